"""Which deltas act in this thread and task: the open blocks of `only()`, `route()` and the like.

A block never changes the model. It changes the selection of the thread and task that opened it, a
context variable. What starts inside the block with a copy of the context has the same selection.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar, Token
from typing import Any

import torch

from ..errors import DeltaError, listed
from .seen import Seen

CLOCK = itertools.count()
_TIMES: list[int] = []  # of all moments; to append needs no lock, which Ctrl-C could leave locked


class Moment:
    """When something changed on a model, and in which open blocks of this thread and task."""

    def __init__(self) -> None:
        self.time = next(CLOCK)
        _TIMES.append(self.time)
        self.blocks = weakref.WeakSet(block.key for block in CURRENT.get().blocks)


class OpenBlock:
    """One `with` block of `only()` or the like, and its choices.

    Blocks may end in any order. A block that ends in another task than the one in which it began,
    as that of an asynchronous generator may, ends in all.

    Args:
        active: {record of a delta: the delta acts}.
        routers: {stack: its router}.
        factors: {stack: its joined factors}.
        watchers: {`Shared` of a backbone: what notes the weights of its blocks}.
        backbones: the `Shared` of backbones on which no other delta acts, such as one that another
            thread attaches.
    """

    def __init__(
        self,
        active: dict[Any, bool] | None = None,
        routers: Mapping[Any, Any] | None = None,
        factors: Mapping[Any, Any] | None = None,
        backbones: Collection[Any] = (),
        watchers: Mapping[Any, Any] | None = None,
    ) -> None:
        self.active, self.backbones = active or {}, backbones
        self.routers, self.factors, self.watchers = routers or {}, factors or {}, watchers or {}
        self.key: Any = self  # a block with other choices in its place has the same
        self.holders: list[weakref.ref[Selection]] = []  # selections that hold the block

    def chooses(self, record: Any) -> bool:
        """True if the block says whether the delta acts."""
        return record in self.active or record.shared in self.backbones

    def switched(self, record: Any, active: bool) -> OpenBlock:
        """Return a block in this one's place in which the delta acts or does not."""
        active_now = {**self.active, record: active}
        twin = OpenBlock(active_now, self.routers, self.factors, self.backbones, self.watchers)
        twin.key, twin.holders = self.key, self.holders
        return twin

    def __enter__(self) -> None:
        self.began, self.moments = next(CLOCK), len(_TIMES)
        self.token = _select((*CURRENT.get().blocks, self))

    def __exit__(self, error: Any, *_: Any) -> None:
        left = CURRENT.get().without(self)
        try:
            CURRENT.reset(self.token)
        except ValueError:  # another task, or another thread
            for holder in list(self.holders):
                if (selection := holder()) is not None:
                    selection.take(selection.without(self))
        if CURRENT.get().blocks != left:
            _select(left)
        if error is None:
            self._check_there()

    def _saw(self, moment: Moment | None) -> bool:
        """True if something changed elsewhere while the block was open."""
        return moment is not None and moment.time > self.began and self.key not in moment.blocks

    def _check_there(self) -> None:
        """Raise if what the block chose was detached or merged elsewhere while it was open."""
        if len(_TIMES) == self.moments:  # nothing changed on any model
            return
        backbones = {*self.backbones, *(record.shared for record in self.active)}
        if any(self._saw(shared.merged) for shared in backbones):
            raise DeltaError(
                "deltas were merged or unmerged outside of this block, by another thread or task, "
                "while it was open: what ran in the block may have their changes twice, or against "
                "the block's choice. Merge when no request is under way"
            )
        gone = [r.name for r, active in self.active.items() if active and self._saw(r.left)]
        if gone:
            raise DeltaError(
                f"{listed(gone)} was detached outside of this block, by another thread or task, "
                "while the block chose it: what ran in the block may lack it. Detach a delta when "
                "no request that uses it is under way"
            )


class Selection:
    """The choices of several blocks; the last block decides.

    Attributes:
        blocks: the open blocks, in the order in which they began.
        active, routers, factors, watchers: the choices of all blocks. A delta that is not in
            `active` may have been attached since: see `acts`.
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
        watchers: dict[Any, Any] = {}
        for block in blocks:
            outer = {r: a for r, a in active.items() if r.shared not in block.backbones}
            active = {**outer, **block.active}
            routers, factors = {**routers, **block.routers}, {**factors, **block.factors}
            watchers = {**watchers, **block.watchers}
        self.blocks, self.active, self.routers, self.factors = blocks, active, routers, factors
        self.watchers = watchers

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
        then: see `Selection`. A run with gradients is then the second one, for a backward.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        own = blocks
        if then is not None and torch.is_grad_enabled():  # it runs again: nobody sees its weights
            unseen = {shared: Seen() for block in blocks for shared in block.watchers}
            own = (*blocks, OpenBlock(watchers=unseen))
        selection = Selection(own)
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
