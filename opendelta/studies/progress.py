"""Show how far a comparison is: the scores so far as a table, and a bar."""

from __future__ import annotations

from typing import Any

from .._show.tables import plain_table
from .comparison import Row
from .contenders import Contender
from .tasks import Task
from .training import Run


class Progress:
    """A context manager that draws on standard error: live on a terminal, else a line a training.

    Args:
        trainings: how many there will be.
        show: draw at all.
    """

    def __init__(self, task: Task, every: list[Contender], trainings: int, show: bool) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        self.task, self.runs = task, {contender.name: list[Run]() for contender in every}
        self.console = Console(stderr=True, quiet=not show, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.bar = Bar(*columns, TimeElapsedColumn(), console=self.console)
        self.all = self.bar.add_task("trainings", total=trainings)
        self.steps = self.bar.add_task("steps", total=None)
        self.live = Live(get_renderable=self._drawn, console=self.console, transient=True)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.live.stop()

    def begin(self, what: str, steps: int) -> None:
        """Show that a training begins."""
        self.bar.reset(self.steps, total=steps, description=what)

    def step(self, loss: float) -> None:
        """Show that a step is done."""
        self.bar.update(self.steps, advance=1)

    def end(self, what: str, run: Run, trial: bool) -> None:
        """Show what a training ended with."""
        if not trial:
            self.runs[run.deltas].append(run)
        self.bar.advance(self.all)
        if not self.console.is_terminal:
            self.console.print(f"{what}: {run.score:.3f} in {run.seconds:.0f} s")

    def _drawn(self) -> Any:
        from rich.console import Group

        table = plain_table(None, "deltas", f"{self.task.unit} on {self.task.name}", "seeds")
        for name, runs in self.runs.items():
            table.add_row(name, Row.of(runs).shown if runs else "", str(len(runs)))
        return Group(table, self.bar)
