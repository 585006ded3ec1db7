"""A model's name may hold settings: read, refused, built, and the model's name everywhere after that."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from run_cases import HERE, Refused, plan_of, resume, run, states

import run_experiment
from experiment.models import COMPARED, MODELS, Model, mechanism_settings
from experiment.run_plan import load_tasks, parameter_counts
from multi_timescale_attention import MultiTimescaleAttention
from results_folder import file_name, read_json, read_results
from train_and_evaluate import ModelSettings

USER_MODEL = '''
from typing import Literal
from torch import nn

class Warm(nn.MultiheadAttention):
    """Attention with a temperature.

    temperature, offset: of the softmax. More is more.
    mode: how.
    """
    def __init__(self, embed_dim, num_heads, temperature: float, offset=0, *, mode: Literal["a", "b"] = "a",
                 name: "Absent" = None, batch_first=True):
        super().__init__(embed_dim, num_heads, batch_first=batch_first)
        self.settings = temperature, offset, mode, name
'''
FORCE = "gravitational,normalization=force"


@pytest.fixture(autouse=True)
def user_model(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("code")
    (folder / "warm_model.py").write_text(USER_MODEL, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "warm_model", raising=False)


def counts_of(*argv: str) -> dict[str, int]:
    plan, tasks = load_tasks(plan_of(*HERE, "--models", *argv))
    return {model: count for (_, model), count in parameter_counts(plan, tasks).items()}


# What a name means


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("conventional", {}),
        (FORCE, {"softening": 0.1, "distance_power": None, "normalization": "force"}),
        ("gravitational,softening=1", {"softening": 1.0, "distance_power": None, "normalization": "softmax"}),
        ("multi_timescale,gammas=0.6:0.9:0.99,num_timescales=3", {"gammas": (0.6, 0.9, 0.99)}),
        ("multi_timescale,gammas=none,learn_gammas=false", {"gammas": None, "learn_gammas": False}),
        ("discounted", {"learn_gammas": True, "discount": "weights"}),
        ("warm_model:Warm,temperature=2,offset=3", {"temperature": 2.0, "offset": 3, "name": None}),
        ("warm_model:Warm,temperature=2,mode=b,name=x", {"mode": "b", "name": "x"}),
    ],
)
def test_a_name_is_a_model_and_the_settings_of_its_constructor_in_their_types(
    name: str, own: dict[str, Any]
) -> None:
    arguments = Model.parse(name).arguments
    found = {key: arguments[key] for key in own}
    assert found == own
    assert {key: type(value) for key, value in found.items()} == {k: type(v) for k, v in own.items()}


def test_every_model_is_built_with_the_encoders_sizes_and_its_own_settings() -> None:
    def built(name: str) -> Any:
        return Model.parse(name).attention(ModelSettings(embed_dim=8, num_heads=2))()

    for name in MODELS:
        module = built(name)
        assert (module.embed_dim, module.num_heads, module.dropout) == (8, 2, 0.0)
    assert built("gravitational,softening=1.5").field.softening == 1.5
    gammas = built("multi_timescale,gammas=0.6:0.9").learned_scalars()["gamma"]
    assert gammas[:, 0].tolist() == pytest.approx([0.6, 0.9])  # they set the number of timescales
    control = built("discounted")  # softmax attention with one decay
    assert isinstance(control, MultiTimescaleAttention)
    assert (control.num_timescales, control.out_proj.in_features) == (1, 8)


def test_a_settings_help_is_its_line_of_the_docstring_up_to_the_first_full_stop() -> None:
    for name in COMPARED:
        assert all(setting.help for setting in mechanism_settings(MODELS[name]).values()), name
    warm = mechanism_settings(Model.parse("warm_model:Warm,temperature=1").factory)
    assert (warm["offset"].help, warm["mode"].help, warm["name"].help) == ("of the softmax", "how", "")


def test_match_parameters_brings_all_models_to_the_size_of_the_largest_variant() -> None:
    five = "multi_timescale,num_timescales=5"
    plain, matched = (counts_of("multi_timescale", five, *more) for more in ((), ("--match-parameters",)))
    assert matched["multi_timescale"] == pytest.approx(matched[five], rel=0.01)
    assert matched[five] == plain[five] > plain["multi_timescale"]


# What is refused


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("gravitatonal", "unknown model 'gravitatonal': did you mean 'gravitational'"),
        ("gravitational,softenin=1", r"no setting of it: did you mean 'softening'\? \(it has softening, dis"),
        ("gravitational,", "an empty entry is no setting of it"),
        (",softening=1", "unknown model ''"),
        ("gravitational,softening", "give softening once, as softening=value"),
        ("gravitational,softening=1,softening=2", "give softening once"),
        ("gravitational,softening=much", "softening must be a number, got 'much'"),
        ("gravitational,softening=-1", "softening must be above 0 and finite, got -1.0"),
        ("gravitational,softening=nan", "softening must be a finite number, got 'nan'"),
        ("gravitational,softening=1e300", r"softening must be at most 1e\+40, got '1e300'"),
        ("gravitational,normalization=forc", "one of softmax, force: did you mean 'force'"),
        ("multi_timescale,num_timescales=2.5", "num_timescales must be a whole number, got '2.5'"),
        ("multi_timescale,learn_gammas=yes", "learn_gammas must be true or false, got 'yes'"),
        ("multi_timescale,gammas=0.6:", "must be a number for each entry, separated by ':', got '0.6:'"),
        ("conventional,softening=1", r"softening is no setting of it: \(it has none\)"),
        ("discounted,gammas=0.5", "gammas is fixed in this model"),
        ("gravitational,bias=false", "bias is fixed in this model"),
        ("gravitational,embed_dim=32", "same for all models of a comparison; set it for all with --embed"),
        ("gravitational gravitational,softening=0.10", "names one model twice"),
        ("absent_module:A,softening=1", "absent_module cannot be imported"),
        ("warm_model:Wam", "warm_model has no class Wam; did you mean 'Warm'"),
        ("warm_model:Warm", "it needs temperature: give warm_model:Warm,temperature=value"),
        (f"multi_timescale,gammas={':'.join(['0.999'] * 40)}", "longer than the 200 bytes of a folder"),
    ],
)
def test_a_name_that_means_nothing_is_one_line_before_any_work(
    names: str, message: str, tmp_path: Path, refused: Refused
) -> None:
    said = refused(run_experiment.main, *HERE, "--output-dir", tmp_path, "--models", *names.split(" "))
    assert re.search(message, said) and not list(tmp_path.iterdir())


# From the command line to the results


@pytest.mark.usefixtures("compared")
def test_a_run_of_variants_is_kept_and_resumed_under_their_names(tmp_path: Path, refused: Refused) -> None:
    names = ["conventional", FORCE, "warm_model:Warm,temperature=2"]
    root = run(tmp_path, "--models", *names, "--max-epochs", "1", "--prepare")
    assert resume(root, "--models", *names) == 0
    assert read_results(root).config["models"] == names and states(root) == ["done"] * 3
    config = read_json(root / "listops" / file_name(FORCE) / "seed0" / "config.json")
    assert config["attention_arguments"]["normalization"] == "force"
    assert FORCE in refused(run_experiment.main, "--resume", root, "--models", "conventional")
