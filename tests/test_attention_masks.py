"""Masks mean what they mean in `nn.MultiheadAttention`, which the conventional module equals; what they
block is never read."""

import math
import warnings
from typing import Any

import pytest
import torch
from attention_cases import (
    POISON,
    E,
    H,
    L,
    N,
    S,
    assert_same,
    each_module,
    make,
    make_inputs,
    nothing_read,
    relative,
    run,
    with_gradients,
)
from torch import Tensor, nn

from conventional_attention import ConventionalAttention


def added(mask: Tensor) -> Tensor:
    """A mask as what is added to logits."""
    return mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(mask, -math.inf)


def masks_of(length: int) -> dict[str, dict[str, Any]]:
    """By kind, masks of which no row is blocked altogether, for keys of the given length."""
    generator = torch.Generator().manual_seed(11)
    padding = make_inputs(self_attention=length == L).padding
    of_heads = torch.rand(N * H, L, length, generator=generator) < 0.3
    of_heads[..., 0] = False
    floats_of_heads = torch.randn(of_heads.shape, generator=generator)
    pairs, floats = of_heads[0], floats_of_heads[0]
    float_padding = torch.randn(N, length, generator=generator) + added(padding)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "causal": {"is_causal": True},
        "padding and causal": {"key_padding_mask": padding, "is_causal": True},
        "pairs": {"attn_mask": pairs},
        "pairs and causal": {"attn_mask": pairs, "is_causal": True},
        "pairs of heads": {"attn_mask": of_heads},
        "pairs of heads and padding": {"attn_mask": of_heads, "key_padding_mask": padding},
        "float pairs": {"attn_mask": floats + added(pairs)},
        "float pairs of heads": {"attn_mask": floats_of_heads + added(of_heads)},
        "float padding": {"key_padding_mask": float_padding},
        "float padding and boolean pairs": {"key_padding_mask": float_padding, "attn_mask": pairs},
        "float pairs and padding": {"key_padding_mask": padding, "attn_mask": floats},
        "float both, causal": {"key_padding_mask": float_padding, "attn_mask": floats, "is_causal": True},
    }


KINDS = list(masks_of(S))
JOINED = ["padding", "causal", *(kind for kind in KINDS if " and " in kind or "," in kind)]


@pytest.mark.parametrize(("kind", "bias"), [*((kind, True) for kind in KINDS), ("none", False)])
@pytest.mark.parametrize("self_attention", [True, False])
def test_conventional_attention_equals_pytorchs(
    kind: str, bias: bool, self_attention: bool, need_weights: bool
) -> None:
    torch.manual_seed(5)
    theirs, ours = nn.MultiheadAttention(E, H, bias=bias, batch_first=True), make("conventional", bias=bias)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours.load_state_dict(theirs.state_dict())
    inputs = make_inputs(self_attention=self_attention)[:3]
    masks = masks_of(inputs[1].shape[1])[kind]
    asked = {"need_weights": need_weights, "average_attn_weights": self_attention}
    found = run(ours, inputs, **masks, **asked)
    if masks.pop("is_causal", False):  # PyTorch wants the causal mask in full
        causal = torch.ones(L, inputs[1].shape[1], dtype=torch.bool).triu(1)
        pairs = masks.get("attn_mask", causal)
        masks["attn_mask"] = pairs | causal if pairs.dtype == torch.bool else pairs + added(causal)
    if len({mask.dtype for mask in masks.values()}) > 1:  # and masks of one type
        masks = {name: added(mask) for name, mask in masks.items()}
    assert_same(found, run(theirs, inputs, **masks, **asked))


def test_conventional_attention_starts_like_pytorchs() -> None:
    theirs, ours = nn.MultiheadAttention(64, 4).state_dict(), ConventionalAttention(64, 4).state_dict()
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.shape == theirs[name].shape, name
        assert float(parameter.abs().max()) == pytest.approx(float(theirs[name].abs().max()), rel=0.02), name
        assert float(parameter.std()) == pytest.approx(float(theirs[name].std()), rel=0.05), name


@pytest.mark.parametrize(
    "name",
    [
        *("conventional", "gravitational", "gravitational multi-timescale force"),
        *("multi-timescale adaptive", "gravitational manhattan"),
    ],
)
@pytest.mark.parametrize("kind", JOINED)
def test_masks_mean_the_same_in_every_form(name: str, need_weights: bool, kind: str) -> None:
    """Each mask against the same pairs written out as one float (N * H, L, S) mask."""
    module = make(name)
    inputs = make_inputs(self_attention="causal" in kind)[:3]
    length = inputs[1].shape[1]
    masks = masks_of(length)[kind]
    written = torch.zeros(N, H, L, length)
    if (pairs := masks.get("attn_mask")) is not None:
        written = written + added(pairs).view(-1, H if pairs.dim() == 3 else 1, L, length)
    if (padding := masks.get("key_padding_mask")) is not None:
        written = written + added(padding)[:, None, None]
    if masks.get("is_causal"):
        written = written + added(torch.ones(L, length, dtype=torch.bool).triu(1))
    found = run(module, inputs, **masks, need_weights=need_weights)
    assert_same(found, run(module, inputs, attn_mask=written.flatten(0, 1), need_weights=need_weights))
    assert relative(found["output"], module(*inputs)[0]) > 1e-3


@each_module
@pytest.mark.parametrize("kind", ["padding", "float pairs", "together"])
def test_a_row_with_no_key_gives_zeros_and_finite_gradients(name: str, need_weights: bool, kind: str) -> None:
    """Before the output projection, whose bias is all that is left of it."""
    module, (*inputs, padding) = make(name), make_inputs()
    pairs = torch.zeros(L, S, dtype=torch.bool)
    empty = torch.zeros(N, L, dtype=torch.bool)  # rows without a key
    if kind == "padding":
        padding[1] = empty[1] = True
        masks = {"key_padding_mask": padding}
    elif kind == "together":  # neither blocks everything by itself
        pairs[2, :3] = empty[2, 2] = True
        masks = {"attn_mask": pairs, "key_padding_mask": padding}
    else:
        pairs[4] = empty[:, 4] = True
        masks = {"attn_mask": added(pairs)}
    found = run(module, tuple(inputs), need_weights=need_weights, **masks)
    assert all(bool(part.isfinite().all()) for part in found.values())
    count = int(empty.sum())
    torch.testing.assert_close(found["output"][empty], nothing_read(module).expand(count, E))
    if need_weights:
        assert not found["weights"][empty].any()
        torch.testing.assert_close(found["weights"][~empty].sum(-1), torch.ones(N * L - count))
    if kind == "padding":
        assert not found["gradient of query"][1].any()
        assert not found["gradient of value"][1].any()


@each_module
def test_inputs_and_masks_are_left_as_they_were(name: str, need_weights: bool) -> None:
    module, (*inputs, padding) = make(name), make_inputs()
    given = [*inputs, padding, added(torch.rand(L, S) < 0.2)]
    before = [tensor.clone() for tensor in given]
    module(*given[:4], need_weights, given[4])
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"query": (N, L, E + 1)}, (N, L, E)),
        ({"key": (N + 1, S, E)}, (N, S, E)),
        ({"value": (N, S + 1, E)}, (N, S, E)),
        ({"value": (1, S, E)}, (N, S, E)),
        ({"key_padding_mask": (N, L)}, (N, S)),
        ({"key_padding_mask": (S,)}, (N, S)),
        ({"key_padding_mask": (1, S)}, (N, S)),
        ({"attn_mask": (S, L)}, (L, S)),
        ({"attn_mask": (N, L, S)}, (N * H, L, S)),
        ({"attn_mask": (N, H, L, S)}, (N * H, L, S)),
        ({"attn_mask": (1, S)}, (L, S)),
        ({"key": (S, E)}, "(N, L, E)"),
        ({"query": (E,), "key": (E,), "value": (E,)}, "(N, L, E)"),
        ({"query": (L, E), "key": (S, E), "value": (S, E), "key_padding_mask": (S - 1,)}, (S,)),
        ({"query": (L, E), "key": (S, E), "value": (S, E), "key_padding_mask": (1, S)}, (S,)),
    ],
)
def test_a_wrong_shape_raises_a_value_error_naming_both_shapes(
    arguments: dict[str, tuple[int, ...]], expected: object
) -> None:
    call: dict[str, Any] = make_inputs()._asdict()
    del call["padding"]
    for argument, shape in arguments.items():
        call[argument] = torch.zeros(shape, dtype=torch.bool if "mask" in argument else torch.float32)
    with pytest.raises(ValueError) as raised:
        make("gravitational")(**call)
    assert str(expected) in str(raised.value)
    assert str(shape) in str(raised.value)


@pytest.mark.parametrize(("argument", "shape"), [("key_padding_mask", (N, S)), ("attn_mask", (L, S))])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_an_integer_mask_is_refused(argument: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"{argument}.*{dtype}"):
        make("gravitational")(*make_inputs()[:3], **{argument: torch.zeros(shape, dtype=dtype)})


def test_a_nested_tensor_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(2, E), torch.randn(3, E)])
    with pytest.raises(ValueError, match="enable_nested_tensor=False"):
        make("gravitational")(nested, nested, nested)


@each_module
@pytest.mark.parametrize(
    ("change", "floating", "is_causal"),
    [("poisoned", False, False), ("poisoned", True, True), ("longer", False, False), ("longer", True, False)],
)
def test_padding_changes_neither_outputs_nor_gradients(
    name: str, need_weights: bool, change: str, floating: bool, is_causal: bool
) -> None:
    module = make(name)
    x, _, _, padding = make_inputs(self_attention=True)
    other, other_padding = x.masked_fill(padding.unsqueeze(-1), POISON), padding
    if change == "longer":
        other = torch.cat([other, torch.full((N, 5, E), -POISON)], 1)
        other_padding = torch.cat([padding, torch.ones(N, 5, dtype=torch.bool)], 1)

    def at_true_positions(y: Tensor, blocked: Tensor) -> dict[str, Tensor]:
        mask = added(blocked) if floating else blocked
        output = module(y, y, y, mask, need_weights, is_causal=is_causal)[0]
        return with_gradients(module, output[~blocked])

    assert_same(at_true_positions(other, other_padding), at_true_positions(x, padding))


@pytest.mark.usefixtures("each_fused_backend")
@each_module
@pytest.mark.parametrize("floating", [False, True])
def test_a_blocked_outlier_changes_nothing_for_the_other_rows(name: str, floating: bool) -> None:
    """A key of 1e9 that attn_mask blocks for every query: without weights as with them."""
    module = make(name)
    x = make_inputs(self_attention=True).query
    x[:, -1] = POISON
    mask = torch.zeros(L, L, dtype=torch.bool)
    mask[:, -1] = True
    found, expected = (
        run(module, (x, x, x), attn_mask=added(mask) if floating else mask, need_weights=asked)
        for asked in (False, True)
    )
    assert [key for key, part in found.items() if not bool(part.isfinite().all())] == []
    torch.testing.assert_close(found["output"][:, :-1], expected["output"][:, :-1])
