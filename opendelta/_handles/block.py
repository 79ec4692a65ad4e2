"""`Block`, the user's handle of a block: a delta that holds others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

from .._backbone.backbone import Backbone
from .._deltas.blocks import BlockConfig, inside
from .._deltas.order import handles_of, known_records
from .._layers.block import BlockLayer
from .._layers.record import Record
from .._layers.selection import OpenBlock
from ..errors import OptionError
from .delta import Delta
from .with_block import with_block


class Block(Delta, abstract=True):
    """The base class of all blocks: `AverageModel(model, deltas=["a", "b"])` combines two deltas.

    A block is a delta. While it acts, the deltas that it names act inside of it; without it they
    act by themselves, at their own places.
    """

    config_class: ClassVar[type[BlockConfig]]
    layer_class: ClassVar[type[BlockLayer]]
    default_modified_modules = ()

    def __init_subclass__(cls, **options: Any) -> None:
        for own, base in ((cls.config_class, BlockConfig), (cls.layer_class, BlockLayer)):
            if isinstance(own, type) and not issubclass(own, base):
                raise OptionError(
                    f"{cls.__name__} is a Block, so its {own.__name__} must be a {base.__name__}"
                )
        super().__init_subclass__(**options)

    def _inside(self) -> list[Record]:
        return inside(self.record, known_records(Backbone.of(self.backbone_model)))

    def _to_save(self) -> list[Delta]:
        backbone = Backbone.of(self.backbone_model)
        wanted = {self.record, *self._inside()}
        records = [record for record in backbone.records() if record in wanted]
        return cast(list[Delta], handles_of(backbone, records))

    def _switch(self, active: bool) -> None:
        records = [self.record, *self._inside()]
        for record in records:
            if record.merged and active != record.active:
                record.require_apart("cannot switch")
        for record in records:
            record.switch(active)

    def enable(self) -> None:
        """Let the block act, and all deltas in it."""
        self._switch(True)

    def disable(self) -> None:
        """Switch off the block and all deltas in it."""
        self._switch(False)

    @with_block
    def disabled(self) -> Iterator[None]:
        """Switch off the block and all deltas in it inside a `with` block; see `Delta.disabled`."""
        records = [self.record, *self._inside()]
        for record in records:
            if record.active:
                record.require_apart("cannot switch")
        with OpenBlock(dict.fromkeys(records, False)):
            yield
