"""Change for a while what a process has only once, though several threads may do so at a time."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import torch

from ..errors import to_the_end

P = ParamSpec("P")
R = TypeVar("R")
_changing = threading.RLock()


class Together:
    """Blocks of which the first to be entered makes a change, and the last to end undoes it.

    If each put back what it found, two that overlap would leave the change for ever. A block inside
    another of its thread makes the change and undoes it by itself.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[Any]]) -> None:
        self._change, self._lock = change, threading.Lock()
        self._open = set[int]()  # the threads inside
        self._undo = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        thread = threading.get_ident()
        if thread in self._open:
            with self._change():
                yield
            return
        try:
            with self._lock:
                self._open.add(thread)
                if len(self._open) == 1:
                    self._undo.enter_context(self._change())
            yield
        finally:
            to_the_end(functools.partial(self._leave, thread))

    def _leave(self, thread: int) -> None:
        with self._lock:
            self._open.discard(thread)
            if not self._open:
                self._undo.close()


@contextlib.contextmanager
def _ignored() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _generators() -> list[torch.Generator]:
    """Return torch's own generators: the CPU's, and those of devices that the process uses."""
    apple = [torch.mps._get_default_mps_generator()] if torch.backends.mps.is_available() else []
    others = torch.cuda.default_generators, torch.xpu.default_generators  # empty until in use
    return [torch.default_generator, *apple, *itertools.chain(*others)]


@contextlib.contextmanager
def _drawn_beside() -> Iterator[None]:
    numpy: Any = sys.modules.get("numpy")
    before = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        yield
    finally:
        random.setstate(before[0])
        if numpy:
            numpy.random.set_state(before[1])


@contextlib.contextmanager
def _drawn() -> Iterator[None]:
    states = [(generator, generator.get_state()) for generator in _generators()]
    with _drawn_beside():
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)


def seed_all(seed: int = 0) -> None:
    """Seed all generators, inside `kept_random`.

    `torch.manual_seed` would seed a device that is not in use yet too, and nothing would put the
    user's seed back once it is.
    """
    for generator in _generators():
        generator.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


@contextlib.contextmanager
def _as_written() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


_eager = Together(_as_written)
kept_random = Together(_drawn)  # the states of all random number generators
kept_random_beside = Together(_drawn_beside)  # of those of Python and numpy, but not of torch
ignored_warnings = Together(_ignored)
silent_fakes = Together(_silent)  # torch logs each operation that fails on shapes


def one_at_a_time(verb: Callable[P, R]) -> Callable[P, R]:
    """Let one thread put deltas on models, take them off or reorder them, while others wait.

    Forwards do not wait.
    """

    @functools.wraps(verb)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with _changing:
            return verb(*args, **kwargs)

    return alone


def eager() -> AbstractContextManager[None]:
    """Return a block in which what torch compiled runs as it was written."""
    return _eager() if "torch._dynamo" in sys.modules else contextlib.nullcontext()
