"""Warn of layers that ran before the model trains, and whose module is read there, not called."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .._backbone.backbone import Backbone
from .._backbone.shapes import PROBING
from .._sites import swap
from .._sites.noting import Uses, uses_of
from .._sites.stack import Stack, acting_on
from ..errors import UnreachedWarning, listed, warn
from ..names import SLOT, join
from .head_watch import is_compiled, take_away, trains

FORWARDS = 6  # code beside the model may read a weight now and then


class TrainingWatch:
    """Hooks on a model that look at its first forwards that train, where others came before.

    The first of them tells the sites whose layers ran before, and do not run now. From then on they
    note whether code reads them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.ran: dict[str, set[str]] = {}
        self.silent: dict[str, tuple[int, int]] = {}  # {site: reads and gradients that are known}

    def __call__(self, model: nn.Module, _args: Any, *output: Any) -> None:
        if torch.compiler.is_compiling() or PROBING.get() or not trains(model):
            return
        backbone = Backbone.of(model)
        if not output:
            self._begin(backbone)
            return
        self._judge(backbone, called=True) if self.count else self._find(backbone)
        self.count += 1

    def _begin(self, backbone: Backbone) -> None:
        """Look at what came since the last forward that trained; begin the next one."""
        stacks = backbone.stacks
        self._judge(backbone)
        if not self.count:
            self._restore(backbone)
            self.ran = {where: set(stack.ran) for where, stack in stacks.items()}
            for stack in stacks.values():
                stack.ran.clear()
        elif self.count == FORWARDS or not self.silent:
            take_away(backbone, TrainingWatch)
        for where in self.silent:
            uses_of(stacks[where]).called = False

    def _restore(self, backbone: Backbone) -> None:
        for where, names in self.ran.items():
            if where in backbone.stacks:
                backbone.stacks[where].ran |= names & {*backbone.stacks[where]}
        self.ran = {}

    def _find(self, backbone: Backbone) -> None:
        """Let the sites whose layers ran before, and not now, note who reads them."""
        before, now = self.ran, {w for w, stack in backbone.stacks.items() if stack.ran}
        self._restore(backbone)
        for where, stack in backbone.stacks.items():
            site = backbone.modules[where]
            noted = swap.weight_is_read(site, False) or getattr(type(site), "_site_notes", None)
            if before.get(where) and where not in now and not noted and swap.note_uses(site):
                self.silent[where] = _known(uses_of(stack))

    def _judge(self, backbone: Backbone, called: bool = False) -> None:
        """Warn of sites that have been read.

        Args:
            called: a forward has ended, and those that it called use their layers.
        """
        read: list[str] = []
        for where, (reads, reached) in [*self.silent.items()]:
            stack = backbone.stacks.get(where)
            uses = Uses() if stack is None else uses_of(stack)
            used = uses.called if called else uses.reached.total() > reached
            if stack is None or used or is_compiled(backbone.chain(where)):
                del self.silent[where]
            elif uses.reads > reads:
                read += [join(where, SLOT, name) for name in _acting(stack)]
                del self.silent[where]
        if read:
            warn(
                f"{len(read)} delta layers ran before, but not in a forward of "
                f"{type(backbone.model).__name__} that trains, where code reads the module's "
                f"weight instead of calling it: {listed(read)}. Attach with reads=True, so that "
                "they act there too",
                UnreachedWarning,
            )


def _known(uses: Uses) -> tuple[int, int]:
    return uses.reads, uses.reached.total()


def _acting(stack: Stack) -> list[str]:
    return [layer.record.name for layer in acting_on(stack) if layer.computes]
