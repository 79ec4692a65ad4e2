"""Count the bytes that training needs for delta layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from .._layers.base import DeltaLayer


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs for deltas, without activations.

    Attributes:
        parameters: all values, with buffers and parameters that do not train.
        gradients: the gradients of the parameters that train.
        optimizer: the optimizer's states of these parameters, in the dtype of the parameter.
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Return the sum of the three."""
        return self.parameters + self.gradients + self.optimizer


def memory_of(layers: Iterable[DeltaLayer], optimizer_states: int) -> Memory:
    """Return the memory of `layers`, for an optimizer with so many states per parameter."""
    values: dict[int, Tensor] = {}
    for layer in layers:
        values |= {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    trained = sum(t.nbytes for t in values.values() if t.requires_grad)
    return Memory(sum(t.nbytes for t in values.values()), trained, optimizer_states * trained)
