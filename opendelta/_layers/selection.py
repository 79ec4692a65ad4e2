"""Which deltas act in this thread and task: the open blocks of `only()`, `route()` and the like.

A block never changes the model. It changes the selection of the thread and task that opened it, a
context variable. What starts inside the block with a copy of the context has the same selection.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True, eq=False)
class Block:
    """The choices of one `with` block.

    Attributes:
        active: {record of a delta: the delta acts}.
        routers: {stack: its router}.
        factors: {stack: its joined factors}.
        backbones: the `Shared` of backbones on which no other delta acts, such as one that another
            thread attaches.
        holders: the selections that hold the block.
    """

    active: dict[Any, bool] = field(default_factory=dict)
    routers: Mapping[Any, Any] = field(default_factory=dict)
    factors: Mapping[Any, Any] = field(default_factory=dict)
    backbones: frozenset[Any] = frozenset()
    holders: weakref.WeakSet[Selection] = field(default_factory=weakref.WeakSet)

    def chooses(self, record: Any) -> bool:
        """True if the block says whether the delta acts."""
        return record in self.active or record.shared in self.backbones


class Selection:
    """The choices of several blocks; the last block decides.

    Attributes:
        blocks: the open blocks, in the order in which they began.
        active, routers, factors: the choices of all blocks. A delta that is not in `active` may
            have been attached since: see `acts`.
    """

    def __init__(self, blocks: tuple[Block, ...] = ()) -> None:
        self._take(blocks)

    def _take(self, blocks: tuple[Block, ...]) -> None:
        active: dict[Any, bool] = {}
        routers: dict[Any, Any] = {}
        factors: dict[Any, Any] = {}
        for block in blocks:
            outer = {r: a for r, a in active.items() if r.shared not in block.backbones}
            active = {**outer, **block.active}
            routers, factors = {**routers, **block.routers}, {**factors, **block.factors}
        self.blocks, self.active, self.routers, self.factors = blocks, active, routers, factors

    def acts(self, record: Any) -> bool:
        """True if the delta acts."""
        for block in reversed(self.blocks):
            if block.chooses(record):
                return block.active.get(record, False)
        return record.enabled

    def without(self, holders: Any) -> tuple[Block, ...]:
        """Return the blocks but the one with these holders."""
        return tuple(block for block in self.blocks if block.holders is not holders)

    def forget(self, holders: Any) -> None:
        """Drop the block with these holders."""
        self._take(self.without(holders))


# The default is never changed.
CURRENT: ContextVar[Selection] = ContextVar("opendelta", default=Selection())  # noqa: B039


LOCK = threading.Lock()  # over the sets of holders


def _select(blocks: tuple[Block, ...]) -> Token[Selection]:
    selection = Selection(blocks)
    with LOCK:
        for block in blocks:
            block.holders.add(selection)
    return CURRENT.set(selection)


@contextlib.contextmanager
def opened(block: Block) -> Iterator[None]:
    """Let the choices of `block` hold in this thread and task.

    Blocks may end in any order. A block that ends in another task than the one in which it began,
    as that of an asynchronous generator may, ends in all.
    """
    token = _select((*CURRENT.get().blocks, block))
    try:
        yield
    finally:
        left = CURRENT.get().without(block.holders)
        try:
            CURRENT.reset(token)
        except ValueError:  # another task, or another thread
            with LOCK:
                holders = list(block.holders)
            for holder in holders:
                holder.forget(block.holders)
        if CURRENT.get().blocks != left:
            _select(left)


def switch(record: Any, active: bool) -> bool:
    """Switch a delta inside the last open block that chose about it; False if there is none."""
    blocks = list(CURRENT.get().blocks)
    for index in reversed(range(len(blocks))):
        if blocks[index].chooses(record):
            switched = {**blocks[index].active, record: active}
            blocks[index] = replace(blocks[index], active=switched)
            _select(tuple(blocks))
            return True
    return False


def join(record: Any) -> None:
    """Let a delta that is attached inside a block act there."""
    for block in reversed(CURRENT.get().blocks):
        if record.shared in block.backbones:
            block.active.setdefault(record, record.enabled)
            return


def within(blocks: tuple[Block, ...], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, with just these blocks open while it runs, in whatever thread."""

    def run(*args: Any, **kwargs: Any) -> Any:
        token = CURRENT.set(Selection(blocks))
        try:
            return function(*args, **kwargs)
        finally:
            CURRENT.reset(token)

    return run


class _ByContext(dict):
    """Finds a value for an owner anew each time; it stays empty."""

    def __init__(self, find: Callable[[Any], Any]) -> None:
        self.find = find

    def __missing__(self, owner: Any) -> Any:
        return self.find(owner)


def in_context(find: Callable[[Any], Any]) -> Any:
    """Return a property with the value that `find` gives its owner in this thread and task.

    torch.compile cannot trace a context variable. But it takes a property whose getter is written
    in C as it is, and before each run of a graph it compares the value with the traced one. The
    getter `dict.__getitem__` is written in C, and calls `__missing__`.
    """
    return property(_ByContext(find).__getitem__)
