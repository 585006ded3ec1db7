"""A model's name may hold settings: read, refused, built, and the model's name everywhere after that."""

import json
from pathlib import Path
from typing import Any

import pytest

import run_experiment
from command_line import InputError
from data_pipeline import load_task
from experiment.experiment_plan import (
    Plan,
    attention_arguments,
    attention_factory,
    find_model,
    make_plan,
    settings_by_cell,
)
from experiment.model_variants import ENCODER, OWN, variant
from experiment.plan_files import parameter_counts, read_plan
from experiment.transformer_classifier import ModelSettings
from gravitational_attention import GravitationalAttention
from multi_timescale_attention import MultiTimescaleAttention
from results_folder import file_name, read_results
from run_experiment import make_parser

USER_MODEL = """
from torch import nn

class Soft(nn.MultiheadAttention):
    def __init__(self, embed_dim, num_heads, softening=0.5, batch_first=True):
        super().__init__(embed_dim, num_heads, batch_first=batch_first)
        self.softening = softening
"""
SMOKE = ["--preset", "smoke", "--tasks", "listops", "--device", "cpu"]
FORCE = "gravitational,normalization=force"
THREE = "multi_timescale,gammas=0.6:0.9:0.99"
SETTINGS = ModelSettings(embed_dim=8, num_heads=2)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def user_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "variant_models.py").write_text(USER_MODEL, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return "variant_models:Soft"


def plan_of(*argv: str) -> Plan:
    return make_plan(make_parser().parse_args([*SMOKE, *argv]))


# What a name means


@pytest.mark.parametrize(
    ("name", "base", "own"),
    [
        ("conventional", "conventional", {}),
        (FORCE, "gravitational", {"normalization": "force"}),
        ("gravitational,softening=1,distance_power=4", "gravitational", {"softening": 1.0}),
        (THREE, "multi_timescale", {"gammas": (0.6, 0.9, 0.99)}),
        ("multi_timescale,num_timescales=5", "multi_timescale", {"num_timescales": 5}),
        ("multi_timescale,learn_gammas=false", "multi_timescale", {"learn_gammas": False}),
        ("multi_timescale,learn_gammas=true", "multi_timescale", {"learn_gammas": True}),
        ("package.module:Class,decoder=mlp", "package.module:Class", {"decoder": "mlp"}),
    ],
)
def test_a_name_is_a_model_and_settings_of_their_own_types(name: str, base: str, own: dict[str, Any]) -> None:
    found_base, found = variant(name)
    assert found_base == base
    assert {key: found[key] for key in own} == own
    assert {key: type(found[key]) for key in own} == {key: type(value) for key, value in own.items()}


def test_every_setting_is_either_the_encoders_or_may_be_a_models_own() -> None:
    assert {*ENCODER, *OWN} == set(ModelSettings.__dataclass_fields__)
    assert not {*ENCODER} & {*OWN}


def test_the_models_own_settings_stand_over_those_of_the_run() -> None:
    settings = ModelSettings(embed_dim=8, num_heads=2, softening=0.7, distance_power=4.0)
    module = attention_factory("gravitational,softening=1.5", settings)()
    assert isinstance(module, GravitationalAttention)
    assert (module.field.softening, module.field.distance_power) == (1.5, 4.0)
    assert attention_arguments("gravitational", settings)["softening"] == 0.7


def test_gammas_alone_set_the_number_of_timescales_of_that_model_only() -> None:
    module = attention_factory("multi_timescale,gammas=0.6:0.9", SETTINGS)()
    assert isinstance(module, MultiTimescaleAttention)
    assert module.num_timescales == 2
    gammas = module.learned_scalars()["gamma"][:, 0].tolist()
    assert gammas == pytest.approx([0.6, 0.9])
    assert attention_arguments("multi_timescale", SETTINGS)["num_timescales"] == 3


def test_a_users_class_takes_the_settings_its_constructor_has_arguments_for(user_model: str) -> None:
    module: Any = attention_factory(f"{user_model},softening=2", SETTINGS)()
    assert module.softening == 2.0
    with pytest.raises(InputError, match=r"gammas is no setting of this model: .*\(it has softening\)"):
        attention_factory(f"{user_model},gammas=0.5", SETTINGS)


def test_a_variant_is_its_model_with_other_settings() -> None:
    assert find_model(FORCE) is find_model("gravitational")
    plan = plan_of("--models", "gravitational", FORCE)
    counts = list(_counts(plan).values())
    assert counts[0] > counts[1]  # in force form there is neither G nor the query's mass


def _counts(plan: Plan) -> dict[str, int]:
    tasks = {task: load_task(task, plan.data[task]) for task in plan.tasks}
    return {model: count for (_, model), count in parameter_counts(plan, tasks).items()}


def test_match_parameters_brings_variants_to_the_size_of_the_largest() -> None:
    five = "multi_timescale,num_timescales=5"
    counts = _counts(plan_of("--models", "conventional", five, "--match-parameters"))
    assert counts["conventional"] == pytest.approx(counts[five], rel=0.01)
    assert counts[five] > _counts(plan_of("--models", "multi_timescale"))["multi_timescale"]


def test_a_cells_settings_are_those_of_its_model() -> None:
    plan = plan_of("--models", "gravitational", "gravitational,softening=3", THREE)
    settings = settings_by_cell(plan, {})
    assert [settings["listops", model].softening for model in plan.models] == [0.1, 3.0, 0.1]
    assert settings["listops", THREE].gammas == (0.6, 0.9, 0.99)


# What is refused


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("gravitational,softenin=1", "did you mean 'softening'"),
        ("gravitationl,softening=1", "did you mean 'gravitational'"),
        ("gravitational,", "unknown setting in model gravitational,: ''"),
        (",softening=1", "unknown model ''"),
        ("gravitational,softening", "give softening once, as softening=value"),
        ("gravitational,softening=1,softening=2", "give softening once"),
        ("gravitational,softening=", "softening must be a number, got ''"),
        ("gravitational,softening=much", "softening must be a number, got 'much'"),
        ("gravitational,softening=-1", "must be above 0, got -1.0"),
        ("gravitational,softening=nan", "must be above 0, got nan"),
        ("gravitational,softening=inf", "must be finite and above 0, got inf"),
        ("gravitational,normalization=forc", "did you mean 'force'"),
        ("multi_timescale,num_timescales=2.5", "num_timescales must be a whole number"),
        ("multi_timescale,num_timescales=0", "must be at least 1"),
        ("multi_timescale,learn_gammas=yes", "learn_gammas must be true or false, got 'yes'"),
        ("multi_timescale,gammas=0.6:", "gammas must be numbers separated by ':'"),
        ("multi_timescale,gammas=0.6:1", "must be above 0 and below 1, got 1.0"),
        ("multi_timescale,gammas=0.6:0.9,num_timescales=3", "one entry per timescale, got 2 for 3"),
        ("conventional,softening=1", r"softening is no setting of this model: \(it has none\)"),
        ("gravitational,decoder=mlp", r"it has softening, distance_power, normalization\)"),
        ("discounted,num_timescales=3", "num_timescales is fixed in this model"),
        ("discounted,gammas=0.5", "gammas is fixed in this model"),
        (
            "gravitational,embed_dim=32",
            "equal for all models of a comparison; set it for all with --embed-dim",
        ),
        ("gravitational_multi_timescale,normalization=force,discount=logits", "needs normalization"),
        ("gravitational gravitational,softening=0.1", "names one model twice"),
        ("gravitational,softening=1 gravitational,softening=1.0", "names one model twice"),
        (f"{FORCE} {FORCE}", f"names {FORCE} twice"),
        ("no_such_module:A,softening=1", "no_such_module cannot be imported"),
        (f"multi_timescale,gammas={':'.join(['0.999'] * 40)}", "longer than the 200 bytes of a folder"),
    ],
)
def test_a_name_that_means_nothing_is_one_line_before_any_work(
    names: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*SMOKE, "--output-dir", str(tmp_path), "--models", *names.split(" ")]
    assert run_experiment.main(argv) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    with pytest.raises(InputError, match=message):
        plan_of("--models", *names.split(" "))
    assert not list(tmp_path.iterdir())


# From the command line to the results


def test_a_run_of_variants_is_kept_shown_and_resumed_under_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["conventional", FORCE, "multi_timescale,gammas=0.6:0.9"]
    argv = [*SMOKE, "--models", *names, "--output-dir", str(tmp_path), "--max-epochs", "1"]
    assert run_experiment.main([*argv, "--prepare"]) == 0
    root = next(tmp_path.glob("results_*"))
    assert run_experiment.main(["--resume", str(root), "--models", *names]) == 0
    results = read_results(root)
    assert results.config["models"] == names
    assert [(record.cell.model, record.state) for record in results.cells] == [
        (name, "done") for name in names
    ]
    folder = root / "listops" / file_name(FORCE) / "seed0"
    cell = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert cell["attention_arguments"]["normalization"] == cell["model_settings"]["normalization"] == "force"
    report = (root / "analysis" / "report.md").read_text(encoding="utf-8")
    assert "Gravitational, normalization=force" in report
    assert "Multi-timescale, gammas=0.6:0.9" in report
    capsys.readouterr()
    assert run_experiment.main(["--resume", str(root), "--models", "conventional"]) == 2
    assert FORCE in capsys.readouterr().err


def test_a_config_without_the_newest_setting_is_gone_on_with_and_has_the_default(tmp_path: Path) -> None:
    argv = [*SMOKE, "--models", "multi_timescale", "--output-dir", str(tmp_path), "--prepare"]
    assert run_experiment.main(argv) == 0
    root = next(tmp_path.glob("results_*"))
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    assert config["settings"]["model"].pop("discount") == "weights"
    (root / "config.json").write_text(json.dumps(config), encoding="utf-8")
    plan = read_plan(root, make_parser().parse_args(["--resume", str(root)]))
    assert plan.model.discount == "weights"


def test_a_dry_run_keeps_its_columns_for_long_names(capsys: pytest.CaptureFixture[str]) -> None:
    name = "gravitational_multi_timescale,normalization=force,softening=1.0,learn_gammas=false"
    assert run_experiment.main([*SMOKE, "--models", "conventional", name, "--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("listops/")]
    assert [line.split()[0] for line in lines] == ["listops/conventional", f"listops/{name}"]
    assert len({len(line) for line in lines}) == 1


def test_the_list_says_which_model_the_settings_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--discount", "logits", "--normalization", "force"]
    assert run_experiment.main([*SMOKE, "--list", "--models", "gravitational", *settings]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "not with these settings" in line]
    assert [line.strip("* ").split()[0] for line in lines] == ["gravitational_multi_timescale"]


def test_the_list_and_the_help_show_how_a_variant_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_experiment.main([*SMOKE, "--list", "--models", FORCE]) == 0
    shown = capsys.readouterr().out
    assert "MODEL,setting=value,..." in shown
    assert f"listops/{FORCE}/seed0" in shown
    with pytest.raises(SystemExit):
        run_experiment.main(["--help"])
    assert "gravitational,softening=1.0" in capsys.readouterr().out
