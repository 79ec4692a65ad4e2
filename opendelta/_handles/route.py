"""Let the rows of one batch take different deltas."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from .._backbone import sharding
from .._backbone.backbone import Backbone
from .._deltas.order import attached_by_name, attached_once
from .._layers.selection import OpenBlock
from .._sites.routed import Routed
from .._sites.rows import Rows
from ..errors import DeltaError
from ..names import ancestors
from .composition import Composition, Model
from .delta import Delta
from .with_block import with_block


def _as_lists(rows: Any) -> list[Any]:
    """Return the deltas of each row as a list."""
    if isinstance(rows, str | Mapping) or not isinstance(rows, Collection) or not rows:
        raise DeltaError(
            f"route(model, rows) takes one entry for each row of the batch, such as "
            f"[['fr'], ['de', 'legal'], []] or ['fr', 'de', None], not {rows!r}"
        )
    several = (list, tuple, set, frozenset)
    return [[] if row is None else list(row) if isinstance(row, several) else [row] for row in rows]


@with_block
def route(
    model: Model,
    rows: Sequence[str | Delta | Collection[str | Delta] | None],
    repeats: int = 1,
) -> Iterator[Composition[Model]]:
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
            means the plain backbone.
        repeats: number of successive rows in a batch that each entry of `rows` may stand for:
            `num_beams` or `num_return_sequences` of `generate()`, whichever is larger.

    Raises:
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
    """
    if not isinstance(repeats, int) or repeats < 1:
        raise DeltaError(f"route(repeats={repeats!r}) must be a whole number of at least 1")
    composed = Composition(model)
    records = attached_once(model)
    lists = _as_lists(rows)
    named = iter(attached_by_name(model, [name for row in lists for name in row], records))
    taken = [{next(named) for _ in row} for row in lists]
    chosen = set().union(*taken)
    for record in records:
        if any(record not in row for row in taken):
            record.require_apart("cannot route rows around")
    names = [frozenset(record.name for record in row) for row in taken]
    shared = Rows(names, frozenset(record.name for record in records), repeats)
    backbone = Backbone.of(model)
    in_shards = sharding.has_units(backbone)
    around = {name for site in backbone.stacks for name in ("", *ancestors(site)) if name != site}
    routers = {
        stack: Routed(where, shared, where in around, in_shards)
        for where, stack in backbone.stacks.items()
    }
    switches = {record: record in chosen for record in records}
    backbones = {record.shared for record in records}
    with OpenBlock(switches, routers, backbones=backbones):
        for where, stack in backbone.stacks.items():
            routers[stack].check(stack, backbone.modules[where])
        yield composed
