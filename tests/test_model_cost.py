"""Counted matrix products and matched parameters, against counts made by hand."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from run_cases import only
from torch import nn

import run_experiment
from command_line import InputError
from conventional_attention import ConventionalAttention
from experiment.models import COMPARED, Model, build, matched_settings
from results_folder import Cell, read_json
from train_and_evaluate import AttentionFactory, ModelSettings, TransformerClassifier
from training.model_cost import forward_flops

E, H, D, F, C = 12, 3, 4, 20, 5
SETTINGS = ModelSettings(embed_dim=E, num_heads=H, feed_forward_dim=F, num_layers=2)


def model_of(name: str, settings: ModelSettings = SETTINGS) -> TransformerClassifier:
    two = ",num_timescales=2" if "multi" in name else ""
    return build(Model.parse(name + two), settings, 17, C)


def by_hand(name: str, length: int) -> int:
    """Twice the multiplications of the matrix products of a forward pass."""
    timescales = 2 if "multi" in name else 1
    projected = timescales if name == "multi_timescale" else 1
    products = length * E * 3 * projected * E  # q, k, v
    products += (projected + timescales) * length * length * E  # scores, weights times values
    products += length * timescales * E * E  # the output projection
    if "gravitational" in name:
        products += 2 * length * E * timescales * H  # masses of both roles
    if timescales > 1:
        products += length * timescales * timescales * E  # the mixing of what the timescales read
    products += 2 * length * E * F
    return 2 * (2 * products + E * C)


@pytest.mark.parametrize("name", COMPARED)
def test_flops_are_those_counted_by_hand(name: str) -> None:
    model = model_of(name)
    for lengths in ([31], [3, 40, 77]):
        mean = np.mean([by_hand(name, length) for length in lengths])
        flops = forward_flops(model, model.attentions, np.array(lengths))
        assert flops == pytest.approx(mean, rel=1e-9)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = model_of("gravitational")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward_flops(model.train(), model.attentions, np.array([10]))
    assert model.training and not any(attention._forward_pre_hooks for attention in model.attentions)
    assert all(bool((value == before[name]).all()) for name, value in model.state_dict().items())


def test_pytorchs_own_attention_is_counted_like_ours() -> None:
    def flops(make_attention: AttentionFactory) -> float:
        model = TransformerClassifier(make_attention, 17, C, SETTINGS)
        return forward_flops(model, model.attentions, np.array([20, 30]))

    theirs = flops(partial(nn.MultiheadAttention, E, H, batch_first=True))
    assert theirs == pytest.approx(flops(partial(ConventionalAttention, E, H)))


def test_a_width_whose_step_is_too_coarse_is_refused() -> None:
    settings = ModelSettings(embed_dim=2, num_heads=1, feed_forward_dim=1, num_layers=5)
    with pytest.raises(InputError, match="cannot be matched"):
        matched_settings(map(Model.parse, ("conventional", "gravitational")), settings, 3, 2)


def test_matched_models_have_equal_sizes_in_their_cells_and_in_the_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["conventional", "gravitational_multi_timescale"]
    argv = ["--preset", "smoke", "--tasks", "listops", "--models", *models, "--match-parameters"]
    assert run_experiment.main([*argv, "--prepare", "--output-dir", str(tmp_path)]) == 0
    folders = [Cell("listops", model, 0).folder(only(tmp_path)) for model in models]
    configs = [read_json(folder / "config.json") for folder in folders]
    conventional, both = (config["parameters"] for config in configs)
    assert abs(conventional - both) <= 0.02 * both
    widths = [config["model_settings"]["feed_forward_dim"] for config in configs]
    assert widths[0] > widths[1] >= 32
    capsys.readouterr()
    assert run_experiment.main([*argv, "--dry-run"]) == 0
    assert f"{conventional:,}" in capsys.readouterr().out
