"""The report of a comparison: a table, data, plots and files."""

from __future__ import annotations

import importlib.util
import json
import math
import platform
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import plot
from .._show.data import for_json
from .._show.notebooks import InNotebooks
from .._show.tables import as_text, cells, plain_table, size
from .tasks import Task
from .training import Run, Settings, as_number

if TYPE_CHECKING:  # rich is imported where something is drawn
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

HEADINGS = ("parameters", "share", "training", "memory", "on disk", "learning rate")


@dataclass(frozen=True)
class Row:
    """One composition of the table.

    Attributes:
        deltas: its name.
        scores: the score of each seed; nan for a training that diverged.
        score: their mean.
        spread: their standard deviation; None for one seed.
        parameters: number of parameters of the deltas.
        share: of the parameters that trained in all parameters.
        seconds: of a training, the mean.
        memory: bytes that a training holds beside the weights, in its first step, the mean.
        size: bytes of the saved composition.
        rates: {name of a delta: its highest learning rate}.
    """

    deltas: str
    scores: list[float]
    score: float
    spread: float | None
    parameters: int
    share: float
    seconds: float
    memory: int
    size: int
    rates: dict[str, float]

    @classmethod
    def of(cls, runs: list[Run]) -> Row:
        """Return the row of a composition's trainings."""
        scores, first = [run.score for run in runs], runs[0]
        mean = statistics.fmean(scores)
        known = len(scores) > 1 and math.isfinite(mean)
        return cls(
            first.deltas,
            scores,
            mean,
            statistics.stdev(scores) if known else None,
            first.parameters,
            first.share,
            statistics.fmean(run.seconds for run in runs),
            round(statistics.fmean(run.memory for run in runs)),
            max(run.size for run in runs),
            first.rates,
        )

    @property
    def shown(self) -> str:
        """Return the score with its spread."""
        if not math.isfinite(self.score):
            bad = sum(not math.isfinite(score) for score in self.scores)
            return f"diverged ({bad} of {len(self.scores)})"
        return f"{self.score:.3f}" + (f" ± {self.spread:.3f}" if self.spread is not None else "")

    def cells(self) -> list[str]:
        """Return the row in words."""
        rates = dict.fromkeys(f"{rate:.2g}" for rate in self.rates.values())
        return [
            self.deltas,
            self.shown,
            f"{self.parameters:,}",
            f"{self.share:.2%}",
            f"{self.seconds:.0f} s",
            size(self.memory),
            size(self.size),
            ", ".join(rates),
        ]


@dataclass(frozen=True)
class Comparison(InNotebooks):
    """The findings of `opendelta.compare`; `str()` gives a table, `to_dict()` data for JSON.

    Attributes:
        task: the name of the task.
        unit: what the score is called.
        higher_is_better: False for losses.
        baseline: the score of always naming the largest class; None: there are no classes.
        facts: all that the numbers depend on: the settings, the model and the task, as hashes.
        where: the machine and the versions.
        rows: one for each composition, in the order that was given.
        runs: the trainings.
    """

    task: str
    unit: str
    higher_is_better: bool
    baseline: float | None
    facts: dict[str, Any]
    where: str
    rows: list[Row]
    runs: list[Run] = field(repr=False)

    @classmethod
    def of(
        cls, task: Task, facts: dict[str, Any], names: Iterable[str], runs: list[Run]
    ) -> Comparison:
        """Return the report of trainings; compositions without one have no row."""
        own = {name: [run for run in runs if run.deltas == name] for name in names}
        rows = [Row.of(each) for each in own.values() if each]
        better = task.higher_is_better
        return cls(task.name, task.unit, better, task.baseline, facts, where(), rows, runs)

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Comparison:
        """Return what `to_dict` gave."""
        own = {each.name: held[each.name] for each in fields(cls)}
        rows = [
            Row(
                **{
                    **row,
                    "score": as_number(row["score"]),
                    "scores": [*map(as_number, row["scores"])],
                }
            )
            for row in held["rows"]
        ]
        return cls(**{**own, "rows": rows, "runs": list(map(Run.from_dict, held["runs"]))})

    @property
    def best(self) -> Row:
        """Return the row with the best mean score."""
        return max(self.rows, key=lambda row: self._rank(row.score))

    @property
    def best_run(self) -> Run:
        """Return the best training of the best composition."""
        own = [run for run in self.runs if run.deltas == self.best.deltas]
        return max(own, key=lambda run: self._rank(run.score))

    def _rank(self, score: float) -> float:
        if not math.isfinite(score):
            return -math.inf
        return score if self.higher_is_better else -score

    # ----------------------------------------------------------------------------------- as a table
    def _headings(self) -> list[str]:
        return ["deltas", f"{self.unit} on {self.task}", *HEADINGS]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._table()

    def _table(self) -> Table:
        table = plain_table(None, *self._headings())
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self.rows:
            table.add_row(*cells(*row.cells()), style="bold" if row is self.best else None)
        table.caption, table.caption_justify = self._caption(), "left"
        return table

    def _caption(self) -> str:
        f, seeds = self.facts, len(self.rows[0].scores) if self.rows else 0
        steps = Settings(f["epochs"], f["max_steps"], f["batch_size"]).steps(f["train"])
        how = (
            f"{f['train']:,} examples to learn from, {f['test']:,} held out; {steps:,} steps; "
            f"{seeds} seed{'s' * (seeds != 1)}"
        )
        if self.baseline is None:
            return how
        if self.rows and self._rank(self.best.score) <= self._rank(self.baseline):
            return (
                f"{how}; no composition beats the largest class alone ({self.baseline:.3f}): train "
                "longer (--epochs), or at other rates (--sweep)"
            )
        return f"{how}; always naming the largest class scores {self.baseline:.3f}"

    def __str__(self) -> str:
        return as_text(self)

    def _markdown(self) -> str:
        rows = [self._headings(), ["---"] + ["---:"] * (len(HEADINGS) + 1)]
        rows += [[cell.replace("|", "\\|") for cell in row.cells()] for row in self.rows]
        pictures = [f"![{name}]({name}.svg)" for name in ("scores", "losses")]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return "\n\n".join(
            [f"# {self.task}", table, f"{self._caption()}. {self.where}.", *pictures, ""]
        )

    # ---------------------------------------------------------------------------- as data and files
    def to_dict(self) -> dict[str, Any]:
        """Return all data for JSON; a score that is not a number is null."""
        best = self.best.deltas if self.rows else None
        parts = {key: list(map(vars, getattr(self, key))) for key in ("rows", "runs")}
        return for_json({**vars(self), "best": best, **parts})

    def save(self, folder: Path) -> None:
        """Write report.md and report.json, and scores.svg and losses.svg if matplotlib is there."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", "utf-8")
        (folder / "report.md").write_text(self._markdown(), "utf-8")
        if importlib.util.find_spec("matplotlib") is not None:
            from matplotlib.figure import Figure  # not by pyplot, which keeps each figure

            for name, draw in (("scores", plot.scores), ("losses", plot.losses)):
                figure = Figure(figsize=(7, 4.5), layout="constrained")
                draw(self, figure.subplots())
                figure.savefig(folder / f"{name}.svg")


def where() -> str:
    """Return the machine and the versions."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "opendelta"))
    threads = torch.get_num_threads()
    return (
        f"{platform.machine()}, {threads} threads, Python {platform.python_version()}, {versions}"
    )
