"""A stream of PyTorch's random numbers for each purpose, which no other draw moves on.

with random_stream(device, seed, "dropout", epoch):
    ...                          # the same numbers each time, whatever was drawn before
"""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def random_stream(device: torch.device, *purpose: object) -> Iterator[None]:
    """Draw from PyTorch's generators as seeded by the purpose; the caller's draws go on as if nothing was."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        yield
