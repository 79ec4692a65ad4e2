"""Find and replace the first input and the hidden states of a module's call."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..errors import SiteError


def has_forward(module: nn.Module) -> bool:
    """True if `module` has a forward; ModuleList, for example, has none."""
    return getattr(type(module), "forward", None) is not nn.Module.forward


def names_of(forward: Any) -> tuple[str, ...]:
    """Return the names of a forward's parameters, in their order; (): it does not tell."""
    try:
        return tuple(inspect.signature(forward).parameters)[1:]
    except (TypeError, ValueError):  # compiled by TorchScript, or written in C
        return ()


def in_order(names: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of a call with the first parameter that is given before the others.

    Args:
        names: of the forward's parameters, in their order.
    """
    if args or not kwargs:
        return kwargs
    first = next((name for name in names if kwargs.get(name) is not None), None)
    if first is None or first == next(iter(kwargs)):
        return kwargs
    return {first: kwargs[first], **kwargs}


def first_given(args: tuple, kwargs: dict[str, Any]) -> Any:
    """Return the first argument of a call, positional or by keyword; None if there is none.

    A site's layers are given the keywords in the order of the forward's parameters.
    """
    return args[0] if args else next(iter(kwargs.values()), None)


def first_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return the first argument of a call, positional or by keyword.

    Raises:
        SiteError: it is no tensor.
    """
    x = first_given(args, kwargs)
    if isinstance(x, Tensor):
        return x
    raise SiteError(
        f"a delta acts on the first argument of a module's call, which is a {type(x).__name__} "
        "here and no tensor; choose a module inside, which is given the tensor itself"
    )


def dense(x: Tensor) -> Tensor:
    """Return `x`, which may be sparse, as a dense tensor."""
    return x if x.layout in (torch.strided, torch.jagged) else x.to_dense()


def replace_input(args: tuple, kwargs: dict[str, Any], new: Tensor) -> tuple[tuple, dict[str, Any]]:
    """Return the arguments with `new` in the place of the first one."""
    if args:
        return (new, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): new}


def _is_hidden(value: Any, width: int | None, axes: int = 2) -> bool:
    """True if `value` is a floating tensor [..., width] of `axes` or more; None: any width."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < axes:
        return False
    return width is None or value.size(-1) == width  # a nested tensor has no shape


def hidden_key(output: Any, width: int | None = None) -> Any:
    """Return the key (index or field) of the hidden states in an output; None if it is the tensor.

    Args:
        output: a tensor, a tuple or list, a mapping such as a ModelOutput, or a record.
        width: the size of the last axis. None: any size.

    Raises:
        SiteError: the output has no floating tensor [..., width].
    """
    items = {None: output} if isinstance(output, Tensor) else items_of(output) or {}
    for key, value in items.items():
        if _is_hidden(value, width, axes=1 if key is None else 2):
            return key
    if isinstance(output, torch.fx.Proxy):
        raise SiteError(
            "torch.fx cannot trace deltas around a module whose output it does not know: "
            "torch.export.export can, and so can fx a plain model, composition(model).to_backbone()"
        )
    raise SiteError(
        f"no floating tensor [..., {'width' if width is None else width}] in the module's output, "
        f"a {type(output).__name__}; choose a module that returns one"
    )


def hidden(output: Any) -> Tensor:
    """Return the hidden states in an output: a tensor, or its first floating one of two axes."""
    key = hidden_key(output)
    return output if key is None else _item(output, key)


def _item(output: Any, key: Any) -> Any:
    return output[key] if isinstance(output, dict | tuple | list) else getattr(output, key)


def changed_in(output: Any) -> Tensor:
    """Return what `change_hidden` changes in an output: all of a tensor, however few its axes."""
    return output if isinstance(output, Tensor) else hidden(output)


def _is_record(value: Any) -> bool:
    """True for an instance of a dataclass, or a namespace: its attributes are its items."""
    if isinstance(value, types.SimpleNamespace):
        return True
    return dataclasses.is_dataclass(value) and not isinstance(value, type | nn.Module)


def items_of(value: Any) -> dict[Any, Any] | None:
    """Return what a mapping, a list, a tuple or a record holds, by key; None: it is none."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if not _is_record(value):
        return None
    if isinstance(value, types.SimpleNamespace):
        return dict(vars(value))
    names = (field.name for field in dataclasses.fields(value))
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def every(kind: Any, value: Any, objects: bool = False) -> Iterator[Any]:
    """Yield all instances of `kind` in `value`, at any depth of mappings, sequences and records.

    Args:
        kind: a class, or several in a tuple.
        objects: also among the attributes of other objects, but modules and classes.
    """
    seen: dict[int, Any] = {}
    todo, compiling = [value], torch.compiler.is_compiling()
    while todo:
        each = todo.pop()
        if isinstance(each, kind):
            yield each
            continue
        items = items_of(each)
        if items is None and objects and not isinstance(each, nn.Module | type):
            items = _attributes(each)
        if not items or (not compiling and id(each) in seen):
            continue
        if not compiling:  # a graph would be guarded by the ids, which each call has anew
            seen[id(each)] = each
        todo += reversed(items.values())


def _attributes(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, in its `__dict__` and in the slots of its class."""
    found = dict(getattr(value, "__dict__", None) or {})
    if torch.compiler.is_compiling():  # which follows no `__mro__`
        return found
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found


def change_hidden(
    output: Any, width: int, change: Callable[[Tensor], Tensor], axis: int = -1
) -> Any:
    """Return `output` with its hidden states [..., width] replaced by `change(hidden states)`.

    Args:
        axis: the axis of the width, if `output` is a tensor.
    """
    if isinstance(output, Tensor):
        if axis == -1:
            return change(output)
        return change(output.movedim(axis, -1)).movedim(-1, axis)
    key = hidden_key(output, width)
    new = change(_item(output, key))
    if type(output) is dict:
        return {**output, key: new}
    if isinstance(output, dict):  # a ModelOutput sets its field along with the item
        output[key] = new
        return output
    if _is_record(output):
        return like(output, {key: new})
    if hasattr(output, "_replace"):
        return output._replace(**{output._fields[key]: new})
    return type(output)([*output[:key], new, *output[key + 1 :]])


def like(value: Any, items: dict[Any, Any]) -> Any:
    """Return a mapping, a list, a tuple or a record like `value` with other items, by key."""
    if type(value) is dict:
        return items
    if isinstance(value, tuple | list):
        new = items.values()
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    out = copy.copy(value)
    for key, item in items.items():
        if isinstance(value, Mapping):  # a ModelOutput, which has no update()
            if item is not value[key]:
                out[key] = item
        else:
            object.__setattr__(out, key, item)  # a dataclass may be frozen
    return out


def joined(parts: Sequence[Any], join: Callable[[Sequence[Any]], Any]) -> Any:
    """Join values of one structure, at any depth of mappings, lists, tuples and records.

    Args:
        join: takes the values in one place of all parts, and returns the value for all.
    """
    items = items_of(parts[0])
    if items is None:
        return join(parts)
    every_part = [items_of(part) or {} for part in parts]
    return like(parts[0], {key: joined([p[key] for p in every_part], join) for key in items})


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return `value` with `change(tensor)` for each tensor, at any depth.

    Besides mappings, lists, tuples and records, it knows what is registered with torch's pytree.
    """

    def leaf(each: Any) -> Any:
        if isinstance(each, Tensor):
            return change(each)
        items = items_of(each)
        if not items:
            return each
        return like(each, {key: map_tensors(change, item) for key, item in items.items()})

    return tree_map(leaf, value)


def same(one: Any, other: Any) -> bool:
    """True if two calls have the same objects as arguments, also in tuples, lists and mappings."""
    if isinstance(one, dict):
        known = isinstance(other, dict) and one.keys() == other.keys()
        return known and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        known = isinstance(other, tuple | list) and len(one) == len(other)
        return known and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one is other


def fresh(output: Any) -> Any:
    """Return an output whose hidden states may be replaced: a ModelOutput is changed in place."""
    return copy.copy(output) if isinstance(output, dict) and type(output) is not dict else output
