"""Hand the documents in the rows of a call on to the modules inside it.

A module that embeds tokens is given what says where they begin and end. Modules inside it are not
given all of it: they find the `Documents` of the running call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .._layers import recomputing
from .._layers.base import Acts, DeltaLayer
from .._texts.arguments import (
    READS,
    arguments,
    is_beside_text,
    named,
    padding_id,
    stated,
    with_mask,
)
from .._texts.documents import Asks, else_say, of_ends
from .._texts.moved import LATENTS, moved_before
from .._texts.rehearsal import is_own
from .._texts.running import (
    beginning,
    during,
    earlier_in,
    noting,
    of_now,
    of_one_during,
    unheard_during,
    unsaid,
    unsaid_during,
)
from .._texts.saying import by_usual_names
from .._texts.states import may_be_state
from ..errors import SiteError
from ..names import ancestors, join, relative
from .tokens import beside_input, noted

TORCHS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
ENDS = "cu_seqlens"  # where each image ends
TOKENS_FIRST = ("FSMTEncoder", "FSMTDecoder", "XLNetModel")


class Notes(DeltaLayer):
    """Notes the documents in the rows of a module's call, for layers inside the module.

    Args:
        module: the module, which is not kept.
        where: its full name.
        asks: what the layers ask.
    """

    acts = Acts.SERVES
    routes_itself = True
    only_notes = True

    def __init__(self, module: nn.Module, where: str, asks: Asks) -> None:
        super().__init__()
        recomputing.keep(of_now)
        self.arguments, self.padding = arguments(module), padding_id(module)
        self.where, self.asks, self.said = where, asks, stated(module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        recomputing.keep(of_now)  # an unpickled model may be in another process

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = with_mask(named(self.arguments, args, kwargs), self.padding)
        documents = noted(given, self.where, self.asks, self.said, self)
        if documents is None and self.said.own:
            return unheard_during(self.said.telling(given), call, *args, **kwargs)
        return noting(documents, call, *args, **kwargs)


class Guesses(Notes):
    """Notes the documents of a call of somebody's own that names no `input_ids`."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        told = self.said.telling(named(self.arguments, args, kwargs))
        return beginning(self._noting, told, call, *args, **kwargs)

    def _noting(
        self, told: dict[str, Any], call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        given, texts = by_usual_names(told)
        given = with_mask(given, self.padding)
        documents = noted(given, self.where, self.asks, self.said, self, *texts[:1])
        if documents is None:
            why = after_earlier(told, args, kwargs, self.where)
            return unsaid_during(why, unheard_during, given, call, *args, **kwargs)
        documents.guessed = True
        if len(texts) > 1 and not documents.says_nothing:
            documents.doubt = "is in a call of several texts, and nothing says whose its mask is"
        return noting(documents, call, *args, **kwargs)


class Listens(DeltaLayer):
    """Hears by what arguments a module is called, for layers inside it that choose tokens.

    Args:
        module: the module, which is not kept.
        where: its full name.
    """

    acts = Acts.SERVES
    routes_itself = True

    def __init__(self, module: nn.Module, where: str) -> None:
        super().__init__()
        self.arguments, self.said, self.where = arguments(module), stated(module), where

    def told(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a call that may tell of its tokens."""
        return self.said.telling(named(self.arguments, args, kwargs))


class Apart(Listens):
    """Lets modules inside know of no text, as images and sounds have tokens of their own."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        counts = _packed(self.told(args, kwargs))
        name = next((name for name, count in counts.items() if count > 1), "")
        why = f"is given several images or sounds as one row ({name!r})" if name else ""
        one = bool(counts) and not name
        return of_one_during(one, unsaid_during, why, during, None, call, *args, **kwargs)


class Continued(Listens):
    """Lets layers inside a module know that it is given earlier tokens, which nothing counts."""

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        why = after_earlier(self.told(args, kwargs), args, kwargs, self.where)
        return unsaid_during(why or unsaid(), call, *args, **kwargs)


def after_earlier(told: Mapping[str, Any], args: tuple, kwargs: dict[str, Any], where: str) -> str:
    """Return why nothing counts the tokens before those of a call, if there are some; or "".

    Args:
        told: what may tell of its tokens, of the call's arguments by name.
        where: the full name of the module.
    """
    name = earlier_in(beside_input(told, args, kwargs))
    advice = else_say(name, where)
    return f"runs after earlier tokens ({name!r}), which nothing counts; {advice}" if name else ""


def _beside_text(outer: list[str], takes: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the outermost module of images or sounds, if text or several images may be there.

    Args:
        outer: the modules around a layer, the innermost first.
        takes: those of them that take token ids.
    """
    inner = outer[: outer.index(takes[0])] if takes else outer
    found = [o for o in inner if is_beside_text(modules[o])]
    return [o for o in found if takes or any(map(_may_pack, arguments(modules[o])))][-1:]


def _packed(given: Mapping[str, Any]) -> dict[str, int]:
    """Return how many images or sounds are one row, by the name of the argument that says it."""
    return {
        name: value.size(0) - (name == ENDS)
        for name, value in given.items()
        if isinstance(value, Tensor) and value.ndim and _may_pack(name)
    }


def _may_pack(name: str) -> bool:
    return "grid" in name or name in (ENDS, "feature_lens")


def notes_at_ends(
    made: Mapping[str, DeltaLayer],
    modules: Mapping[str, nn.Module],
    first: int | None,
    last: int | None,
) -> dict[str, DeltaLayer]:
    """Return the result of `notes_for` for layers that act at these tokens of each document."""
    return {} if first is last is None else notes_for(made, modules, of_ends(last))


def notes_for(
    made: Mapping[str, DeltaLayer], modules: Mapping[str, nn.Module], asks: Asks
) -> dict[str, DeltaLayer]:
    """Return `Notes` for the innermost module with token ids around each layer in `made`.

    And for the outermost one: RWKV's, for example, takes a mask and does not hand it on. That of an
    encoder-decoder says nothing of its decoder's tokens. Encoders of images beside the text, which
    may happen to have as many tokens, get an `Apart`.

    Raises:
        SiteError: the modules around a layer put the tokens before the rows, or in another order.
    """
    found: dict[str, DeltaLayer] = {}
    innermost: dict[str, list[str]] = {}

    def put(where: str, cls: Any, *more: Any) -> None:
        if where not in made and type(found.get(where)) is not cls:
            found[where] = cls(modules[where], where, *more)

    for name in made:
        outer = [*ancestors(name), ""][1:]
        _check_axes(name, [modules[o] for o in (name, *outer)], asks)
        takes = [o for o in outer if set(arguments(modules[o])) >= READS]
        takes = takes or [o for o in outer if "input_ids" in arguments(modules[o])]
        if takes and "decoder_input_ids" in arguments(modules[takes[0]]):
            raise SiteError(
                f"{asks.option}: {name!r} is in {type(modules[takes[0]]).__name__}, which is given "
                "the tokens of two texts, and nothing says which of them it computes: choose "
                f"{asks.instead}",
                where=name,
            )
        own_root = not takes and is_own(modules[""])
        states = [] if takes else _given_states(name, modules)
        for where in states:
            if where or not own_root:
                put(where, Continued)
        for where in _beside_text(outer, takes, modules):
            put(where, Apart)
        for around in dict.fromkeys((*takes[:1], *takes[-1:])):
            two = around != takes[0] and "decoder_input_ids" in arguments(modules[around])
            if not two:
                put(around, Notes, asks)
        if own_root:
            put("", Guesses, asks)
        if takes or own_root:
            innermost.setdefault(takes[0] if takes else "", []).append(name)
    for around, names in innermost.items():
        _check_order(modules[around], around, {name: made[name] for name in names}, asks)
    return found


def _check_axes(name: str, around: list[nn.Module], asks: Asks) -> None:
    """Raise if one of the modules around a layer, or its own, puts the tokens before the rows."""
    for holder in filter(_has_tokens_first, around):
        raise SiteError(
            f"{asks.option}: {name!r} is in a {type(holder).__name__}, where hidden states "
            f"are [length, batch, width]: choose {asks.instead}",
            where=name,
        )


def _check_order(module: nn.Module, around: str, made: Mapping[str, Any], asks: Asks) -> None:
    """Raise if a module puts the tokens of its call in another order before a layer inside.

    Layers on latents that the module computes of the tokens learn that they are there.
    """
    moved = moved_before(module, [relative(name, around) for name in made])
    for name, layer in made.items():
        what = moved.get(relative(name, around))
        if what == LATENTS:
            layer.tokens.of_latents = True
        elif what:
            raise SiteError(
                f"{asks.option}: {type(module).__name__} puts the {what} of its call in another "
                f"order before {name!r}, as a run on a few tokens shows: choose {asks.instead}",
                where=name,
            )


def _has_tokens_first(module: nn.Module) -> bool:
    """True if hidden states in a module are [length, batch, width], as by default in torch's."""
    if any(base.__name__ in TOKENS_FIRST for base in type(module).__mro__):
        return True
    attention = getattr(module, "self_attn", None) if isinstance(module, TORCHS) else None
    return getattr(attention, "batch_first", True) is False


def _given_states(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the modules at and around `name` that may be given a state, and those before them.

    The first of several siblings is given the state that they share before it holds anything.
    """
    found = [o for o in [*ancestors(name), ""] if may_be_given_state(modules[o])]
    firsts = []
    for where in found:
        parent = where.rpartition(".")[0]
        siblings = modules[parent].named_children() if where else ()
        likely = (join(parent, n) for n, child in siblings if may_be_given_state(child))
        firsts += [first for first in itertools.islice(likely, 1) if first in modules]
    return [*dict.fromkeys((*found, *firsts))]


def may_be_given_state(module: nn.Module) -> bool:
    """True if an argument beside a module's input may hold earlier tokens."""
    return any(map(may_be_state, arguments(module)[1:]))
