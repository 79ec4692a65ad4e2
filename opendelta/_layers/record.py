"""The record of a delta, which all its layers share: its name, options, sites and switches.

On the model only the layers of a delta refer to its record. So a deepcopy or an unpickled model has
a whole, independent composition.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DeltaError
from . import selection

WHOLE, TRAINED, PICKLED = "whole", "trained", "pickled"


@dataclass(eq=False)
class Shared:
    """Facts that all deltas of one backbone share.

    Attributes:
        frozen: names of the backbone's parameters that `freeze_module` froze.
        excluded: names of the parameters and buffers that its `exclude` named; they are saved with
            a delta.
        in_state_dict: what `state_dict()` of the backbone holds: `WHOLE`, all tensors; `TRAINED`,
            those of the deltas and those that train; `PICKLED`, all, and once it is pickled those.
        records: the attached deltas, in no order.
        merged: when deltas were last merged or unmerged; None: never.
    """

    frozen: set[str] = field(default_factory=set)
    excluded: set[str] = field(default_factory=set)
    in_state_dict: str = WHOLE
    records: list[Record] = field(default_factory=list)
    merged: selection.Moment | None = None

    def __post_init__(self) -> None:
        BACKBONES.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "merged": None}

    def __setstate__(self, state: dict[str, Any]) -> None:  # called on a copy
        self.__dict__.update(state)
        BACKBONES.add(self)


BACKBONES: weakref.WeakSet[Shared] = weakref.WeakSet()  # one for each backbone that has deltas


@dataclass(eq=False)
class Record:
    """One delta, without its tensors.

    Attributes:
        name: unique on the backbone; also the delta's key on each site.
        config: the options of the method.
        rank: position in the one total order of the backbone's deltas; a lower rank acts first.
        shared: facts that all deltas of the backbone share.
        sites: the full names of the modules that carry its layers.
        enabled: the layers act where no open block chooses; see `selection`.
        active: the layers act in this thread and task.
        scale: the factor of the change that the layers make.
        scale_tensors: the scale as tensors of float32 and float64, for compiled code. With a
            number, torch would compile the code again for each value.
        merged: the merges that hold its layers, one for each module.
        frozen: full names of the delta's parameters that `freeze_module` froze.
        watched: what notes the weights of a block inside `watching()` of this thread and task, else
            None.
        left: when it was last detached; None: never.
    """

    name: str
    config: Any
    rank: int
    shared: Shared
    sites: tuple[str, ...]
    enabled: bool = True
    scale: float = 1.0
    scale_tensors: tuple[Tensor, Tensor] = field(
        default_factory=lambda: (
            torch.ones((), dtype=torch.float32, device="cpu"),
            torch.ones((), dtype=torch.float64, device="cpu"),
        )
    )
    merged: set[Any] = field(default_factory=set)
    frozen: set[str] = field(default_factory=set)
    left: selection.Moment | None = None
    watched = selection.in_context(lambda _, own: selection.CURRENT.get().watchers.get(own.shared))
    active = selection.in_context(lambda _, own: selection.CURRENT.get().acts(own))

    def __getstate__(self) -> dict[str, Any]:  # a copy acts as here, in all threads
        return {**self.__dict__, "enabled": self.active, "left": None}

    def switch(self, active: bool) -> None:
        """Let the layers act or not: inside the open block that chooses, or else everywhere.

        Raises:
            DeltaError: the delta is merged.
        """
        if self.merged and active != self.active:
            self.require_apart("cannot switch")
        if not selection.switch(self, active):
            self.enabled = active

    def set_scale(self, scale: float) -> None:
        """Set the scale, as a number and as tensors."""
        self.scale = scale
        with torch.inference_mode():  # the tensor may have been made in inference mode
            for tensor in self.scale_tensors:
                tensor.fill_(scale)

    def scale_tensor(self, wide: bool) -> Tensor:
        """Return the scale as a tensor.

        Args:
            wide: of float64.
        """
        return self.scale_tensors[wide]

    def require_apart(self, verb: str) -> None:
        """Raise if the delta is merged: its layers are then part of the weights.

        Args:
            verb: the start of the message, such as "cannot save".

        Raises:
            DeltaError: the delta is merged.
        """
        if self.merged:
            raise DeltaError(
                f"{verb} {self.name!r}: it is merged into the weights of {len(self.merged)} "
                "modules; call composition(model).unmerge() first"
            )


class Weighed:
    """A record as some rows of a batch see it: its scale has a further factor."""

    def __init__(self, record: Record, weight: float) -> None:
        self.record, self.weight = record, weight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.record, name)

    @property
    def scale(self) -> float:
        """Return the factor of the change that the layers make."""
        return self.record.scale * self.weight

    def scale_tensor(self, wide: bool) -> Tensor:
        """Return it as a tensor."""
        return self.record.scale_tensor(wide) * self.weight


def weighed(layer: Any, weight: float) -> Any:
    """Return a layer over the same tensors as `layer` whose change is multiplied by `weight`."""
    twin = object.__new__(type(layer))
    twin.__dict__.update(layer.__dict__, record=Weighed(layer.record, weight))
    return twin


def _state(record: Record, chosen: selection.Selection) -> tuple:
    """Return all that decides what the layers of a delta compute, but their tensors."""
    return chosen.acts(record), record.scale, frozenset(record.merged)


def of_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which a backward runs again, with just the blocks of this moment open.

    Where it meets a delta whose state is not that of this moment, it raises; see `check_same`.
    """
    now = selection.CURRENT.get()
    then = {each: _state(each, now) for shared in list(BACKBONES) for each in shared.records}
    return selection.within(now.blocks, function, then)


def check_same(record: Record, chosen: selection.Selection) -> None:
    """Raise if a delta's state is not that of the first run, while a forward runs again.

    Raises:
        DeltaError: the gradients would not be those of the forward.
    """
    assert chosen.then is not None
    if chosen.then.get(record) != _state(record, chosen):
        raise DeltaError(
            f"{record.name!r} was attached, enabled, disabled, scaled, merged or unmerged between "
            "a forward and its backward, which runs the forward again (activation checkpointing): "
            "its gradients would be others. Call backward() before, or choose deltas in a block of "
            "only() or disabled() around the forward"
        )
