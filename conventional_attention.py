"""Conventional attention: softmax of scaled dot products (Vaswani et al. 2017, "Attention is all you need").

    attention = ConventionalAttention(embed_dim=128, num_heads=4)
    output, weights = attention(x, x, x, key_padding_mask=mask)

Symbols and masks: see attention_module.py.
"""

from typing import Any

from torch import Tensor

from attention_engine.attention_scores import DotProduct
from attention_module import AttentionModule


class ConventionalAttention(AttentionModule):
    """`output_i = sum_j softmax_j(q_i . k_j / sqrt(D)) v_j`: softmax attention itself, the baseline.

    In plain PyTorch, for one head::

        q, k, v = x @ W_q.T + b_q, x @ W_k.T + b_k, x @ W_v.T + b_v
        weights = (q @ k.mT / D**0.5).softmax(-1)
        output = weights @ v @ W_o.T + b_o

    Parameters are named as in `nn.MultiheadAttention`, whose state dict can be loaded.

    embed_dim: E, a positive multiple of num_heads. num_heads: H.
    dropout: probability of dropping an attention weight in training, in [0, 1); default 0.
    bias: whether the four projections have biases.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        *,
        batch_first: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, batch_first=batch_first, device=device, dtype=dtype
        )
        self.out_proj = self.make_out_proj(embed_dim, bias, device, dtype)

    def score(self, query: Tensor, key: Tensor) -> DotProduct:
        return DotProduct(scale=self.head_dim**-0.5)
