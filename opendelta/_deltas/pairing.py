"""Choose the modules of a method whose layers are branches: in pairs, from a start to an end."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence

from .._backbone.backbone import Backbone
from .._backbone.patterns import excluded_by
from .._backbone.roles import SUBLAYERS
from ..errors import AddressError
from ..names import parent

Select = Callable[[Backbone, Sequence[str]], list[str]]


def in_pairs(
    backbone: Backbone,
    wanted: Sequence[str],
    select_all: Select,
    excluded: Sequence[str],
) -> list[str]:
    """Return full names in pairs: the start and the end of a branch, of the next branch, ...

    A pair of modules with several names is returned once.

    Raises:
        AddressError: the names do not come in pairs, or a module would be in two pairs.
    """
    if len(wanted) % 2:
        raise AddressError(
            f"modified_modules={list(wanted)} must come in pairs: where a branch starts, where it "
            "ends; name a module twice for a branch around it"
        )
    out = excluded_by(backbone, excluded)
    chosen: list[str] = []
    for one, other in zip(wanted[::2], wanted[1::2], strict=True):
        starts, ends = (
            [name for name in select_all(backbone, [pattern]) if name not in out]
            for pattern in (one, other)
        )
        if one == other and one in SUBLAYERS:
            starts, ends = _around(backbone, starts, one, select_all)
        if len(starts) != len(ends):
            raise AddressError(
                f"modified_modules: {one!r} selects {len(starts)} modules and {other!r} "
                f"{len(ends)}, which make no pairs: {', '.join(starts[:2])}, ... and "
                f"{', '.join(ends[:2])}, ..."
            )
        chosen += [name for pair in zip(starts, ends, strict=True) for name in pair]
    chosen = _once(backbone, chosen)
    pairs = list(zip(chosen[::2], chosen[1::2], strict=True))
    needed = Counter(name for pair in pairs for name in dict.fromkeys(pair))
    if twice := [name for name, count in needed.items() if count > 1]:
        raise AddressError(
            f"modified_modules={list(wanted)}: {twice[0]!r} is in two pairs; make two deltas"
        )
    if not chosen:
        raise AddressError(f"exclude_modules={list(excluded)} leaves no pair of modules")
    return chosen


def _around(
    backbone: Backbone, names: list[str], sublayer: str, select_all: Select
) -> tuple[list[str], list[str]]:
    """Return where branches around an attention start and end.

    That is at the module that holds it; or else at its queries and its output projection, which
    take and give what such a module would.
    """

    def playing(part: str) -> set[str]:
        with contextlib.suppress(AddressError):
            return {*select_all(backbone, [f"{sublayer}.{part}"])}
        return set()

    asking, giving = playing("q"), playing("proj")
    first = {parent(name): name for name in reversed(names) if name in asking}
    last = {parent(name): name for name in names if name in giving}
    parts = asking | giving | playing("k") | playing("v")
    inside = [n for n in names if n in parts and parent(n) in first.keys() & last.keys()]
    starts = dict.fromkeys(first[parent(n)] if n in inside else n for n in names)
    return [*starts], [last[parent(n)] if n in inside else n for n in starts]


def _once(backbone: Backbone, chosen: list[str]) -> list[str]:
    """Return names in pairs, each module by its first one, without pairs that are one then."""
    first: dict[int, str] = {}
    known: dict[tuple[str, ...], tuple[str, ...]] = {}
    once: list[str] = []
    for pair in zip(chosen[::2], chosen[1::2], strict=True):
        own = tuple(first.setdefault(id(backbone.modules[name]), name) for name in pair)
        if known.setdefault(own, pair) == pair:
            once += own
    return once
