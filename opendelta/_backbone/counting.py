"""Count the parameters of a backbone with its deltas."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .._modules.tensors import size
from .backbone import Backbone


@dataclass(frozen=True)
class Statistics:
    """Parameter counts of a backbone with its deltas; a tied weight counts once."""

    total_parameters: int
    trainable_parameters: int
    delta_parameters: int

    @property
    def trainable_ratio(self) -> float:
        """Return the share of all parameters that train."""
        return self.trainable_parameters / max(1, self.total_parameters)

    @property
    def delta_ratio(self) -> float:
        """Return the share of all parameters that belong to deltas."""
        return self.delta_parameters / max(1, self.total_parameters)


def statistics(model: nn.Module) -> Statistics:
    """Count the parameters of `model` with its deltas."""
    parameters = list(model.parameters())
    deltas = Backbone.of(model).delta_parameters()
    return Statistics(
        total_parameters=sum(size(p) for p in parameters),
        trainable_parameters=sum(size(p) for p in parameters if p.requires_grad),
        delta_parameters=sum(size(p) for p in {id(p): p for p in deltas.values()}.values()),
    )
