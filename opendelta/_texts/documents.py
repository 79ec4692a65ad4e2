"""The documents in each row of a batch: where they begin and end, as a call's arguments say it.

A module that embeds tokens is given the attention mask, the position ids and the cache.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SiteError, quoted
from ..names import join
from .masks import NUMBERED, agrees, numbers_documents, shown
from .returned import Watch
from .saying import counted_before, numbers_in
from .states import (
    cache_in,
    counts_none,
    earlier,
    holds_tensors,
    note_of,
    now,
    other_state_in,
    renew,
    state_in,
)

BESIDE = "beside_tokens"  # by which attribute a module says which arguments tell nothing of tokens
OTHERS = ("encoder_hidden", "encoder_output", "memory", "context")


def else_say(name: str, where: str) -> str:
    """Return advice for an argument, of the module called `where`, that tells nothing of tokens."""
    model = join("model", where) if where else "model"
    return f"if it tells nothing of them, set {model}.{BESIDE} = [{name!r}] before attaching"


class Asks(NamedTuple):
    """A question of a layer about the tokens of its rows.

    Attributes:
        option: the user's option, for messages.
        all_tokens: the option, if it needs all tokens at once; else "".
        instead: what the user may choose instead.
    """

    option: str
    all_tokens: str
    instead: str


FIRST = Asks("first= and last=", "", "all tokens, first=None and last=None")
LAST = FIRST._replace(all_tokens="last=...")
SEQUENCE = Asks('per="sequence"', 'per="sequence"', 'a gate for each token, per="token"')


def of_ends(last: int | None) -> Asks:
    """Return the question which tokens are the first ones of a document, or the last ones too."""
    return LAST if last else FIRST


def _states_in(out: Any) -> list[Any]:
    """Return what a call's output holds of states: by their names, or nested in a tuple."""
    if isinstance(out, dict):
        return [cache_in(out)]
    return list(filter(holds_tensors, out[1:])) if isinstance(out, tuple | list) else []


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
        uncounted: the argument that may hold earlier tokens, which it does not count; or "".
        unnumbered: this call, or one around it, was given no position ids.
        guessed: which argument holds the tokens was told by its form alone.
        doubt: what else the call may say of its tokens, if nothing tells how.
        others: what the call is given of other texts, which modules inside may read.
        watch: the call's arguments, to know them in a later one; None: nobody asks.
    """

    def __init__(
        self, given: Mapping[str, Any], batch: int, length: int, device: torch.device
    ) -> None:
        self.batch, self.length, self.device = batch, length, device
        self.ids, self.state = given.get("input_ids"), cache_in(given)
        mask: Any = given.get("attention_mask")
        if isinstance(mask, dict):  # one for each kind of layer; a recurrent one takes it plain
            mask = next((m for m in mask.values() if getattr(m, "ndim", 0) == 2), mask)
        self.positions = numbers_in(given, batch, length, device)
        plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
        self.plain = plain and given.get("input_mask") is None  # XLNet's, true for padding
        self.mask = mask if self.plain else None
        self.shown, self.unnumbered = mask, self.positions is None
        self.held = earlier(given)
        counts, before = counted_before(given, batch, length, device)
        if counts and not self.held:
            self.held = before
        other = other_state_in(given)
        if self.held == 0 and ((other and not counts) or self._is_longer()):
            self.held = None
        self.uncounted = state_in(given) if self.held is None else ""
        self.began, self.note_before = now(), note_of(self.state)
        self.noted = None if self.note_before is None else self.note_before.counts
        self.several, self.continued = isinstance(self.positions, Tensor), self.held != 0
        self.others = [v for n, v in given.items() if n.startswith(OTHERS) and torch.is_tensor(v)]
        self.guessed, self.doubt = False, ""
        self.watch: Watch | None = None
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

    def unpadded(self, row: int) -> Documents:
        """Return the documents of one row, without its padding."""
        new = self[row : row + 1]
        seen = new.seen()[0]
        new.found, new.mask, new.length = {}, None, int(seen.sum())
        if self.several:
            new.positions = new.positions[..., seen]
        return new

    def _cut(self, value: Any, rows: slice | Tensor) -> Any:
        return value if value is None or value.size(0) != self.batch else value[rows]

    def hears(self, around: Documents | None) -> None:
        """Take the mask of a call around this one, whose own says no more than who sees whom."""
        if around is not None and not self.plain and around.plain and self._same(around):
            self.plain, self.mask = True, around.mask

    def _same(self, around: Documents) -> bool:
        """True if both have as many rows and tokens, and the same ids if both have ids."""
        if (self.batch, self.length) != (around.batch, around.length):
            return False
        ids, other = self.ids, around.ids
        if ids is None or other is None or ids is other or torch.compiler.is_compiling():
            return True
        return ids.shape != other.shape or torch.equal(ids, other.to(ids.device))

    @property
    def says_nothing(self) -> bool:
        """True if its call tells of no padding, no positions and no earlier tokens."""
        return self.plain and self.mask is None and not (self.several or self.continued)

    def says_less_than(self, around: Documents) -> bool:
        """True if a call around this one, of as many rows and tokens, alone has a mask or ids."""
        return self._same(around) and self.plain and self.mask is None and self.positions is None

    def seen(self) -> Tensor:
        """Return booleans [batch or 1, length], false for padding."""
        if self.mask is None:
            return torch.ones(1, self.length, dtype=torch.bool, device=self.device)
        return shown(self.mask)[:, -self.length :]

    def _number(self, seen: Tensor) -> Tensor:
        """Return integers [batch or 1, length], which change where a document begins."""
        if self.several:
            return _restarts(self.positions, seen).cumsum(-1)
        return torch.zeros(1, self.length, dtype=torch.long, device=self.device)

    def _is_longer(self) -> bool:
        """True if the mask has columns for earlier tokens."""
        return self.mask is not None and self.mask.size(1) > self.length

    def _before(self) -> list[Any]:
        """Return all that says how many tokens of a row's first document a cache holds.

        Each is an integer, or integers [batch or 1, 1].
        """
        counts: list[Any] = [self.noted if self.held is None else self.held]
        if self._is_longer():
            seen = shown(self.mask)  # type: ignore[arg-type]
            counts.append(seen[:, : -self.length].sum(-1, keepdim=True))
        if self.several and self.positions.ndim == 2:
            counts.append(self.positions[:, :1])
        return [count for count in counts if count is not None]

    def note(self, out: Any) -> None:
        """Note how many tokens went into the state in a call's output, if it counts none.

        If a layer beneath has noted it, with the rows of a prompt, this stays.
        """
        if self.watch is not None:
            self.watch.end(out)
        before = self.noted if self.held is None else self.held
        for state in (*_states_in(out), self.state):
            if before is not None and counts_none(state):
                counts = self.seen().expand(self.batch, -1).sum(-1, keepdim=True) + before
                renew(state, counts, self.note_before, self.began)

    def check(self, asks: Asks, where: str) -> None:
        """Raise unless the call says enough about the tokens of its rows."""
        padding = self.plain or (
            self.several and agrees(self.shown, self._number(self.seen()), self.held)
        )
        if not padding or (self.continued and not self._before()):
            raise SiteError(
                f"{asks.option}: the call of {quoted(where)} does not say by its mask, position "
                "ids and cache which tokens are padding and how many came before"
                + self._way_out(where),
                where=where,
            )
        if self.mask is not None and not self.several and numbers_documents(self.mask):
            problem = f"{asks.option}: in the call of {quoted(where)}, {NUMBERED}"
            raise SiteError(problem, where=where)
        if asks.all_tokens and self.continued:
            raise SiteError(
                f"{asks.all_tokens} needs all tokens at once, and the cache given to "
                f"{quoted(where)} holds some of them: call generate(use_cache=False), or choose "
                + ("first=..." if asks is LAST else asks.instead),
                where=where,
            )

    def _way_out(self, where: str) -> str:
        ways = "give position_ids, or an attention_mask [batch, length] for all tokens"
        if not (state := self.uncounted):
            return f": {ways}"
        return f", as {state!r} may hold: {ways}; {else_say(state, where)}"

    def firsts(self) -> Tensor:
        """Return booleans [batch or 1, length]: true for the first token of each document."""
        seen = self.seen()
        return seen & (_ranks(seen, self._number(seen)) == 1)

    def chosen(self, first: int, last: int) -> Tensor:
        """Return booleans: true for the `first` and the `last` tokens of each document."""
        if (first, last) not in self.found:
            self.found[first, last] = self._chosen(first, last)
        return self.found[first, last]

    def means(self, u: Tensor) -> Tensor:
        """Return for each token the mean of `u` [batch, length, width] over its document."""
        seen = self.seen().to(u.device).expand(u.size(0), -1)
        counted = torch.where(seen[..., None], u, 0)
        if not self.several:
            mean = counted.sum(1, keepdim=True) / seen.sum(1)[:, None, None].clamp(min=1)
            return mean.expand_as(u)
        number = self._number(seen).to(u.device).expand(u.size(0), -1)
        sums = u.new_zeros(u.size(0), u.size(1) + 1, u.size(2) + 1)  # a token may be a document
        each = torch.cat([counted, seen[..., None].to(u.dtype)], -1)
        places = number[..., None].expand_as(each)
        sums = sums.scatter_add(1, places, each).gather(1, places)
        return sums[..., :-1] / sums[..., -1:].clamp(min=1)

    def one_each(self, values: Tensor) -> Tensor:
        """Return for each token one of the `values` [batch, length, n]: that of its document."""
        number = self._number(self.seen()).to(values.device)
        return values.gather(1, number[..., None].expand_as(values))

    def _chosen(self, first: int, last: int) -> Tensor:
        seen = self.seen()
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
    before = latest(seen).roll(1, -1)
    before[..., 0] = -1
    step = flat - flat.gather(-1, before.clamp(min=0))
    return seen & (before >= 0) & (step < (1 if positions.ndim < 3 else 0))


def _ranks(seen: Tensor, number: Tensor) -> Tensor:
    """Return 1 for the first token of each document, 2 for the second, and so on."""
    seen, number = torch.broadcast_tensors(seen, number)
    count = seen.cumsum(-1)
    changed = number != number.roll(1, -1)
    changed[..., 0] = True
    return count - (count - seen.long()).gather(-1, latest(changed))


def latest(flags: Tensor) -> Tensor:
    """Return for each column [..., length] the last one up to it that is true, or -1.

    ONNX has no `cummax`.
    """
    count, length = flags.cumsum(-1), flags.size(-1)
    columns = torch.arange(length, device=flags.device).expand_as(count)
    found = torch.full((*flags.shape[:-1], length + 2), -1, device=flags.device)
    found = found.scatter(-1, torch.where(flags, count, length + 1), columns)
    return found.gather(-1, count)
