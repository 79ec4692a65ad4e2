"""Where the documents in each row of a batch begin and end.

A module that embeds tokens is given the attention mask, the position ids and the cache, which say
so. Modules inside it are not given all of them: they find the `Documents` of the running call.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import SiteError, quoted
from ..names import ancestors
from ..names import last as last_step
from . import recomputing
from .base import Acts, DeltaLayer
from .masks import agrees

READS = {"input_ids", "attention_mask"}
EMBEDDED = ("input_ids", "inputs_embeds")
TOKENS_FIRST = ("FSMTEncoder", "FSMTDecoder", "XLNetModel")
CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states", "cache")


def arguments(module: nn.Module) -> list[str]:
    """Return the names of the arguments of a module's forward."""
    cls: Any = type(module)
    return list(_arguments(cls))


@functools.cache
def _arguments(cls: type) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]
    except (AttributeError, TypeError, ValueError):  # compiled by TorchScript, or written in C
        return ()


def named(names: list[str], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def cache_in(given: Mapping[str, Any]) -> Any:
    """Return the cache, or the state, of earlier tokens among the arguments of a call, or None."""
    return next((given[name] for name in CACHES if given.get(name) is not None), None)


def earlier(given: Mapping[str, Any]) -> int | None:
    """Return the number of tokens that a call's cache holds; None: some, and it counts none."""
    cache = cache_in(given)
    if cache is None:
        return 0
    cache = getattr(cache, "self_attention_cache", cache)
    layers = getattr(cache, "layers", (cache,))
    counted = [layer for layer in layers if hasattr(layer, "get_seq_length")]
    most = max((int(layer.get_seq_length() or 0) for layer in counted), default=0)
    if most or (counted and len(counted) == len(layers)):
        return most
    states = [getattr(layer, "has_previous_state", {}) for layer in layers]
    began = not hasattr(cache, "layers") or any(any(state.values()) for state in states)
    return None if began else 0


# {the state of earlier tokens, if it counts none: their numbers in each row [batch, 1]}
_in_states: Any = WeakIdKeyDictionary()


def _holder(state: Any) -> Any:
    """Return what stays the same while a state grows: RWKV's is a list of tensors."""
    return state[0] if isinstance(state, list | tuple) else state


def _noted(state: Any) -> Tensor | None:
    """Return the numbers of tokens that were noted for a state; None: there are none."""
    if state is None or torch.compiler.is_compiling():
        return None
    return _in_states.get(_holder(state))


class Documents:
    """The documents in the rows of one call.

    A row is one document, maybe with padding at its ends. If its position ids restart, a new
    document begins there.

    Args:
        given: the arguments of the call by name.
        batch: number of rows.
        length: number of tokens of a row in this call.

    Attributes:
        several: rows may hold several documents.
        continued: a cache holds earlier tokens.
    """

    def __init__(
        self, given: Mapping[str, Any], batch: int, length: int, device: torch.device
    ) -> None:
        self.batch, self.length, self.device = batch, length, device
        mask: Any = given.get("attention_mask")
        self.positions: Any = given.get("position_ids")
        plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        self.plain = plain and given.get("input_mask") is None  # XLNet's, true for padding
        self.mask = mask if self.plain else None
        self.shown = mask
        self.held = earlier(given)
        self.noted = _noted(cache_in(given))
        self.several, self.continued = isinstance(self.positions, Tensor), self.held != 0
        self.found: dict[tuple[int, int], Tensor] = {}

    def __getitem__(self, rows: slice | Tensor) -> Documents:
        """Return the documents of some of the rows."""
        new = copy.copy(self)
        new.batch = len(range(self.batch)[rows]) if isinstance(rows, slice) else len(rows)
        new.found = {key: self._cut(value, rows) for key, value in self.found.items()}
        new.mask, new.noted = self._cut(self.mask, rows), self._cut(self.noted, rows)
        if self.several:  # of text with images, they have an axis before the rows
            positions = self.positions.movedim(-2, 0)
            new.positions = self._cut(positions, rows).movedim(0, -2)
        return new

    def _cut(self, value: Any, rows: slice | Tensor) -> Any:
        return value if value is None or value.size(0) != self.batch else value[rows]

    def hears(self, around: Documents | None) -> None:
        """Take the mask of a call around this one, whose own says no more than who sees whom."""
        if around is not None and not self.plain and around.plain and self._same(around):
            self.plain, self.mask = True, around.mask

    def _same(self, around: Documents) -> bool:
        return (self.batch, self.length) == (around.batch, around.length)

    def says_less_than(self, around: Documents) -> bool:
        """True if a call around this one, of as many rows and tokens, alone has a mask or ids."""
        return self._same(around) and self.plain and self.mask is None and self.positions is None

    def _seen(self) -> Tensor:
        """Return booleans [batch or 1, length], false for padding."""
        if self.mask is None:
            return torch.ones(1, self.length, dtype=torch.bool, device=self.device)
        return self.mask[:, -self.length :] != 0

    def _number(self, seen: Tensor) -> Tensor:
        """Return integers [batch or 1, length], which change where a document begins."""
        if self.several:
            return _restarts(self.positions, seen).cumsum(-1)
        return torch.zeros(1, self.length, dtype=torch.long, device=self.device)

    def _before(self) -> list[Any]:
        """Return all that says how many tokens of a row's first document a cache holds.

        Each is an integer, or integers [batch or 1, 1].
        """
        counts: list[Any] = [self.noted if self.held is None else self.held]
        if self.mask is not None and self.mask.size(1) > self.length:
            counts.append((self.mask[:, : -self.length] != 0).sum(-1, keepdim=True))
        if self.several and self.positions.ndim == 2:
            counts.append(self.positions[:, :1])
        return [count for count in counts if count is not None]

    def note(self, out: Any) -> None:
        """Note how many tokens went into the state in a call's output, if it counts none.

        If a layer beneath has noted it, with the rows of a prompt, this stays.
        """
        state = cache_in(out) if isinstance(out, dict) else None
        if state is None or earlier({CACHES[0]: state}) is not None:
            return
        before = self.noted if self.held is None else self.held
        if before is not None and _noted(state) is self.noted:
            seen = self._seen().expand(self.batch, -1)
            _in_states[_holder(state)] = seen.sum(-1, keepdim=True) + before

    def check(self, last: bool, where: str) -> None:
        """Raise unless the call says enough about the first, and `last`, tokens of its rows."""
        padding = self.plain or (
            self.several and agrees(self.shown, self._number(self._seen()), self.held)
        )
        if not padding or (self.continued and not self._before()):
            raise SiteError(
                f"first= and last=: the call of {quoted(where)} does not say by its mask, position "
                "ids and cache which tokens are padding and how many came before: give "
                "position_ids, or an attention_mask [batch, length] for all tokens",
                where=where,
            )
        if last and self.continued:
            raise SiteError(
                f"last=... needs all tokens at once, and the cache given to {quoted(where)} holds "
                "some of them: call generate(use_cache=False), or choose first=...",
                where=where,
            )

    def firsts(self) -> Tensor:
        """Return booleans [batch or 1, length]: true for the first token of each document."""
        seen = self._seen()
        return seen & (_ranks(seen, self._number(seen)) == 1)

    def chosen(self, first: int, last: int) -> Tensor:
        """Return booleans: true for the `first` and the `last` tokens of each document."""
        if (first, last) not in self.found:
            self.found[first, last] = self._chosen(first, last)
        return self.found[first, last]

    def _chosen(self, first: int, last: int) -> Tensor:
        seen = self._seen()
        number = self._number(seen)
        ranks = _ranks(seen, number)
        if self.continued:
            before = functools.reduce(_least, self._before())
            ranks = ranks + torch.where(number == number[:, :1], before, 0)
        chosen = ranks <= first
        if last:
            ends = _ranks(seen.flip(-1), number.flip(-1)).flip(-1)
            chosen = chosen | (ends <= last)
        return chosen & seen


def _least(one: Any, other: Any) -> Any:
    """Return the least of two numbers of tokens: a cache counts padding, position ids may not."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.minimum(one, other)
    number, tensor = (other, one) if isinstance(one, Tensor) else (one, other)
    return tensor.clamp(max=number)


def _restarts(positions: Tensor, seen: Tensor) -> Tensor:
    """Return booleans: true for tokens whose position is not beyond that of the token before.

    Args:
        positions: [batch or 1, length], or [axes, batch or 1, length] for text with images, whose
            tokens may share a position.
        seen: false for padding, which is no token.
    """
    flat = positions[0] if positions.ndim == 3 else positions
    flat, seen = torch.broadcast_tensors(flat, seen)
    columns = torch.arange(flat.size(-1), device=flat.device)
    last = torch.where(seen, columns, -1).cummax(-1).values
    before = last.roll(1, -1)
    before[..., 0] = -1
    step = flat - flat.gather(-1, before.clamp(min=0))
    return seen & (before >= 0) & (step < (1 if positions.ndim < 3 else 0))


def _ranks(seen: Tensor, number: Tensor) -> Tensor:
    """Return 1 for the first token of each document, 2 for the second, and so on."""
    seen, number = torch.broadcast_tensors(seen, number)
    count = seen.cumsum(-1)
    changed = number != number.roll(1, -1)
    changed[..., 0] = True
    return count - torch.where(changed, count - seen.long(), 0).cummax(-1).values


# --------------------------------------------------------------------------------- the running call
class _Running(threading.local):
    def __init__(self) -> None:
        # In each thread from the start: a compiled graph's guard must not see it come.
        self.documents: Documents | None = None


_running = _Running()


def during(documents: Documents | None, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `call`; modules inside find `documents`."""
    before, _running.documents = _running.documents, documents
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


class Notes(DeltaLayer):
    """Notes the documents in the rows of a module's call, for layers inside the module.

    Args:
        module: the module, which is not kept.
        where: its full name.
        last: the layers ask for the last tokens.
    """

    acts = Acts.SERVES
    routes_itself = True

    def __init__(self, module: nn.Module, where: str, last: bool) -> None:
        super().__init__()
        recomputing.keep(of_now)
        self.arguments, self.where, self.last = arguments(module), where, last

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        recomputing.keep(of_now)  # an unpickled model may be in another process

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        documents = noted(self.arguments, self.where, self.last, args, kwargs)
        return noting(documents, call, *args, **kwargs)


def noted(
    names: list[str], where: str, last: bool, args: tuple, kwargs: dict[str, Any]
) -> Documents | None:
    """Return the documents that a call says, whose arguments have these names; None: it has none.

    Raises:
        SiteError: the call does not say enough about the first, and `last`, tokens of its rows.
    """
    given = named(names, args, kwargs)
    tokens = next((given[n] for n in EMBEDDED if given.get(n) is not None), None)
    if tokens is None or tokens.ndim < 2:
        return None
    documents = Documents(given, tokens.size(0), tokens.size(1), tokens.device)
    around = _running.documents
    documents.hears(around)
    if around is not None and documents.says_less_than(around):
        return around
    documents.check(last, where)
    return documents


def padding_of(given: Mapping[str, Any], tokens: Tensor, where: str) -> Tensor | None:
    """Return the mask [batch, keys] of a call, false for padding; None: there is no padding.

    Args:
        given: the arguments of the call by name.
        where: the full name of the module.

    Raises:
        SiteError: neither the call nor one around it has such a mask, but another one.
    """
    mask = given.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    documents = Documents(given, tokens.size(0), tokens.size(1), tokens.device)
    documents.hears(_running.documents)
    if not documents.plain:
        raise SiteError(
            f"prefixes: the mask that {quoted(where)} is given does not show which tokens are "
            "padding: give position_ids too, or an attention_mask [batch, length] instead",
            where=where,
        )
    return documents.mask


class Tokens:
    """Chooses tokens of the rows that go through a module.

    Args:
        module: the module, which is not kept.
        where: its full name.
    """

    def __init__(self, module: nn.Module, where: str) -> None:
        own = arguments(module)
        self.where, self.arguments = where, own if set(own) >= READS else None

    def chosen(
        self, h: Tensor, args: tuple, kwargs: dict[str, Any], first: int, last: int
    ) -> Tensor:
        """Return booleans [batch or 1, length]: true for the `first` and the `last` tokens.

        Args:
            h: the module's output [batch, length, width], or [length, width] of a single row, for
                which the result is [length].
            args, kwargs: the arguments of the module's call.

        Raises:
            SiteError: the call does not say where the documents in `h` begin and end.
        """
        documents = _running.documents
        if self.arguments is not None:
            documents = noted(self.arguments, self.where, last > 0, args, kwargs)
        if documents is None:
            self._check_bare(args, kwargs)
            documents = Documents({}, 1, h.size(-2), h.device)
        elif h.size(-2) != documents.length or (h.ndim > 2 and h.size(0) != documents.batch):
            self._refuse(
                f"has an output of the shape {tuple(h.shape)} for {documents.batch} rows of "
                f"{documents.length} tokens, which does not show the tokens: choose "
                f"{_block(self.where)}or all tokens, first=None and last=None"
            )
        chosen = documents.chosen(first, last).to(h.device)
        return chosen[0] if h.ndim == 2 else chosen

    def _check_bare(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise if there may be padding or earlier tokens in a call that no `Notes` saw."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            self._refuse(
                "runs again in a backward, where nothing says where its rows begin and end: use "
                "torch.utils.checkpoint"
            )
        masks = [value for name, value in kwargs.items() if "mask" in name]
        masks += [value for value in args if isinstance(value, Tensor) and value.ndim == 4]
        if cache_in(kwargs) is not None or any(mask is not None for mask in masks):
            self._refuse(
                "is given a mask or a cache, but no module around it that has input_ids says which "
                "tokens are padding and how many came before"
            )

    def _refuse(self, why: str) -> None:
        raise SiteError(f"first= and last=: {self.where!r} {why}", where=self.where)


def _block(where: str) -> str:
    """Return advice to choose the block around a module, or ""."""
    numbered = [name for name in ancestors(where) if last_step(name).isdigit()]
    if not numbered or numbered[-1] == where:
        return ""
    block, number = numbered[-1], last_step(numbered[-1])
    pattern = f"[r]^{re.escape(block.removesuffix(number))}\\d+$"
    return f"the block around it, such as by modified_modules=[{pattern!r}], "


def notes_for(
    made: Mapping[str, DeltaLayer], modules: Mapping[str, nn.Module], last: bool
) -> dict[str, DeltaLayer]:
    """Return `Notes` for the innermost module with token ids around each layer in `made`.

    And for the outermost one: RWKV's, for example, takes a mask and does not hand it on. That of an
    encoder-decoder says nothing of its decoder's tokens.

    Raises:
        SiteError: the modules around a layer put the tokens before the rows.
    """
    found: dict[str, DeltaLayer] = {}
    for name in made:
        outer = [*ancestors(name), ""][1:]
        for kind in (type(modules[o]) for o in outer):
            if any(base.__name__ in TOKENS_FIRST for base in kind.__mro__):
                raise SiteError(
                    f"first= and last=: {name!r} is inside {kind.__name__}, where hidden states "
                    "are [length, batch, width]: choose all tokens, first=None and last=None",
                    where=name,
                )
        takes = [o for o in outer if set(arguments(modules[o])) >= READS]
        for around in dict.fromkeys((*takes[:1], *takes[-1:])):
            two = around != takes[0] and "decoder_input_ids" in arguments(modules[around])
            if around not in made and not two:
                found[around] = Notes(modules[around], around, last)
    return found
