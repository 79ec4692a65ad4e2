"""Measure how the deltas of a composition interact."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sized
from itertools import combinations, pairwise
from typing import Any

from torch import nn

from .._backbone.backbone import Backbone
from .._deltas.base import BaseDelta
from .._deltas.blocks import inside, with_children
from .._deltas.order import attached_by_name, attached_once
from .._layers.base import Acts
from .._layers.record import Record
from .._layers.selection import OpenBlock
from .._verbs.put_back import put_back
from ..errors import DeltaError
from . import metrics
from .conditions import progress_bar, still, swapped
from .interference_report import InterferenceReport
from .metrics import Metric
from .overlaps import overlaps
from .shifts import Shifts

Players = dict[str, frozenset[Record]]


def interference(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Metric = metrics.LOSS,
    *,
    deltas: Iterable[str | BaseDelta] | None = None,
    pairs: bool = True,
    orders: bool = True,
    overlap: bool = True,
    forward: Callable[[Any, Any], Any] | None = None,
    progress: bool = True,
) -> InterferenceReport:
    """Measure how the deltas of a composition interact: their gains, synergies and overlaps.

    Let N be the n deltas, s(S) the score with just those of S acting, and s(0) that of the plain
    backbone. The report has, in the unit of the metric, for deltas i and j:

        gain(i) = s(i) - s(0)                       cost(i) = s(N) - s(N without i)
        synergy(ij) = s(ij) - s(i) - s(j) + s(0)    order(ij) = s(N with i and j exchanged) - s(N)

    The last is measured for neighbours in the order. s(S) = sum_b r_b m_b / sum_b r_b for the
    metric m_b of batch b and its number of rows r_b, the size of axis 0 of its first tensor.

    Overlap compares the changes D_i and D_j that two deltas alone make to one weight [out, in]:

        cosine(ij) = <D_i, D_j> / (|D_i| |D_j|), with <D, E> the sum of D_ab E_ab

    and the principal angles, in degrees, between their column spaces, where they write, and between
    their row spaces, from which they read. The space of D is spanned by its first singular vectors,
    as many as hold 99% of |D|^2. `column_overlap` and `row_overlap` are the mean of cos^2 of the
    angles, then of modules; spaces of k and l of d dimensions have max(k, l) / d by chance.
    `cosines` are those of all weights that both change, as one vector. Deltas that change no
    weight, such as adapters, have only shifts. The shift of the output h [..., width] of a module
    that carries deltas is, with sums over all tokens t of all batches,

        shift(i) = sum_t |h_t(i) - h_t(0)| / sum_t |h_t(0)|

    Padding that `attention_mask` or, in a decoder, `decoder_attention_mask` hides does not count.

    A forward of each batch is run for each set of deltas: s(0), s(N), n alone, n left out,
    n (n - 1) / 2 pairs and at most n - 1 exchanges, each set once. From n = 4 on that is at most
    1 + 3n + n (n - 1) / 2: 26 for n = 5; without pairs and orders 2 + 2n. Neighbours whose order
    cannot matter are not exchanged: they share no module, or just add to its output. Overlap costs
    no forward; it keeps the outputs of all modules with deltas for one batch in memory.

    The model runs in evaluation mode without gradients, eagerly if it is compiled. All runs of a
    batch begin with the same random numbers. Modes, order, switches, buffers and random number
    generators are afterwards as they were, after an error and Ctrl-C too. While deltas are
    exchanged no other thread may run the model, as the order belongs to the model.

    Args:
        batches: the arguments of the model's forward, each batch as a mapping, a sequence or one
            tensor. They are read once, so that a generator or a shuffling DataLoader is fine.
        metric: a function `metric(outputs, batch)` that returns one finite number. "loss": the
            `loss` in the outputs, or the outputs themselves if they are one number.
        deltas: the deltas to study, or their names, disabled ones too. None: all that act but
            blocks. Others do not act. A block that acts combines those of its deltas that act. If
            it is named here, it counts as one delta with all that is in it.
        pairs: measure pairs.
        orders: measure exchanges of neighbours in the order.
        overlap: compare changes of weights, and outputs.
        forward: a function `forward(model, batch)` that returns the outputs, for batches that hold
            more than arguments. None: `model(**batch)`, `model(*batch)` or `model(batch)`.
        progress: draw a progress bar on a terminal if it takes longer than a second.

    Raises:
        DeltaError: no delta acts, one is merged, a name is unknown or given twice, or the model is
            inside `route` or has no values.
        OptionError: `metric` or `batches` is wrong, or the metric is no finite number for a batch.

    Example:
        >>> import torch
        >>> import opendelta
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> for name in ("law", "news"):
        ...     delta = opendelta.LoraModel(model, modified_modules=["0"], name=name)
        >>> batches = [torch.randn(4, 8), torch.randn(2, 8)]
        >>> report = opendelta.interference(model, batches, lambda out, x: out.square().mean())
        >>> report.synergies, report.runs  # at their start deltas change nothing
        ({('law', 'news'): 0.0}, 8)
    """
    label = metrics.check(metric, batches)
    backbone = Backbone.of(model)
    players = _players(model, deltas)
    _check(backbone)
    not_compared: list[str] = []
    spaces = overlaps(backbone, players, not_compared) if overlap else {}
    shifts = Shifts(backbone, not_compared) if overlap else None
    study = _Study(backbone, players, metric, forward or metrics.run)
    study.run(batches, pairs, orders, shifts, progress)
    names, score = list(players), study.score
    every = frozenset(names)
    return InterferenceReport(
        model=type(model).__name__,
        metric=label,
        deltas=names,
        batches=study.batches,
        rows=study.rows,
        runs=study.runs,
        score=score(every),
        none=score(frozenset()),
        alone={name: score(frozenset({name})) for name in names},
        without={name: score(every - {name}) for name in names},
        pairs={pair: score(frozenset(pair)) for pair in combinations(names, 2) if pairs},
        swaps={(i.name, j.name): score((i, j)) for i, j in study.neighbours() if orders},
        overlaps=spaces,
        shifts=shifts.result(names) if shifts else {},
        not_compared=not_compared,
    )


def _check(backbone: Backbone) -> None:
    """Raise unless each delta can be switched, and the model can run."""
    for record in backbone.records():
        record.require_apart("interference() cannot switch")
    backbone.require_unrouted("interference() cannot run")
    if backbone.is_meta:
        raise DeltaError(
            f"{type(backbone.model).__name__} is on the meta device, where nothing has values: "
            "load it first"
        )


def _players(model: nn.Module, deltas: Any) -> Players:
    """Return {name: the delta of this name, and those that act with it}, in their order."""
    records = attached_once(model)
    if deltas is None:
        chosen = [record for record in records if record.active and not record.config.children]
        own = {record: {record} for record in chosen}
    else:
        if not isinstance(deltas, Iterable):
            raise DeltaError(f"deltas={deltas!r} must be a list of deltas or of their names")
        deltas = [deltas] if isinstance(deltas, str) else list(deltas)
        named = attached_by_name(model, deltas, records)
        own = {record: with_children([record], records) for record in named}
        parts = Counter(part for each in named for part in own[each])
        if twice := [part.name for part in records if parts[part] > 1]:
            raise DeltaError(
                f"deltas={[record.name for record in named]} has {twice[0]!r} twice, by itself or "
                "in a block: name the block, or deltas in it"
            )
    if not own:
        raise DeltaError(
            f"no delta acts on {type(model).__name__}: attached are "
            f"{[record.name for record in records]}; attach or enable some, or name them in deltas="
        )
    return {record.name: frozenset(own[record]) for record in records if record in own}


class _Study:
    """Runs of a model with sets of its deltas, and their scores.

    Attributes:
        batches, rows, runs: the numbers of batches, of their rows and of forwards.
    """

    def __init__(
        self,
        backbone: Backbone,
        players: Players,
        metric: Metric,
        forward: Callable[[Any, Any], Any],
    ) -> None:
        records = backbone.records()
        self.backbone, self.records, self.players = backbone, records, players
        self.metric, self.forward = metric, forward
        parts = frozenset().union(*players.values())
        blocks = [r for r in records if r.active and r.config.children and r not in parts]
        self.held = {block: {*inside(block, records)} for block in blocks}
        self.sums: dict[Any, float] = {}
        self.batches = self.rows = self.runs = 0

    def score(self, key: Any) -> float:
        """Return the mean metric of a set of deltas, or of two neighbours that are exchanged."""
        return self.sums[key if key in self.sums else frozenset(self.players)] / self.rows

    def acting(self, chosen: Iterable[str]) -> set[Record]:
        """Return the deltas that act if just the chosen ones do, with the blocks around them."""
        own = {part for name in chosen for part in self.players[name]}
        return own | {block for block, held in self.held.items() if held & own}

    def neighbours(self) -> list[tuple[Record, Record]]:
        """Return each two neighbours in the order of all that acts; a block counts as one."""
        acting = self.acting(self.players)
        within = {part for record in acting for part in inside(record, self.records)}
        return list(pairwise(r for r in self.records if r in acting and r not in within))

    def _ordered(self, first: Record, second: Record) -> bool:
        """True if the order of two neighbours matters on a module that both have."""
        one, other = ({each, *inside(each, self.records)} for each in (first, second))
        adding = {Acts.BESIDE} if len(one) == len(other) == 1 else set()
        for stack in self.backbone.stacks.values():
            acts = {layer.record: layer.acts for layer in stack.values()}
            if one & acts.keys() and other & acts.keys():
                both = {acts[each] for each in one | other if each in acts}
                if both != adding:
                    return True
        return False

    def run(
        self,
        batches: Iterable[Any],
        pairs: bool,
        orders: bool,
        shifts: Shifts | None,
        progress: bool,
    ) -> None:
        """Run each batch with each set of deltas."""
        names = list(self.players)
        every = frozenset(names)
        sets = [frozenset[str](), *(frozenset({name}) for name in names), every]
        sets += [every - {name} for name in names]
        sets += [frozenset(pair) for pair in combinations(names, 2) if pairs]
        sets = list(dict.fromkeys(sets))
        swaps = [pair for pair in self.neighbours() if orders and self._ordered(*pair)]
        total = len(batches) * (len(sets) + len(swaps)) if isinstance(batches, Sized) else None
        with still(self.backbone), progress_bar(progress, total, "interference") as step:
            for batch in metrics.each(batches):
                rows = metrics.rows_in(batch)
                for chosen in sets:
                    with _seen(shifts, chosen, batch):
                        self._add(chosen, chosen, batch, rows)
                    step()
                for pair in swaps:
                    with swapped(self.backbone, *pair):
                        self._add(pair, every, batch, rows)
                    step()
                self.rows += rows
                self.batches += 1

    def _add(self, key: Any, chosen: frozenset[str], batch: Any, rows: int) -> None:
        acting, backbones = self.acting(chosen), {record.shared for record in self.records}
        switches = {record: record in acting for record in self.records}
        block = OpenBlock(switches, backbones=backbones, watchers=dict.fromkeys(backbones))
        names = [name for name in self.players if name in chosen]
        where = f"batch {self.batches} with {names or 'no delta'} acting"
        with put_back(self.backbone), block, metrics.unchanged(batch, where):
            outputs = self.forward(self.backbone.model, batch)
            value = metrics.measure(self.metric, outputs, batch, where)
        self.runs += 1
        self.sums[key] = self.sums.get(key, 0.0) + rows * value


def _seen(
    shifts: Shifts | None, chosen: frozenset[str], batch: Any
) -> contextlib.AbstractContextManager[None]:
    """Return a block in which the outputs of modules are kept or compared, where they are asked."""
    if shifts is None or len(chosen) > 1:
        return contextlib.nullcontext()
    return shifts.moved_by(*chosen) if chosen else shifts.plain(batch)
