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
GAMMAS = (0.6, 0.9)

Factory = Callable[..., AttentionModule]


def make_conventional(embed_dim: int = E, num_heads: int = H, **kwargs: Any) -> AttentionModule:
    return ConventionalAttention(embed_dim, num_heads, **kwargs)


def make_gravitational(embed_dim: int = E, num_heads: int = H, **kwargs: Any) -> AttentionModule:
    return GravitationalAttention(embed_dim, num_heads, **kwargs)


def make_force(embed_dim: int = E, num_heads: int = H, **kwargs: Any) -> AttentionModule:
    return GravitationalAttention(embed_dim, num_heads, **{"normalization": "force", **kwargs})


def make_multi_timescale(embed_dim: int = E, num_heads: int = H, **kwargs: Any) -> AttentionModule:
    return MultiTimescaleAttention(embed_dim, num_heads, **{"num_timescales": T, "gammas": GAMMAS, **kwargs})


def make_both(embed_dim: int = E, num_heads: int = H, **kwargs: Any) -> AttentionModule:
    own = {"num_timescales": T, "gammas": GAMMAS, **kwargs}
    return GravitationalMultiTimescaleAttention(embed_dim, num_heads, **own)


def make_both_force(embed_dim: int = E, num_heads: int = H, **kwargs: Any) -> AttentionModule:
    return make_both(embed_dim, num_heads, **{"normalization": "force", **kwargs})


def make_heads(embed_dim: int = E, num_heads: int = H, **kwargs: Any) -> AttentionModule:
    return MultiTimescaleAttention(embed_dim, num_heads, **{"timescales": "heads", **kwargs})


FACTORIES: dict[str, Factory] = {
    "conventional": make_conventional,
    "gravitational": make_gravitational,
    "gravitational force": make_force,
    "multi-timescale": make_multi_timescale,
    "gravitational multi-timescale": make_both,
    "gravitational multi-timescale force": make_both_force,
    "heads": make_heads,
    "heads adaptive": functools.partial(make_heads, adaptive=True),
    "gravitational adaptive": functools.partial(make_gravitational, adaptive=True),
    "multi-timescale adaptive": functools.partial(make_multi_timescale, adaptive=True),
    "gravitational multi-timescale force adaptive": functools.partial(make_both_force, adaptive=True),
    "gravitational cosine": functools.partial(make_gravitational, distance="cosine"),
    "gravitational manhattan": functools.partial(make_gravitational, distance="manhattan"),
    "gravitational multi-timescale force learned": functools.partial(
        make_both_force, learned_power=True, learned_softening=True
    ),
}
TIMESCALES = {name: T if "multi" in name else 1 for name in FACTORIES}
each_module = pytest.mark.parametrize("name", list(FACTORIES))
with_and_without_weights = pytest.mark.parametrize("need_weights", [True, False])


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


def make_inputs(dtype: torch.dtype = torch.float32, *, self_attention: bool = False) -> Inputs:
    """Seeded inputs of sizes that all differ; in self-attention query, key and value are (N, L, E)."""
    generator = torch.Generator().manual_seed(7)
    query = torch.randn(N, L, E, generator=generator).to(dtype)
    key, value = (torch.randn(N, S, E, generator=generator).to(dtype) for _ in range(2))
    length = L if self_attention else S
    true_lengths = torch.tensor([length, length - 2, length - 4])
    padding = torch.arange(length) >= true_lengths[:, None]
    return Inputs(query, query, query, padding) if self_attention else Inputs(query, key, value, padding)


def make(name: str, **kwargs: Any) -> AttentionModule:
    """The module with every parameter drawn, biases too."""
    torch.manual_seed(3)
    module = FACTORIES[name](**kwargs)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def run(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor], **kwargs: Any) -> dict[str, Tensor]:
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
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            found[f"gradient of {name}"] = parameter.grad.clone()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == expected[name].shape, name
        error = float((value.double() - expected[name].double()).norm())
        # The key bias has no gradient in softmax attention: what is left is rounding.
        assert error <= tolerance * max(float(expected[name].double().norm()), 1e-1), (name, error)


def gradients(module: nn.Module) -> list[Tensor]:
    """Those of all parameters; each must have one."""
    found = [parameter.grad for parameter in module.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient for gradient in found if gradient is not None]


def nothing_read(module: AttentionModule) -> Tensor:
    """The output (E,) of a row that attends to nothing."""
    zeros = torch.zeros(1, 1, module.num_timescales * module.embed_dim)
    return module.project_out(zeros).detach().view(-1)
