"""What makes a mechanism a drop-in for `nn.MultiheadAttention(batch_first=True)`.

`AttentionModule` checks arguments, projects and splits heads, merges masks, calls the engine and shapes
the results. A mechanism adds its score, and `project_out` where it has several timescales:

    class MyAttention(AttentionModule):
        def __init__(self, embed_dim, num_heads, dropout=0.0, bias=True, **settings):
            super().__init__(embed_dim, num_heads, dropout, bias, **settings)
            self.out_proj = self.make_out_proj(embed_dim, bias)

        def score(self, query, key):                  # -> attention_scores.Score
            return DotProduct(scale=self.head_dim**-0.5)

Symbols, here and wherever this file is referred to: N batch, L query length, S key length, E embed_dim,
H num_heads, D = E / H head width, T timescales, T' = T or, where the timescales share q, k and v, 1; i query
and j key position. The horizon of a discount gamma is 1 / (1 - gamma) tokens.

Meta and fake tensors, `torch.jit.trace`, `torch.export` and `torch.compile(fullgraph=True)` go by
`use_backend("dense")` (see attention_kernels.py): faster backends look at numbers to plan by them.

Masks: True means blocked, as in `nn.MultiheadAttention`. `F.scaled_dot_product_attention` and Hugging Face
mean the opposite: pass `~mask` of theirs, or `attention_mask == 0`.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention_engine.attention_scores import Clock, Mask, Score, merge_masks
from attention_engine.dense_attention import dense_weights
from attention_kernels import attend, without_autocast


class AttentionModule(nn.Module):
    """Projections, masks and the calling convention; the weighing of pairs is left to `score`.

    embed_dim: width E of inputs and output; num_heads: H, must divide E.
    dropout: probability of dropping an attention weight in training, in [0, 1).
    bias: whether the projections have biases.
    num_timescales: T, the number of weightings that are computed side by side.
    num_projections: T', of q, k and v: T or 1.
    batch_first: must be True: inputs are (N, L, E), or (L, E) for a single example.
    """

    in_proj_bias: Tensor | None
    out_proj: nn.Linear
    builds_causal_mask = True  # by `is_causal` alone, which is a hint beside `attn_mask` in PyTorch's module

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        num_timescales: int = 1,
        num_projections: int = 1,
        batch_first: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a positive multiple of num_heads, got embed_dim={embed_dim}, "
                f"num_heads={num_heads}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if not batch_first:
            raise ValueError("batch_first=False is not supported: inputs are (N, L, E)")
        if num_timescales < 1:
            raise ValueError(f"num_timescales must be at least 1, got {num_timescales}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.dropout, self.batch_first = dropout, True
        self.num_timescales, self.num_projections = num_timescales, num_projections
        # nn.TransformerEncoderLayer asks for this one before it takes its fused path around our forward.
        self._qkv_same_embed_dim = False

        width = 3 * num_projections * embed_dim
        self.in_proj_weight = nn.Parameter(torch.empty(width, embed_dim, device=device, dtype=dtype))
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        else:
            self.register_parameter("in_proj_bias", None)
        self._reset_in_proj()

    def _reset_in_proj(self) -> None:
        # nn.MultiheadAttention draws its three projections as one (3 E, E) matrix: its Xavier bound.
        bound = (6 / (4 * self.embed_dim)) ** 0.5
        nn.init.uniform_(self.in_proj_weight, -bound, bound)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)

    def reset_parameters(self) -> None:
        """Draw everything anew, that of the parts too: after `to_empty`, where it is undefined."""
        self._reset_in_proj()
        for part in self.children():
            part.reset_parameters()  # type: ignore[operator]
        if self.out_proj.bias is not None:
            nn.init.zeros_(self.out_proj.bias)

    def make_out_proj(
        self, in_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> nn.Linear:
        """The output projection (in_features -> E), with its bias 0 at the start."""
        out_proj = nn.Linear(in_features, self.embed_dim, bias=bias, device=device, dtype=dtype)
        if bias:
            nn.init.zeros_(out_proj.bias)
        return out_proj

    def score(self, query: Tensor, key: Tensor) -> Score:
        """How a pair is weighed, from the inputs query (N, L, E) and key (N, S, E)."""
        raise NotImplementedError(f"{type(self).__name__} must define score(query, key)")

    def clock(self, query: Tensor, key: Tensor, padding: Tensor | None) -> Clock | None:
        """For a decay by time in place of distance: the time at each token. padding: (N, S), True = blocked;
        padded tokens must not advance it. In self-attention query is the same tensor as key, and so it is
        with a `query_offset`: queries then have the time of the keys at their positions."""
        return None

    def project_out(self, read: Tensor) -> Tensor:
        """What the timescales read, side by side, (N, L, T E) -> the output (N, L, E)."""
        return self.out_proj(read)

    def learned_scalars(self) -> dict[str, Tensor]:
        """What a reader would like to follow over training, each (T, H), detached."""
        return {}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        query_offset: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query (N, L, E) to value (N, S, E) by key (N, S, E), or unbatched (L, E), (S, E).

        key_padding_mask: (N, S) or (S,); attn_mask: (L, S) or (N * H, L, S). Boolean: True = blocked; float:
        added to the logits. is_causal: block j > i, together with the other masks.
        query_offset: the position of the first query, where that of the first key is 0: in generation with a
        cache, of as many tokens as came before. `|i - j|`, clocks and `is_causal` count from it.
        Returns the output (N, L, E) and, with `need_weights`, the weights before dropout, the mean over
        timescales: (N, L, S), the mean over heads, or (N, H, L, S) without `average_attn_weights`.
        A query with no key to attend to gets a row of zero weights.
        Raises ValueError where shapes do not fit.
        """
        batched = query.dim() == 3
        masks = key_padding_mask, attn_mask, is_causal, query_offset
        query, key, value, mask = self._checked(query, key, value, *masks)
        heads, weights = attend(
            *self._project(query, key, value),
            self._score(query, key, mask),
            mask,
            dropout=self.dropout if self.training else 0.0,
            need_weights=need_weights,
        )
        read = heads.permute(0, 3, 1, 2, 4).flatten(2)  # (N, T, H, L, D) -> (N, L, T E)
        output = self.project_out(read).to(query.dtype)
        if weights is not None:
            weights = weights.mean(1).to(output.dtype)  # (N, T, H, L, S) -> (N, H, L, S)
            weights = weights.mean(1) if average_attn_weights else weights
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output, weights

    def attention_maps(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        query_offset: int = 0,
    ) -> Tensor:
        """The weights of every timescale and head, (N, T, H, L, S), float32; arguments as in `forward`."""
        masks = key_padding_mask, attn_mask, is_causal, query_offset
        query, key, _, mask = self._checked(query, key, key, *masks)
        q, k, _ = self._project(query, key, key)
        with without_autocast(q.device):
            dtype = torch.promote_types(q.dtype, torch.float32)
            return dense_weights(q.to(dtype), k.to(dtype), self._score(query, key, mask), mask)

    def _checked(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        query_offset: int,
    ) -> tuple[Tensor, Tensor, Tensor, Mask]:
        """Batched inputs and the merged mask; ValueError where a shape does not fit."""
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "nested tensors are not supported: use nn.TransformerEncoder(enable_nested_tensor=False)"
            )
        if query.dim() not in (2, 3) or key.dim() != query.dim() or value.dim() != query.dim():
            shapes = f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
            raise ValueError(f"query, key and value must all be (N, L, E) or all be (L, E), got {shapes}")
        if query.dim() == 2:
            if key_padding_mask is not None:
                if key_padding_mask.shape != key.shape[:1]:
                    expected, got = tuple(key.shape[:1]), tuple(key_padding_mask.shape)
                    raise ValueError(f"key_padding_mask must have shape {expected}, got {got}")
                key_padding_mask = key_padding_mask.unsqueeze(0)
            same_key, same_value = key is query, value is key  # self-attention is told by identity
            query = query.unsqueeze(0)
            key = query if same_key else key.unsqueeze(0)
            value = key if same_value else value.unsqueeze(0)
        batch, query_length, _ = query.shape
        of_keys = (batch, key.shape[1], self.embed_dim)
        for name, tensor, shape in (
            ("query", query, (batch, query_length, self.embed_dim)),
            ("key", key, of_keys),
            ("value", value, of_keys),
        ):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        sizes = batch, self.num_heads, query_length, key.shape[1]
        mask = merge_masks(key_padding_mask, attn_mask, is_causal, *sizes, query_offset)
        return query, key, value, mask

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, T', H, L, D), k and v (N, T', H, S, D), by one matrix product in self-attention."""
        if query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:
            weights = self.in_proj_weight.chunk(3)
            biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
            q, k, v = (F.linear(*args) for args in zip((query, key, value), weights, biases, strict=True))
        return self._split(q), self._split(k), self._split(v)

    def _split(self, x: Tensor) -> Tensor:
        """(N, L, T' E) -> (N, T', H, L, D)."""
        shape = (self.num_projections, self.num_heads, self.head_dim)
        return x.unflatten(-1, shape).permute(0, 2, 3, 1, 4)

    def _score(self, query: Tensor, key: Tensor, mask: Mask) -> Score:
        """The score with its tensors in float32 at least: masses and rates are small numbers that matter."""
        with without_autocast(query.device):
            score = self.score(query, key)
            clock = self.clock(key if mask.query_offset else query, key, mask.padding)
        if clock is not None and mask.query_offset:
            end = mask.query_offset + query.shape[1]
            if end > key.shape[1]:
                raise ValueError(
                    f"query_offset + L must be at most S = {key.shape[1]} where time passes at rates of "
                    f"tokens, got {end}: pass the keys of all tokens up to the last query"
                )
            clock = replace(clock, query=clock.query[..., mask.query_offset : end])
        return score if clock is None else replace(score, clock=clock)
