"""Keep what blocks weighed in a forward, for `watching`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Weighing(NamedTuple):
    """The weights of one block on one module.

    Attributes:
        weights: [..., n] for the n deltas of the block; 0 for those that do not act.
        logits: what the weights are the softmax of, before a choice of the best: [..., n], -inf for
            those that do not act; None: the weights are no softmax.
        chosen: booleans [..., n]: the best that each position chose, or its first if it takes all;
            None: the weights are no softmax.
        taken: booleans [..., 1]: false in rows of `route` that do not take the block.
    """

    weights: Tensor
    logits: Tensor | None
    chosen: Tensor | None
    taken: Tensor


RESTS = Weighing(0.0, -torch.inf, False, False)  # type: ignore[arg-type]  # where a block does not act
Runs = list[Weighing]  # of one block on one module: one for each time that the module ran
Part = tuple[Any, Any, dict[str, Runs]]


class Seen:
    """The weights of each block on each module in the last forward of a model, with their graph.

    Attributes:
        runs: {(the stack of the module, name of the block): its weights in each run}. Outside of a
            forward of the whole model they are those of the last run.
        acted: the names of the blocks that ran, with weights or without.
    """

    def __init__(self) -> None:
        self.runs: dict[tuple[Any, str], Runs] = {}
        self.acted: set[str] = set()
        self.depth = 0  # a model may call itself

    def begin(self) -> None:
        """A forward of the whole model begins: forget the one before."""
        if not self.depth:
            self.runs.clear()
            self.acted.clear()
        self.depth += 1

    def end(self) -> None:
        """A forward of the whole model ends."""
        self.depth -= 1

    def note(self, stack: Any, name: str, weighing: Weighing) -> None:
        """Keep the weights of a block on a module."""
        if not self.depth:
            self.runs.pop((stack, name), None)
        self.runs.setdefault((stack, name), []).append(weighing)

    @contextlib.contextmanager
    def group(self, stack: Any) -> Iterator[dict[str, Runs]]:
        """Give what blocks weigh on a module while a group of rows runs, instead of keeping it."""
        whole, self.runs = self.runs, {}
        found: dict[str, Runs] = {}
        try:
            yield found
        finally:
            inside, self.runs = self.runs, whole
            for (where, name), runs in inside.items():
                if where is stack:
                    found[name] = runs
                else:
                    self.runs.setdefault((where, name), []).extend(runs)

    def put(self, stack: Any, parts: Sequence[Part], batch: int, axes: int) -> None:
        """Keep the weights that groups of rows had, as those of one batch; other rows have 0.

        Args:
            parts: for each group the rows on which it ran, its own rows, and what `group` gave.
            batch: number of all rows.
            axes: number of axes of the module's output.
        """
        for name in dict.fromkeys(name for *_, part in parts for name in part):
            own = [(ran, rows, part[name]) for ran, rows, part in parts if name in part]
            for number in range(max(len(runs) for *_, runs in own)):
                each = [(ran, rows, rs[number]) for ran, rows, rs in own if number < len(rs)]
                fields: list[Any] = [
                    _joined([(ran, rows, w[field]) for ran, rows, w in each], batch, axes, rest)
                    for field, rest in enumerate(RESTS)
                ]
                self.note(stack, name, Weighing(*fields))


class Edge:
    """A hook that tells `seen` where a forward of a model begins or ends; no copy of it does.

    Args:
        record: one that is watched; in another thread or task something else may watch it.
    """

    def __init__(self, record: Any = None, seen: Seen | None = None, begins: bool = True) -> None:
        self.record, self.seen, self.begins = record, seen, begins

    def __call__(self, *_: Any) -> None:
        if self.seen is not None and self.record.watched is self.seen:
            self.seen.begin() if self.begins else self.seen.end()

    def __reduce__(self) -> tuple:
        return Edge, ()


def together(runs: Runs) -> Weighing:
    """Return several runs as one: [runs, ...], or [positions, n] if their shapes differ."""
    if len(runs) == 1:
        return runs[0]
    alike = all(run.weights.shape == runs[0].weights.shape for run in runs)

    def join(values: tuple[Tensor | None, ...]) -> Any:
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        return torch.stack(known) if alike else torch.cat([v.flatten(0, -2) for v in known])

    return Weighing(*map(join, zip(*runs, strict=True)))


def _joined(
    parts: Sequence[tuple[Any, Any, Any]], batch: int, axes: int, rest: Any
) -> Tensor | None:
    first = parts[0][2]
    if first is None:
        return None
    same = first.ndim == 1  # at all positions of a group
    sizes = [*[1] * (axes - 2), first.size(0)] if same else first.shape[1:]
    whole = first.new_full((batch, *sizes), rest)
    for ran, rows, values in parts:
        whole[rows] = values if same or ran is rows else values[rows]
    return whole


def spread(values: Tensor, numbers: Sequence[int], total: int, rest: float) -> Tensor:
    """Return `values` [..., acting children] as [..., total], with `rest` for the others."""
    if len(numbers) == total:
        return values
    whole = values.new_full((*values.shape[:-1], total), rest)
    whole[..., list(numbers)] = values
    return whole
