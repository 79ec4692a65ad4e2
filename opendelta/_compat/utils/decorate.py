"""`opendelta.utils.decorate` of OpenDelta 0.3."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from opendelta._compat.gone import refuses

__all__ = ["decorate"]
__getattr__ = refuses(__name__, {"fix": "use inspect.signature(function).bind(*args, **kwargs)"})


def decorate(
    func: Callable[..., Any],
    caller: Callable[..., Any],
    extras: Sequence[Any] = (),
    kwsyntax: bool = False,
) -> Callable[..., Any]:
    """Return a function with the name and signature of `func` that calls `caller`.

    Of a bound method a function is made that takes `self` first, to be bound again by `__get__`.

    Args:
        caller: takes `func`, the `extras`, and then the arguments of a call.
        extras: values that `caller` takes before the arguments.
        kwsyntax: leave keyword arguments as they are given. False: pass them by position.
    """
    plain = getattr(func, "__func__", func)
    arguments = inspect.signature(plain)

    @functools.wraps(func)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        if not kwsyntax:
            bound = arguments.bind(*args, **kwargs)
            args, kwargs = bound.args, bound.kwargs
        return caller(func, *extras, *args, **kwargs)

    decorated.__signature__ = arguments  # type: ignore[attr-defined]
    return decorated
