"""Look if the code of a module's class may write to the tensors that it is given."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Collection, Iterator
from types import CodeType
from typing import Any

from torch import nn

ENTRIES = ("forward", "__call__", "_call_impl")
NO_TENSORS = ("BUILD_TUPLE", "BUILD_LIST", "BUILD_STRING")  # what lists and texts grow by


def codes_of(
    cls: Any, beneath: bool = False, entries: Collection[str] = ("forward",)
) -> Iterator[CodeType]:
    """Yield the code of a class's forward, of methods that it names, and of functions inside.

    Args:
        beneath: methods that others override too, as `super()` may call them.
        entries: the methods to begin with.
    """
    methods: dict[str, list[CodeType]] = {}
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if base.__module__ != nn.Module.__module__ and (beneath or name not in methods):
                code = getattr(inspect.unwrap(value), "__code__", None)
                methods.setdefault(name, []).extend([code] if code is not None else [])
    todo = [code for name in entries for code in methods.pop(name, ())]
    while todo:
        code = todo.pop()
        yield code
        todo += [const for const in code.co_consts if isinstance(const, CodeType)]
        todo += [each for name in code.co_names for each in methods.pop(name, ())]


def writes(cls: Any) -> bool:
    """True if the code of a class stores to items or computes in place, which may be its input's.

    It is looked at once for each class and forward.
    """
    return _writes(cls, getattr(cls, "forward", None))


@functools.cache
def _writes(cls: Any, _: Any) -> bool:
    return any(map(_code_writes, codes_of(cls, entries=ENTRIES)))


@functools.cache
def _code_writes(code: CodeType) -> bool:
    steps = list(dis.get_instructions(code))
    return any(_step_writes(*pair) for pair in itertools.pairwise(steps))


def _step_writes(before: dis.Instruction, step: dis.Instruction) -> bool:
    """True if a step may write to a tensor: by an item, in place, or by a method such as `mul_`."""
    name = step.argval
    if step.opname in ("LOAD_METHOD", "LOAD_ATTR"):
        return name.endswith("_") and not name.endswith("__")
    if step.opname == "STORE_SLICE":
        return True
    text = before.opname == "LOAD_CONST" and type(before.argval) is str
    if step.opname == "STORE_SUBSCR":
        return not text  # a key
    in_place = step.opname == "BINARY_OP" and step.argrepr.endswith("=")
    return in_place and not text and before.opname not in NO_TENSORS
