"""`with` blocks that tell if nobody entered them: they do nothing then."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar

from .errors import UnusedWarning

P = ParamSpec("P")
Given = TypeVar("Given")


class Block(Generic[Given]):
    """What `with` takes.

    Args:
        inner: what it does.
        name: of the function that made it, for messages.
    """

    def __init__(self, inner: contextlib.AbstractContextManager[Given], name: str) -> None:
        self.inner, self.name, self.entered = inner, name, False

    def __enter__(self) -> Given:
        self.entered = True
        return self.inner.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.inner.__exit__(*error)

    def __del__(self) -> None:
        if not self.entered:
            warnings.warn(
                f"{self.name}() did nothing, because nobody entered it: with ...{self.name}(...):",
                UnusedWarning,
                stacklevel=2,
            )


def block(function: Callable[P, Iterator[Given]]) -> Callable[P, Block[Given]]:
    """Make of a function with one `yield` one that gives a `with` block."""
    make = contextlib.contextmanager(function)

    @functools.wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> Block[Given]:
        return Block(make(*args, **kwargs), function.__name__)

    return made
