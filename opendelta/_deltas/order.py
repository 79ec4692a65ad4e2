"""The one total order of a backbone's deltas, attached and detached, and their names."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable

from torch import nn

from .._backbone.backbone import Backbone, attached_records
from .._layers.base import DeltaLayer
from .._layers.record import Record
from .._sites.stack import LONGEST_NAME, Stack
from ..errors import DeltaError, SiteError, nearest, to_the_end
from ..names import unwrapped
from .base import HANDLES, BaseDelta
from .registry import method


def free_name(wanted: str, taken: Collection[str]) -> str:
    """Return `wanted`, or the first of wanted_1, wanted_2, ... that is not taken."""
    name, count = wanted, 0
    while name in taken:
        count += 1
        end = f"_{count}"
        name = wanted[: LONGEST_NAME - len(end)] + end
    return name


def known_records(backbone: Backbone) -> list[Record]:
    """Return all deltas of a backbone in order, with detached ones that are still in variables."""
    records = dict.fromkeys(backbone.records())
    inside = {id(module) for module in backbone.modules.values()}
    records |= dict.fromkeys(h.record for h in HANDLES if id(h.backbone_model) in inside)
    return sorted(records, key=lambda record: record.rank)


def prefix_of(record: Record, sites: list[str]) -> str | None:
    """Return the name of the module to which a delta was attached; None: one around the backbone.

    Args:
        sites: the full names of the delta's sites on the backbone.
    """
    names = set(record.sites)
    if any(unwrapped(where) in names for where in sites):
        return ""
    for where in map(unwrapped, sites):
        for name in names:
            if name == "" or where.endswith(f".{name}"):
                return where.removesuffix(name).removesuffix(".")
    return None


def neighbour(
    known: list[Record], delta: BaseDelta, other: BaseDelta | str | None
) -> Record | None:
    """Return the record of `other`, next to which `delta` will act; None if `other` is None.

    Args:
        known: the deltas of the backbone.
        other: a delta or its name.

    Raises:
        DeltaError: there is no such delta on the backbone.
    """
    if other is None:
        return None
    others = [record for record in known if record is not delta.record]
    for record in others:
        if record.name == other or record is getattr(other, "record", None):
            return record
    name, names = getattr(other, "name", other), [record.name for record in others]
    raise DeltaError(
        f"{delta.name!r} cannot stand next to {name!r}: "
        + (
            stranger(delta.backbone_model, name)
            if name in names
            else f"the other deltas of this {type(delta.backbone_model).__name__} are {names}"
        )
    )


def _order(
    known: list[Record], record: Record, before: Record | None, after: Record | None
) -> list[Record]:
    """Return the `known` others with `record` at its old place, or next to a neighbour."""
    order = sorted([*known, record], key=lambda r: (r.rank, r is record))
    if before is not None or after is not None:
        order.remove(record)
        order.insert(order.index(before) if before is not None else order.index(after) + 1, record)  # type: ignore[arg-type]
    return order


def order_with(
    backbone: Backbone,
    delta: BaseDelta,
    before: Record | None,
    after: Record | None,
    known: list[Record] | None = None,
) -> list[Record]:
    """Return all deltas of a backbone in their order with `delta`; `known` as for `place`.

    Raises:
        SiteError: another delta has the same name.
        DeltaError: `delta` would act beneath a merged delta.
    """
    known = known_records(backbone) if known is None else known
    known = [record for record in known if record is not delta.record]
    if any(record.name == delta.name for record in known):
        raise SiteError(f"another delta of this backbone is called {delta.name!r} by now")
    order = _order(known, delta.record, before, after)
    backbone.require_above_merged(delta.layers, order)
    return order


def move(backbone: Backbone, record: Record, before: Record | None, after: Record | None) -> None:
    """Move an attached delta next to a neighbour in the order."""
    known = known_records(backbone)
    for each in known:
        each.require_apart("cannot move deltas around")
    renumber(backbone, _order([r for r in known if r is not record], record, before, after))


def renumber(backbone: Backbone, order: list[Record], new: Collection[str] = ()) -> None:
    """Let the deltas act in this order.

    Args:
        new: the sites that have a new layer.
    """
    moved = any(record.rank != rank for rank, record in enumerate(order))
    stacks = [backbone.stacks[where] for where in (backbone.stacks if moved else new)]
    to_the_end(functools.partial(_sort, dict(zip(order, range(len(order)), strict=True)), stacks))


def rerank(backbone: Backbone, ranks: dict[Record, int]) -> None:
    """Give deltas these ranks, and let them act in this order."""
    to_the_end(functools.partial(_sort, ranks, list(backbone.stacks.values())))


def _sort(ranks: dict[Record, int], stacks: list[Stack]) -> None:
    for record, rank in ranks.items():
        record.rank = rank
    for stack in stacks:
        stack.sort()


def check_root(backbone: Backbone) -> None:
    """Raise if a delta on the backbone was attached to another model.

    That is a module around the backbone, a module inside it, or a model that shares modules with
    it.
    """
    what = type(backbone.model).__name__
    made_for = {h.record: h.backbone_model for h in HANDLES}
    inside = {id(module) for module in backbone.modules.values()}
    for record, sites in backbone.sites().items():
        prefix = prefix_of(record, sites)
        if prefix != "":
            other = "a module around it" if prefix is None else f"its module {prefix!r}"
            raise SiteError(
                f"{record.name!r} was attached through {other}, not through this {what}; attach "
                "all deltas of a model through the same module"
            )
        other_model = made_for.get(record, backbone.model)
        if id(other_model) not in inside and not _holds(other_model, backbone.model):
            raise SiteError(
                f"{record.name!r} was attached through another {type(other_model).__name__}, which "
                f"shares modules with this {what}; detach it first, or give this model modules of "
                "its own by opendelta.shared_copy(model)"
            )
    others = {id(h.backbone_model): h.backbone_model for h in HANDLES}
    others.pop(id(backbone.model), None)
    around = {k for k, outer in others.items() if _holds(outer, backbone.model)}
    for handle in HANDLES:
        outer = handle.backbone_model
        if id(outer) in around and handle.attached:
            raise SiteError(
                f"{handle.name!r} was attached through the {type(outer).__name__} around this "
                f"{what}; attach all deltas of a model through the same module"
            )


def _holds(outer: nn.Module, module: nn.Module) -> bool:
    return any(part is module for part in outer.modules())


def handles_of(backbone: Backbone, records: Iterable[Record]) -> list[BaseDelta]:
    """Return the handles of attached deltas: those in variables, or else new ones."""
    known = {handle.record: handle for handle in HANDLES}
    layers: dict[Record, list[tuple[str, DeltaLayer]]] = {}
    for where, _, layer in backbone.delta_layers():
        layers.setdefault(layer.record, []).append((where, layer))
    return [
        known[record] if record in known else _new_handle(backbone, record, layers.get(record, []))
        for record in records
    ]


def handle_of(backbone: Backbone, record: Record) -> BaseDelta:
    """Return the handle of an attached delta: the handle in a variable, or else a new one."""
    (handle,) = handles_of(backbone, [record])
    return handle


def _new_handle(backbone: Backbone, record: Record, own: list[tuple[str, DeltaLayer]]) -> BaseDelta:
    """Return a new handle of an attached delta, which has these layers on these sites."""
    prefix = prefix_of(record, [where for where, _ in own])
    if prefix is None:
        raise DeltaError(
            f"{record.name!r} was attached through a module around this "
            f"{type(backbone.model).__name__}; use composition() of that one"
        )
    cls = method(record.config.delta_type)
    handle = cls.__new__(cls)
    handle.backbone_model, handle.record = backbone.modules[prefix], record
    names = {
        unwrapped(name): name for name in record.sites
    }  # others may have wrapped modules since
    inside = len(prefix) + 1 if prefix else 0
    layers = {names[unwrapped(where[inside:])]: layer for where, layer in own}
    handle.layers = {name: layers[name] for name in record.sites if name in layers}
    HANDLES.add(handle)
    return handle


def attached_once(model: nn.Module) -> list[Record]:
    """Return the attached deltas of a model in order; raise if two have the same name.

    Raises:
        DeltaError: two deltas have the same name.
    """
    records = attached_records(model)
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise DeltaError(
            f"{type(model).__name__} carries several deltas called {twice}: they were "
            "attached through different modules of it; use composition() on those"
        )
    return records


def attached_by_name(
    model: nn.Module, names: Iterable[str | BaseDelta], among: list[Record]
) -> list[Record]:
    """Return the records of attached deltas, given by names or handles.

    Args:
        names: several names or handles, or one name. A name may have a handle's `record`.
        among: the attached deltas.

    Raises:
        DeltaError: a delta is not attached.
    """
    records = {record.name: record for record in among}
    chosen = []
    for given in [names] if isinstance(names, str) else names:
        if not isinstance(given, str | BaseDelta):
            raise DeltaError(f"{given!r} must be a delta or the name of one, by itself")
        name = given.name if isinstance(given, BaseDelta) else given
        record = getattr(given, "record", None)
        if name not in records or record not in (None, records[name]):
            raise DeltaError(_not_attached(model, name, record, records))
        chosen.append(records[name])
    return chosen


def stranger(model: nn.Module, name: str) -> str:
    """Return the message that a handle is that of another model's delta."""
    return (
        f"this {name!r} is a delta of another model, such as the one that this "
        f"{type(model).__name__} is a copy of: give its name, or the handle "
        f"composition(model)[{name!r}]"
    )


def _not_attached(
    model: nn.Module, name: str, given: Record | None, attached: Collection[str]
) -> str:
    """Return the message that no such delta is attached, with advice."""
    if given is not None and name in attached:
        return stranger(model, name)
    text = f"no delta {name!r} is attached to {type(model).__name__}; "
    for record in known_records(Backbone.of(model)):
        if given in (None, record) and record.name == name and name not in attached:
            return f"{text}it is detached: call attach() of it first"
    near = nearest(name, attached)
    return f"{text}attached are {list(attached)}" + (f"; nearest: {near[0]!r}" if near else "")
