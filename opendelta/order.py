"""The one total order of a backbone's deltas, attached and detached, and their names."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from torch import nn

from . import merging
from .addressing import Survey, unwrapped
from .errors import DeltaError, SiteError
from .record import Record
from .registry import method
from .site import LONGEST_NAME

if TYPE_CHECKING:
    from .delta import Delta


class Handles:
    """The deltas that somebody holds, as `iter()` finds them while other threads add theirs.

    Who holds a detached delta keeps its name and its place; this set keeps nothing alive.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakSet[Delta] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, handle: Delta) -> None:
        """Know one more."""
        with self._lock:
            self._known.add(handle)

    def __iter__(self) -> Iterator[Delta]:
        with self._lock:
            return iter(list(self._known))


HANDLES = Handles()


def free_name(wanted: str, taken: Collection[str]) -> str:
    """`wanted`, or the first of wanted_1, wanted_2, ... that is not taken."""
    name, count = wanted, 0
    while name in taken:
        count += 1
        end = f"_{count}"
        name = wanted[: LONGEST_NAME - len(end)] + end
    return name


def known_records(found: Survey) -> list[Record]:
    """The deltas of a backbone in total order: the attached, and the detached that are held."""
    records = dict.fromkeys(found.records())
    inside = {id(module) for module in found.modules.values()}
    records |= dict.fromkeys(h.record for h in HANDLES if id(h.backbone_model) in inside)
    return sorted(records, key=lambda record: record.place)


def prefix_of(record: Record, sites: list[str]) -> str | None:
    """The name of the module through which a delta was attached; None: one around the backbone.

    Args:
        sites: where the delta stands on the backbone.
    """
    names = set(record.sites)
    if any(unwrapped(where) in names for where in sites):
        return ""
    for where in map(unwrapped, sites):
        for name in names:
            if name == "" or where.endswith(f".{name}"):
                return where.removesuffix(name).removesuffix(".")
    return None


def neighbour(known: list[Record], delta: Delta, other: Delta | str | None) -> Record | None:
    """The delta among the `known` ones next to which `delta` is to stand, given or by name.

    Raises:
        DeltaError: there is no such delta on the backbone.
    """
    if other is None:
        return None
    others = [record for record in known if record is not delta.record]
    for record in others:
        if record.name == other or record is getattr(other, "record", None):
            return record
    name = getattr(other, "name", other)
    raise DeltaError(
        f"{delta.name!r} cannot stand next to {name!r}: the other deltas of this "
        f"{type(delta.backbone_model).__name__} are {[record.name for record in others]}"
    )


def _order(
    known: list[Record], record: Record, before: Record | None, after: Record | None
) -> list[Record]:
    """The `known` others, with `record` at its old place or next to a neighbour."""
    order = sorted([*known, record], key=lambda r: (r.place, r is record))
    if before is not None or after is not None:
        order.remove(record)
        order.insert(order.index(before) if before is not None else order.index(after) + 1, record)  # type: ignore[arg-type]
    return order


def renumber(
    known: list[Record], record: Record, before: Record | None, after: Record | None
) -> None:
    """Give `record` its place among the `known` others: its old one, or next to a neighbour."""
    for place, each in enumerate(_order(known, record, before, after)):
        each.place = place


def check_place(
    found: Survey, delta: Delta, before: Record | None, after: Record | None
) -> list[Record]:
    """The deltas among which `delta` is to take its place.

    Raises:
        SiteError: one of them has its name.
        DeltaError: one that is merged would come to act on what the delta does.
    """
    known = [record for record in known_records(found) if record is not delta.record]
    if any(record.name == delta.name for record in known):
        raise SiteError(f"another delta of this backbone is called {delta.name!r} by now")
    merging.check_beneath(found, delta.layers, _order(known, delta.record, before, after))
    return known


def check_root(found: Survey) -> None:
    """Raise if the backbone has deltas that were attached through a module around it, or inside.

    Or through another model that has modules of this one.
    """
    what = type(found.root).__name__
    made_for = {h.record: h.backbone_model for h in HANDLES}
    inside = {id(module) for module in found.modules.values()}
    for record, sites in found.sites().items():
        prefix = prefix_of(record, sites)
        if prefix != "":
            other = "a module around it" if prefix is None else f"its module {prefix!r}"
            raise SiteError(
                f"{record.name!r} was attached through {other}, not through this {what}; attach "
                "all deltas of a model through the same module"
            )
        other_model = made_for.get(record, found.root)
        if id(other_model) not in inside and not _holds(other_model, found.root):
            raise SiteError(
                f"{record.name!r} was attached through another {type(other_model).__name__}, which "
                f"shares modules with this {what}; detach it first, or give this model modules of "
                "its own by opendelta.shared_copy(model)"
            )
    others = {id(h.backbone_model): h.backbone_model for h in HANDLES}
    others.pop(id(found.root), None)
    around = {k for k, outer in others.items() if _holds(outer, found.root)}
    for handle in HANDLES:
        outer = handle.backbone_model
        if id(outer) in around and handle.attached:
            raise SiteError(
                f"{handle.name!r} was attached through the {type(outer).__name__} around this "
                f"{what}; attach all deltas of a model through the same module"
            )


def _holds(outer: nn.Module, module: nn.Module) -> bool:
    return any(part is module for part in outer.modules())


def handle_of(found: Survey, record: Record) -> Delta:
    """The handle of an attached delta: the one that somebody holds, or a new one."""
    for handle in HANDLES:
        if handle.record is record:
            return handle
    own = [(where, layer) for where, _, layer in found.layers() if layer.record is record]
    prefix = prefix_of(record, [where for where, _ in own])
    if prefix is None:
        raise DeltaError(
            f"{record.name!r} was attached through a module around this "
            f"{type(found.root).__name__}; use composition() of that one"
        )
    cls = method(record.config.delta_type)
    handle = cls.__new__(cls)
    handle.backbone_model, handle.record = found.modules[prefix], record
    layers = {w[len(prefix) + 1 if prefix else 0 :]: layer for w, layer in own}
    places = {name: place for place, name in enumerate(record.sites)}
    ordered = sorted(layers, key=lambda where: places[unwrapped(where)])
    handle.layers = {where: layers[where] for where in ordered}
    HANDLES.add(handle)
    return handle
