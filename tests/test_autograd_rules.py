"""Autograd's rules hold for every backend: what backward reads is saved by autograd and read once, transforms
of `torch.func` and higher derivatives work, and what cannot be done is said; and a backend is chosen."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import (
    FACTORIES,
    E,
    H,
    N,
    assert_same,
    each_module,
    gradients,
    has_backend,
    make,
    relative,
)
from torch import Tensor
from torch.func import functional_call

from attention_engine.attention_scores import DotProduct, Mask
from attention_kernels import BACKENDS, attend, use_backend
from attention_module import AttentionModule

ON_CPU = [backend for backend in BACKENDS if backend not in ("auto", "triton")]
CASES = [(name, backend) for name in FACTORIES for backend in ON_CPU if has_backend(name, backend)]
each_case = pytest.mark.parametrize(("name", "backend"), CASES)
LENGTH = 40


def tokens() -> Tensor:
    return torch.randn(N, LENGTH, E, generator=torch.Generator().manual_seed(1))


def attended(module: AttentionModule, **masks: Any) -> Callable[[Tensor], Tensor]:
    return lambda y: module(y, y, y, need_weights=False, **masks)[0]


def loss(module: AttentionModule, x: Tensor, **masks: Any) -> Tensor:
    return attended(module, **masks)(x).square().sum()


def make_mask(kind: str) -> dict[str, Tensor]:
    late = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [LENGTH - 9], [20]])
    order = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    kinds = {
        "padding": {"key_padding_mask": late},
        "pairs": {"attn_mask": order},
        "pairs of heads": {"attn_mask": order.expand(N * H, -1, -1).clone()},
        "float pairs": {"attn_mask": torch.zeros(LENGTH, LENGTH).masked_fill(order, -torch.inf)},
    }
    return kinds[kind]


@each_case
@pytest.mark.parametrize("kind", ["padding", "pairs of heads", "float pairs"])
def test_a_mask_refilled_before_backward_is_an_error_or_changes_nothing(
    name: str, backend: str, kind: str
) -> None:
    module, x, masks = make(name), tokens(), make_mask(kind)
    with use_backend(backend):
        if (backend, kind) == ("native", "float pairs"):
            with pytest.raises(ValueError, match="use 'tiled'"):
                loss(module, x, **masks)
            return
        loss(module, x, **masks).backward()
        expected = gradients(module)
        late = loss(module, x, **masks)
    for mask in masks.values():
        mask.zero_()
    try:
        late.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert_same(gradients(module), expected)


@each_case
def test_saved_tensors_go_through_hooks_and_are_read_once(name: str, backend: str) -> None:
    module, x, masks = make(name), tokens(), make_mask("pairs")
    numbers, read = itertools.count(), []

    def pack(tensor: Tensor) -> tuple[int, Tensor]:
        return next(numbers), tensor.clone()

    def unpack(packed: tuple[int, Tensor]) -> Tensor:
        read.append(packed[0])
        return packed[1]

    with use_backend(backend):
        loss(module, x, **masks).backward()
        expected = gradients(module)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            late = loss(module, x, **masks)
        late.backward()
    assert 0 < len(read) == len(set(read))
    assert_same(gradients(module), expected)


def per_sample(module: AttentionModule, x: Tensor) -> Tensor:
    parameters: dict[str, Tensor] = dict(module.named_parameters())

    def of_one(p: dict[str, Tensor], y: Tensor) -> Tensor:
        return functional_call(module, p, (y, y, y), {"need_weights": False})[0].square().sum()

    found = torch.func.vmap(torch.func.grad(of_one), (None, 0))(parameters, x[:, None])
    return torch.cat([found[name].flatten(1) for name in parameters], 1)


def per_sample_by_a_loop(module: AttentionModule, x: Tensor) -> Tensor:
    parameters = list(module.parameters())
    found = (torch.autograd.grad(loss(module, y[None]), parameters) for y in x)
    return torch.stack([torch.cat([part.flatten() for part in of_one]) for of_one in found])


def by_dual_numbers(module: AttentionModule, x: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent: Tensor = torch.autograd.forward_ad.unpack_dual(attended(module)(dual)).tangent
    return tangent


def by_double_backward(module: AttentionModule, x: Tensor) -> Tensor:
    with use_backend("dense"):
        return torch.autograd.functional.jvp(attended(module), x, torch.ones_like(x))[1]


def jacobian(module: AttentionModule, x: Tensor, **kwargs: Any) -> Tensor:
    return torch.autograd.functional.jacobian(attended(module), x[:1, :5], **kwargs)


Function = Callable[[AttentionModule, Tensor], Tensor]
TRANSFORMS: dict[str, tuple[Function, Function]] = {
    "per-sample gradients": (per_sample, per_sample_by_a_loop),
    "jacrev": (lambda module, x: torch.func.jacrev(attended(module))(x[:1, :5]), jacobian),
    "vectorised Jacobian": (lambda module, x: jacobian(module, x, vectorize=True), jacobian),
    "jvp": (
        lambda module, x: torch.func.jvp(attended(module), (x,), (torch.ones_like(x),))[1],
        by_double_backward,
    ),
    "dual numbers": (by_dual_numbers, by_double_backward),
}


@each_module
@pytest.mark.parametrize("what", list(TRANSFORMS))
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's forward mode uses it
def test_transforms_of_functions_work_by_themselves(name: str, what: str) -> None:
    module, x = make(name), tokens()
    transformed, plain = TRANSFORMS[what]
    assert relative(transformed(module, x), plain(module, x)) < 1e-5


@pytest.mark.parametrize(("name", "backend"), [case for case in CASES if case[1] != "dense"])
def test_a_named_backend_says_that_transforms_are_for_dense(name: str, backend: str) -> None:
    with use_backend(backend), pytest.raises(ValueError, match="use 'dense'"):
        torch.func.vmap(attended(make(name)))(tokens()[:, None])


def penalty(module: AttentionModule, x: Tensor) -> dict[str, Tensor]:
    """The gradients of a gradient penalty."""
    slope = torch.autograd.grad(loss(module, x), x, create_graph=True)[0]
    slope.square().sum().backward()
    return gradients(module)


@each_case
def test_double_backward_is_that_of_the_formula_or_refused(name: str, backend: str) -> None:
    dtype, tolerance = (torch.float32, 1e-4) if backend == "native" else (torch.float64, 1e-9)
    module, x = make(name).to(dtype), tokens().to(dtype).requires_grad_()
    with use_backend("dense"):
        expected = penalty(module, x)
    with use_backend(backend):
        if backend == "sdpa":  # PyTorch's own kernel
            with pytest.raises(RuntimeError, match="not implemented"):
                penalty(module, x)
        else:
            assert_same(penalty(module, x), expected, tolerance)


def test_double_backward_with_dropout_is_refused_in_words() -> None:
    module, x = make("gravitational", dropout=0.3), tokens().requires_grad_()
    with use_backend("tiled"), pytest.raises(RuntimeError, match=r"no double backward with dropout.*'dense'"):
        penalty(module, x)


@each_case
def test_a_module_that_was_used_can_be_copied_and_its_state_saved(name: str, backend: str) -> None:
    module, x, loaded, file = make(name), tokens(), FACTORIES[name](), io.BytesIO()
    with use_backend(backend):
        loss(module, x).backward()
        expected = attended(module)(x)
        torch.save(module.state_dict(), file)
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=True))
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
            torch.testing.assert_close(attended(other)(x), expected, rtol=0, atol=0)


def test_a_chosen_backend_is_that_of_all_modules_until_its_block_ends() -> None:
    module, x = make("gravitational"), tokens()

    def refused() -> Any:
        return pytest.raises(ValueError, match="backend 'sdpa' is for the dot product")

    with refused(), use_backend("sdpa"):
        attended(module)(x)
    fastest = attended(module)(x)  # an error has ended the choice
    with use_backend("sdpa"):
        with use_backend("dense"):
            dense = attended(module)(x)
        with refused():
            attended(module)(x)
        with use_backend("auto"):
            torch.testing.assert_close(attended(module)(x), fastest)
        decaying = DotProduct(0.5, log_decay=torch.full((1, 1), -0.1))
        q = x[:, None, None]
        attend(q, q, q, decaying, Mask(), backend="dense")  # what is named is taken, whatever is chosen
    torch.testing.assert_close(dense, module(x, x, x)[0], rtol=0, atol=0)  # weights are made by "dense"


@pytest.mark.parametrize("name", ["multi-timescale", "gravitational multi-timescale"])
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend not in ("auto", "dense")])
def test_discounted_logits_are_for_the_dense_formula_alone_and_auto_takes_it(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module, x = make(name, discount="logits"), tokens()
    message = "without decay.*'tiled'" if backend == "sdpa" else "discounts weights, not logits: use 'dense'"
    with use_backend(backend), pytest.raises(ValueError, match=message):
        attended(module)(x)
    with use_backend("dense"):
        expected = attended(module)(x)
    assert torch.equal(attended(module)(x), expected)


def test_an_unknown_backend_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"backend must be one of \('auto', .*got 'denes'"):
        use_backend("denes").__enter__()
