"""Where prefixes stand: give models that turn queries and keys ids that padding does not shift."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .._layers.base import Acts, DeltaLayer
from .._texts.arguments import EMBEDDED, READS, arguments, named, padding_id, with_mask
from .._texts.documents import Documents
from .._texts.masks import shown
from .._texts.rehearsal import counts_distances, differ, is_own, is_relative
from .._texts.running import during, running
from ..errors import SiteError, quoted
from ..names import ancestors
from .tokens import padding_of

# Takes a list for keys; inside its block, a model given to what it yields puts its keys there.
Watch = Callable[[list[Tensor]], AbstractContextManager[Callable[[nn.Module], None]]]


def names_in_forward(cls: type) -> tuple[str, ...]:
    """Return the names that the code of a class's forward uses of others."""
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)  # type: ignore[attr-defined]
    return () if code is None else code.co_names


def places_for(
    made: Mapping[str, DeltaLayer], modules: Mapping[str, nn.Module], watch: Watch
) -> dict[str, DeltaLayer]:
    """Return the layers that prefixes in `made` need on the models around them, by full name."""
    known = {*EMBEDDED, "attention_mask", "position_ids"}
    takes = [
        [outer for outer in [*ancestors(name), ""] if {*arguments(modules[outer])} >= known]
        for name in made
    ]
    around = {outer for outers in takes for outer in outers}
    turning = {outer for outer in around if _turns(modules[outer])}
    turning |= {own[0] for name, own in zip(made, takes, strict=True)
                if own and _turns(modules[name])}  # fmt: skip
    found: dict[str, DeltaLayer] = {
        outer: Places(modules[outer], outer, outer in turning)
        for outer in around
        if outer in turning or _makes_them(modules[outer])
    }
    inner = [own[:1] or _reader_around(name, modules)
             for name, own in zip(made, takes, strict=True)]  # fmt: skip
    for outer in {outer for outers in inner for outer in outers}:
        is_new = outer not in found and is_own(modules[outer])
        if is_new and _may_turn(modules[outer], watch):
            found[outer] = Unnumbered(modules[outer], outer)
    return found


def _turns(module: nn.Module) -> bool:
    """True if a module turns queries and keys by position ids.

    By a child; Moshi's is in each attention. Or as a model of somebody's own shows.
    """
    if any("Rotary" in type(child).__name__ for child in module.children()):
        return True
    takes = {"input_ids", "position_ids"} <= {*arguments(module)}
    return takes and is_own(module) and is_relative(module) is True


def _reader_around(name: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the innermost module around `name` with token ids and a mask, or none."""
    return [o for o in [*ancestors(name), ""] if {*arguments(modules[o])} >= READS][:1]


def _may_turn(module: nn.Module, watch: Watch) -> bool:
    """True if a module of somebody's own turns by numbers that it makes itself, or may do so."""
    keys: list[Tensor] = []
    with watch(keys) as show:
        counts = counts_distances(module, show)
    if counts is None or not keys or len(keys) % 3:
        return counts is not False
    behind, before = keys[0], keys[len(keys) // 3]
    return counts and (before.ndim != 4 or differ(behind[:, :, :4], before[:, :, 2:6]))


def _makes_them(module: nn.Module) -> bool:
    """True if modules inside are given masks or position ids that do not show the padding.

    Gemma 3 with images makes such masks, and Fuyu such position ids.
    """
    names = names_in_forward(type(module))
    return "arange" in names or any(n.startswith("create_") and "_mask" in n for n in names)


class Places(DeltaLayer):
    """Gives a model that turns queries and keys by position the ids that padding does not shift.

    By themselves such models count padding on the left too. It changes no distance between tokens,
    but the keys of a prefix are not turned.

    Args:
        module: the model, which is not kept.
        where: its full name.
        turns: modules inside turn by the position ids that the model is given; else the model only
            makes them, or masks, for a model inside.
    """

    acts = Acts.SERVES
    routes_itself = True

    def __init__(self, module: nn.Module, where: str, turns: bool) -> None:
        super().__init__()
        self.arguments, self.where, self.turns = arguments(module), where, turns
        self.padding = padding_id(module)

    @property
    def watches(self) -> bool:  # type: ignore[override]
        """Return False if it holds the tensors that the prefixes share."""
        return not self._modules

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = named(self.arguments, args, kwargs)
        tokens = next((given[name] for name in EMBEDDED if given.get(name) is not None), None)
        made = given.get("position_ids")  # by the user, or by a model around for this one
        if tokens is None or (made is not None and not (self.turns and _is_made(made))):
            return call(**given)
        if not self.turns:
            documents = Documents(given, tokens.size(0), tokens.size(1), tokens.device)
            return during(documents, call, **given)
        mask = padding_of(with_mask(given, self.padding), tokens, self.where)
        if mask is not None:
            padding = (shown(mask).cumsum(-1) == 0).sum(-1, keepdim=True)
            counted = torch.arange(mask.size(1), device=mask.device)[-tokens.size(1) :]
            places = (counted - padding).clamp(min=0)
            if made is not None:
                places = torch.where((made == counted).all(), places, made)
            given["position_ids"] = places
        return call(**given)


class Unnumbered(DeltaLayer):
    """Refuses padding on the left where nothing says how a prefix stands to the tokens behind it.

    Args:
        module: the model, which is not kept.
        where: its full name.
    """

    acts = Acts.SERVES
    routes_itself = True
    watches = True

    def __init__(self, module: nn.Module, where: str) -> None:
        super().__init__()
        self.arguments, self.where = arguments(module), where
        self.takes = "position_ids" in self.arguments
        self.padding = padding_id(module)

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = named(self.arguments, args, kwargs)
        tokens, placed = given.get("input_ids"), given.get("position_ids") is not None
        if tokens is None or placed or torch.compiler.is_compiling():
            return call(*args, **kwargs)
        mask = padding_of(with_mask(given, self.padding), tokens, self.where)
        if mask is not None and not bool(shown(mask)[:, 0].all()):
            raise SiteError(
                f"prefixes: {quoted(self.where)} may turn queries and keys by positions that count "
                "padding on the left, which moves a row away from the prefix: "
                + ("give position_ids that begin at each row's first token" if self.takes
                   else "pad on the right"),
                where=self.where,
            )  # fmt: skip
        return call(*args, **kwargs)


def _is_made(positions: Tensor) -> bool:
    """True if a model around was given no position ids, and made such as no image needs."""
    around = running()
    return around is not None and around.unnumbered and positions.ndim == 2
