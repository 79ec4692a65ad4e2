"""Find whether a model puts its rows, or their tokens, in another order before a module, or none.

A model of somebody's own is run on a few token ids, or embeddings, with padding, without layers,
twice: one token of a row is another one in the second run, and what changes at the module shows
where it went. It is run on longer rows, too: what gives as many positions as before has latents,
and no tokens. The runs change nothing of the model. Where they fail, nothing is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._modules.calls import names_of
from .._modules.devices import device_and_dtype
from .._modules.tensors import is_sharded, lasting
from .arguments import EMBEDDED
from .rehearsal import (
    LENGTH,
    ROWS,
    differ,
    is_own,
    leaving_nothing,
    some_ids,
    special_ids,
    watched,
)

ROW, TOKENS = "rows", "tokens"  # what is moved
LATENTS = "latents"  # what a site has instead of tokens
PAD = 2  # tokens of padding
WIDTHS = 3  # that embeddings may have
LENGTHS = re.compile(r"(^|_)len(gth)?s?$")
# The arguments of rows and of booleans that are false for padding.
Call = Callable[[Tensor, Tensor], dict[str, Any]]
_found: Any = WeakKeyDictionary()  # {module: (its forward, the sites, what was found)}


def moved_before(module: nn.Module, sites: Sequence[str]) -> dict[str, str]:
    """Return `ROW` or `TOKENS` for sites that are given them in another order than the module.

    And `LATENTS` for those whose output has as many positions in rows of any length.

    Args:
        module: the model.
        sites: modules inside, by full name.
    """
    if not is_own(module):
        return {}
    key = getattr(type(module), "forward", None), frozenset(sites)  # TorchScript's class has none
    if _found.get(module, (None,))[:2] != key:
        if any(p.is_meta or is_sharded(p) for p in module.parameters()):
            return {}
        _found[module] = *key, _on_few(module, sites)
    return _found[module][2]


def _on_few(module: nn.Module, sites: Sequence[str]) -> dict[str, str]:
    names = names_of(getattr(type(module), "forward", None))
    for rows in (*some_ids(module), *_some_embedded(module)):
        for call in _calls(names) if names else ():
            with leaving_nothing(module):
                try:
                    return _tried(module, sites, rows, call)
                except Exception:  # whatever a forward of somebody's own raises on such an input
                    continue
    return {}


def _some_embedded(module: nn.Module) -> Iterator[Tensor]:
    """Yield rows [rows, length, width], for the first widths in a module."""
    parts = [*module.modules()]
    device, dtype = device_and_dtype(parts)
    widths = [part.in_features for part in parts if isinstance(part, nn.Linear)]
    for width in [*dict.fromkeys(widths)][:WIDTHS]:
        generator = torch.Generator().manual_seed(0)
        yield torch.randn(ROWS, LENGTH, width, generator=generator).to(device, dtype)


def _calls(names: tuple[str, ...]) -> Iterator[Call]:
    """Yield functions that make a call's arguments of rows and of what shows where tokens are.

    Masks are numbers first, then booleans.
    """
    text = next((name for name in EMBEDDED if name in names), names[0])
    masks = [name for name in names if "mask" in name]
    counts = [name for name in names if LENGTHS.search(name) and not name.startswith("max")]
    for kind in (torch.long, torch.bool)[: 1 + bool(masks)]:

        def call(rows: Tensor, shown: Tensor, kind: torch.dtype = kind) -> dict[str, Any]:
            as_masks = {name: (shown ^ ("pad" in name)).to(kind) for name in masks}
            lengths = dict.fromkeys(counts, shown.sum(1).cpu())  # as pack_padded_sequence wants
            return {**as_masks, **lengths, text: rows}

        yield call


@lasting()
@torch.no_grad()
def _tried(
    module: nn.Module,
    sites: Sequence[str],
    rows: Tensor,
    call: Call,
) -> dict[str, str]:
    padding = 0
    if not rows.is_floating_point():
        padding = max(special_ids(module) & {*range(int(rows.max()) + 1)}, default=0)
    found: dict[str, str] = {}
    with watched(module, sites) as run:
        for short, at_end in ((0, True), (1, False)):  # sorts of both directions, pads at both ends
            hidden = slice(LENGTH - PAD, None) if at_end else slice(PAD)
            shown = rows.new_ones(ROWS, LENGTH, dtype=torch.bool)
            shown[short, hidden] = False
            begin = 0 if at_end else PAD
            given = rows.clone()
            given[~shown] = padding
            other = given.clone()
            other[short, begin] = rows[short, -1 - begin]
            before, after = (run((), call(each, shown))[0] for each in (given, other))
            for name in before.keys() & after.keys():
                what = _what(before[name], after[name], short, begin)
                found.update({name: what} if what and found.get(name) != ROW else {})
        latents = _latents(before, rows, call, run)
        return found | {name: what for name, what in latents.items() if found.get(name) != ROW}


def _latents(
    before: dict[str, Tensor], rows: Tensor, call: Call, run: Callable[..., Any]
) -> dict[str, str]:
    """Return `LATENTS` for sites of several positions, as many in rows of one token more.

    That token counts there: it does not where a model cuts its rows. One that makes rows longer, up
    to a multiple or to its longest, has more positions then, or does not run.
    """
    several = {n: out for n, out in before.items() if out.ndim > 2 and out.size(1) > 1}
    own = {name: out.size(1) for name, out in several.items() if out.size(0) == ROWS}
    found: dict[str, str] = {}
    for count in {*own.values()}:
        longer = torch.cat([rows] * (2 + count // LENGTH), 1)[:, : count + 1]
        shown = longer.new_ones(longer.shape[:2], dtype=torch.bool)
        try:
            one, other = (run((), call(longer[:, :n], shown[:, :n]))[0] for n in (count, count + 1))
        except Exception:  # as a table of positions ends before
            continue
        both = [n for n in one.keys() & other.keys() if own.get(n) == count == one[n].size(1)]
        found |= {n: LATENTS for n in both if _has_as_many(one[n], other[n])}
    return found


def _has_as_many(one: Tensor, other: Tensor) -> bool:
    """True if results have the same form, and other values."""
    return one.shape == other.shape and differ(one, other)


def _what(one: Tensor, other: Tensor, row: int, place: int) -> str:
    """Return what is elsewhere after a token was changed; or ""."""
    if one.shape != other.shape or one.ndim < 2 or one.size(0) != ROWS:
        return ""
    rows = [i for i in range(ROWS) if differ(one[i], other[i])]
    if row not in rows:
        return ROW if rows else ""
    if one.ndim < 3 or one.size(1) != LENGTH:
        return ""
    places = [i for i in range(LENGTH) if differ(one[row, i], other[row, i])]
    return "" if any(abs(i - place) < 2 for i in places) else TOKENS  # a shift by one keeps order
