"""Which deltas are in a block, and where a block can stand."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from .._backbone.backbone import Backbone
from .._layers.record import Record
from ..errors import DeltaError, OptionError, SharedDeltaWarning, SiteError, quoted, warn
from .base import BaseDelta
from .options import DeltaConfig
from .order import attached_by_name


class NameOf(str):
    """The name of a delta that was given by its handle; copies of it are plain names.

    Attributes:
        record: the delta, which must be the one that is attached under this name.
    """

    record: Record

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, (str(self),)


def _name(given: Any) -> Any:
    if not isinstance(given, BaseDelta):
        return given
    name = NameOf(given.name)
    name.record = given.record
    return name


@dataclass
class BlockConfig(DeltaConfig):
    """The options of each block.

    Attributes:
        deltas: the deltas that it combines: their names, or handles. They must be attached; blocks
            may be among them.
    """

    deltas: list[str] | None = None
    _: KW_ONLY

    def __post_init__(self) -> None:
        if isinstance(self.deltas, str):
            raise OptionError(
                f"{type(self).__name__}: deltas={self.deltas!r} must be a list of names"
            )
        if isinstance(self.deltas, list | tuple):
            self.deltas = [_name(each) for each in self.deltas]
        super().__post_init__()
        if len(set(self.children)) < len(self.children):
            raise OptionError(f"{type(self).__name__}: deltas={self.deltas} names one delta twice")

    @property
    def children(self) -> Sequence[str]:
        return self.deltas or ()


def sites_of_children(backbone: Backbone, names: Sequence[str]) -> list[str]:
    """Return the full names of the sites where at least one of these deltas acts.

    Raises:
        OptionError: there are none.
        DeltaError: one is not attached.
        SiteError: one changes the length of the sequence.
    """
    known = backbone.records()
    if not names:
        raise OptionError(
            f'a block needs deltas=, the names of those to combine, such as deltas=["a", "b"]; '
            f"attached are {[record.name for record in known]}"
        )
    attached_by_name(backbone.model, names, known)
    for where, name, layer in backbone.delta_layers():
        if name in names and layer.stands_alone:
            raise _changes_length(name, where, "this block")
    return [
        where
        for where, stack in backbone.stacks.items()
        if any(name in names and layer.joins_blocks for name, layer in stack.in_order())
    ]


def with_children(chosen: Iterable[Record], among: Sequence[Record]) -> set[Record]:
    """Return the chosen deltas, and all that is in each block of which no child is chosen.

    Args:
        among: the deltas that may be chosen.
    """
    by_name = {record.name: record for record in among}
    found, todo = {*chosen}, [*chosen]
    named = frozenset(found)
    while todo:
        children = [by_name[n] for n in todo.pop().config.children if n in by_name]
        if not named.intersection(children):
            todo += [record for record in children if record not in found]
            found.update(children)
    return found


def inside(record: Record, among: Sequence[Record]) -> list[Record]:
    """Return the deltas in a block, and in the blocks in it, in the order of `among`."""
    found = with_children([record], among) - {record}
    return [each for each in among if each in found]


def check_blocks(backbone: Backbone, delta: BaseDelta) -> None:
    """Raise if a new delta cannot be in the blocks that name it, or has what no block combines.

    Raises:
        DeltaError: a block would be in itself.
        SiteError: a child changes the length of the sequence.
    """
    records = [*backbone.records(), delta.record]
    blocks = [record for record in records if record.config.children]
    if not blocks:
        return
    _check_circle(delta.record, records)
    named = {name for record in blocks for name in record.config.children}
    layers = [(where, name, ly) for where, name, ly in backbone.delta_layers()]
    layers += [(where, delta.name, layer) for where, layer in delta.layers.items()]
    for where, name, layer in layers:
        if name in named and layer.stands_alone:
            block = next(r.name for r in blocks if name in r.config.children)
            raise _changes_length(name, where, f"the block {block!r}")
    if delta.record.config.children:
        _warn_of_shared(delta.record, blocks)


def _changes_length(name: str, where: str, block: str) -> SiteError:
    return SiteError(
        f"{name!r} on {quoted(where)} changes the length of the sequence, so {block} cannot "
        "combine what it gives with others: leave it out of deltas=, and let it act by itself",
        where=where,
    )


def _check_circle(new: Record, records: Collection[Record]) -> None:
    by_name = {record.name: record for record in records}
    path = [new.name]

    def visit(name: str) -> None:
        for child in by_name[name].config.children if name in by_name else ():
            if child == new.name:
                chain = " in ".join(map(repr, reversed([*path, child])))
                raise DeltaError(f"a block cannot be in itself: {chain}")
            path.append(child)
            visit(child)
            path.pop()

    visit(new.name)


def _warn_of_shared(new: Record, blocks: Iterable[Record]) -> None:
    for other in blocks:
        both = [name for name in new.config.children if name in other.config.children]
        if other is not new and both and other.active:
            warn(
                f"{both[0]!r} is in two blocks that act, {other.name!r} and {new.name!r}, so its "
                "change is made twice: disable one of them, or choose by only()",
                SharedDeltaWarning,
            )
