"""Find whether a model puts its rows, or their tokens, in another order before a module.

A model of somebody's own is run on a few token ids with padding, without layers, twice: one token
of a row is another one in the second run, and what changes at the module shows where it went. The
runs change nothing of the model. Where they fail, nothing is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._modules.calls import names_of
from .._modules.tensors import is_sharded, lasting
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
PAD = 2  # tokens of padding
LENGTHS = re.compile(r"(^|_)len(gth)?s?$")
_found: Any = WeakKeyDictionary()  # {module: (its forward, the sites, what was found)}


def moved_before(module: nn.Module, sites: Sequence[str]) -> dict[str, str]:
    """Return `ROW` or `TOKENS` for sites that are given them in another order than the module.

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
        _found[module] = *key, _on_ids(module, sites)
    return _found[module][2]


def _on_ids(module: nn.Module, sites: Sequence[str]) -> dict[str, str]:
    names = names_of(getattr(type(module), "forward", None))
    for ids in some_ids(module):
        for call in _calls(names) if names else ():
            with leaving_nothing(module):
                try:
                    return _tried(module, sites, ids, call)
                except Exception:  # whatever a forward of somebody's own raises on such an input
                    continue
    return {}


def _calls(names: tuple[str, ...]) -> Iterator[Callable[[Tensor, Tensor], dict[str, Any]]]:
    """Yield functions that make a call's arguments of ids and of what shows where tokens are.

    Masks are numbers first, then booleans.
    """
    text = "input_ids" if "input_ids" in names else names[0]
    masks = [name for name in names if "mask" in name]
    counts = [name for name in names if LENGTHS.search(name) and not name.startswith("max")]
    for kind in (torch.long, torch.bool)[: 1 + bool(masks)]:

        def call(ids: Tensor, shown: Tensor, kind: torch.dtype = kind) -> dict[str, Any]:
            as_masks = {name: (shown ^ ("pad" in name)).to(kind) for name in masks}
            lengths = dict.fromkeys(counts, shown.sum(1).cpu())  # as pack_padded_sequence wants
            return {**as_masks, **lengths, text: ids}

        yield call


@lasting()
@torch.no_grad()
def _tried(
    module: nn.Module,
    sites: Sequence[str],
    ids: Tensor,
    call: Callable[[Tensor, Tensor], dict[str, Any]],
) -> dict[str, str]:
    padding = max(special_ids(module) & {*range(int(ids.max()) + 1)}, default=0)
    found: dict[str, str] = {}
    with watched(module, sites) as run:
        for short, at_end in ((0, True), (1, False)):  # sorts of both directions, pads at both ends
            hidden = slice(LENGTH - PAD, None) if at_end else slice(PAD)
            shown = torch.ones_like(ids, dtype=torch.bool)
            shown[short, hidden] = False
            begin = 0 if at_end else PAD
            given = torch.where(shown, ids, padding)
            other = given.clone()
            other[short, begin] = ids[short, -1 - begin]
            before, after = (run((), call(each, shown))[0] for each in (given, other))
            for name in before.keys() & after.keys():
                what = _what(before[name], after[name], short, begin)
                found.update({name: what} if what and found.get(name) != ROW else {})
    return found


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
