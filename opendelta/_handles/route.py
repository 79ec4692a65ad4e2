"""Let the rows of one batch take different deltas."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from .._backbone import sharding
from .._backbone.backbone import Backbone
from .._deltas.blocks import with_children
from .._deltas.options import as_scaling
from .._deltas.order import attached_by_name, attached_once
from .._deltas.registry import method
from .._layers.record import Record
from .._layers.selection import OpenBlock
from .._sites.routed import Routed
from .._sites.rows import Rows
from .._texts.moved import ROW, moved_before
from ..errors import DeltaError, OptionError, SiteError, shown
from ..names import ancestors, is_inside
from .composition import Composition, Model
from .delta import Delta
from .with_block import with_block

Row: TypeAlias = (
    str | Delta | Collection[str | Delta] | Mapping[str, float] | Mapping[Delta, float] | None
)


def _as_lists(rows: Any) -> list[Any]:
    """Return the deltas of each row as a list."""
    if isinstance(rows, str | Mapping) or not isinstance(rows, Collection) or not rows:
        raise DeltaError(
            f"route(model, rows) takes one entry for each row of the batch, such as "
            f"[['fr'], ['de', 'legal'], []] or ['fr', 'de', None], not {rows!r}"
        )
    several = (list, tuple, set, frozenset, Mapping)
    return [[] if row is None else list(row) if isinstance(row, several) else [row] for row in rows]


def _taken(model: Any, rows: Any, records: list[Record]) -> list[dict[Record, float]]:
    """Return {delta that the row takes: its weight} for each row; weights are 1 if none is given.

    Args:
        records: the attached deltas.

    Raises:
        DeltaError: no such delta is attached.
        OptionError: a weight is no number, or its delta has no scale.
    """
    lists = _as_lists(rows)
    named = iter(attached_by_name(model, [name for row in lists for name in row], records))
    found: list[dict[Record, float]] = []
    for row, names in zip(rows, lists, strict=True):
        own = [next(named) for _ in names]
        weights = dict.fromkeys(with_children(own, records), 1.0)
        given = row.values() if isinstance(row, Mapping) else [1.0] * len(own)
        for record, value in zip(own, given, strict=True):
            what = f"route(): the weight {shown(value)} of {record.name!r}"
            weights[record] = as_scaling(what, value)
            layer_class = method(record.config.delta_type).layer_for(record.config)
            if weights[record] != 1 and not layer_class.scales:
                raise OptionError(
                    f"{what}: a {layer_class.__name__} has no scale, as there is no one thing to "
                    "multiply: let the row take it whole"
                )
        found.append(weights)
    return found


@with_block
def route(model: Model, rows: Sequence[Row], repeats: int = 1) -> Iterator[Composition[Model]]:
    """Let each row of a batch take its own deltas inside a `with` block, in training too.

    Row i is computed as if only the deltas of `rows[i]` were enabled, in the composition's order;
    its gradients reach only these deltas. Rows are counted on axis 0 of the input of each module
    with deltas. So a module whose input has the sequence on axis 0, as torch's modules by default,
    cannot be routed. The model's own forward runs once for all rows, except in modules whose input
    a delta changes.

    A delta that is disabled outside is enabled for the rows that name it. A delta that is switched
    off inside acts on no row. Another `route` inside replaces this one until it ends. Like that of
    `only`, the block belongs to the thread and task that enters it.

    Args:
        rows: for each row the names or handles of its attached deltas, or just one; [] or None
            means the plain backbone. {name: weight}: the change of each delta is multiplied by the
            weight, on top of its `scale`.
        repeats: number of successive rows in a batch that each entry of `rows` may stand for:
            `num_beams` or `num_return_sequences` of `generate()`, whichever is larger.

    Raises:
        OptionError: a weight is no number, or is not 1 for a delta that has no scale.
        DeltaError: no such delta is attached; a delta is merged, and not all rows take it; or a
            delta cannot act on some rows alone, such as a soft prompt or a head for other labels.
            Later, in the forward: the batch has another number of rows.

    Example:
        >>> import torch
        >>> import opendelta
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> fr = opendelta.LoraModel(model, modified_modules=["0"], name="fr")
        >>> de = opendelta.LoraModel(model, modified_modules=["0"], name="de")
        >>> with opendelta.route(model, ["fr", ["fr", "de"], None]):
        ...     out = model(torch.ones(3, 8))
        >>> with opendelta.route(model, [{"fr": 0.7, "de": 0.5}, "de"]):
        ...     out = model(torch.ones(2, 8))
    """
    with routed(model, rows, repeats):
        yield Composition(model)


@contextlib.contextmanager
def routed(model: Any, rows: Sequence[Row], repeats: int = 1, inside: str = "") -> Iterator[None]:
    """Do what `route` does.

    Args:
        inside: only modules inside this one are routed; no other one may run then.
    """
    if not isinstance(repeats, int) or repeats < 1:
        raise DeltaError(f"route(repeats={repeats!r}) must be a whole number of at least 1")
    records = attached_once(model)
    taken = _taken(model, rows, records)
    chosen = set().union(*taken)
    for record in records:
        if any(row.get(record) != 1 for row in taken):
            record.require_apart("cannot route rows around")
    names = [{record.name: weight for record, weight in row.items()} for row in taken]
    shared = Rows(names, frozenset(record.name for record in records), repeats)
    backbone = Backbone.of(model)
    in_shards = sharding.has_units(backbone)
    stacks = {
        where: stack
        for where, stack in backbone.stacks.items()
        if inside in ("", where) or is_inside(where, inside)
    }
    around = {name for site in stacks for name in ("", *ancestors(site)) if name != site}
    routers = {
        stack: Routed(where, shared, where in around, in_shards) for where, stack in stacks.items()
    }
    moved = moved_before(backbone.modules[""], list(stacks))
    for where in (name for name, what in moved.items() if what == ROW):
        raise SiteError(
            f"route(): {type(model).__name__} puts the rows of a batch in another order before "
            f"{where!r}, as a run on a few tokens shows: give it rows that it leaves in order, one "
            "at a time with only(), or take the delta off this module",
            where=where,
        )
    switches = {record: record in chosen for record in records}
    backbones = {record.shared for record in records}
    with OpenBlock(switches, routers, backbones=backbones):
        for where, stack in stacks.items():
            routers[stack].check(stack, backbone.modules[where])
        yield
