"""Find the modules whose weight the module around them reads, instead of calling them."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

from torch import nn

from .._modules import trials
from .._modules.calls import has_forward
from .._sites import swap
from .._sites.swap import plain_class
from ..names import last, parent
from . import watching
from .backbone import Backbone

ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
LOOK = ""
ALL = {"parameters", "named_parameters", "state_dict", "get_parameter"}
RAW = {*ALL, "_parameters"}
LOOKS = {"dtype", "device", "shape", "size", "requires_grad", "is_meta", "ndim"}  # no values


def weight_is_read(backbone: Backbone, where: str) -> bool:
    """True if the module around reads the weight of the module `where`, and does not call it.

    Its code is looked at. If it does both, in branches, say, the module around is run on shapes.
    """
    if not where:
        return False
    around = backbone.modules[parent(where)]
    read, used = _uses(_class_of(around))
    name = last(where)
    if name not in read & used:
        return name in read
    key = trials.facts(around)
    if key not in backbone.read:
        watch = watching.of_part(backbone, parent(where), sorted(read & used & {*around._modules}))
        found = set() if watch is None else {n for n, k in watch.read if k == "weight"}
        backbone.read[key] = found - (watch.called if watch is not None else set())
    return name in backbone.read[key]


def _class_of(module: nn.Module) -> Any:
    return plain_class(module) or type(module)


def may_be_read(backbone: Backbone, where: str) -> bool:
    """True if the code around the module `where` reads a weight of a module that it does not name.

    So it is with the items of a list, and with a function that is given a module.
    """
    if not where:
        return False
    around = next((m for m in [*backbone.chain(where)][1:] if has_forward(m)), None)
    if around is None:
        return False
    return _reads_unnamed(_class_of(around))


def _suspects(backbone: Backbone, names: Iterable[str]) -> list[str]:
    """Return the modules of `names` whose weight or bias other code may read, beside calling them.

    It may if its class's code reads a child of that name or asks for all parameters, or if some
    module holds the module or its parameters in a list, say, or under another name.
    """
    aside = _held_aside(backbone)
    found = []
    for name in names:
        module = backbone.modules[name]
        reads = {r for m in [*backbone.chain(name)][1:] for r in _may_read(_class_of(m))}
        held = aside & {id(module), *map(id, module._parameters.values())}
        if held or reads & {last(name), *ALL} or may_be_read(backbone, name):
            found.append(name)
    return found


def _held_aside(backbone: Backbone) -> set[int]:
    """Return the ids of modules and parameters that modules hold beside their own tables."""
    found = set()
    for module in backbone.modules.values():
        for key, value in module.__dict__.items():
            if key in ("_modules", "_parameters", "_buffers"):
                continue
            items = value.values() if isinstance(value, dict) else value
            several = isinstance(value, dict | list | tuple)
            found |= {
                id(item)
                for item in (items if several else (value,))
                if isinstance(item, nn.Module | nn.Parameter)
            }
    return found


def read_beside(backbone: Backbone, names: Iterable[str]) -> dict[str, set[str] | None]:
    """Return {module: the ones of "weight" and "bias" that other code computes with}.

    A module that shows its deltas to other code is there only if code computes with its weight or
    bias and has them otherwise, as from `named_parameters`. If no run on shapes tells, and the code
    of the module around reads the weight or bias by name, its value is None.
    """
    names = list(names)
    shown = {n for n in names if swap.weight_is_read(backbone.modules[n], False)}
    suspects = _suspects(backbone, [n for n in names if n not in shown])
    suspects += [n for n in shown if _may_read_raw(backbone, n)]
    whole = watching.of_backbone(backbone, suspects) if suspects else None
    found: dict[str, set[str] | None] = {}
    for name in suspects:
        watch, own = whole, name
        if name in shown and watch is None:
            continue
        if watch is None or not (name in watch.called or name in {n for n, _ in watch.read}):
            watch, own = watching.of_part(backbone, parent(name), [last(name)]), last(name)
        if watch is not None:
            found[name] = {key for n, key in watch.read if n == own}
        elif last(name) in _may_read(_class_of(backbone.modules[parent(name)])):
            found[name] = None
    return found


def _may_read_raw(backbone: Backbone, where: str) -> bool:
    """True if code around a module asks for its parameters otherwise than by attribute."""
    around = [_class_of(m) for m in [*backbone.chain(where)][1:]]
    return any(RAW & {*code.co_names} for cls in around for code in _codes(cls))


@functools.cache
def _reads_unnamed(cls: Any) -> bool:
    """True if code of a class, or a function beside it, reads a weight of an unnamed module."""
    codes = list(_codes(cls))
    beside = vars(sys.modules.get(cls.__module__, cls))
    functions = [beside.get(name) for code in codes for name in code.co_names]
    codes += [function.__code__ for function in functions if inspect.isfunction(function)]
    return any(_has_unnamed(list(dis.get_instructions(code))) for code in codes)


def _has_unnamed(steps: list[dis.Instruction]) -> bool:
    for number, step in enumerate(steps[:-1]):
        if step.argval != "weight" or steps[number + 1].argval in LOOKS:
            continue
        if step.opname == "LOAD_CONST":
            return True
        if step.opname in ATTRIBUTES:
            before = [each.argval for each in steps[max(0, number - 2) : number]]
            own = before[-1:] == ["self"]
            named = before[:1] == ["self"] and steps[number - 1].opname in ATTRIBUTES
            if not own and not named:
                return True
    return False


@functools.cache
def _may_read(cls: Any) -> set[str]:
    """Return the names of children whose weight or bias a class's code reads, and of `ALL`."""
    own = {name for name, key in _chains(cls) if key in ("weight", "bias")}
    return own.union(*(ALL & {*code.co_names} for code in _codes(cls)))


@functools.cache
def _uses(cls: Any) -> tuple[set[str], set[str]]:
    """Return the names of children whose `weight` a class's code reads, and of those it calls.

    A child that the code hands on, or asks for anything else, counts as called.
    """
    read: set[str] = set()
    used: set[str] = set()
    for name, key in _chains(cls):
        if key == "weight":
            read.add(name)
        elif key not in ("bias", LOOK):
            used.add(name)
    return read, used


def _chains(cls: Any) -> Iterator[tuple[str, str | None]]:
    """Yield (attribute, attribute of that one or None) wherever a class's code reads an attribute.

    The second is `LOOK` if the code looks at a weight or a bias, and at none of its values.
    """
    for code in _codes(cls):
        steps = list(dis.get_instructions(code))
        for number, step in enumerate(steps[:-1]):
            if step.opname not in ATTRIBUTES:
                continue
            after = steps[number + 1]
            beyond = steps[number + 2].argval if number + 2 < len(steps) else None
            asked = number > 1 and steps[number - 2].argval == "isinstance"
            if after.opname not in ATTRIBUTES:
                yield step.argval, None
            elif after.argval in ("weight", "bias") and (beyond in LOOKS or asked):
                yield step.argval, LOOK
            else:
                yield step.argval, after.argval


def _codes(cls: Any) -> Iterator[CodeType]:
    """Yield the code of a class's forward, of methods that it names, and of functions inside."""
    methods = {
        name: inspect.unwrap(value).__code__
        for base in reversed(cls.__mro__)
        for name, value in vars(base).items()
        if base.__module__ != nn.Module.__module__ and hasattr(inspect.unwrap(value), "__code__")
    }
    todo = [methods.pop("forward")] if "forward" in methods else []
    while todo:
        code = todo.pop()
        yield code
        todo += [const for const in code.co_consts if isinstance(const, CodeType)]
        todo += [methods.pop(name) for name in code.co_names if name in methods]
