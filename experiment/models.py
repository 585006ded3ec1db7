"""The models of a comparison: a name, the factory behind it, and the settings of its own mechanism.

    model = Model.parse("gravitational,softening=0.01")       # InputError names the settings that there are
    attention = model.attention(ModelSettings())()            # nn.Module

A model is a factory in MODELS, or any class with the interface of `nn.MultiheadAttention(batch_first=True)`,
named as `package.module:Class`. Its settings are what its constructor's signature has beside that interface,
with their types and defaults; what they mean its docstring says in lines `name: text`.
"""

import collections.abc
import functools
import importlib
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from command_line import InputError, choose, first_line, nearest, option_name, too_large
from conventional_attention import ConventionalAttention
from gravitational_attention import GravitationalAttention
from gravitational_multi_timescale_attention import GravitationalMultiTimescaleAttention
from multi_timescale_attention import MultiTimescaleAttention
from tasks.task_data import TaskForm
from train_and_evaluate import ModelSettings, TransformerClassifier
from training.model_cost import count_parameters
from training.random_stream import random_stream

MODELS: dict[str, Callable[..., nn.Module]] = {
    "conventional": ConventionalAttention,
    "gravitational": GravitationalAttention,
    "multi_timescale": MultiTimescaleAttention,
    "gravitational_multi_timescale": GravitationalMultiTimescaleAttention,
    # A control, on request: is it the several timescales, or would any relative position do?
    "discounted": functools.partial(MultiTimescaleAttention, num_timescales=1, gammas=None, decoder="linear"),
    # A control: does a horizon for each head, log-spaced as ALiBi's slopes are, do as well as timescales?
    "per_head_decay": functools.partial(
        MultiTimescaleAttention, timescales="heads", num_timescales=None, decoder="linear", adaptive=False
    ),
    "adaptive": functools.partial(
        MultiTimescaleAttention,
        timescales="heads",
        num_timescales=None,
        decoder="linear",
        adaptive=True,
        learn_gammas=True,
        discount="weights",
    ),
}
COMPARED = ("conventional", "gravitational", "multi_timescale", "gravitational_multi_timescale")
SYNTAX = "MODEL,setting=value,..."
ENCODERS = ("embed_dim", "num_heads")  # the same for all models: options of the run
INTERFACE = (*ENCODERS, "dropout", "bias", "batch_first", "device", "dtype")
EMPTY = inspect.Parameter.empty
MATCHED_WITHIN = 0.01  # of the parameters of the largest model


class MechanismSetting(NamedTuple):
    """An argument of a mechanism's constructor that is its own. help: empty where nothing says it."""

    hint: Any
    default: Any
    help: str


@dataclass(frozen=True)
class Model:
    """A model of a comparison.

    name: as it was given, and is shown. arguments: the mechanism's own settings, defaults included.
    """

    name: str
    factory: Callable[..., nn.Module]
    arguments: dict[str, Any]

    @classmethod
    def parse(cls, name: str) -> "Model":
        """The model of a name, which may go on with settings: `name,setting=value,...`."""
        base, *pairs = name.split(",")
        factory = _find_factory(base)
        known = mechanism_settings(factory)
        given: dict[str, Any] = {}
        for pair in pairs:
            key, equals, text = pair.partition("=")
            if key not in known:
                raise InputError(f"model {name}: {_why_unknown(key, factory, known)}")
            if not equals or key in given:
                raise InputError(f"model {name}: give {key} once, as {key}=value")
            try:
                given[key] = _read(text, known[key])
            except ValueError as error:
                raise InputError(f"model {name}: {key} must be {error}, got '{text}'") from error
        arguments = {key: given.get(key, setting.default) for key, setting in known.items()}
        if lacking := [key for key, value in arguments.items() if value is EMPTY]:
            raise InputError(f"model {name}: it needs {lacking[0]}: give {base},{lacking[0]}=value")
        return cls(name, factory, arguments)

    def attention(self, settings: ModelSettings) -> functools.partial[nn.Module]:
        """The factory of one layer's attention. Attention weights are not dropped: the settings' dropout is
        the encoder's."""
        offered = {"dropout": 0.0, "batch_first": True} | {name: getattr(settings, name) for name in ENCODERS}
        taken = inspect.signature(self.factory).parameters
        shared = {key: value for key, value in offered.items() if key in taken}
        return functools.partial(self.factory, **shared, **self.arguments)

    @property
    def class_name(self) -> str:
        """The full name of the class behind the model."""
        target, _ = _unwrapped(self.factory)
        return f"{target.__module__}.{target.__qualname__}"

    def check(self, settings: ModelSettings) -> None:
        """Build the attention and attend over three tokens; InputError where that does not work."""
        x = torch.zeros(2, 3, settings.embed_dim)
        padding = torch.tensor([[False, False, True], [False, False, False]])
        try:
            with random_stream(torch.device("cpu"), "check"), torch.no_grad():
                attention = self.attention(settings)()
                if any(map(nn.parameter.is_lazy, attention.parameters())):
                    raise TypeError("its lazy layers have no parameters to count and train: give their sizes")
                output, _ = attention(x, x, x, key_padding_mask=padding, need_weights=False)
                shape = tuple(output.shape)
        except Exception as error:
            raise InputError(f"model {self.name}: {first_line(error)}") from error
        if shape != tuple(x.shape):
            expected = f"its output must have the query's shape {tuple(x.shape)}"
            raise InputError(f"model {self.name}: {expected}, got {shape}")


def _find_factory(base: str) -> Callable[..., nn.Module]:
    if ":" not in base:
        return MODELS[choose(base, MODELS, "model")]
    module_name, _, class_name = base.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(f"model {base}: {module_name} cannot be imported: {first_line(error)}") from error
    factory = getattr(module, class_name, None)
    if not callable(factory):
        hint = nearest(class_name, dir(module))
        raise InputError(f"model {base}: {module_name} has no class {class_name}; {hint}".strip("; "))
    return factory


def _unwrapped(factory: Callable[..., nn.Module]) -> tuple[Any, Mapping[str, Any]]:
    """The class behind a factory, and the arguments that the factory has fixed."""
    if isinstance(factory, functools.partial):
        return factory.func, factory.keywords
    return factory, {}


def mechanism_settings(factory: Callable[..., nn.Module]) -> dict[str, MechanismSetting]:
    """By name, what can be set of a mechanism: its constructor's arguments beside those of the interface."""
    target, fixed = _unwrapped(factory)
    parameters = inspect.signature(target).parameters
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:  # an annotation that names what is imported for type checkers only
        found = {name: parameter.annotation for name, parameter in parameters.items()}
        hints = {
            name: hint for name, hint in found.items() if not isinstance(hint, str) and hint is not EMPTY
        }
    return {
        name: MechanismSetting(hints.get(name), parameter.default, _documented(target, name))
        for name, parameter in parameters.items()
        if name not in (*INTERFACE, *fixed)
        and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }


def _documented(target: Any, name: str) -> str:
    """What a docstring says of an argument, in a line `name: text`, also `name, other: text`, up to the
    first full stop."""
    pattern = rf"^\s*(?:\w+, )*{name}(?:, \w+)*: ((?:.|\n)+?)(?:\.\s|\n\s*\n|\Z)"
    found = re.search(pattern, target.__doc__ or "", re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def _why_unknown(key: str, factory: Callable[..., nn.Module], known: Iterable[str]) -> str:
    if key in ENCODERS:
        return f"{key} is the same for all models of a comparison; set it for all with {option_name(key)}"
    why = "is fixed in this model" if key in (*_unwrapped(factory)[1], *INTERFACE) else "is no setting of it"
    return f"{key or 'an empty entry'} {why}: {nearest(key, known)}(it has {', '.join(known) or 'none'})"


def _read(text: str, setting: MechanismSetting) -> Any:
    """The value that a setting's text stands for; ValueError tells what it must be."""
    hint = setting.hint
    if hint is None:  # not annotated: of the type that its default has
        hint = str if setting.default in (None, EMPTY) else type(setting.default)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        choices = typing.get_args(hint)
        if types.NoneType in choices and text == "none":
            return None
        hint = next(choice for choice in choices if choice is not types.NoneType)
    if typing.get_origin(hint) in (tuple, list, collections.abc.Sequence):
        entry = typing.get_args(hint)[0]
        try:
            return tuple(_value(part, entry) for part in text.split(":"))
        except ValueError as error:
            raise ValueError(f"{error} for each entry, separated by ':'") from error
    return _value(text, hint)


def _value(text: str, hint: Any) -> Any:
    if typing.get_origin(hint) is Literal:
        named = {str(choice): choice for choice in typing.get_args(hint)}
        if text not in named:
            raise ValueError(f"one of {', '.join(named)}: {nearest(text, named)}".rstrip(": "))
        return named[text]
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError("true or false")
        return text == "true"
    if hint not in (int, float, str):
        raise ValueError(f"of a type that a name can hold, and it is {getattr(hint, '__name__', hint)}")
    try:
        value = hint(text)
    except ValueError as error:
        raise ValueError("a whole number" if hint is int else "a number") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a finite number")
    if allowed := too_large(value):
        raise ValueError(allowed)
    return value


def build(
    model: Model, settings: ModelSettings, vocab_size: int, num_classes: int, form: TaskForm | None = None
) -> TransformerClassifier:
    """The encoder with the model's attention."""
    attention = model.attention(settings)
    return TransformerClassifier(attention, vocab_size, num_classes, settings, form=form or TaskForm())


def matched_settings(
    models: Iterable[Model], settings: ModelSettings, vocab_size: int, num_classes: int
) -> dict[str, ModelSettings]:
    """For each model the settings with a feed-forward width that gives it the parameters of the largest,
    within 1 %. The encoder's parameters are linear in that width, and attention does not see it.

    Raises InputError where one step of the width is more than that."""

    def parameters(model: Model, chosen: ModelSettings) -> int:
        return count_parameters(build(model, chosen, vocab_size, num_classes))

    by_name = {model.name: model for model in models}
    counts = {name: parameters(model, settings) for name, model in by_name.items()}
    target = max(counts.values())
    wider = replace(settings, feed_forward_dim=settings.feed_forward_dim + 1)
    matched = {}
    for name, model in by_name.items():
        step = parameters(model, wider) - counts[name]
        width = settings.feed_forward_dim + round((target - counts[name]) / step)
        matched[name] = replace(settings, feed_forward_dim=width)
        found = parameters(model, matched[name])
        if abs(found - target) > MATCHED_WITHIN * target:
            raise InputError(
                f"--match-parameters: {name} cannot be matched: {found} parameters instead of {target}; "
                "choose a larger model"
            )
    return matched
