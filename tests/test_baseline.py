"""Differences are taken to the baseline that was asked for, and every text and figure says whose they are."""

from pathlib import Path

import pytest
from results_fixture import make_results
from run_cases import Refused

from analyze_results import main
from reporting.figure_style import LONGEST_NAME, ModelStyle, model_styles
from reporting.metrics import ACCURACY
from reporting.task_figures import file_stems
from results_folder import read_results

FORCE = "gravitational,normalization=force"
LONG = "gravitational_multi_timescale,normalization=force,softening=1.0,learn_gammas=false"
MODELS = ("conventional", "gravitational", FORCE, "multi_timescale,gammas=0.6:0.9:0.99", LONG)


pytestmark = pytest.mark.usefixtures("texts_alone")


def analysed(folder: Path, *argv: str) -> tuple[str, str]:
    """The report, and summary.md."""
    assert main([*argv]) == 0
    report, summary = (folder / name for name in ("report.md", "summary.md"))
    return report.read_text(encoding="utf-8"), summary.read_text(encoding="utf-8")


def accuracies(root: Path, model: str) -> dict[int, float]:
    cells = [record for record in read_results(root).cells if record.cell.model == model]
    return {record.cell.seed: record.result[ACCURACY] for record in cells if record.result}


def test_differences_are_to_the_baseline_that_was_asked_for(tmp_path: Path) -> None:
    root = make_results(tmp_path / "a", models=MODELS, patterns=False)
    report, summary = analysed(root / "analysis", str(root), "--baseline", FORCE)
    mine, base = accuracies(root, "conventional"), accuracies(root, FORCE)
    points = 100 * sum(mine[seed] - base[seed] for seed in mine) / len(mine)
    assert f"Conventional against Gravitational, normalization=force: {points:+.1f} points" in report
    assert "against Conventional" not in report
    assert "Differences to Gravitational, normalization=force" in summary
    assert "as a multiple of Gravitational, normalization=force's" in report
    assert f"python analyze_results.py a --baseline {FORCE}" in report


def test_without_the_option_it_is_conventional_attention_or_the_first_model_which_is_said(
    tmp_path: Path,
) -> None:
    root = make_results(tmp_path / "a", models=MODELS[2::-1], seeds=(0, 1), patterns=False)
    report, summary = analysed(root / "analysis", str(root))
    assert "Gravitational against Conventional" in report and "--baseline" not in report
    assert "Differences to Conventional" in summary
    root = make_results(tmp_path / "b", models=(FORCE, "gravitational"), seeds=(0, 1), patterns=False)
    report, _ = analysed(root / "analysis", str(root))
    assert "Gravitational, normalization=force (the first model: conventional is not among them)" in report
    assert "Gravitational against Gravitational, normalization=force" in report


def test_an_unknown_baseline_is_one_line_with_the_models(tmp_path: Path, refused: Refused) -> None:
    root = make_results(tmp_path / "a", models=MODELS[:3], seeds=(0,))
    shown = refused(main, root, "--baseline", "gravitational,normalization=forc")
    assert f"did you mean '{FORCE}'? (one of conventional, gravitational, {FORCE})" in shown
    assert not (root / "analysis").exists()


# How variants are shown


def test_a_variant_is_called_by_its_models_name_and_its_settings() -> None:
    styles = model_styles([*MODELS, "my_module:Mine,softening=2"])
    assert styles[FORCE].name == "Gravitational, normalization=force"
    assert styles["my_module:Mine,softening=2"].name == "Mine, softening=2"


def test_ten_models_have_ten_colours_and_keep_their_order() -> None:
    models = ["conventional", *(f"gravitational,softening={number}" for number in range(1, 10))]
    styles = model_styles(models)
    assert list(styles) == models
    assert len({style.color for style in styles.values()}) == 10


def test_a_long_name_takes_several_lines_in_a_figure_and_a_short_one_stays() -> None:
    lines = model_styles([LONG])[LONG].label.splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= LONGEST_NAME
    assert ModelStyle("Gravitational multi-timescale", "k", "o").label == "Gravitational multi-timescale"


def test_names_that_begin_alike_have_figures_of_their_own() -> None:
    names = [f"{LONG},distance_power={power}" for power in (1, 2, 3)]
    assert len(set(file_stems(names).values())) == 3
