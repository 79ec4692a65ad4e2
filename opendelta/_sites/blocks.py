"""The blocks among the layers of a stack: which layers are in which.

No attribute of a `Stack` holds it, as no delta could have the name of that attribute.
"""

from __future__ import annotations

from typing import Any

import torch

from .._layers.base import DeltaLayer
from .._layers.bound import arranged
from .._layers.seen import Seen

KEY = "blocks?"  # no delta can have this name


class Blocks:
    """How the layers of one stack ran last.

    Attributes:
        some: there are blocks among them.
        last: the layers that acted, and the result of `arranged` for them.
    """

    def __init__(self) -> None:
        self.some = False
        self.last: tuple[list[DeltaLayer] | None, list[Any]] = None, []

    def __getstate__(self) -> dict[str, Any]:  # a copy has other layers
        return {"some": self.some, "last": (None, [])}


def note_blocks(stack: Any) -> None:
    """Look which blocks a stack has, after a layer came or left."""
    blocks = stack.__dict__[KEY] = Blocks()
    blocks.some = any(layer.is_block for layer in stack.values())


def has_blocks(stack: Any) -> bool:
    """True if one of the layers combines others: see `BlockLayer`."""
    return stack.__dict__[KEY].some


def in_place(stack: Any, acting: list[DeltaLayer]) -> list[Any]:
    """Return acting layers as they run, with blocks around theirs; see `arranged`."""
    if torch.compiler.is_compiling():
        return arranged(acting, stack)
    blocks: Blocks = stack.__dict__[KEY]
    known, runs = blocks.last  # in one step, as other threads write it
    if known != acting:
        runs = arranged(acting, stack)
        blocks.last = acting, runs
    return runs


def watcher_of(stack: Any) -> Seen | None:
    """Return what notes the weights of the blocks on a stack inside `watching()`, else None."""
    for layer in stack.values() if has_blocks(stack) else ():
        return layer.record.watched
    return None


def unmerged(stack: Any) -> list[Any]:
    """Return the layers that are not merged as they run, disabled ones in their places.

    Those that a block names, which acts, are in it or, if they are disabled, nowhere.
    """
    layers = [layer for name, layer in stack.in_order() if not stack.holds(name)]
    acting = [layer for layer in layers if layer.record.active]
    runs = {layer.record: layer for layer in arranged(acting)}
    named = {name for layer in acting for name in layer.record.config.children}
    off = {ly.record for ly in layers if not ly.record.active and ly.record.name not in named}
    return [runs.get(ly.record, ly) for ly in layers if ly.record in runs or ly.record in off]


def in_block(stack: Any, layer: Any) -> dict[str, DeltaLayer]:
    """Return the layers that a block has on a module, disabled ones too, and its own.

    Args:
        layer: a layer or a bound block.
    """
    found: dict[str, DeltaLayer] = {}
    for name in layer.record.config.children:
        if name in stack and stack[name].joins_blocks:
            found |= in_block(stack, stack[name])
    name = layer.record.name
    return {**found, name: stack[name]}
