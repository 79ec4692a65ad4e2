"""Errors for names of OpenDelta 0.3 that have no counterpart."""

from collections.abc import Callable, Mapping
from typing import NoReturn


def refusal(name: str, instead: str) -> ImportError:
    """Return the error for a module or name of OpenDelta 0.3, with what replaces it."""
    return ImportError(f"{name} of OpenDelta 0.3 is gone: {instead}", name=name)


def refuses(module: str, names: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """Return a `__getattr__` for a module that lacks some names.

    Args:
        module: the module's name.
        names: {name: what to use in its place}.
    """

    def __getattr__(name: str) -> NoReturn:
        if name in names:
            raise refusal(f"{module}.{name}", names[name])
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__
