"""`opendelta.utils.inspect` of OpenDelta 0.3: counts of parameters."""

from typing import Any

import torch
from torch import nn

from opendelta._deltas.base import BaseDelta
from opendelta._handles.as_module import module_statistics

__all__ = [
    "inspect_module_statistics", "inspect_optimizer_statistics", "num_delta_parameters",
    "num_total_parameters", "num_trainable_parameters",
]  # fmt: skip


def num_total_parameters(module: nn.Module | BaseDelta) -> int:
    """Count the parameters of a module, or of a delta."""
    return int(module_statistics(module)["total_parameters"])


def num_trainable_parameters(module: nn.Module | BaseDelta) -> int:
    """Count the parameters that train of a module, or of a delta."""
    return int(module_statistics(module)["trainable_parameters"])


def num_delta_parameters(module: nn.Module | BaseDelta) -> int:
    """Count the parameters of the deltas on a module, or of a delta."""
    return int(module_statistics(module)["delta_parameters"])


def inspect_module_statistics(
    module: nn.Module | BaseDelta, verbose: bool = True
) -> dict[str, float]:
    """Return the counts and shares of the parameters of a module or a delta, and CUDA memory.

    Args:
        verbose: print them too.
    """
    counts = module_statistics(module)
    if verbose:
        print(counts)
    return counts


def inspect_optimizer_statistics(
    optimizer: torch.optim.Optimizer, verbose: bool = True
) -> dict[str, dict[str, Any]]:
    """Return {"group_0": its number of parameters and its settings} of an optimizer.

    Args:
        verbose: print them too.
    """
    groups = {
        f"group_{number}": {
            "total_parameters": sum(parameter.numel() for parameter in group["params"]),
            "trainable_parameters": sum(p.numel() for p in group["params"] if p.requires_grad),
            **{key: value for key, value in group.items() if key != "params"},
        }
        for number, group in enumerate(optimizer.param_groups)
    }
    if verbose:
        print(groups)
    return groups
