"""The report of `interference`: its data, its tables and its pictures."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .._show.data import for_json
from .._show.notebooks import InNotebooks
from .._show.tables import SHOWN, as_text, cells, plain_table
from ..errors import OptionError, listed
from ..plot import heat_map

if TYPE_CHECKING:  # rich is imported where something is drawn
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

Pair = tuple[str, str]
MOST = 20  # pairs in the printed table


@dataclass(frozen=True)
class Spaces:
    """How two spaces lie to each other, those in which two changes of one weight read or write.

    Attributes:
        angles: the principal angles between them in degrees, the smallest first.
        chance: the `shared` part to expect of random spaces of their dimensions.
    """

    angles: list[float]
    chance: float

    @property
    def shared(self) -> float:
        """Return the mean squared cosine of the angles: 0 if orthogonal, 1 if one in the other."""
        squares = [math.cos(math.radians(angle)) ** 2 for angle in self.angles]
        return sum(squares) / len(squares)


@dataclass(frozen=True)
class Overlap:
    """The overlap of the changes D and E that two deltas make to the weight of one module.

    Attributes:
        dot: the sum of the products of all entries of D and E.
        norms: |D| and |E|, the roots of the sums of their squared entries.
        columns: their column spaces, where they write. None for a normalisation, whose weight
            spans no space.
        rows: their row spaces, from which they read, or None.
    """

    dot: float
    norms: tuple[float, float]
    columns: Spaces | None
    rows: Spaces | None

    @property
    def cosine(self) -> float:
        """Return the cosine between D and E, from -1 to 1."""
        return self.dot / (self.norms[0] * self.norms[1])

    def to_dict(self) -> dict[str, Any]:
        """Return the cosine and the angles for JSON."""
        found: dict[str, Any] = {"cosine": self.cosine}
        for name, spaces in (("columns", self.columns), ("rows", self.rows)):
            if spaces is not None:
                found[name] = {**dataclasses.asdict(spaces), "shared": spaces.shared}
        return found


@dataclass(frozen=True, repr=False)
class InterferenceReport(InNotebooks):
    """How the deltas of a composition interact; `str()` gives tables, `to_dict()` data for JSON.

    s(S) is the score with just the deltas of S acting, N are all the deltas; `interference` has all
    definitions. A part that was switched off is empty.

    Attributes:
        model: the class of the model.
        metric: the name of the metric.
        deltas: the names of the deltas, in their order.
        batches: number of batches.
        rows: number of rows in them.
        runs: number of forwards.
        score: s(N).
        none: s(0), with no delta acting.
        alone: {delta i: s(i)}.
        without: {delta i: s(N without i)}.
        pairs: {(i, j): s(ij)}.
        swaps: {(i, j), neighbours in the order: the score of all with i and j exchanged}.
        overlaps: {(i, j): {full name of a module: the overlap of their changes of its weight}}.
        shifts: {delta i: {full name of a module: the mean length of the change of its output by i
            alone, over the mean length of its output without deltas}}.
        not_compared: the weights and outputs that could not be compared, each with the reason.
    """

    model: str
    metric: str
    deltas: list[str]
    batches: int
    rows: int
    runs: int
    score: float
    none: float
    alone: dict[str, float]
    without: dict[str, float]
    pairs: dict[Pair, float] = field(default_factory=dict)
    swaps: dict[Pair, float] = field(default_factory=dict)
    overlaps: dict[Pair, dict[str, Overlap]] = field(default_factory=dict)
    shifts: dict[str, dict[str, float]] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)

    # ------------------------------------------------------------------- what follows from it
    @property
    def gains(self) -> dict[str, float]:
        """Return {delta i: s(i) - s(0)}: the gain by it alone."""
        return {name: score - self.none for name, score in self.alone.items()}

    @property
    def costs(self) -> dict[str, float]:
        """Return {delta i: s(N) - s(N without i)}: the part of the score that leaves with it."""
        return {name: self.score - score for name, score in self.without.items()}

    @property
    def synergies(self) -> dict[Pair, float]:
        """Return {(i, j): s(ij) - s(i) - s(j) + s(0)}: the gain of both beyond the sum of each."""
        return {
            (i, j): both - self.alone[i] - self.alone[j] + self.none
            for (i, j), both in self.pairs.items()
        }

    @property
    def order_changes(self) -> dict[Pair, float]:
        """Return {(i, j): the change of the score as the neighbours i and j are exchanged}."""
        return {pair: score - self.score for pair, score in self.swaps.items()}

    @property
    def cosines(self) -> dict[Pair, float]:
        """Return {(i, j): the cosine between their changes of all weights that both change}."""
        found = {}
        for pair, modules in self.overlaps.items():
            sizes = [sum(each.norms[k] ** 2 for each in modules.values()) for k in (0, 1)]
            found[pair] = sum(each.dot for each in modules.values()) / (sizes[0] * sizes[1]) ** 0.5
        return found

    @property
    def column_overlap(self) -> dict[Pair, float]:
        """Return {(i, j): the shared part of their column spaces, from 0 to 1: a mean of modules}.

        On one module it is the mean squared cosine of the principal angles.
        """
        return self._mean(lambda overlap: overlap.columns, lambda spaces: spaces.shared)

    @property
    def row_overlap(self) -> dict[Pair, float]:
        """Return {(i, j): the shared part of their row spaces}, as `column_overlap` does."""
        return self._mean(lambda overlap: overlap.rows, lambda spaces: spaces.shared)

    @property
    def column_chance(self) -> dict[Pair, float]:
        """Return {(i, j): the `column_overlap` to expect of random spaces of their dimensions}."""
        return self._mean(lambda overlap: overlap.columns, lambda spaces: spaces.chance)

    @property
    def row_chance(self) -> dict[Pair, float]:
        """Return {(i, j): the `row_overlap` to expect of random spaces of their dimensions}."""
        return self._mean(lambda overlap: overlap.rows, lambda spaces: spaces.chance)

    def _mean(
        self, side: Callable[[Overlap], Spaces | None], fact: Callable[[Spaces], float]
    ) -> dict[Pair, float]:
        found = {}
        for pair, modules in self.overlaps.items():
            known = [fact(spaces) for each in modules.values() if (spaces := side(each))]
            if known:
                found[pair] = sum(known) / len(known)
        return found

    # ----------------------------------------------------------------------------- showing it
    def to_dict(self) -> dict[str, Any]:
        """Return all data of the report for JSON; a number that JSON does not have is null."""
        parts: dict[str, dict[Pair, Any]] = {
            "score": self.pairs,
            **self.by_pair(),
            "column_chance": self.column_chance,
            "row_chance": self.row_chance,
            "modules": {
                pair: {where: each.to_dict() for where, each in modules.items()}
                for pair, modules in self.overlaps.items()
            },
        }
        found: dict[Pair, dict[str, Any]] = {}
        for key, part in parts.items():
            for pair, value in part.items():
                found.setdefault(pair, {"deltas": list(pair)})[key] = value
        scalars = ("model", "metric", "deltas", "batches", "rows", "runs", "score", "none", "alone")
        return for_json(
            {
                **{key: getattr(self, key) for key in scalars},
                "without": self.without,
                "gains": self.gains,
                "costs": self.costs,
                "pairs": list(found.values()),
                "shifts": self.shifts,
                "not_compared": self.not_compared,
            }
        )

    def to_json(self, indent: int | None = 2) -> str:
        """Return `to_dict()` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def plot(self, what: str | None = None, ax: Any = None) -> Any:
        """Draw a heat map with matplotlib; return its axes.

        Args:
            what: "synergy", "order", "cosine", "column_overlap" or "row_overlap": a number for each
                two deltas; "shift": one for each delta and module. None: the first of these that
                the report has.
            ax: the axes to draw on. None: new ones.

        Raises:
            OptionError: the report has no such part, or matplotlib is not installed.
        """
        parts: dict[str, Any] = {name: part for name, part in self.by_pair().items() if part}
        if any(self.shifts.values()):
            parts["shift"] = self.shifts
        what = next(iter(parts), None) if what is None else what
        if what not in parts:
            raise OptionError(f"plot({what!r}): this report has {list(parts) or 'nothing to draw'}")
        part, title = parts[what], what.replace("_", " ")
        title += f" ({self.metric})" if what in ("synergy", "order") else ""
        if what == "shift":
            where = list(dict.fromkeys(name for own in part.values() for name in own))
            rows = [[part[delta].get(name) for delta in self.deltas] for name in where]
            names = [name or "(root)" for name in where]
            return heat_map(rows, names, self.deltas, title, ax=ax)
        names = list(dict.fromkeys([*self.deltas, *(name for pair in part for name in pair)]))
        rows = [[part.get((i, j), part.get((j, i))) for j in names] for i in names]
        signed = what in ("synergy", "order", "cosine")
        return heat_map(rows, names, names, title, signed=signed, ax=ax)

    def by_pair(self) -> dict[str, dict[Pair, float]]:
        """Return {"synergy", "order" and so on: {(i, j): the number for these two deltas}}."""
        return {
            "synergy": self.synergies,
            "order": self.order_changes,
            "cosine": self.cosines,
            "column_overlap": self.column_overlap,
            "row_overlap": self.row_overlap,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from tables(self)

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__


def tables(report: InterferenceReport) -> Iterator[RenderableType]:
    """Yield a table of the deltas, one of the pairs, and a line on what was not compared."""
    table = plain_table(f"interference in {report.model}: {report.metric}, {report.rows} rows")
    table.add_column("acting", style="magenta", no_wrap=True)
    for heading in ("score", "gain", "without", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    if report.shifts:
        table.add_column("largest shift", overflow="fold")
    table.add_row(*cells("none", _score(report.none)))
    for name in report.deltas:
        own = _score(report.alone[name]), _signed(report.gains[name])
        left = _score(report.without[name]), _signed(report.costs[name])
        table.add_row(*cells(name, *own, *left, *_largest(report.shifts.get(name, {}))))
    table.add_row(*cells("all", _score(report.score), _signed(report.score - report.none)))
    yield table
    parts = {name: part for name, part in report.by_pair().items() if part}
    if parts:
        yield ""
        yield from _of_pairs(report, parts)
    if report.not_compared:
        yield ""
        yield cells(f"not compared: {listed(report.not_compared, SHOWN)}")[0]


def _of_pairs(report: InterferenceReport, parts: dict[str, dict[Pair, float]]) -> Iterator[Any]:
    pairs = list(dict.fromkeys(pair for part in parts.values() for pair in part))
    first = next(iter(parts.values()))
    shown = sorted(pairs, key=lambda pair: -abs(first.get(pair, 0.0)))[:MOST]
    table = plain_table(None, "pair")
    for name in parts:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    chances = {"column_overlap": report.column_chance, "row_overlap": report.row_chance}
    for pair in [pair for pair in pairs if pair in shown]:
        row = [" ".join(pair)]
        for name, part in parts.items():
            text = _signed(part[pair]) if pair in part else ""
            if text and name in chances:
                text = f"{part[pair]:.3f} ({chances[name][pair]:.3f})"
            row.append(text)
        table.add_row(*cells(*row))
    yield table
    if len(shown) < len(pairs):
        yield f"and {len(pairs) - len(shown)} pairs more: to_dict() has all"
    if parts.keys() & chances.keys():
        yield "in parentheses: the overlap of random spaces of the same dimensions"


def _largest(shifts: dict[str, float]) -> list[str]:
    where = max(shifts, key=lambda name: shifts[name], default=None)
    return [] if where is None else [f"{shifts[where]:.3g} {where or '(root)'}"]


def _score(value: float) -> str:
    return f"{value:.4g}"


def _signed(value: float) -> str:
    return f"{value:+.3g}" if value else "0"
