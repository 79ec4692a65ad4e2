"""Look if the code of a module's class may write to the tensors that it is given."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ..names import SLOT

ENTRIES = ("forward", "__call__", "_call_impl")
CALL, CALL_IMPL = nn.Module.__call__, nn.Module._call_impl
# Their forwards write to no input, but for what has an option `inplace`, or does so in its code.
LIBRARIES = {"torch", "torchvision", "timm", "transformers", "bitsandbytes", "torchao", "optimum"}
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


def may_write(module: nn.Module) -> bool:
    """True if a forward of somebody's own, of TorchScript or in place may run in a module."""
    cls: Any = type(module)
    forward = getattr(cls, "forward", None)  # a script's class has none
    if module.__dict__.get("inplace", False) or _class_may_write(cls, forward):
        return True
    return any(
        _is_changed(child) or may_write(child)
        for key, child in module._modules.items()
        if key != SLOT and child is not None
    )


@functools.cache
def _class_may_write(cls: Any, forward: Any) -> bool:
    """True if the code of a class is somebody's own, stores to items or computes in place.

    Args:
        forward: that of the class now.
    """
    package = "" if forward is None else package_of(inspect.unwrap(forward))
    if package not in LIBRARIES:
        return True
    return package != "torch" and any(map(_code_writes, codes_of(cls, entries=ENTRIES)))


def _is_changed(child: nn.Module) -> bool:
    """True if code of somebody's own may run around the forward of a class, or in its place."""
    own, cls = child.__dict__, type(child)
    if "forward" in own:
        return True
    if cls.__call__ is not CALL and package_of(cls.__call__) not in LIBRARIES:
        return True
    if cls._call_impl is not CALL_IMPL and package_of(cls._call_impl) not in LIBRARIES:
        return True
    hooks = (*own["_forward_pre_hooks"].values(), *own["_forward_hooks"].values())
    return any(package_of(hook) not in (*LIBRARIES, "opendelta") for hook in hooks)


@functools.cache
def words_of(code: CodeType) -> set[str]:
    """Return the names and the constants in a code, as texts, with those of functions inside."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return {*code.co_names, *map(str, code.co_consts)}.union(*map(words_of, inner))


def package_of(function: Any) -> str:
    """Return the first word of the name of the module in which a function is, or a class."""
    while isinstance(function, functools.partial):
        function = function.func
    return (getattr(function, "__module__", None) or "").partition(".")[0]


def through(
    pairs: Sequence[tuple[Tensor, Tensor]], call: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    """Run `call`, and write to tensors what it writes to others that it is given in their place.

    Args:
        pairs: a tensor, and the one in its place; equal ones are left alone.
    """
    if torch.compiler.is_compiling():
        return call(*args, **kwargs)
    begun = [(x, new, _state_of(new)) for x, new in pairs if new is not x]
    out = call(*args, **kwargs)
    for x, new, before in begun:
        if _is_written(new, before):
            x.copy_(new)
    return out


def _state_of(tensor: Tensor) -> Any:
    return tensor.clone() if tensor.is_inference() else tensor._version


def _is_written(tensor: Tensor, before: Any) -> bool:
    if isinstance(before, Tensor):
        return not torch.equal(tensor, before)
    return tensor._version != before
