"""Models as a user may name them, `user_models:Sleepy`: some train like any other, some end badly.

They are themselves only on real text: a run's check has three tokens.
"""

import os
import signal
import time
from typing import Any

from torch import Tensor, nn

from conventional_attention import ConventionalAttention

not_a_class = 3


class Mine(nn.MultiheadAttention):
    """Trains like any other."""

    def forward(self, query: Tensor, *rest: Any, **options: Any) -> Any:
        if query.shape[1] > 3:
            self.act()
        return super().forward(query, *rest, **options)

    def act(self) -> None:
        """What this model does before each step."""


class Broken(Mine):
    def act(self) -> None:
        raise RuntimeError("too long for me")


class Moody(Mine):
    """Fails as long as the environment says so."""

    def act(self) -> None:
        if os.environ.get("MOOD") == "bad":
            raise RuntimeError("not today")


class Exploding(Mine):
    def forward(self, query: Tensor, *rest: Any, **options: Any) -> Any:
        output, weights = super().forward(query, *rest, **options)
        return (output * float("nan") if self.training and query.shape[1] > 3 else output), weights


class Terminated(Mine):
    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


class Narrow(Mine):
    def forward(self, query: Tensor, *rest: Any, **options: Any) -> Any:
        return query[..., :1], None


class Lazy(Mine):
    def __init__(self, embed_dim: int, num_heads: int, batch_first: bool = True) -> None:
        super().__init__(embed_dim, num_heads, batch_first=batch_first)
        self.extra = nn.LazyLinear(embed_dim)


class Sleepy(ConventionalAttention):
    """Sleeps in each training step, so that a run lasts long enough to be stopped within."""

    def forward(self, query: Tensor, *rest: Any, **options: Any) -> Any:
        if self.training and query.shape[1] > 3:
            time.sleep(float(os.environ.get("SLEEP", "0")))
        return super().forward(query, *rest, **options)
