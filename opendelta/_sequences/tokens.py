"""Choose tokens of the rows in the running call, by the documents that its arguments say."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._modules.calls import first_given
from .._texts.arguments import (
    EMBEDDED,
    READS,
    Stated,
    arguments,
    is_beside_text,
    named,
    padding_id,
    stated,
    with_mask,
)
from .._texts.documents import (
    SEQUENCE,
    Asks,
    Documents,
    else_say,
    of_ends,
)
from .._texts.returned import RETURNED, Watch
from .._texts.running import (
    earlier_in,
    meets,
    of_one,
    running,
    unheard,
    unsaid,
)
from .._texts.saying import (
    KEEPS,
    keeps_its_cache,
    other_mask_in,
    parts_in,
    unheard_in,
)
from ..errors import SiteError, quoted
from ..names import ancestors
from ..names import last as last_step


def noted(
    given: dict[str, Any], where: str, asks: Asks, said: Stated, owner: Any, name: str = ""
) -> Documents | None:
    """Return the documents that a call's arguments, by name, say; None: it has none.

    Args:
        said: the result of `stated`.
        owner: what notes the calls of the module.
        name: what the module calls its tokens.

    Raises:
        SiteError: the call does not say enough about the tokens of its rows.
    """
    given = said.telling(given)
    tokens = next((given[n] for n in EMBEDDED if given.get(n) is not None), None)
    if isinstance(tokens, Tensor) and said.own and tokens.ndim == 1:
        tokens = tokens[None]
    if not isinstance(tokens, Tensor) or tokens.ndim != (3 if tokens.is_floating_point() else 2):
        return None  # such as several choices for each row: a module inside takes them as rows
    documents = Documents(given, tokens.size(0), tokens.size(1), tokens.device)
    documents.hears(around := running())
    if around is not None and documents.says_less_than(around):
        return around
    if said.own:
        documents.watch = Watch(owner, given)
        documents.doubt = _doubt(documents, documents.watch, given, said.keeps, name, where)
    documents.check(asks, where)
    return documents


def _may_say(name: str, where: str) -> str:
    return (
        f"is in a call that may say by {name!r} which tokens are padding, or where documents "
        "begin, and nothing tells how: call a mask 'attention_mask' [batch, length], or give "
        f"position_ids; {else_say(name, where)}"
    )


def _doubt(
    documents: Documents, watch: Watch, given: Mapping[str, Any], keeps: bool, own: str, where: str
) -> str:
    """Return what arguments may say of the tokens, and nothing tells how; or ""."""
    numbered = given.get("position_ids") is not None
    masked = given.get("attention_mask") is not None
    seen = documents.seen() if masked else None
    batch, length = documents.batch, documents.length
    name = "" if numbered else parts_in(given, batch, length, seen, own)
    if not name and not numbered and not masked:
        name = other_mask_in(given, batch, length, own=own)
    if name:
        return _may_say(name, where)
    if numbered or documents.continued:
        return ""
    if name := watch.known:
        return f"is in a call that is given {name!r}, {RETURNED}; {else_say(name, where)}"
    kept = keeps_its_cache(given, keeps)
    return f"is in a call that is given {kept!r}, {KEEPS}" if kept else ""


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
    documents.hears(running())
    if not documents.plain:
        raise SiteError(
            f"prefixes: the mask that {quoted(where)} is given does not show which tokens are "
            "padding: give position_ids too, or an attention_mask [batch, length] instead",
            where=where,
        )
    return documents.mask


def beside_input(told: Mapping[str, Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments `told` of a call but for its input, the first one."""
    x = first_given(args, kwargs)
    return {name: value for name, value in told.items() if value is not x}


class Tokens:
    """Chooses tokens of the rows that go through a module.

    Args:
        module: the module, which is not kept.
        where: its full name.

    Attributes:
        of_latents: it gives as many positions in rows of any length, and no tokens.
    """

    def __init__(self, module: nn.Module, where: str) -> None:
        own = arguments(module)
        self.where, self.names, self.of_latents = where, own, False
        self.arguments = own if set(own) >= READS else None
        self.padding, self.beside_text = padding_id(module), is_beside_text(module)
        self.said = stated(module)

    def hearing(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run `call`, the module's, after a look at what it is given and may fill."""
        meets(self._beside(args, kwargs))
        return call(*args, **kwargs)

    def _beside(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        return beside_input(self.said.telling(named(self.names, args, kwargs)), args, kwargs)

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
        documents = self._documents(h, args, kwargs, of_ends(last))
        chosen = documents.chosen(first, last).to(h.device)
        return chosen[0] if h.ndim == 2 else chosen

    def means(self, u: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Return for each token the mean over its document, without padding.

        Args:
            u: the module's input or output [batch, length, width].
            args, kwargs: the arguments of the module's call.

        Raises:
            SiteError: as for `chosen`, or the call has not all tokens at once.
        """
        return self._in_documents(Documents.means, u, args, kwargs)

    def one_each(self, values: Tensor, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Return for each token one of the `values` [batch, length, n], the same in its document.

        The arguments are those of `means`.
        """
        return self._in_documents(Documents.one_each, values, args, kwargs)

    def _in_documents(
        self,
        function: Callable[[Documents, Tensor], Tensor],
        u: Tensor,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Tensor:
        documents = self._documents(u, args, kwargs, SEQUENCE)
        found = function(documents, u if u.ndim == 3 else u[None])
        return found if u.ndim == 3 else found[0]

    def _documents(self, h: Tensor, args: tuple, kwargs: dict[str, Any], asks: Asks) -> Documents:
        documents = None if self.beside_text else running()
        if self.arguments is not None:
            given = with_mask(named(self.arguments, args, kwargs), self.padding)
            documents = noted(given, self.where, asks, self.said, self)
        if documents is not None and args and any(args[0] is each for each in documents.others):
            self._refuse(asks, "reads another text, of which nothing here says where rows begin")
        if documents is not None and documents.doubt:
            self._refuse(asks, f"{documents.doubt}; or choose {asks.instead}")
        guess = None
        may_be_others = self.of_latents or (documents is not None and documents.guessed)
        if documents is not None and may_be_others and documents.says_nothing:
            self._check_flat(asks, h, documents)
            guess, documents = documents, None
        if documents is None:
            if unsaid():
                self._refuse(asks, unsaid())
            if h.ndim > 2 and (name := unheard_in(unheard(), h.size(0), h.size(-2))):
                self._refuse(asks, _may_say(name, ""))
            self._check_bare(asks, args, kwargs, h)
            self._check_single(asks, h, guess)
            documents = Documents({}, 1, h.size(-2), h.device)
        elif self.of_latents:
            self._refuse(
                asks,
                f"gives {h.size(-2)} positions in rows of any length, as a run on a few tokens "
                "showed, so that what the call says of padding and of earlier tokens tells nothing "
                f"of them: leave that out, or choose {asks.instead}",
            )
        elif (_rows(h), h.size(-2)) != (documents.batch, documents.length):
            whole = h.ndim > 2 and h.size(0) == documents.batch  # blocks have this length too
            self._refuse(
                asks,
                f"has an output of the shape {tuple(h.shape)} for {documents.batch} rows of "
                f"{documents.length} tokens, which does not show the tokens: choose "
                f"{'' if whole else _block(self.where)}{asks.instead}",
            )
        return documents

    def _check_flat(self, asks: Asks, h: Tensor, documents: Documents) -> None:
        """Raise if a module's output has the tokens of all rows on one axis, or before the rows."""
        batch, length = documents.batch, documents.length
        flat = batch > 1 and h.ndim == 2 and h.size(0) == batch * length
        turned = batch != length and h.ndim == 3 and h.shape[:2] == (length, batch)
        if flat or (turned and documents.ids is not None):
            self._refuse(
                asks,
                f"has an output of the shape {tuple(h.shape)} for {batch} rows of {length} tokens, "
                f"which does not show the rows: choose {_block(self.where)}{asks.instead}",
            )

    def _check_single(self, asks: Asks, h: Tensor, guess: Documents | None) -> None:
        """Raise if a module's output [n, width] may be rows without tokens.

        Args:
            guess: what the arguments of the call may say of its tokens by their form alone.
        """
        known = guess is not None and (guess.batch, guess.length) == (1, h.size(0))
        if h.ndim == 2 and not known and not of_one():
            self._refuse(
                asks,
                f"has an output of the shape {tuple(h.shape)}, and nothing says that these are the "
                "tokens of one row, and no rows: give a single row an axis [1, ...] before its "
                f"tokens; choose {_block(self.where)}{asks.instead}",
            )

    def _check_bare(self, asks: Asks, args: tuple, kwargs: dict[str, Any], h: Tensor) -> None:
        """Raise if there may be padding or earlier tokens in a call that no `Notes` saw."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            self._refuse(
                asks,
                "runs again in a backward, where nothing says where its rows begin and end: call "
                "the whole model, which notes that, and use torch.utils.checkpoint",
            )
        given = self._beside(args, kwargs)
        if self.said.own and (name := other_mask_in(given, h.size(0), h.size(-2))):
            self._refuse(asks, _may_say(name, self.where))
        masks = [value for name, value in kwargs.items() if "mask" in name]
        masks += [value for value in args[1:] if isinstance(value, Tensor) and value.ndim == 4]
        hidden = not self.said.own and any(mask is not None for mask in masks)
        if hidden or earlier_in(given):
            self._refuse(
                asks,
                "is given a mask or a cache, but no module around it that has input_ids says which "
                "tokens are padding and how many came before",
            )

    def _refuse(self, asks: Asks, why: str) -> None:
        raise SiteError(f"{asks.option}: {self.where!r} {why}", where=self.where)


def _rows(h: Tensor) -> int:
    """Return how many rows a module's output has: [length, width] is that of a single one."""
    return h.size(0) if h.ndim > 2 else 1


def _block(where: str) -> str:
    """Return advice to choose the block around a module, or ""."""
    numbered = [name for name in ancestors(where) if last_step(name).isdigit()]
    if not numbered or numbered[-1] == where:
        return ""
    block, number = numbered[-1], last_step(numbered[-1])
    pattern = f"[r]^{re.escape(block.removesuffix(number))}\\d+$"
    return f"the block around it, such as by modified_modules=[{pattern!r}], or "
