"""What the tests of the backends share: a seeded case, and how far a backend is from the dense formula in
float64, outputs and all gradients."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attention_engine.attention_scores import Clock, DotProduct, Gravity, Mask, Score
from attention_kernels import attend

Kind = Literal["dot product", "gravity", "force"]
KINDS: tuple[Kind, ...] = ("dot product", "gravity", "force")
POISON = 1e9
NO_MASK = Mask()


@dataclass(frozen=True)
class Case:
    """One call of `attend`. Sizes all differ by default; L and S are no multiples of a tile."""

    kind: Kind
    batch: int = 2
    timescales: int = 3
    heads: int = 1
    queries: int = 19
    keys: int = 35
    head_dim: int = 5
    shared: bool = False  # whether the timescales share q, k and v
    decay: tuple[float, float] | None = (0.6, 0.95)  # between which gammas are drawn
    learn_decay: bool = True
    clock: bool = False  # whether time passes by a rate of each token
    power: float = 2.0
    softening: float = 0.1
    learned: bool = False  # whether power and softening are, for each timescale and head
    distance: Literal["euclidean", "cosine", "manhattan"] = "euclidean"
    duplicates: bool = False  # q equals k
    apart: float = 0.0  # by which q then is beside k
    size: float = 1.0  # of q and k
    offset: float = 0.0  # of q and k, which no distance sees
    mask: Mask = NO_MASK
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def inputs(self) -> dict[str, Tensor]:
        """Seeded q, k, v and what the score has, in its own type. Padding is poisoned."""
        generator = torch.Generator().manual_seed(7)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        projections = 1 if self.shared else self.timescales
        # (N, L, T', H, D) seen as (N, T', H, L, D): what a module hands over is not contiguous
        q, k, v = (
            draw(self.batch, length, projections, self.heads, self.head_dim).permute(0, 2, 3, 1, 4)
            for length in (self.queries, self.keys, self.keys)
        )
        q, k = q * self.size + self.offset, k * self.size + self.offset
        if self.duplicates:
            k = q + self.apart * draw(*q.shape)
        found = {"q": q, "k": k, "v": v}
        if self.mask.padding is not None:
            padding = self.mask.padding.cpu()[:, None, None, :, None]
            found |= {name: found[name].masked_fill(padding, POISON) for name in ("k", "v")}
        found = {name: x.to(self.dtype) for name, x in found.items()}
        of_heads = self.timescales, self.heads
        if self.kind != "dot product":
            found["key_mass"] = draw(self.batch, *of_heads, self.keys).exp()
        if self.kind == "gravity":
            found["query_mass"] = draw(self.batch, *of_heads, self.queries).exp() * 0.3
            found["log_gravity"] = draw(*of_heads) * 0.1
        if self.decay is not None:
            low, high = self.decay
            found["log_decay"] = (low + (high - low) * torch.rand(*of_heads, generator=generator)).log()
        if self.learned:
            found["softening"] = self.softening * (1 + draw(*of_heads).tanh() / 2)
            found["power"] = self.power * (2 + draw(*of_heads).tanh())
        if self.clock:
            for name, length in (("query_clock", self.queries), ("key_clock", self.keys)):
                rates = F.softplus(draw(self.batch, *of_heads, length))
                found[name] = rates.to(self.dtype).cumsum(-1) * 0.1
        return {name: x.to(self.device) for name, x in found.items()}

    def score(self, leaves: dict[str, Tensor]) -> Score:
        clock = Clock(leaves["query_clock"], leaves["key_clock"]) if self.clock else None
        if self.kind == "dot product":
            return DotProduct(self.head_dim**-0.5, leaves.get("log_decay"), clock=clock)
        return Gravity(
            leaves["key_mass"],
            leaves.get("query_mass"),
            leaves.get("log_gravity"),
            leaves.get("softening", self.softening),
            leaves.get("power", self.power),
            "softmax" if self.kind == "gravity" else "force",
            leaves.get("log_decay"),
            clock=clock,
            distance=self.distance,
        )

    def evaluate(self, backend: str, **kwargs: Any) -> dict[str, Tensor]:
        """The output and every gradient; "dense" is in float64."""
        leaves = {}
        for name, x in self.inputs().items():
            # detach keeps the strides; a copy by `to` would too
            leaf = x.double() if backend == "dense" else x
            leaves[name] = leaf.detach().requires_grad_(self.learn_decay or name != "log_decay")
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        output, _ = attend(q, k, v, self.score(leaves), self.mask, backend=backend, **kwargs)
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        output.backward(upstream.to(output))
        found = {"output": output.detach()}
        return found | {f"gradient of {name}": x.grad for name, x in leaves.items() if x.grad is not None}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Distances relative to the norm, or to 0.1 where what is expected is nothing."""
    assert found.keys() == expected.keys()
    result = {}
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        distance = (found[name].double() - value.double()).norm()
        result[name] = float(distance / value.double().norm().clamp(min=0.1))
    return result


def beyond(
    case: Case, output: float, gradient: float, backend: str = "triton", **kwargs: Any
) -> dict[str, float]:
    """What a backend gets wrong by more than the tolerances: nothing, where it is right. A NaN is wrong. The
    gradient of a single number, and one that is nothing, as by the mass of an only key, is a sum that
    cancels, and may err by a digit more."""
    expected = case.evaluate("dense")
    found = errors(case.evaluate(backend, **kwargs), expected)
    cancels = {name for name, value in expected.items() if "log_" in name or value.norm() < 1e-6}
    tolerances = {name: 10 * gradient if name in cancels else gradient for name in found}
    tolerances["output"] = output
    return {name: error for name, error in found.items() if not error <= tolerances[name]}


def masks(batch: int, heads: int, queries: int, keys: int, device: str = "cpu") -> dict[str, Mask]:
    """Masks of each kind, some with rows of which every key is blocked."""
    generator = torch.Generator().manual_seed(11)
    behind = torch.arange(keys) >= keys - 7 * torch.arange(batch)[:, None]
    everything = behind.clone()
    everything[-1] = True
    before = torch.arange(keys) < 3 * torch.arange(1, batch + 1)[:, None]
    pairs = torch.rand(batch, 1, heads, queries, keys, generator=generator) < 0.3
    pairs[..., queries // 2, :] = True
    added = torch.randn(1, 1, 1, queries, keys, generator=generator)
    added_to_keys = torch.randn(batch, 1, 1, 1, keys, generator=generator)
    found = {
        "padding": Mask(behind),
        "an example of padding only": Mask(everything),
        "causal": Mask(causal=True),
        "causal, padding in front": Mask(before, causal=True),
        "pairs": Mask(pairs=pairs),
        "pairs, padding and causal": Mask(behind, pairs, True),
        "float pairs": Mask(pairs=added.masked_fill(pairs[:1, :, :1], -torch.inf)),
        "float padding": Mask(pairs=added_to_keys),
    }

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device)

    return {
        name: replace(mask, padding=moved(mask.padding), pairs=moved(mask.pairs))
        for name, mask in found.items()
    }


MASKS = tuple(masks(1, 1, 2, 2))
