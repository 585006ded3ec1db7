"""A model's name with settings of its own, `gravitational,softening=1.0,normalization=force`.

    base, own = variant("multi_timescale,gammas=0.6:0.9:0.99")   # "multi_timescale", {"gammas": (...), ...}
    settings = variant_settings(name, settings)                  # the run's settings, with the model's own

The settings are those of ModelSettings about the mechanism, with the values that their options take; entries
of `gammas` are separated by a colon. The encoder's sizes are equal for all models, and no model's own.
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from command_line import InputError, choose, option_name
from experiment.transformer_classifier import ModelSettings

ENCODER = ("embed_dim", "num_heads", "num_layers", "feed_forward_dim", "match_parameters", "dropout")
OWN = tuple(field.name for field in dataclasses.fields(ModelSettings) if field.name not in ENCODER)
SYNTAX = "MODEL,setting=value,..."
_FLAGS = {"true": True, "false": False}
_KINDS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    int: ("a whole number", int),
    float: ("a number", float),
    bool: ("true or false", lambda text: _FLAGS[text]),
    str: ("a word", str),
    tuple[float, ...] | None: (
        "numbers separated by ':'",
        lambda text: tuple(float(entry) for entry in text.split(":")),
    ),
}


def variant(name: str) -> tuple[str, dict[str, Any]]:
    """The model without its settings, and these as given. Raises InputError for one that is none."""
    base, *pairs = name.split(",")
    own: dict[str, Any] = {}
    for pair in pairs:
        setting, equals, text = pair.partition("=")
        if setting in ENCODER:
            raise InputError(
                f"model {name}: {setting} is equal for all models of a comparison; set it for all with "
                f"{option_name(setting)}"
            )
        choose(setting, OWN, f"setting in model {name}:")
        if not equals or setting in own:
            raise InputError(f"model {name}: give {setting} once, as {setting}=value")
        what, read = _KINDS[typing.get_type_hints(ModelSettings)[setting]]
        try:
            own[setting] = read(text)
        except (KeyError, ValueError) as error:
            raise InputError(f"model {name}: {setting} must be {what}, got '{text}'") from error
    return base, own


def variant_settings(name: str, settings: ModelSettings) -> ModelSettings:
    """`settings` with the model's own in their place; gammas alone set the number of timescales too.

    Raises InputError where a value is not legal."""
    _, own = variant(name)
    if "gammas" in own:
        own = {"num_timescales": len(own["gammas"])} | own
    try:
        return dataclasses.replace(settings, **own)
    except InputError as error:
        raise InputError(f"model {name}: {error}") from error
