"""The small record behind every delta layer: who it is, where it stands, whether it acts.

A record is reachable from each layer of its delta and from nowhere else on the model, so that a
deepcopy or an unpickled model carries a whole, independent composition.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DeltaError


@dataclass(eq=False)
class Shared:
    """What all deltas of one backbone share.

    Attributes:
        frozen: names of the parameters that `freeze_module` froze.
        excluded: names of those that its `exclude` named, and of the buffers among them, which are
            saved with a delta.
        only_trainable: whether `state_dict()` of the backbone holds only what trains.
        records: the attached deltas, in no order.
    """

    frozen: set[str] = field(default_factory=set)
    excluded: set[str] = field(default_factory=set)
    only_trainable: bool = False
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        BACKBONES.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # of a copy
        self.__dict__.update(state)
        BACKBONES.add(self)


BACKBONES: weakref.WeakSet[Shared] = weakref.WeakSet()  # one for each backbone that has deltas


@dataclass(eq=False)
class Record:
    """One delta, without its tensors.

    Attributes:
        name: unique on the backbone; also the delta's key on every site.
        config: the options of the method.
        rank: position in the one total order of the backbone's deltas; lower acts first.
        sites: the full names of the modules that carry its layers.
        active: whether the layers act. Read on every call, changed in constant time.
        scale: what multiplies the change that they make.
        scale_tensor: the same as a float32 tensor, for compiled code, which is compiled for just
            one value of a number.
        merged: on how many modules they are merged into the weights.
    """

    name: str
    config: Any
    rank: int
    shared: Shared
    sites: tuple[str, ...]
    active: bool = True
    scale: float = 1.0
    scale_tensor: Tensor = field(
        default_factory=lambda: torch.ones((), dtype=torch.float32, device="cpu")
    )
    merged: int = 0

    def set_scale(self, scale: float) -> None:
        """Set the number and the tensor."""
        self.scale = scale
        with torch.inference_mode():  # where the tensor may have been made
            self.scale_tensor.fill_(scale)

    def require_apart(self, verb: str) -> None:
        """Raise if the delta is merged: its layers are in the weights, and do as those do.

        Raises:
            DeltaError: it is.
        """
        if self.merged:
            raise DeltaError(
                f"{verb} {self.name!r}: it is merged into the weights of {self.merged} modules; "
                "call composition(model).unmerge() first"
            )
