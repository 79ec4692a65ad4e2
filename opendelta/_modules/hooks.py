"""Find hooks of somebody's own in which a trial fails, and take them off for it."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import traceback
from collections.abc import Collection, Iterable, Iterator
from types import CodeType
from typing import Any

from torch import nn

from .writing import LIBRARIES, package_of

OTHERS = ("opendelta", "accelerate", "deepspeed")  # what their hooks do is put back by others
BEFORE, AFTER = "_forward_pre_hooks", "_forward_hooks"


def is_users(hook: Any) -> bool:
    """True if a hook is of none of the libraries whose hooks are known."""
    return package_of(hook) not in (*LIBRARIES, *OTHERS)


def tables_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    """Yield the tables of a module's forward hooks."""
    yield from (t for key in (BEFORE, AFTER) if (t := module.__dict__.get(key)))


def raising(modules: Iterable[nn.Module], error: BaseException) -> set[CodeType]:
    """Return the code of users' hooks on `modules` in which an error was raised.

    Of those alone that return nothing, as far as their code tells: the others may change widths.
    """
    ran = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    hooks = [hook for module in modules for table in tables_of(module) for hook in table.values()]
    found = {_code(hook) for hook in hooks if is_users(hook)} & ran
    return {code for code in found if code is not None and _returns_nothing(code)}


def take_off(modules: Iterable[nn.Module], codes: Collection[CodeType]) -> None:
    """Take hooks with such code off `modules`."""
    for table in (table for module in modules for table in tables_of(module) if codes):
        for key in [key for key, hook in table.items() if _code(hook) in codes]:
            del table[key]


def _code(hook: Any) -> CodeType | None:
    while isinstance(hook, functools.partial):
        hook = hook.func
    function = hook if inspect.isroutine(hook) else type(hook).__call__
    return getattr(inspect.unwrap(function), "__code__", None)


def _returns_nothing(code: CodeType) -> bool:
    """True if code returns None, or is a lambda, which may."""
    steps = [*dis.get_instructions(code)]
    out = [one for one, step in itertools.pairwise(steps) if step.opname == "RETURN_VALUE"]
    out += [step for step in steps if step.opname == "RETURN_CONST"]
    nothing = all(step.opname.endswith("_CONST") and step.argval is None for step in out)
    return code.co_name == "<lambda>" or nothing
