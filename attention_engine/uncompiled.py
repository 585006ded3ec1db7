"""Calls that torch.compile leaves as they are: `uncompiled.call(function, *arguments)`.

`call` is made when it is first asked for, since to load the compiler takes a second.
"""

from typing import Any

import torch


def __getattr__(name: str) -> Any:
    if name != "call":
        raise AttributeError(name)
    globals()[name] = torch.compiler.disable(lambda function, *arguments: function(*arguments))
    return globals()[name]
