"""The one total order of a backbone's deltas, attached and detached, and their names."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING

from .addressing import Survey
from .record import Record

if TYPE_CHECKING:
    from .delta import Delta

# Who holds a detached delta keeps its name and its place; this set keeps nothing alive.
HANDLES: weakref.WeakSet[Delta] = weakref.WeakSet()


def free_name(wanted: str, taken: Collection[str]) -> str:
    """`wanted`, or the first of wanted_1, wanted_2, ... that is not taken."""
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def known_records(found: Survey) -> list[Record]:
    """The deltas of a backbone in total order: the attached, and the detached that are held."""
    records = {id(record): record for record in found.records()}
    inside = {id(module) for module in found.modules.values()}
    for handle in list(HANDLES):
        if id(handle.backbone_model) in inside:
            records.setdefault(id(handle.record), handle.record)
    return sorted(records.values(), key=lambda record: record.place)


def renumber(
    known: list[Record], record: Record, before: Record | None, after: Record | None
) -> bool:
    """Give `record` its place among the `known` others; whether it got another than it had."""
    order = sorted([*known, record], key=lambda r: (r.place, r is record))
    if before is not None or after is not None:
        order.remove(record)
        at = order.index(before) if before is not None else order.index(after) + 1  # type: ignore
        order.insert(at, record)
    for place, each in enumerate(order):
        each.place = place
    return before is not None or after is not None
