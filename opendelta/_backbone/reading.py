"""Find the modules whose weight the module around them reads, instead of calling them."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from types import FunctionType
from typing import Any

from torch import nn

from .._modules.calls import has_forward
from .._modules.facts import facts, remembered
from .._modules.holding import beside_tables, held_by, others_among
from .._modules.writing import codes_of, words_of
from .._sites import swap
from .._sites.swap import plain_class
from ..names import join, last, parent
from . import watching
from .backbone import Backbone
from .codes import ANY, LOOK, RAW, READ, chains_in, reads_unnamed
from .owned import KEYS, OwnCode, is_of_library, own_code

# The files of torch's modules.
TORCH = {
    inspect.getsourcefile(each) for each in (nn.TransformerEncoderLayer, nn.MultiheadAttention)
}


def _by_forward(look: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return `look`, kept for each class and forward of it, which other code may replace."""
    kept = functools.cache(lambda cls, _: look(cls))
    return functools.wraps(look)(lambda cls: kept(cls, getattr(cls, "forward", None)))


def weight_is_read(backbone: Backbone, where: str) -> bool:
    """True if the module around reads the weight of the module `where`, and does not call it.

    Its code is looked at. If it does both, in branches, say, a run on shapes tells.
    """
    if not where:
        return False
    read, used = _uses(_class_of(backbone.modules[parent(where)]))
    if last(where) not in read & used:
        return last(where) in read
    return _run_around(backbone, where).get(last(where)) is False


def is_called_and_read(backbone: Backbone, where: str) -> bool:
    """True if a run on shapes of the module around calls the module `where`, and reads its weight.

    Code tells whether such a run is needed.
    """
    read, used = _uses(_class_of(backbone.modules[parent(where)])) if where else (set(), set())
    return last(where) in read & used and _run_around(backbone, where).get(last(where), False)


def _run_around(backbone: Backbone, where: str) -> dict[str, bool]:
    """Run the module around `where` on shapes; return {child that is read: it is called too}."""
    around = backbone.modules[parent(where)]
    read, used = _uses(_class_of(around))

    def ask() -> dict[str, bool]:
        both = sorted(read & used & {*around._modules})
        watch = watching.of_children(backbone, [join(parent(where), each) for each in both])
        found = set() if watch is None else {n for n, k in watch.read if k == "weight"}
        return {last(name): watch is not None and name in watch.called for name in found}

    return remembered(backbone.read, facts(around), ask)


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


def suspects(backbone: Backbone, names: Iterable[str], own: OwnCode | None = None) -> list[str]:
    """Return the modules of `names` that other code may use otherwise than by calling them.

    It may if its class's code reads the weight or bias of a child of that name, asks for all
    parameters or calls a class's forward, or if something else than the tables of a module holds
    the module or its parameters. Of a module that shows its deltas, parameters alone count.
    """
    names = list(names)
    if not names:
        return []
    aside = _held_aside(backbone)
    own = own or own_code(backbone)
    found = []
    for name in names:
        module = backbone.modules[name]
        shown = swap.weight_is_read(module, False)
        mine = {id(parameter) for parameter in module._parameters.values()}
        if shown:
            suspect = bool(aside & mine) or own.raw or _may_read_raw(backbone, name)
        else:
            suspect = bool(aside & {id(module), *mine}) or code_may_read(backbone, name, own)
        if suspect:
            found.append(name)
    return found


def code_may_read(backbone: Backbone, where: str, own: OwnCode) -> bool:
    """True if code may use a module otherwise than by calling it.

    That is code of the classes around, and code of somebody's own anywhere in the model.
    """
    reads = {r for m in [*backbone.chain(where)][1:] for r in _may_read(_class_of(m))}
    named = bool(reads & {last(where), *ANY}) or own.names(where)
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
    own = words_of(function.__code__)
    beside = [function.__globals__.get(name) for name in own]
    codes = [each.__code__ for each in beside if inspect.isfunction(each)]
    return own.union(*map(words_of, codes))


def _held_aside(backbone: Backbone) -> set[int]:
    """Return the ids of modules and parameters that are held beside the modules' own tables.

    Whoever holds a module has those inside.
    """
    modules = list(backbone.modules.values())
    found = held_by(_beside(modules))
    inside = [part for module in modules if id(module) in found for part in module.modules()]
    own = [parameter for part in inside for parameter in part._parameters.values()]
    return found | {id(each) for each in (*inside, *own)}


def _beside(modules: list[nn.Module]) -> list[Any]:
    """Return what may hold something beside the modules' own tables.

    That is their attributes, their hooks and the methods of own classes.
    """
    classes = {base for cls in {type(m) for m in modules} for base in cls.__mro__}
    own_classes = [cls for cls in classes if not is_of_library(cls)]
    functions = [v for cls in own_classes for v in vars(cls).values() if inspect.isfunction(v)]
    return beside_tables(modules) + functions


def tied_aside(backbone: Backbone) -> dict[int, nn.Module]:
    """Return {id of a parameter: a module that has it, and that is in no table of the model's}.

    Such a module is held in a list, say, or by a function.
    """
    modules = list(backbone.modules.values())
    others = others_among(_beside(modules), modules)
    return {id(p): other for other in others for p in other._parameters.values() if p is not None}


def read_beside(
    backbone: Backbone, names: Iterable[str], missed: Collection[str] = ()
) -> dict[str, set[str] | None]:
    """Return {module: the ones of "weight" and "bias" that other code computes with}.

    A module that shows its deltas to other code is there only if code computes with its weight or
    bias and has them otherwise, as from `named_parameters`. Its value is None if no run on shapes
    tells and code may read the weight or bias; and if somebody's own code reads one that no run has
    read, as in a branch that the run did not take.

    Args:
        missed: modules whose layers a forward has missed, which are watched too.
    """
    names = list(names)
    own = own_code(backbone)
    shown = {name for name in names if swap.weight_is_read(backbone.modules[name], False)}
    asked = suspects(backbone, names, own)
    told = [name for name in names if own.reads and name not in shown]
    watched = list(dict.fromkeys([*asked, *(name for name in names if name in missed), *told]))
    whole = watching.of_backbone(backbone, watched) if watched else None
    found: dict[str, set[str] | None] = {}
    for name in watched:
        watch = whole
        alone = name in asked and name not in shown
        hooked = alone and _hook_may_read(backbone, name)  # hooks do not run where a part does
        if alone and not hooked and (watch is None or not watch.has_seen(name)):
            watch = watching.of_part(backbone, [name])
        if watch is not None:
            seen = {key for n, key in watch.read if n == name}
            reads = own.named if alone else ()
            unseen = {
                key
                for child, key, code, at in reads
                if child == last(name) and not watch.branches.settle(code, at)
            }
            found[name] = None if unseen - seen else seen
        else:
            named = alone and _is_read_around(backbone, name)
            if hooked or named or (name in told and own.may_read(name)):
                found[name] = None
    return found


def _is_read_around(backbone: Backbone, where: str) -> bool:
    """True if the code of the module around reads the weight or bias by name."""
    return last(where) in _read_but_by_torch(_class_of(backbone.modules[parent(where)]))


@_by_forward
def _read_but_by_torch(cls: Any) -> set[str]:
    """Return the names of children whose weight or bias a class's code reads.

    torch's own does not count: the fast path of TransformerEncoderLayer computes the same.
    """
    codes = (code for code in codes_of(cls, True) if code.co_filename not in TORCH)
    return {name for code in codes for name, key, _ in chains_in(code) if key in KEYS}


def _may_read_raw(backbone: Backbone, where: str) -> bool:
    """True if code around a module asks for its parameters otherwise than by attribute."""
    return any(RAW & _words(_class_of(m)) for m in [*backbone.chain(where)][1:])


def gets_parameters(backbone: Backbone, where: str) -> bool:
    """True if code around a module uses `get_parameter`, which refuses a weight with deltas."""
    return any("get_parameter" in _words(_class_of(m)) for m in [*backbone.chain(where)][1:])


@_by_forward
def _words(cls: Any) -> set[str]:
    """Return the names and the texts in a class's code."""
    return set[str]().union(*map(words_of, codes_of(cls, True)))


@_by_forward
def _reads_unnamed(cls: Any) -> bool:
    """True if code of a class, or a function beside it, reads a weight of an unnamed module."""
    codes = list(codes_of(cls))
    beside = vars(sys.modules.get(cls.__module__, cls))
    functions = [beside.get(name) for code in codes for name in code.co_names]
    codes += [function.__code__ for function in functions if inspect.isfunction(function)]
    return any(map(reads_unnamed, codes))


@_by_forward
def _may_read(cls: Any) -> set[str]:
    """Return the names of children whose weight or bias a class's code reads, and of `ANY`."""
    own = {name for name, key in _chains(cls, True) if key in KEYS}
    return own.union(*(ANY & {*code.co_names} for code in codes_of(cls, True)))


@_by_forward
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
    for code in codes_of(cls, beneath):
        for name, key, _ in chains_in(code):
            yield name, key
