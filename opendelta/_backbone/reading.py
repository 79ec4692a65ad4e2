"""Find the modules whose weight the module around them reads, instead of calling them."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from .._modules import trials
from .._modules.calls import has_forward
from .._modules.holding import held_by
from .._sites import swap
from .._sites.swap import plain_class
from ..names import join, last, parent
from . import watching
from .backbone import Backbone
from .branches import LIBRARIES

ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
LOOK = ""
TABLES = ("_modules", "_parameters", "_buffers")
ALL = {"parameters", "named_parameters", "state_dict", "get_parameter"}
ANY = {*ALL, "forward"}  # a class's, as in `nn.Linear.forward(module, x)`
RAW = {*ALL, "_parameters", "functional_call"}
READ = {*RAW, "weight", "bias"}
LOOKS = {"dtype", "device", "shape", "size", "requires_grad", "is_meta", "ndim"}  # no values


def weight_is_read(backbone: Backbone, where: str) -> bool:
    """True if the module around reads the weight of the module `where`, and does not call it.

    Its code is looked at. If it does both, in branches, say, a run on shapes tells.
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
        both = sorted(read & used & {*around._modules})
        watch = watching.of_children(backbone, [join(parent(where), each) for each in both])
        found = set() if watch is None else {n for n, k in watch.read if k == "weight"}
        found -= set() if watch is None else watch.called
        backbone.read[key] = set(map(last, found))
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


def suspects(backbone: Backbone, names: Iterable[str]) -> list[str]:
    """Return the modules of `names` that other code may use otherwise than by calling them.

    It may if its class's code reads the weight or bias of a child of that name, asks for all
    parameters or calls a class's forward, or if something else than the tables of a module holds
    the module or its parameters. Of a module that shows its deltas, parameters alone count.
    """
    names = list(names)
    aside = _held_aside(backbone) if names else set()
    found = []
    for name in names:
        module = backbone.modules[name]
        shown = swap.weight_is_read(module, False)
        own = {id(parameter) for parameter in module._parameters.values()}
        if shown:
            suspect = bool(aside & own) or _may_read_raw(backbone, name)
        else:
            suspect = bool(aside & {id(module), *own}) or code_may_read(backbone, name)
        if suspect:
            found.append(name)
    return found


def code_may_read(backbone: Backbone, where: str) -> bool:
    """True if code of the classes around a module may use it otherwise than by calling it."""
    reads = {r for m in [*backbone.chain(where)][1:] for r in _may_read(_class_of(m))}
    named = bool(reads & {last(where), *ANY})
    return named or may_be_read(backbone, where) or _hook_may_read(backbone, where)


def _hook_may_read(backbone: Backbone, where: str) -> bool:
    """True if a hook on a module, or on one around it, names a weight in its code.

    Functions that it calls by name are looked at too.
    """
    for module in backbone.chain(where):
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            function = _function_of(hook)
            if function is not None and READ & _named_in(function):
                return True
    return False


def _function_of(hook: Any) -> FunctionType | None:
    """Return the function of a hook that is not torch's or ours."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)
    if not inspect.isfunction(hook):
        hook = type(hook).__call__
    if not inspect.isfunction(hook):
        return None
    return None if hook.__module__.partition(".")[0] in ("torch", "opendelta") else hook


def _named_in(function: FunctionType) -> set[str]:
    """Return the names and texts in a function's code, and in the functions that it names."""
    own = _words_of(function.__code__)
    beside = [function.__globals__.get(name) for name in own]
    codes = [each.__code__ for each in beside if inspect.isfunction(each)]
    return own.union(*map(_words_of, codes))


@functools.cache
def _words_of(code: CodeType) -> set[str]:
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return {*code.co_names, *map(str, code.co_consts)}.union(*map(_words_of, inner))


def _held_aside(backbone: Backbone) -> set[int]:
    """Return the ids of modules and parameters that are held beside the modules' own tables.

    Attributes, hooks and the methods of classes are looked into, with all that they hold. Whoever
    holds a module has those inside.
    """
    modules = list(backbone.modules.values())
    todo = [v for m in modules for key, v in m.__dict__.items() if key not in TABLES]
    classes = {base for m in modules for base in type(m).__mro__}
    todo += [v for cls in classes for v in vars(cls).values() if inspect.isfunction(v)]
    found = held_by(todo)
    inside = [part for module in modules if id(module) in found for part in module.modules()]
    own = [parameter for part in inside for parameter in part._parameters.values()]
    return found | {id(each) for each in (*inside, *own)}


def read_beside(
    backbone: Backbone, names: Iterable[str], missed: Collection[str] = ()
) -> dict[str, set[str] | None]:
    """Return {module: the ones of "weight" and "bias" that other code computes with}.

    A module that shows its deltas to other code is there only if code computes with its weight or
    bias and has them otherwise, as from `named_parameters`. Its value is None if no run on shapes
    tells and the code of the module around reads the weight or bias by name; and if somebody's own
    code reads one that no run has read, as in a branch that the run did not take.

    Args:
        missed: modules whose layers a forward has missed, which are watched too.
    """
    names = list(names)
    asked = suspects(backbone, names)
    watched = list(dict.fromkeys([*asked, *(name for name in names if name in missed)]))
    whole = watching.of_backbone(backbone, watched) if watched else None
    found: dict[str, set[str] | None] = {}
    for name in watched:
        watch = whole
        alone = name in asked and not swap.weight_is_read(backbone.modules[name], False)
        hooked = alone and _hook_may_read(backbone, name)  # hooks do not run where a part does
        if alone and not hooked and (watch is None or not watch.has_seen(name)):
            watch = watching.of_part(backbone, [name])
        if watch is not None:
            seen = {key for n, key in watch.read if n == name}
            reads = _reads_by_own(backbone, name) if alone else ()
            unseen = {key for key, code, at in reads if not watch.branches.settle(code, at)}
            found[name] = None if unseen - seen else seen
        elif hooked or (alone and _is_read_around(backbone, name)):
            found[name] = None
    return found


def _reads_by_own(backbone: Backbone, where: str) -> Iterator[tuple[str, CodeType, int]]:
    """Yield ("weight" or "bias", code, offset) where somebody's own classes read it by name.

    The branches of a library's forward compute the same, such as those with and without a kernel.
    """
    for cls in {_class_of(module) for module in [*backbone.chain(where)][1:]}:
        if cls.__module__.partition(".")[0] in LIBRARIES:
            continue
        beneath = any("super" in code.co_names for code in _codes(cls))
        for code in _codes(cls, beneath):
            for name, key, offset in _chains_in(code):
                if name == last(where) and key in ("weight", "bias"):
                    yield key, code, offset


def _is_read_around(backbone: Backbone, where: str) -> bool:
    """True if the code of the module around reads the weight or bias by name."""
    return last(where) in _may_read(_class_of(backbone.modules[parent(where)]))


def _may_read_raw(backbone: Backbone, where: str) -> bool:
    """True if code around a module asks for its parameters otherwise than by attribute."""
    return any(RAW & _words(_class_of(m)) for m in [*backbone.chain(where)][1:])


def gets_parameters(backbone: Backbone, where: str) -> bool:
    """True if code around a module uses `get_parameter`, which refuses a weight with deltas."""
    return any("get_parameter" in _words(_class_of(m)) for m in [*backbone.chain(where)][1:])


@functools.cache
def _words(cls: Any) -> set[str]:
    """Return the names and the texts in a class's code."""
    return set[str]().union(*map(_words_of, _codes(cls, True)))


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
    """Return the names of children whose weight or bias a class's code reads, and of `ANY`."""
    own = {name for name, key in _chains(cls, True) if key in ("weight", "bias")}
    return own.union(*(ANY & {*code.co_names} for code in _codes(cls, True)))


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


def _chains(cls: Any, beneath: bool = False) -> Iterator[tuple[str, str | None]]:
    """Yield (attribute, attribute of that one or None) wherever a class's code reads an attribute.

    The second is `LOOK` if the code looks at a weight or a bias, and at none of its values.
    """
    for code in _codes(cls, beneath):
        for name, key, _ in _chains_in(code):
            yield name, key


def _chains_in(code: CodeType) -> Iterator[tuple[str, str | None, int]]:
    """Yield what `_chains` does, each with the offset of the second attribute in the code."""
    steps = list(dis.get_instructions(code))
    for number, step in enumerate(steps[:-1]):
        if step.opname not in ATTRIBUTES:
            continue
        after = steps[number + 1]
        beyond = steps[number + 2].argval if number + 2 < len(steps) else None
        asked = number > 1 and steps[number - 2].argval == "isinstance"
        if after.opname not in ATTRIBUTES:
            yield step.argval, None, after.offset
        elif after.argval in ("weight", "bias") and (beyond in LOOKS or asked):
            yield step.argval, LOOK, after.offset
        else:
            yield step.argval, after.argval, after.offset


def _codes(cls: Any, beneath: bool = False) -> Iterator[CodeType]:
    """Yield the code of a class's forward, of methods that it names, and of functions inside.

    Args:
        beneath: methods that others override too, as `super()` may call them.
    """
    methods: dict[str, list[CodeType]] = {}
    for base in cls.__mro__:
        for name, value in vars(base).items():
            if base.__module__ != nn.Module.__module__ and (beneath or name not in methods):
                code = getattr(inspect.unwrap(value), "__code__", None)
                methods.setdefault(name, []).extend([code] if code is not None else [])
    todo = methods.pop("forward", [])
    while todo:
        code = todo.pop()
        yield code
        todo += [const for const in code.co_consts if isinstance(const, CodeType)]
        todo += [each for name in code.co_names for each in methods.pop(name, ())]
