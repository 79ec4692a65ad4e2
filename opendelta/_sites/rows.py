"""Group the rows of a batch by the layers that they take; cut out the rows, and join them again."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._layers.base import DeltaLayer
from .._layers.record import weighed
from .._modules import calls
from ..errors import SiteError, quoted

MOST_KEPT = 16
# the row that runs by itself, as those of nested tensors do: its index, the number of rows
ALONE: ContextVar[tuple[int, int] | None] = ContextVar("alone", default=None)


@dataclass(frozen=True)
class Group:
    """The rows of a batch that take the same layers of a site.

    Attributes:
        path: for each of these layers its index among the acting layers, and its weight.
        rows: the rows' indices in the batch.
        count: number of rows.
    """

    path: tuple[tuple[int, float], ...]
    rows: slice | Tensor
    count: int


@dataclass(frozen=True)
class Groups:
    """All rows of a batch, grouped by the layers of a site that they take.

    Attributes:
        groups: the groups in the order of their first rows.
        of_row: for each row the index of its group.
        order: index that sorts the rows of all groups, one group after the other; None: they are
            sorted.
    """

    groups: list[Group]
    of_row: list[int]
    order: Tensor | None

    def of_one(self, row: int) -> Groups:
        """Return the groups of a batch that is one of the rows."""
        group = self.groups[self.of_row[row]]
        return Groups([Group(group.path, slice(0, 1), 1)], [0], None)


class Rows:
    """The deltas that each row of a batch takes, and the groups of rows; all sites share it.

    Args:
        taken: for each row {name of a delta that it takes: weight of the delta's change}.
        known: the names of all deltas that rows can choose; other deltas act on all rows.
        repeats: number of successive rows in a batch that each entry of `taken` may stand for.
    """

    def __init__(
        self, taken: Sequence[Mapping[str, float]], known: frozenset[str], repeats: int
    ) -> None:
        self.taken, self.known, self.repeats = taken, known, repeats
        self.found: dict[tuple, Groups] = {}
        self.twins: dict[tuple[DeltaLayer, float], DeltaLayer] = {}

    def takers(self, name: str) -> list[bool]:
        """Return for each row if it takes the delta, provided that the delta acts."""
        return [name in row or name not in self.known for row in self.taken]

    def layers(self, acting: Sequence[DeltaLayer], group: Group) -> list[DeltaLayer]:
        """Return the layers that a group takes, with its weights."""
        return [
            acting[index] if weight == 1 else self._twin(acting[index], weight)
            for index, weight in group.path
        ]

    def _twin(self, layer: DeltaLayer, weight: float) -> DeltaLayer:
        """Return a layer over the same tensors whose change has a weight."""
        twin = self.twins.get((layer, weight))
        if twin is None:
            twin = self.twins[layer, weight] = weighed(layer, weight)
        twin.__dict__["training"] = layer.training
        return twin

    def groups(self, acting: Sequence[DeltaLayer], x: Tensor, where: str) -> Groups:
        """Return the rows of `x`, grouped by the acting layers that they take.

        Raises:
            SiteError: the number of rows of `x` does not fit, with or without `repeats`.
        """
        names = [layer.record.name for layer in acting]
        if torch.compiler.is_compiling():
            return self._grouped(names, x.size(0), x.device, where)
        alone = ALONE.get() if x.size(0) == 1 else None
        batch = x.size(0) if alone is None else alone[1]
        key = (batch, x.device, *names)
        found = self.found.get(key)
        if found is None:
            if len(self.found) > MOST_KEPT:  # tokens may come as rows, each time in another number
                self.found.clear()
            found = self.found[key] = self._grouped(names, batch, x.device, where)
        return found if alone is None else found.of_one(alone[0])

    def _grouped(
        self, names: Sequence[str], batch: int, device: torch.device, where: str
    ) -> Groups:
        times = 1 if batch == len(self.taken) else self.repeats
        if times * len(self.taken) != batch:
            wanted = f"{len(self.taken)} rows" + f" x {self.repeats}" * (self.repeats > 1)
            whole, rest = divmod(batch, len(self.taken))
            beams = "For generate() with beams, or several sequences a row, give "
            raise SiteError(
                f"route() was given {wanted}, but the input of {quoted(where)} has {batch} on its "
                "first axis, where the rows of the batch must be. "
                + (f"{beams}repeats={whole}. " if whole and not rest else "")
                + "If they are not there, leave that module out of the deltas by exclude_modules=",
                where=where,
            )
        paths: dict[tuple[tuple[int, float], ...], list[int]] = {}
        takers = [self.takers(name) for name in names]
        for index, weights in enumerate(self.taken):
            path = tuple(
                (i, weights.get(names[i], 1.0)) for i, taken in enumerate(takers) if taken[index]
            )
            paths.setdefault(path, []).extend(range(index * times, (index + 1) * times))
        groups: list[Group] = []
        of_row = [0] * batch
        for path, rows in paths.items():
            for row in rows:
                of_row[row] = len(groups)
            run = slice(rows[0], rows[-1] + 1)
            together = run.stop - run.start == len(rows)
            groups.append(
                Group(path, run if together else torch.tensor(rows, device=device), len(rows))
            )
        after = [row for rows in paths.values() for row in rows]
        if after == list(range(batch)):
            return Groups(groups, of_row, None)
        order = [0] * batch
        for index, row in enumerate(after):
            order[row] = index
        return Groups(groups, of_row, torch.tensor(order, device=device))


# ------------------------------------------------------------------------------------ cut and join
def cut(value: Any, batch: int, rows: slice | Tensor) -> Any:
    """Return `value` with only `rows` of each tensor in it that has `batch` rows."""
    if isinstance(value, Tensor):
        return calls.dense(value)[rows] if value.ndim and value.size(0) == batch else value
    items = calls.items_of(value)
    if items is None:
        return value
    return calls.like(value, {key: cut(item, batch, rows) for key, item in items.items()})


PLAIN = bool | int | float | complex | str | bytes | torch.dtype | torch.device | enum.Enum | None


class ShapeError(ValueError):
    """Outputs that do not fit into one batch; the message says of what shapes they are."""


def joined(outputs: list[Any], grouped: Groups) -> Any:
    """Join the outputs of the groups to one output for all rows.

    Raises:
        ShapeError: the outputs differ in more than the number of rows.
    """
    return calls.joined(outputs, functools.partial(_together, grouped))


def _together(grouped: Groups, parts: Sequence[Any]) -> Any:
    first = parts[0]
    if all(part is first for part in parts):
        return first
    if not isinstance(first, Tensor):
        whole = isinstance(first, PLAIN) or hasattr(first, "get_seq_length")  # a cache is shared
        if not whole:
            raise ShapeError(f"in objects of the class {type(first).__name__}")
        return first
    counts = [part.size(0) if part.ndim else 0 for part in parts]
    alike = all(part.shape[1:] == first.shape[1:] for part in parts)
    if not alike or counts != [group.count for group in grouped.groups]:
        shapes = ", ".join(str(tuple(part.shape)) for part in parts)
        raise ShapeError(f"of the shapes {shapes}")
    together = torch.cat(list(parts))
    return together if grouped.order is None else together[grouped.order]


# ------------------------------------------------------------------------------- calls and branches
class SharedCall:
    """The forward of a module beneath the layers of each group: one run for all rows.

    If a layer changes the input, the module runs once more, on the rows of this layer's group
    alone where it is known which tensors have rows.

    Args:
        given: the arguments and keyword arguments for all rows.
        batch: number of all rows.
        whole: [the module's output for all rows] if it ran already, else [].
    """

    def __init__(
        self, call: Callable[..., Any], given: tuple, batch: int, whole: list[Any]
    ) -> None:
        self.call, self.given, self.batch, self.whole = call, given, batch, whole

    def has_other_rows(self) -> bool:
        """True if it is not known of some tensor if its first axis is the rows.

        The length of the rows, or a number of heads, may be the number of rows too.
        """
        given = [x for x in calls.every(Tensor, list(self.given)) if x.ndim]
        return any(x is not given[0] and x.size(0) == self.batch for x in given)

    def for_rows(
        self,
        rows: slice | Tensor,
        given: tuple | None,
        check: Callable[[], None],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the module's output for the rows of a group.

        Args:
            given: the arguments and keyword arguments for these rows, before the layers. None: no
                layer changes them, though a hook may have made other objects of them.
            check: raises if the module cannot run on these rows alone.
            args, kwargs: the arguments after the group's layers changed them.
        """
        if given is not None and not calls.same((args, kwargs), given):
            check()
            return self.call(*args, **kwargs)
        if not self.whole:
            self.whole.append(self.call(*self.given[0], **self.given[1]))
        return cut(self.whole[0], self.batch, rows)


class Handovers:
    """Splits the values that branches pass from site to site into the rows of each group.

    Args:
        acting: the layers of a site.
    """

    def __init__(self, acting: Sequence[DeltaLayer]) -> None:
        every: list[Any] = [ly for ly in acting if ly.handover is not None]
        starts = {ly.handover: ly.hands_over for ly in every}
        self.cells: list[Any] = list(starts)
        left = [cell.take() for cell in self.cells]
        # A value at the start of a branch is from a forward that did not reach the branch's end.
        self.held = [None if starts[c] else v for c, v in zip(self.cells, left, strict=True)]
        self.new: list[Tensor | None] = [None for _ in self.cells]

    def open(self, rows: slice | Tensor) -> None:
        """Give the layers of a group their rows of the values from other sites."""
        for cell, value in zip(self.cells, self.held, strict=True):
            if value is not None:
                cell.put(value[rows])

    def close(self, ran: slice | Tensor, rows: slice | Tensor, batch: int) -> None:
        """Keep the rows that the layers of a group, which ran on `ran`, pass to other sites."""
        for index, cell in enumerate(self.cells):
            value = cell.take()
            if value is not None and self.held[index] is None:
                if self.new[index] is None:
                    self.new[index] = value.new_zeros(batch, *value.shape[1:])
                self.new[index][rows] = value if ran is rows else value[rows]  # type: ignore[index]

    def leave(self) -> None:
        """Pass the rows of all groups to other sites; rows without a branch are 0."""
        for cell, value in zip(self.cells, self.new, strict=True):
            if value is not None:
                cell.put(value)
