"""What delta layers cost: bytes for training, and FLOPs, counted on the meta device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from .._layers.base import DeltaLayer


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs for deltas, without activations.

    Attributes:
        parameters: the values, those that do not train and buffers among them.
        gradients: of what trains.
        optimizer: its states of what trains, in the dtype of the parameter.
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of them together."""
        return self.parameters + self.gradients + self.optimizer


def memory_of(layers: Iterable[DeltaLayer], optimizer_states: int) -> Memory:
    """What `layers` need, for an optimizer with so many states a parameter."""
    values: dict[int, Tensor] = {}
    for layer in layers:
        values |= {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    trained = sum(t.nbytes for t in values.values() if t.requires_grad)
    return Memory(sum(t.nbytes for t in values.values()), trained, optimizer_states * trained)
