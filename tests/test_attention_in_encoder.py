"""The modules inside PyTorch's own encoder layers."""

import copy
import math
from typing import Any

import pytest
import torch
from attention_cases import (
    POISON,
    E,
    H,
    L,
    N,
    each_module,
    make,
    make_conventional,
    make_inputs,
)
from torch import nn

from attention_module import AttentionModule


def make_encoder(name: str, num_layers: int = 0) -> nn.Module:
    torch.manual_seed(9)
    layer = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True)
    layer.self_attn = make(name)  # type: ignore[assignment]
    return nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False) if num_layers else layer


@each_module
@pytest.mark.parametrize(
    ("num_layers", "masked", "learning"),
    [
        (0, "nothing", False),
        (0, "both", True),
        (2, "padding", False),
        (2, "causal", True),
        (2, "both", False),
    ],
)
def test_pytorchs_encoder_calls_our_forward_and_train_equals_eval(
    name: str, num_layers: int, masked: str, learning: bool
) -> None:
    encoder = make_encoder(name, num_layers)
    query, _, _, padding = make_inputs(self_attention=True)
    masks: dict[str, Any] = {}
    if masked in ("padding", "both"):
        masks["src_key_padding_mask"] = padding
    if masked in ("causal", "both"):
        masks["mask" if num_layers else "src_mask"] = nn.Transformer.generate_square_subsequent_mask(L)
        masks["is_causal"] = True
        if masked == "both":  # PyTorch wants both masks of one type
            masks["src_key_padding_mask"] = torch.zeros(N, L).masked_fill(padding, -math.inf)
    calls = []
    attentions = [part for part in encoder.modules() if isinstance(part, AttentionModule)]
    assert len(attentions) == max(num_layers, 1)
    for attention in attentions:
        original = attention.forward

        def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            calls.append(1)
            return original(*args, **kwargs)

        attention.forward = counted  # type: ignore[method-assign]
    with torch.set_grad_enabled(learning):
        trained = encoder.train()(query, **masks)
        assert len(calls) == len(attentions)
        evaluated = encoder.eval()(query, **masks)
    assert len(calls) == 2 * len(attentions)
    kept = ~padding if "src_key_padding_mask" in masks else torch.ones(N, L, dtype=torch.bool)
    torch.testing.assert_close(evaluated[kept], trained[kept])
    assert bool(evaluated.isfinite().all())


@each_module
def test_pytorchs_encoder_does_not_read_padding_through_our_module(name: str) -> None:
    encoder = make_encoder(name, 2).eval()
    query, _, _, padding = make_inputs(self_attention=True)
    poisoned = query.masked_fill(padding.unsqueeze(-1), POISON)
    with torch.no_grad():
        clean = encoder(query, src_key_padding_mask=padding)
        dirty = encoder(poisoned, src_key_padding_mask=padding)
    torch.testing.assert_close(dirty[~padding], clean[~padding])


def test_conventional_attention_in_pytorchs_encoder_equals_pytorchs_own() -> None:
    theirs = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(theirs)
    attention = make_conventional()
    attention.load_state_dict(theirs.self_attn.state_dict())
    ours.self_attn = attention  # type: ignore[assignment]
    query, _, _, padding = make_inputs(self_attention=True)
    with torch.no_grad():
        expected = theirs.eval()(query, src_key_padding_mask=padding)
        found = ours.eval()(query, src_key_padding_mask=padding)
    torch.testing.assert_close(found[~padding], expected[~padding])
