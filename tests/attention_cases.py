"""What the tests of the attention modules share: the modules, a seeded input factory, the comparison."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from attention_module import AttentionModule
from conventional_attention import ConventionalAttention
from gravitational_attention import GravitationalAttention
from gravitational_multi_timescale_attention import GravitationalMultiTimescaleAttention
from multi_timescale_attention import MultiTimescaleAttention

N, L, S, E, H, T = 3, 6, 7, 20, 4, 2  # and D = 5
POISON = 1e9

Factory = Callable[..., AttentionModule]
BOTH = GravitationalMultiTimescaleAttention
LEARNED: dict[str, Any] = {"learned_power": True, "learned_softening": True}
FORCE: dict[str, Any] = {"normalization": "force"}
TWO: dict[str, Any] = {"num_timescales": T, "gammas": (0.6, 0.9)}


def factory(module: Factory, **own: Any) -> Factory:
    return functools.partial(module, embed_dim=E, num_heads=H, **own)


FACTORIES: dict[str, Factory] = {
    "conventional": factory(ConventionalAttention),
    "gravitational": factory(GravitationalAttention),
    "gravitational force": factory(GravitationalAttention, **FORCE),
    "multi-timescale": factory(MultiTimescaleAttention, **TWO),
    "gravitational multi-timescale": factory(BOTH, **TWO),
    "gravitational multi-timescale force": factory(BOTH, **TWO, **FORCE),
    "heads": factory(MultiTimescaleAttention, timescales="heads"),
    "heads adaptive": factory(MultiTimescaleAttention, timescales="heads", adaptive=True),
    "gravitational adaptive": factory(GravitationalAttention, adaptive=True),
    "multi-timescale adaptive": factory(MultiTimescaleAttention, adaptive=True, **TWO),
    "gravitational multi-timescale force adaptive": factory(BOTH, adaptive=True, **TWO, **FORCE),
    "gravitational cosine": factory(GravitationalAttention, distance="cosine"),
    "gravitational manhattan": factory(GravitationalAttention, distance="manhattan"),
    "gravitational multi-timescale force learned": factory(BOTH, **LEARNED, **TWO, **FORCE),
}
TIMESCALES = {name: T if "multi" in name else 1 for name in FACTORIES}
each_module = pytest.mark.parametrize("name", list(FACTORIES))


def has_backend(name: str, backend: str) -> bool:
    """Whether the backend is one for a module, or model, of that name."""
    if backend == "native":
        return not any(word in name for word in ("adaptive", "manhattan", "learned"))
    return backend != "sdpa" or name == "conventional"


class Inputs(NamedTuple):
    query: Tensor  # (N, L, E)
    key: Tensor  # (N, S, E)
    value: Tensor  # (N, S, E)
    padding: Tensor  # (N, S), True = blocked; the first example has none, and none is all padding


def make_inputs(*, self_attention: bool = False, sizes: tuple[int, int, int, int] = (N, L, S, E)) -> Inputs:
    """Seeded inputs of sizes that all differ; in self-attention query, key and value are (N, L, E)."""
    batch, queries, keys, width = sizes
    generator = torch.Generator().manual_seed(7)
    query = torch.randn(batch, queries, width, generator=generator)
    key, value = (torch.randn(batch, keys, width, generator=generator) for _ in range(2))
    if self_attention:
        key = value = query
    length = key.shape[1]
    padding = torch.arange(length) >= length - 2 * torch.arange(batch)[:, None]
    return Inputs(query, key, value, padding)


def drawn(factory: Callable[..., nn.Module], **kwargs: Any) -> AttentionModule:
    """The module with every parameter drawn, biases too."""
    torch.manual_seed(3)
    module = factory(**kwargs)
    assert isinstance(module, AttentionModule)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def make(name: str, **kwargs: Any) -> AttentionModule:
    return drawn(FACTORIES[name], **kwargs)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Those that parameters have, by name; then they have none."""
    found = {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    return found


def with_gradients(module: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """An output of the module, and the gradients of parameters by an uneven sum of it."""
    (output * torch.linspace(-1, 2, output.numel()).view_as(output)).sum().backward()
    return {"output": output.detach()} | gradients(module)


def run(module: nn.Module, inputs: tuple[Tensor, ...], **kwargs: Any) -> dict[str, Tensor]:
    """Output, weights and the gradients of inputs and parameters, for a loss that reads both unevenly."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    module.zero_grad()
    output, weights = module(*leaves, **kwargs)
    found = {"output": output.detach()}
    loss = (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum()
    if weights is not None:
        found["weights"] = weights.detach()
        slope = torch.linspace(1, -2, weights.numel(), dtype=weights.dtype).view_as(weights)
        loss = loss + (weights * slope).sum()
    loss.backward()
    for name, leaf in zip(("query", "key", "value"), leaves, strict=True):
        assert leaf.grad is not None
        found[f"gradient of {name}"] = leaf.grad
    return found | gradients(module)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        error = float((value.double() - expected[name].double()).norm())
        # The key bias has no gradient in softmax attention: what is left is rounding.
        assert error <= tolerance * max(float(expected[name].double().norm()), 1e-1), (name, error)


def nothing_read(module: AttentionModule) -> Tensor:
    """The output (E,) of a row that attends to nothing."""
    zeros = torch.zeros(1, 1, module.num_timescales * module.embed_dim)
    return module.project_out(zeros).detach().view(-1)
