"""Warn of layers that ran before the model trains, and whose module is read there, not called."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from .._backbone.backbone import Backbone
from .._backbone.shapes import PROBING
from .._layers.base import DeltaLayer
from .._sites import swap
from .._sites.noting import uses_of, when_gradients_come
from .._sites.stack import Stack, acting_on
from ..errors import UnreachedWarning, listed, warn
from ..names import SLOT, join
from .head_watch import is_compiled, take_away, trains

FORWARDS = 6  # that train, in which a layer that ran before may be missed
LAST = 12  # in which a module that was missed may be read


class TrainingWatch:
    """Hooks on a model that look at its first forwards that train.

    They find the sites whose layers ran before, and not in such a forward. From then on these note
    whether code reads them, in the forward or before gradients come back to its output.
    """

    def __init__(self) -> None:
        self.count = 0
        self.without = False  # the last output takes no gradients, as if nothing trained
        self.ran: dict[str, set[str]] = {}
        self.silent: dict[str, tuple[int, int]] = {}  # {site: reads and gradients that are known}

    def __call__(self, model: nn.Module, _args: Any, *output: Any) -> None:
        if torch.compiler.is_compiling() or PROBING.get() or not trains(model):
            return
        backbone = Backbone.of(model)
        if not output:
            self._begin(backbone)
            return
        self.count += 1
        for where in [w for w in self.silent if uses_of(backbone.stacks[w]).called]:
            del self.silent[where]
        judge = functools.partial(self._judge, model)
        self.without = bool(self.silent) and not when_gradients_come(output, judge)
        if self.without:
            judge()
        if self.count <= FORWARDS:
            self._find(backbone)

    def _begin(self, backbone: Backbone) -> None:
        """Begin a forward; what has been read since the last backward pass does not count."""
        stacks = backbone.stacks
        self._restore(backbone)
        if self.without or any(uses_of(stacks[w]).again for w in self.silent if w in stacks):
            self._judge(backbone.model)
        self.silent = {where: _known(stacks[where]) for where in self.silent if where in stacks}
        for where in self.silent:
            uses_of(stacks[where]).called = False
        if self.count < FORWARDS:
            self.ran = {where: set(stack.ran) for where, stack in stacks.items()}
            for stack in stacks.values():
                stack.ran.clear()
        elif self.count == LAST or not self.silent:
            take_away(backbone, TrainingWatch)

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
            noted = noted or is_compiled(backbone.chain(where))
            acts = before.get(where) and where not in now and _acting(stack)
            if acts and not noted and swap.note_uses(site):
                self.silent[where] = _known(stack)

    def _judge(self, model: nn.Module) -> None:
        """Warn of sites that have been read, and got no gradient in calls."""
        backbone = Backbone.of(model)
        read: list[str] = []
        shown = True
        for where, (reads, reached) in [*self.silent.items()]:
            stack = backbone.stacks.get(where)
            if stack is None:
                continue
            uses, acting = uses_of(stack), _acting(stack)
            if uses.reads > reads and uses.reached.total() == reached:
                read += [join(where, SLOT, each.record.name) for each in acting]
                shown = shown and all(each.stand_in or each.shows_in_weight for each in acting)
                del self.silent[where]
        if read:
            ways = "reads=True" if shown else "a method that folds into the weight, and reads=True"
            warn(
                f"{len(read)} delta layers ran before, but not in a forward of "
                f"{type(model).__name__} that trains, where code reads the module's weight instead "
                f"of calling it: {listed(read)}. Attach with {ways}, so that they act there too; "
                "if that code only looks at the weight, as a penalty does, all is well",
                UnreachedWarning,
            )


def _acting(stack: Stack) -> list[DeltaLayer]:
    return [layer for layer in acting_on(stack) if layer.computes]


def _known(stack: Stack) -> tuple[int, int]:
    uses = uses_of(stack)
    return uses.reads, uses.reached.total()
