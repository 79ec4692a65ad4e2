"""`opendelta.utils.signature` of OpenDelta 0.3: the arguments of a function."""

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any, NamedTuple

__all__ = ["get_arg_names", "get_arg_names_inside_func", "signature"]


class Signature(NamedTuple):
    """Names of arguments, defaults of the last ones, and the names after * and **."""

    args: list[str]
    defaults: list[Any] | None
    varargs: str | None
    keywords: str | None


def signature(f: Callable[..., Any]) -> Signature:
    """Return the arguments of `f` that are taken by position."""
    every = inspect.signature(f).parameters.values()
    plain = [p for p in every if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    names = {p.kind: p.name for p in every}
    return Signature(
        [p.name for p in plain],
        [p.default for p in plain if p.default is not Parameter.empty] or None,
        names.get(Parameter.VAR_POSITIONAL),
        names.get(Parameter.VAR_KEYWORD),
    )


def get_arg_names(f: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments of `f`, without `self`."""
    return [name for place, name in enumerate(signature(f).args) if place or name != "self"]


def get_arg_names_inside_func(func: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments in the code of `func`, without `self`."""
    names = func.__code__.co_varnames[: func.__code__.co_argcount]
    return names[1:] if names[:1] == ("self",) else names
