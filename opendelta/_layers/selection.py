"""Which deltas act in this thread and task: the open blocks of `only()`, `route()` and the like.

A block never changes the model. It changes the selection of the thread and task that opened it, a
context variable. What starts inside the block with a copy of the context has the same selection.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar, Token
from typing import Any


class OpenBlock:
    """One `with` block of `only()` or the like, and its choices.

    Blocks may end in any order. A block that ends in another task than the one in which it began,
    as that of an asynchronous generator may, ends in all.

    Args:
        active: {record of a delta: the delta acts}.
        routers: {stack: its router}.
        factors: {stack: its joined factors}.
        backbones: the `Shared` of backbones on which no other delta acts, such as one that another
            thread attaches.
    """

    def __init__(
        self,
        active: dict[Any, bool] | None = None,
        routers: Mapping[Any, Any] | None = None,
        factors: Mapping[Any, Any] | None = None,
        backbones: Collection[Any] = (),
    ) -> None:
        self.active, self.backbones = active or {}, backbones
        self.routers, self.factors = routers or {}, factors or {}
        self.key: Any = self  # a block with other choices in its place has the same
        self.holders: list[weakref.ref[Selection]] = []  # selections that hold the block

    def chooses(self, record: Any) -> bool:
        """True if the block says whether the delta acts."""
        return record in self.active or record.shared in self.backbones

    def switched(self, record: Any, active: bool) -> OpenBlock:
        """Return a block in this one's place in which the delta acts or does not."""
        twin = OpenBlock(
            {**self.active, record: active}, self.routers, self.factors, self.backbones
        )
        twin.key, twin.holders = self.key, self.holders
        return twin

    def __enter__(self) -> None:
        self.token = _select((*CURRENT.get().blocks, self))

    def __exit__(self, *_: Any) -> None:
        left = CURRENT.get().without(self)
        try:
            CURRENT.reset(self.token)
        except ValueError:  # another task, or another thread
            for holder in list(self.holders):
                if (selection := holder()) is not None:
                    selection.take(selection.without(self))
        if CURRENT.get().blocks != left:
            _select(left)


class Selection:
    """The choices of several blocks; the last block decides.

    Attributes:
        blocks: the open blocks, in the order in which they began.
        active, routers, factors: the choices of all blocks. A delta that is not in `active` may
            have been attached since: see `acts`.
        then: while a forward runs again, {record: its state in the first run}; else None.
    """

    then: dict[Any, Any] | None = None

    def __init__(self, blocks: tuple[OpenBlock, ...] = ()) -> None:
        self.take(blocks)

    def take(self, blocks: tuple[OpenBlock, ...]) -> None:
        """Hold these blocks, and no others."""
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

    def without(self, block: OpenBlock) -> tuple[OpenBlock, ...]:
        """Return the blocks but this one."""
        return tuple(each for each in self.blocks if each.key is not block.key)


# The default is never changed.
CURRENT: ContextVar[Selection] = ContextVar("opendelta", default=Selection())  # noqa: B039


def _select(blocks: tuple[OpenBlock, ...]) -> Token[Selection]:
    selection = Selection(blocks)
    for block in blocks:
        block.holders.append(weakref.ref(selection, block.holders.remove))
    return CURRENT.set(selection)


def switch(record: Any, active: bool) -> bool:
    """Switch a delta inside the last open block that chose about it; False if there is none."""
    blocks = CURRENT.get().blocks
    for index in reversed(range(len(blocks))):
        if blocks[index].chooses(record):
            switched = blocks[index].switched(record, active)
            _select((*blocks[:index], switched, *blocks[index + 1 :]))
            return True
    return False


def join(record: Any) -> None:
    """Let a delta that is attached inside blocks act there."""
    for block in CURRENT.get().blocks:
        if record.shared in block.backbones:
            block.active.setdefault(record, record.enabled)


def within(
    blocks: tuple[OpenBlock, ...], function: Callable[..., Any], then: dict[Any, Any] | None = None
) -> Callable[..., Any]:
    """Return `function`, with just these blocks open while it runs, in whatever thread.

    Args:
        then: see `Selection`.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        selection = Selection(blocks)
        selection.then = then
        token = CURRENT.set(selection)
        try:
            return function(*args, **kwargs)
        finally:
            CURRENT.reset(token)

    return run


def in_context(find: Callable[[Any, Any], Any]) -> Any:
    """Return a property with a value that depends on this thread and task.

    torch.compile cannot trace a context variable. But it takes a property whose getter is written
    in C as it is, and before each run of a graph it compares the value with the traced one. The
    getter of an empty dict is written in C, and calls `__missing__`.

    Args:
        find: takes the dict and the owner of the property, and returns the value.
    """
    return property(type("Empty", (dict,), {"__missing__": find})().__getitem__)
