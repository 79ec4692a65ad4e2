"""`with` blocks that warn if they are never entered: then they do nothing."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Generic, ParamSpec, TypeVar, cast

from ..errors import DeltaError, UnusedWarning, users_line, warn

P = ParamSpec("P")
Given = TypeVar("Given")
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


class WithBlock(contextlib.ContextDecorator, Generic[Given]):
    """A context manager; as a decorator it is entered again for each call of the function.

    Args:
        make: makes the context manager that does the work.
        name: the name of the function that returned this block, for messages.
    """

    entered = True  # torch.compile makes blocks without __init__
    used = False

    def __init__(
        self, make: Callable[[], contextlib.AbstractContextManager[Given]], name: str
    ) -> None:
        self.line = users_line()
        self.inner, self.make, self.name, self.entered = make(), make, name, False

    def __call__(self, function: Decorated) -> Decorated:
        """Return a function that runs inside such a block, a coroutine function too.

        Raises:
            DeltaError: it is a generator function, or the result of a call is a generator: it would
                hand the block to whoever asks for its next value.
        """
        self.entered = True
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise self._refusal(function)

        @functools.wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            with self._recreate_cm():
                result = function(*args, **kwargs)
            if inspect.isgenerator(result) or inspect.isasyncgen(result):
                raise self._refusal(function)
            return self._awaiting(result) if inspect.iscoroutine(result) else result

        @functools.wraps(function)
        async def later(*args: Any, **kwargs: Any) -> Any:
            with self._recreate_cm():
                return await function(*args, **kwargs)

        is_later = inspect.iscoroutinefunction(function)
        return cast(Decorated, later if is_later else inner)

    async def _awaiting(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        with self._recreate_cm():
            return await coroutine

    def _refusal(self, function: Any) -> DeltaError:
        what = getattr(function, "__qualname__", repr(function))
        return DeltaError(
            f"{self.name}() cannot decorate {what}, a generator, whose caller would run inside the "
            f"block, too: write `with ....{self.name}(...):` in it, around each step and never "
            "around a yield"
        )

    def _recreate_cm(self) -> WithBlock[Given]:
        self.entered = True
        return WithBlock(self.make, self.name)

    def __enter__(self) -> Given:
        if self.used:
            raise DeltaError(
                f"this block of {self.name}() was entered before, and each is entered once: write "
                f"`with ....{self.name}(...):` where you need it again"
            )
        self.entered = self.used = True
        return self.inner.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self.inner.__exit__(*error)

    def __del__(self) -> None:
        if not self.entered:
            warn(
                f"{self.name}() did nothing, because nobody entered it: write `with` before it",
                UnusedWarning,
                self.line,
            )


def with_block(function: Callable[P, Iterator[Given]]) -> Callable[P, WithBlock[Given]]:
    """Turn a function with one `yield` into a function that returns a `with` block."""
    make = contextlib.contextmanager(function)

    @functools.wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> WithBlock[Given]:
        return WithBlock(functools.partial(make, *args, **kwargs), function.__name__)

    return made
