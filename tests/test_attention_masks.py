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
    make_conventional,
    make_inputs,
    nothing_read,
    relative,
    run,
)
from torch import Tensor, nn

from attention_module import AttentionModule
from conventional_attention import ConventionalAttention


def convert(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same masks for `nn.MultiheadAttention`, which wants the causal mask in full and one type."""
    theirs = dict(kwargs)
    if theirs.pop("is_causal", False):
        causal = torch.ones(L, theirs.pop("length"), dtype=torch.bool).triu(1)
        mask = theirs.get("attn_mask")
        if mask is None:
            theirs["attn_mask"] = causal
        else:
            theirs["attn_mask"] = (
                mask | causal if mask.dtype == torch.bool else mask.masked_fill(causal, -math.inf)
            )
    theirs.pop("length", None)
    kinds = [theirs[name] for name in ("attn_mask", "key_padding_mask") if theirs.get(name) is not None]
    if len({mask.dtype for mask in kinds}) > 1:
        for name in ("attn_mask", "key_padding_mask"):
            if theirs[name].dtype == torch.bool:
                theirs[name] = torch.zeros(theirs[name].shape).masked_fill(theirs[name], -math.inf)
    return theirs


def make_masks(kind: str, length: int) -> dict[str, Any]:
    """Masks of which no row is blocked altogether, for keys of the given length."""
    generator = torch.Generator().manual_seed(11)
    padding = make_inputs(self_attention=length == L).padding
    pairs = torch.rand(L, length, generator=generator) < 0.3
    pairs[:, 0] = False
    pairs_of_heads = torch.rand(N * H, L, length, generator=generator) < 0.3
    pairs_of_heads[:, :, 0] = False
    added = torch.randn(L, length, generator=generator)
    added_of_heads = torch.randn(N * H, L, length, generator=generator)
    added_padding = torch.randn(N, length, generator=generator).masked_fill(padding, -math.inf)
    kinds: dict[str, dict[str, Any]] = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "causal": {"is_causal": True},
        "padding and causal": {"key_padding_mask": padding, "is_causal": True},
        "pairs": {"attn_mask": pairs},
        "pairs and causal": {"attn_mask": pairs, "is_causal": True},
        "pairs of heads": {"attn_mask": pairs_of_heads},
        "pairs of heads and padding": {"attn_mask": pairs_of_heads, "key_padding_mask": padding},
        "float pairs": {"attn_mask": added.masked_fill(pairs, -math.inf)},
        "float pairs of heads": {"attn_mask": added_of_heads.masked_fill(pairs_of_heads, -math.inf)},
        "float padding": {"key_padding_mask": added_padding},
        "float padding and boolean pairs": {"key_padding_mask": added_padding, "attn_mask": pairs},
        "float pairs and padding": {"key_padding_mask": padding, "attn_mask": added},
        "float both, causal": {"key_padding_mask": added_padding, "attn_mask": added, "is_causal": True},
    }
    return kinds[kind]


# What all modules inherit is checked in two.
two_modules = pytest.mark.parametrize("name", ["conventional", "gravitational multi-timescale"])
MASKS = (
    *("none", "padding", "causal", "padding and causal", "pairs", "pairs and causal", "pairs of heads"),
    *("pairs of heads and padding", "float pairs", "float pairs of heads", "float padding"),
    *("float padding and boolean pairs", "float pairs and padding", "float both, causal"),
)
JOINED = ("padding", "causal", *(kind for kind in MASKS if " and " in kind or "," in kind))


def make_pair_of_equals(**kwargs: Any) -> tuple[nn.MultiheadAttention, AttentionModule]:
    """PyTorch's module and ours with the state dict of it."""
    torch.manual_seed(5)
    theirs = nn.MultiheadAttention(E, H, batch_first=True, **kwargs)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = make_conventional(**kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("self_attention", [True, False])
def test_conventional_attention_equals_pytorchs(kind: str, self_attention: bool, need_weights: bool) -> None:
    theirs, ours = make_pair_of_equals()
    query, key, value, _ = make_inputs(self_attention=self_attention)
    masks = make_masks(kind, key.shape[1])
    asked = {"need_weights": need_weights, "average_attn_weights": self_attention}
    expected = run(theirs, (query, key, value), **convert(masks | {"length": key.shape[1]}), **asked)
    assert_same(run(ours, (query, key, value), **masks, **asked), expected)


def test_conventional_attention_without_bias_equals_pytorchs(need_weights: bool) -> None:
    theirs, ours = make_pair_of_equals(bias=False)
    inputs = make_inputs()[:3]
    assert_same(run(ours, inputs, need_weights=need_weights), run(theirs, inputs, need_weights=need_weights))


def test_conventional_attention_starts_like_pytorchs() -> None:
    theirs, ours = nn.MultiheadAttention(64, 4), ConventionalAttention(64, 4)
    expected = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in ours.state_dict().items()} == expected
    for name, parameter in ours.named_parameters():
        like = theirs.get_parameter(name)
        assert parameter.detach().abs().max().item() == pytest.approx(
            like.detach().abs().max().item(), rel=0.02
        ), name
        assert parameter.detach().std().item() == pytest.approx(like.detach().std().item(), rel=0.05), name


@each_module
@pytest.mark.parametrize("kind", JOINED)
def test_masks_mean_the_same_in_every_form(name: str, need_weights: bool, kind: str) -> None:
    """Each mask against the same pairs written out as one boolean or float (N * H, L, S) mask."""
    module = make(name)
    query, key, value, _ = make_inputs(self_attention="causal" in kind)
    length = key.shape[1]
    masks = make_masks(kind, length)
    written = torch.zeros(N, H, L, length)
    for mask, view in ((masks.get("attn_mask"), None), (masks.get("key_padding_mask"), (N, 1, 1, length))):
        if mask is None:
            continue
        shape = view or ((1, 1, L, length) if mask.dim() == 2 else (N, H, L, length))
        added = mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(mask, -math.inf)
        written = written + added.view(shape)
    if masks.get("is_causal"):
        written = written + torch.full((L, length), -math.inf).triu(1)
    found = run(module, (query, key, value), **masks, need_weights=need_weights)
    written_out = run(module, (query, key, value), attn_mask=written.flatten(0, 1), need_weights=need_weights)
    assert_same(found, written_out)
    plain = module(query, key, value)[0]
    assert relative(found["output"], plain) > 1e-3


@each_module
@pytest.mark.parametrize("kind", ["padding", "float pairs", "together"])
def test_a_row_with_no_key_gives_zeros_and_finite_gradients(name: str, need_weights: bool, kind: str) -> None:
    """Before the output projection, whose bias is all that is left of it."""
    module = make(name)
    query, key, value, padding = make_inputs()
    pairs = torch.zeros(L, S, dtype=torch.bool)
    empty = torch.zeros(N, L, dtype=torch.bool)  # rows without a key
    masks: dict[str, Tensor] = {}
    if kind == "padding":
        padding[1] = True
        empty[1] = True
        masks["key_padding_mask"] = padding
    elif kind == "together":  # neither blocks everything by itself
        pairs[2, :3] = True
        empty[2, 2] = True
        masks = {"attn_mask": pairs, "key_padding_mask": padding}
    else:
        pairs[4] = True
        empty[:, 4] = True
        masks["attn_mask"] = torch.zeros(L, S).masked_fill(pairs, -math.inf)
    found = run(module, (query, key, value), need_weights=need_weights, **masks)
    assert all(bool(part.isfinite().all()) for part in found.values())
    nothing = nothing_read(module)
    torch.testing.assert_close(found["output"][empty], nothing.expand(int(empty.sum()), E))
    if need_weights:
        assert float(found["weights"][empty].abs().max()) == 0
        torch.testing.assert_close(found["weights"][~empty].sum(-1), torch.ones(int((~empty).sum())))
    if kind == "padding":
        assert float(found["gradient of query"][1].abs().max()) == 0
        assert float(found["gradient of value"][1].abs().max()) == 0


@each_module
def test_inputs_and_masks_are_left_as_they_were(name: str, need_weights: bool) -> None:
    module = make(name)
    query, key, value, padding = make_inputs()
    pairs = torch.zeros(L, S).masked_fill(torch.rand(L, S) < 0.2, -math.inf)
    given = [query, key, value, padding, pairs]
    before = [tensor.clone() for tensor in given]
    output, _ = module(query, key, value, padding, need_weights, pairs)
    assert output.shape == query.shape
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@two_modules
@pytest.mark.parametrize(
    ("arguments", "expected", "got"),
    [
        ({"query": (N, L, E + 1)}, (N, L, E), (N, L, E + 1)),
        ({"key": (N, S, E + 1)}, (N, S, E), (N, S, E + 1)),
        ({"key": (N + 1, S, E)}, (N, S, E), (N + 1, S, E)),
        ({"value": (N, S + 1, E)}, (N, S, E), (N, S + 1, E)),
        ({"value": (N, S, 1)}, (N, S, E), (N, S, 1)),
        ({"value": (1, S, E)}, (N, S, E), (1, S, E)),
        ({"key_padding_mask": (N, L)}, (N, S), (N, L)),
        ({"key_padding_mask": (S,)}, (N, S), (S,)),
        ({"key_padding_mask": (N, 1, 1, S)}, (N, S), (N, 1, 1, S)),
        ({"key_padding_mask": (1, S)}, (N, S), (1, S)),
        ({"attn_mask": (S, L)}, (L, S), (S, L)),
        ({"attn_mask": (N, L, S)}, (N * H, L, S), (N, L, S)),
        ({"attn_mask": (1, L, S)}, (N * H, L, S), (1, L, S)),
        ({"attn_mask": (N, H, L, S)}, (N * H, L, S), (N, H, L, S)),
        ({"attn_mask": (1, S)}, (L, S), (1, S)),
        ({"key": (S, E)}, (N, L, E), (S, E)),
        ({"query": (E,), "key": (E,), "value": (E,)}, None, (E,)),
    ],
)
def test_a_wrong_shape_raises_a_value_error_naming_both_shapes(
    name: str, arguments: dict[str, tuple[int, ...]], expected: tuple[int, ...] | None, got: tuple[int, ...]
) -> None:
    query, key, value, _ = make_inputs()
    call: dict[str, Any] = {"query": query, "key": key, "value": value}
    for argument, shape in arguments.items():
        call[argument] = torch.zeros(shape, dtype=torch.bool if "mask" in argument else torch.float32)
    with pytest.raises(ValueError) as raised:
        make(name)(**call)
    message = str(raised.value)
    assert str(got) in message
    assert str(expected) in message or "(N, L, E)" in message


@two_modules
def test_unbatched_masks_of_a_wrong_shape_are_named_as_they_were_given(name: str) -> None:
    query, key, value, _ = make_inputs()
    for shape in ((S - 1,), (1, S)):
        with pytest.raises(ValueError) as raised:
            make(name)(query[0], key[0], value[0], key_padding_mask=torch.zeros(shape, dtype=torch.bool))
        assert f"must have shape {(S,)}, got {shape}" in str(raised.value)


@two_modules
@pytest.mark.parametrize("argument", ["key_padding_mask", "attn_mask"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_an_integer_mask_is_refused(name: str, argument: str, dtype: torch.dtype) -> None:
    query, key, value, _ = make_inputs()
    mask = torch.zeros((N, S) if argument == "key_padding_mask" else (L, S), dtype=dtype)
    with pytest.raises(ValueError, match=f"{argument}.*{dtype}"):
        make(name)(query, key, value, **{argument: mask})


@each_module
def test_a_nested_tensor_is_refused(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.randn(2, E), torch.randn(3, E)])
    with pytest.raises(ValueError, match="enable_nested_tensor=False"):
        make(name)(nested, nested, nested)


@each_module
def test_an_example_does_not_depend_on_its_batch_mates(name: str, need_weights: bool) -> None:
    module = make(name)
    query, key, value, padding = make_inputs()
    mates = [query.clone(), key.clone(), value.clone()]
    for tensor in mates:
        tensor[0] *= 100
        tensor[2] = 0
    together = module(query, key, value, padding, need_weights)[0]
    beside_others = module(*mates, padding, need_weights)[0]
    alone = module(query[1:2], key[1:2], value[1:2], padding[1:2], need_weights)[0]
    assert relative(beside_others[1], together[1]) < 1e-5
    assert relative(alone[0], together[1]) < 1e-5


def gradients_at_true_positions(
    module: AttentionModule, x: Tensor, padding: Tensor, **kwargs: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    output = module(x, x, x, key_padding_mask=padding, **kwargs)[0][kept(padding)]
    (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
    return output.detach(), {
        key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None
    }


def kept(padding: Tensor) -> Tensor:
    return ~padding if padding.dtype == torch.bool else padding == 0


@each_module
@pytest.mark.parametrize(
    ("change", "floating", "is_causal"),
    [
        ("poisoned", False, False),
        ("poisoned", True, True),
        ("zeroed", False, True),
        ("longer", False, False),
        ("longer", True, False),
        ("cut", False, True),
    ],
)
def test_padding_changes_neither_outputs_nor_gradients(
    name: str, need_weights: bool, change: str, floating: bool, is_causal: bool
) -> None:
    module = make(name)
    x, _, _, padding = make_inputs(self_attention=True)
    other, other_padding = x.masked_fill(padding.unsqueeze(-1), POISON), padding
    if change == "zeroed":
        other = x.masked_fill(padding.unsqueeze(-1), 0.0)
    elif change == "longer":
        other = torch.cat([other, torch.full((N, 5, E), -POISON)], 1)
        other_padding = torch.cat([padding, torch.ones(N, 5, dtype=torch.bool)], 1)
    elif change == "cut":  # the two shorter examples alone, cut to the longer of them
        x, padding = x[1:], padding[1:]
        other, other_padding = x[:, : L - 2], padding[:, : L - 2]
    if floating:
        padding = torch.zeros(padding.shape).masked_fill(padding, -math.inf)
        other_padding = torch.zeros(other_padding.shape).masked_fill(other_padding, -math.inf)
    settings = {"need_weights": need_weights, "is_causal": is_causal}
    output, gradients = gradients_at_true_positions(module, x, padding, **settings)
    found, found_gradients = gradients_at_true_positions(module, other, other_padding, **settings)
    assert_same({"output": found} | found_gradients, {"output": output} | gradients)


@pytest.mark.usefixtures("each_fused_backend")
@each_module
@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_a_blocked_outlier_changes_nothing_for_the_other_rows(name: str, kind: str) -> None:
    """A key of 1e9 that attn_mask blocks for every query: without weights as with them."""
    module = make(name)
    x, _, _, _ = make_inputs(self_attention=True)
    x = x.clone()
    x[:, -1] = POISON
    mask = torch.zeros(L, L, dtype=torch.bool)
    mask[:, -1] = True
    attn_mask = mask if kind == "boolean" else torch.zeros(L, L).masked_fill(mask, -math.inf)
    found = run(module, (x, x, x), attn_mask=attn_mask, need_weights=False)
    expected = run(module, (x, x, x), attn_mask=attn_mask, need_weights=True)
    assert [key for key, part in found.items() if not bool(part.isfinite().all())] == []
    torch.testing.assert_close(found["output"][:, :-1], expected["output"][:, :-1])
