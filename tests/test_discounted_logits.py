"""discount="logits": the logits, not the weights, are multiplied by gamma^|i - j|; for comparison."""

import pytest
import torch
from attention_cases import make, make_inputs
from torch import Tensor

from attention_engine.attention_scores import DotProduct, Gravity, Mask
from attention_kernels import attend, fastest_backend


@pytest.mark.parametrize("name", ["multi-timescale", "gravitational multi-timescale"])
def test_it_differs_from_the_default_and_far_tokens_keep_the_weight_of_a_zero_logit(name: str) -> None:
    query, key, _, _ = make_inputs()
    default = make(name, gammas=(1e-6, 2e-6))
    discounted = make(name, gammas=(1e-6, 2e-6), discount="logits")
    far = discounted.attention_maps(query, key)[..., 0, 2:]  # of the first query to keys two and more away
    assert torch.allclose(far, far[..., :1].expand_as(far), atol=1e-5)
    assert far.min() > 0.01
    assert default.attention_maps(query, key)[..., 0, 2:].max() < 1e-6


def make_score(gravity: bool, log_decay: Tensor | None) -> DotProduct | Gravity:
    if not gravity:
        return DotProduct(1.0, log_decay, "logits")
    mass = torch.ones(1, 2, 1, 3)
    return Gravity(mass, mass, torch.zeros(2, 1), 0.1, log_decay=log_decay, discount="logits")


@pytest.mark.parametrize("gravity", [False, True])
@pytest.mark.parametrize("backend", ["tiled", "triton", "sdpa"])
def test_only_the_dense_formula_has_it_and_auto_takes_that(
    gravity: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q = torch.randn(1, 2, 1, 3, 4)
    score = make_score(gravity, torch.tensor([[-0.1], [-0.2]]))
    reasons = {"sdpa": "dot product without decay"}
    with pytest.raises(ValueError, match=reasons.get(backend, "discounts weights, not logits: use 'dense'")):
        attend(q, q, q, score, Mask(), backend=backend)
    assert fastest_backend(q, score, Mask(), 0.0, False) == "dense"
    found, _ = attend(q, q, q, score, Mask())
    assert torch.equal(found, attend(q, q, q, score, Mask(), backend="dense")[0])
