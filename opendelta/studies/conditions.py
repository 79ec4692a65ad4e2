"""The conditions of a study: a model that is put back after it, and a progress bar."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .._backbone.backbone import Backbone
from .._backbone.shapes import untouched
from .._deltas.order import rerank
from .._layers.record import Record
from .._modules.process import eager
from .._verbs.put_back import put_back
from ..errors import to_the_end

PATIENCE = 1.0  # seconds before a progress bar appears


@contextlib.contextmanager
def still(backbone: Backbone) -> Iterator[None]:
    """Run a model in evaluation mode without gradients, and leave it as it was.

    A compiled model runs eagerly.
    """
    modes = [(module, module.training) for module in backbone.model.modules()]
    with eager(), untouched(backbone), put_back(backbone), torch.no_grad():
        try:
            _set_modes([(module, False) for module, _ in modes])
            yield
        finally:
            to_the_end(functools.partial(_set_modes, modes))


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:  # not by train(), which some classes write anew
        if module.training != training:
            module.training = training


@contextlib.contextmanager
def swapped(backbone: Backbone, first: Record, second: Record) -> Iterator[None]:
    """Exchange the places of two deltas in the order, and put them back."""
    before = {first: first.rank, second: second.rank}
    try:
        rerank(backbone, {first: before[second], second: before[first]})
        yield
    finally:
        to_the_end(functools.partial(rerank, backbone, before))


@contextlib.contextmanager
def progress_bar(shown: bool, total: int | None, what: str) -> Iterator[Callable[[], Any]]:
    """Yield a function to call after each of `total` steps, which draws a bar if they take long.

    It is drawn on a terminal or in a notebook, and vanishes at the end.

    Args:
        total: number of steps; None: not known.
    """
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    drawn = console.is_terminal or console.is_jupyter
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, transient=True, disable=not drawn)
    task, begin = bar.add_task(what, total=total), time.monotonic()

    def step() -> None:
        bar.advance(task)
        if time.monotonic() - begin > PATIENCE and not bar.live.is_started:
            bar.start()

    try:
        yield step
    finally:
        bar.stop()
