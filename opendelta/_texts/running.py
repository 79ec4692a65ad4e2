"""The documents of the running call, for the modules inside it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .documents import Documents
from .states import is_new, state_in


class _Running(threading.local):
    def __init__(self) -> None:
        # In each thread from the start: a compiled graph's guard must not see it come.
        self.documents: Documents | None = None
        self.unsaid = ""  # why nothing says where rows begin in the running call
        self.of_one = False  # the tokens of the running call are those of one image, or one sound
        self.unheard: Mapping[str, Any] = {}  # what a call is given whose tokens nobody knows
        # What holds no earlier tokens, as it was empty in the running call; None: nobody looks.
        self.begun: tuple[Any, ...] | None = None


_running = _Running()


def running() -> Documents | None:
    """Return the documents of the running call; None: no call around has said any."""
    return _running.documents


def unsaid() -> str:
    """Return why nothing says where rows begin in the running call; or ""."""
    return _running.unsaid


def of_one() -> bool:
    """Return whether the tokens of the running call are known to be those of one image or sound."""
    return _running.of_one


def unheard() -> Mapping[str, Any]:
    """Return the arguments of the running call by name, if its tokens are in no known form."""
    return _running.unheard


def unheard_during(
    given: Mapping[str, Any], call: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Run `call`; modules inside find that nobody knows its tokens among what it is given."""
    before, _running.unheard = _running.unheard, given
    try:
        return during(None, call, *args, **kwargs)
    finally:
        _running.unheard = before


def beginning(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `call`; what `meets` finds empty inside holds tokens of this call alone."""
    before, _running.begun = _running.begun, ()
    try:
        return call(*args, **kwargs)
    finally:
        _running.begun = before


def meets(given: Mapping[str, Any]) -> None:
    """Look at arguments of a call before it runs: what is empty holds no earlier tokens."""
    if _running.begun is not None:
        new = (value for value in given.values() if is_new(value))
        _running.begun = (*_running.begun, *new)


def earlier_in(given: Mapping[str, Any]) -> str:
    """Return the name of an argument that holds tokens from before the running call; or ""."""
    meets(given)
    begun = _running.begun or ()
    left = {n: v for n, v in given.items() if not any(v is each for each in begun)}
    return state_in(left)


def mask_around(documents: Documents) -> Tensor | None:
    """Return the mask of a call around the one of `documents` that was not handed on; or None."""
    around = _running.documents
    if around is None or not documents.says_less_than(around):
        return None
    return around.mask


def during(documents: Documents | None, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `call`; modules inside find `documents`."""
    before, _running.documents = _running.documents, documents
    if before is not None and documents is not None and before.unnumbered:
        documents.unnumbered = True
    try:
        return call(*args, **kwargs)
    finally:
        _running.documents = before


def noting(documents: Documents | None, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `call`, the whole call that says `documents`, and note what its state holds then."""
    out = during(documents, call, *args, **kwargs)
    if documents is not None and not torch.compiler.is_compiling():
        documents.note(out)
    return out


def of_now(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs `call` with the documents of this moment."""
    return functools.partial(during, _running.documents, call)


def on_rows(rows: slice | Tensor, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `call`, which sees some rows of the batch alone."""
    documents = _running.documents
    return during(None if documents is None else documents[rows], call, *args, **kwargs)


def unsaid_during(why: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `call`; modules inside find that nothing says where rows begin, for this reason."""
    before, _running.unsaid = _running.unsaid, why
    try:
        return call(*args, **kwargs)
    finally:
        _running.unsaid = before


def of_one_during(one: bool, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `call`; modules inside find whether its tokens are those of one image or sound."""
    before, _running.of_one = _running.of_one, one
    try:
        return call(*args, **kwargs)
    finally:
        _running.of_one = before
