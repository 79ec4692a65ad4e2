"""Let the rows of one batch take different deltas."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from .._backbone.backbone import Backbone
from .._deltas.order import attached_by_name, attached_once
from .._layers.record import Record
from .._sites.routed import Routed
from .._sites.rows import Rows
from .._sites.stack import Router, Stack
from ..errors import DeltaError
from ..names import ancestors
from .composition import Composition, Model
from .delta import Delta
from .with_block import with_block


def _as_lists(rows: Any) -> list[Any]:
    """The deltas of each row, as a list."""
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

    Row i is computed as if just the deltas of `rows[i]` were enabled, in the composition's order,
    and its gradients reach just those. A row is a row of axis 0 of what goes into each module with
    deltas: a module that takes the sequence first, as torch's do by default, is not for it. The
    model's own forward runs once for all rows, as far as the deltas leave what goes into their
    modules as it is.

    A delta that is disabled outside is enabled for the rows that name it; one that is switched off
    inside acts on no row. Another `route` inside takes the place of this one until it ends. Like
    all switches it is the model's, and so seen by all threads; `shared_copy` gives each its own
    model. With activation checkpointing call `backward()` inside, as it runs the model again.

    Args:
        rows: for each row the names or handles of its attached deltas, or just one; [] or None is
            the plain backbone.
        repeats: how many rows in a row a batch may have for each of those too: `num_beams` or
            `num_return_sequences` of `generate()`, whichever is more.

    Raises:
        DeltaError: no such delta is attached; one is merged, and not all rows take it; or one
            cannot act on some rows alone, such as a soft prompt or a head for other labels. Later,
            from the forward: the batch has another number of rows.

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
    before = [(record, record.active) for record in records]
    around = {name for site in backbone.stacks for name in ("", *ancestors(site)) if name != site}
    kept = [(stack, stack.router) for stack in backbone.stacks.values()]
    for record in records:
        record.active = record in chosen
    for where, stack in backbone.stacks.items():
        stack.__dict__["router"] = Routed(where, shared, where in around)
    try:
        for where, stack in backbone.stacks.items():
            stack.router.check(stack, backbone.modules[where])  # type: ignore[union-attr]
        yield composed
    finally:
        _leave(shared, kept, before)


def _leave(
    own: Rows, kept: list[tuple[Stack, Router | None]], before: list[tuple[Record, bool]]
) -> None:
    """End a block: everything is as before it.

    Args:
        own: what the block set up.
        kept: the stacks, and what they followed before.
        before: the deltas, and whether they acted before.

    Raises:
        DeltaError: a block inside has not ended. Nothing is routed then.
    """
    now = [stack.router for stack, _ in kept]
    if any(now) or not kept:  # or else a block around, which ended first, has put all back
        for record, active in before:
            record.active = active
    in_order = all(routed is not None and routed.rows is own for routed in now)
    for stack, outer in kept:
        stack.__dict__.pop("router", None)  # not None: as it was, for what is compiled
        if in_order and outer is not None:
            stack.__dict__["router"] = outer
    if not in_order:
        raise DeltaError(
            "blocks of route() must end in the reverse of the order in which they began; now no "
            "row is routed. Give each task its own opendelta.shared_copy(model)"
        )
