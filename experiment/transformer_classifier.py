"""The encoder that every attention mechanism is compared in.

    model = TransformerClassifier(make_attention, vocab_size=257, num_classes=2, settings=ModelSettings())
    logits = model(tokens, key_padding_mask)         # (N, L), (N, L) True = pad -> (N, num_classes)

The mechanism is handed in as a factory of modules with the interface of `nn.MultiheadAttention(
batch_first=True)`; nothing here knows which it is. With one seed, all other starting weights are equal.

Symbols: N batch, L length, E embed_dim, C num_classes. True in a boolean mask means blocked.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from command_line import check_settings, setting

AttentionFactory = Callable[[], nn.Module]


@dataclass(frozen=True)
class ModelSettings:
    """Model

    The encoder's sizes are for every model; the settings below them reach the mechanisms that have them."""

    embed_dim: int = setting(128, "width of the model, a multiple of --num-heads", minimum=1)
    num_heads: int = setting(4, "attention heads", minimum=1)
    num_layers: int = setting(2, "encoder layers", minimum=1)
    feed_forward_dim: int = setting(512, "hidden width of the feed-forward blocks", minimum=1)
    match_parameters: bool = setting(
        False, "widen the feed-forward blocks until each model has the parameters of the largest"
    )
    dropout: float = setting(
        0.1, "dropout on embedding, residual branches and feed-forward", minimum=0, below=1
    )
    num_timescales: int = setting(3, "timescales of the multi-timescale models", minimum=1)
    gammas: tuple[float, ...] | None = setting(
        None, "discount per token of each timescale at the start, e.g. 0.9 0.99 0.999", above=0, below=1
    )
    learn_gammas: bool = setting(True, "train the discounts")
    softening: float = setting(0.1, "softening of the squared distance in gravity", above=0)
    distance_power: float = setting(2.0, "power of the distance in gravity", above=0)
    normalization: str = setting("softmax", "how forces become weights", choices=("softmax", "force"))
    decoder: str = setting("laplace", "how timescales are joined", choices=("laplace", "linear", "mlp"))
    discount: str = setting(
        "weights",
        "what the discounts multiply; logits, for comparison, leaves far tokens the weight e^0",
        choices=("weights", "logits"),
    )

    def __post_init__(self) -> None:
        check_settings(self)


@contextlib.contextmanager
def random_stream(device: torch.device, *purpose: object) -> Iterator[None]:
    """Draw from PyTorch's generators as seeded by the purpose; the caller's draws go on as if nothing was."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield


def sinusoidal_positions(length: int, width: int, device: torch.device) -> Tensor:
    """(L, E): sines and cosines of wavelengths from 2 pi to 10,000 * 2 pi (Vaswani et al. 2017, 3.5)."""
    position = torch.arange(length, device=device).float()
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=device) / width)
    angle = position[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width]


class EncoderLayer(nn.Module):
    """`x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

    Deviation from the 2017 encoder: the norm is before each block, not after the sum ("pre-norm"), which
    trains without a learning rate warm-up.
    """

    def __init__(
        self, make_attention: AttentionFactory, settings: ModelSettings, purpose: tuple[object, ...]
    ) -> None:
        super().__init__()
        cpu = torch.device("cpu")
        # Streams of their own: how much a mechanism draws must not shift the weights of anything else.
        with random_stream(cpu, *purpose, "attention"):
            self.attention = make_attention()
        with random_stream(cpu, *purpose, "feed-forward"):
            self.feed_forward = nn.Sequential(
                nn.Linear(settings.embed_dim, settings.feed_forward_dim),
                nn.ReLU(),
                nn.Dropout(settings.dropout),
                nn.Linear(settings.feed_forward_dim, settings.embed_dim),
            )
        self.attention_norm = nn.LayerNorm(settings.embed_dim)
        self.feed_forward_norm = nn.LayerNorm(settings.embed_dim)
        self.dropout = nn.Dropout(settings.dropout)

    def forward(self, x: Tensor, key_padding_mask: Tensor) -> Tensor:
        y = self.attention_norm(x)
        y, _ = self.attention(y, y, y, key_padding_mask=key_padding_mask, need_weights=False)
        x = x + self.dropout(y)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class TransformerClassifier(nn.Module):
    """Token and sinusoidal position embedding, encoder layers, a final norm, mean pooling, a linear map.

    Deviations from the 2017 encoder: pre-norm, hence the final norm; and it classifies, from the mean of
    the final vectors over the true tokens. Neither the amount nor the content of padding changes a logit.

    make_attention: called once per layer; returns a module that is called as
        `module(x, x, x, key_padding_mask=mask, need_weights=False)` and returns `(output, None)`.
    vocab_size: token ids are 0 (pad) to vocab_size - 1. num_classes: C.
    seed: starting weights are drawn from (seed, part), each part's apart from the others'.
    """

    def __init__(
        self,
        make_attention: AttentionFactory,
        vocab_size: int,
        num_classes: int,
        settings: ModelSettings,
        seed: int = 0,
    ) -> None:
        super().__init__()
        cpu = torch.device("cpu")
        self.embed_dim = settings.embed_dim
        with random_stream(cpu, seed, "embedding"):
            self.embedding = nn.Embedding(vocab_size, settings.embed_dim)
        self.layers = nn.ModuleList(
            EncoderLayer(make_attention, settings, (seed, "layer", index))
            for index in range(settings.num_layers)
        )
        self.final_norm = nn.LayerNorm(settings.embed_dim)
        self.dropout = nn.Dropout(settings.dropout)
        with random_stream(cpu, seed, "classifier"):
            self.classifier = nn.Linear(settings.embed_dim, num_classes)

    @property
    def attentions(self) -> list[nn.Module]:
        """The attention of each layer."""
        return [layer.get_submodule("attention") for layer in self.layers]

    def forward(self, tokens: Tensor, key_padding_mask: Tensor) -> Tensor:
        """tokens (N, L) int64, key_padding_mask (N, L) bool, True = pad -> logits (N, C) in float32."""
        positions = sinusoidal_positions(tokens.shape[1], self.embed_dim, tokens.device)
        x = self.dropout(self.embedding(tokens) + positions)
        for layer in self.layers:
            x = layer(x, key_padding_mask)
        x = self.final_norm(x).float().masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
        true_tokens = (~key_padding_mask).sum(1, keepdim=True).clamp(min=1)
        # In float32: in bf16 the logits of two classes are often equal.
        with torch.autocast(tokens.device.type, enabled=False):
            return self.classifier(x.sum(1) / true_tokens)  # (N, L, E) -> (N, C)
