"""Each folder's report reads right, and the page and the Markdown say the same."""

import html
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from results_fixture import MODELS, make_results, put, report_of, rewrite, rows_of, write_rows

import data_pipeline
from analyze_results import analyze
from experiment import models
from reporting import glossary
from reporting.lra_literature import comparable
from reporting.metrics import ACCURACY
from reporting.text_tables import short
from results_folder import Cell, read_results

pytestmark = pytest.mark.usefixtures("texts_alone")


def analysed(root: Path) -> str:
    analyze(root)
    return report_of(root)


def page_of(root: Path) -> str:
    """What is between <main> and </main>."""
    page = (root / "analysis" / "report.html").read_text(encoding="utf-8")
    return page.split("<main>")[1].split("</main>")[0]


def words(text: str) -> list[str]:
    """What a reader sees, without markup and case of white space."""
    return re.findall(r"[\w.%+]+", text)


def test_the_page_and_the_markdown_say_the_same(tmp_path: Path) -> None:
    states = {Cell("listops", "gravitational", 1): "failed", Cell("listops", "conventional", 2): "missing"}
    text = analysed(make_results(tmp_path, tasks=("listops", "imdb"), states=states, patterns=False))
    main = re.sub(r"<[^>]+>", " ", page_of(tmp_path))
    plain = re.sub(r"^```(sh)?$|^\| [-:| ]+\|$|</?(details|summary)>", " ", text, flags=re.MULTILINE)
    plain = plain.replace("\\", "")
    assert words(html.unescape(main)) == words(html.unescape(plain))


def test_the_page_is_whole_in_itself_and_runs_nothing_of_the_folders(tmp_path: Path) -> None:
    evil = "x:</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"
    root = make_results(tmp_path, models=("conventional", evil), epochs=1, patterns=False)
    analyze(root)
    page = (root / "analysis" / "report.html").read_text(encoding="utf-8")
    assert page.count("<script>") == page.count("</script>") == 1
    assert "<img" not in page and set(re.findall(r'(?:src|href)="(.)', page)) == {"#"}
    assert "default-src 'none'" in page and "http" not in re.sub("http-equiv", "", page)
    assert "attention-explorer" not in page  # without patterns there is nothing to explore


@pytest.mark.parametrize(
    ("mark", "shown"),
    [
        *[("<b>*x*</b>", r"\<b\>\*x\*\</b\>"), ("<script>y</script>", r"\<script\>y\</script\>")],
        *[("a|b", r"a\|b"), ("c\\d", r"c\\d"), ("`e`", r"\`e\`"), ("$f_g$", r"\$f\_g\$")],
    ],
)
def test_what_a_folder_says_is_escaped_wherever_it_stands(mark: str, shown: str, tmp_path: Path) -> None:
    states = {Cell("listops", mark, 1): "failed"}
    models, gone = ("conventional", mark), {mark: mark}
    root = make_results(tmp_path, models=models, states=states, epochs=1, unavailable=gone)
    for name in ("config.json", "environment.json"):
        rewrite(root / name, created=mark, device_name=mark, command="python x")
    text = analysed(root)
    body = page_of(root)
    assert text.count(shown) >= 10 and mark not in text.replace(shown, "")
    assert body.count(html.escape(mark)) >= 10 and ("<" not in mark or mark not in body)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # no name adds a column
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_every_model_and_task_is_explained_in_a_line_but_those_of_somebody_s_own(tmp_path: Path) -> None:
    assert (set(glossary.MODELS), set(glossary.TASKS)) == (set(models.MODELS), set(data_pipeline.TASKS))
    own = "my_module:MyAttention"
    root = make_results(tmp_path, models=("gravitational,softening=0.01", own), patterns=False)
    analyze(root)
    for text in (report_of(root), page_of(root)):
        assert glossary.MODELS["gravitational"] in text and text.count(glossary.TASKS["listops"]) == 2
    assert f"MyAttention: {glossary.MODELS['conventional']}" not in report_of(root)


def test_predictions_of_a_token_task_are_counted_as_such(tmp_path: Path) -> None:
    root = make_results(tmp_path, tasks=("hold",), models=MODELS[:2], seeds=(0,), patterns=False, epochs=1)
    said = "The 2,000 test examples alone leave each accuracy a standard error of about 1.1 points."
    assert said in analysed(root)
    put(root / "config.json", "task_info hold test_predictions", 250_000)
    text = analysed(root)
    assert "2,000 test examples; 250,000 predictions in them" in text
    assert "The 250,000 test predictions alone leave each accuracy a standard error of at least 0.1" in text


def test_cells_without_patterns_are_named_once_for_each_reason(tmp_path: Path) -> None:
    root = make_results(tmp_path, models=MODELS[:3], seeds=(0,), epochs=1)
    for model in MODELS[:2]:
        (Cell("listops", model, 0).folder(root) / "attention_patterns.npz").unlink()
    said = re.findall("^Without attention patterns: (.*)$", analysed(root).replace("\\", ""), re.MULTILINE)
    cells = "listops/conventional/seed0, listops/gravitational/seed0"
    assert said == [f"{cells} (there is no attention_patterns.npz)."]


def test_one_or_two_seeds_have_no_verdict_and_one_no_interval(tmp_path: Path) -> None:
    one = analysed(make_results(tmp_path / "one", seeds=(4,), patterns=False))
    assert "- seeds: 4 (n = 1)" in one and "(n = 1: no interval" in one
    assert "95 % interval" not in one.replace("Interval: 95 % t interval", "")
    two = analysed(make_results(tmp_path / "two", seeds=(0, 1), patterns=False))
    assert "too few seeds to tell; 3 are the least" in two
    assert not re.search(r"\b(better|worse|significant)\b", one + two)


def test_ten_seeds_have_a_verdict_or_what_their_interval_allows(tmp_path: Path) -> None:
    root = make_results(tmp_path, seeds=tuple(range(10)), patterns=False, epochs=1)
    for cell in (record.cell for record in read_results(root).cells):
        step = dict(zip(MODELS, (0.0, 0.02, (-1) ** cell.seed * 0.02, -0.02), strict=True))[cell.model]
        rewrite(cell.folder(root) / "result.json", **{ACCURACY: 0.4 + 0.001 * cell.seed + step})
    text = analysed(root)
    for name, words in {
        "Gravitational": r"\+2\.0 points.* p = 0\.00195.*better at the 0\.05 level, for these settings",
        "Multi-timescale": r"not told apart\. The interval allows a gain of 1\.5 and a loss of 1\.5 points; "
        r"a difference of 1 point would need about \d+ seeds",
        "Gravitational multi-timescale": r"worse at the 0\.05 level",
    }.items():
        assert re.search(f"^- {name} against .*{words}", text, re.MULTILINE)


def test_who_never_reaches_the_target_is_named(tmp_path: Path) -> None:
    root = make_results(tmp_path, models=MODELS[:2], patterns=False)
    for seed in range(3):
        folder = Cell("listops", "gravitational", seed).folder(root)
        write_rows(folder, [row | {"val_accuracy": 0.1} for row in rows_of(folder)])
    text = analysed(root)
    who = r"Conventional \d epochs; Gravitational never in 6 epochs\."
    assert re.search(rf"- To a validation accuracy of \d\d\.\d %, median over seeds: {who}", text)
    assert "| Gravitational | 3 | 0 of 3 | more than 6 | 0, 3, 0 | 0.25 | 0.25 | – | – |" in text  # noqa: RUF001


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        *[({}, True), ({"preset": "quick"}, False), ({"data": {"max_length": 1000}}, False)],
        *[({"data": {"train_size": 600}}, False), ({"data": {"tokenizer": "word"}}, False)],
    ],
)
def test_published_figures_are_beside_full_runs(options: dict[str, Any], shown: bool, tmp_path: Path) -> None:
    small: dict[str, Any] = {"models": MODELS[:1], "seeds": (0,), "patterns": False, "epochs": 1}
    root = make_results(tmp_path, tasks=("listops", "imdb"), **small, **options)
    for task, percent in (("listops", "36.37"), ("imdb", "64.27")):
        accuracies = [f"{100 * one.accuracy:.2f}" for one in comparable(read_results(root), task)]
        assert (percent in accuracies) == shown
    text = analysed(root)
    assert ("google-research/long-range-arena" in text) == shown
    assert ("Published Transformers of the Long Range Arena reach 36.4 to 38.4 %" in text) == shown


def test_three_seeds_have_the_means_of_the_tidy_table_their_number_and_a_caution(tmp_path: Path) -> None:
    root = make_results(tmp_path, models=MODELS[:2], patterns=False)
    rewrite(Cell("listops", "conventional", 1).folder(root) / "result.json", best_epoch=None)
    text = analysed(root)
    assert "Sign flips, which assume nothing, do not show it with 3 seeds." in text
    assert re.search(r"^\| Conventional \| 3 \|.*\| 6 \(n = 2\) \|", text, re.MULTILINE)
    table = pd.read_csv(root / "analysis" / "summary.csv")
    spent = table[(table["model"] == "conventional") & (table["metric"] == "seconds_to_target")]["value"]
    [row] = [line for line in text.splitlines() if line.startswith("| Conventional | 3 | 3 of 3 |")]
    assert len(spent) == 3 and re.search(rf"\| {re.escape(short(spent.mean()))} (\||\\\[)", row)
