"""`opendelta.utils.cuda` of OpenDelta 0.3."""

from typing import Any

import torch
from torch import nn

from opendelta.errors import OptionError

__all__ = ["get_device", "get_dtype", "move_dict_to_cuda"]


def get_device(module: nn.Module | nn.Parameter) -> torch.device | None:
    """Return the device of a parameter, or of all parameters of a module; None if it has none.

    Raises:
        OptionError: `module` is something else, or is on several devices.
    """
    return _only(module, "device")


def get_dtype(module: nn.Module | nn.Parameter) -> torch.dtype | None:
    """Return the dtype of a parameter, or of all parameters of a module; None if it has none.

    Raises:
        OptionError: `module` is something else, or has several dtypes.
    """
    return _only(module, "dtype")


def _only(module: nn.Module | nn.Parameter, what: str) -> Any:
    """Return the one device or dtype of a module or parameter."""
    if isinstance(module, torch.Tensor):
        return getattr(module, what)
    if not isinstance(module, nn.Module):
        raise OptionError(
            f"get_{what} takes a module or a parameter, not a {type(module).__name__}"
        )
    found = {getattr(parameter, what) for parameter in module.parameters()}
    if len(found) > 1:
        raise OptionError(
            f"this {type(module).__name__} has several {what}s: "
            f"{', '.join(sorted(map(str, found)))}; ask for the {what} of a module inside it"
        )
    return found.pop() if found else None


def move_dict_to_cuda(dict_of_tensor: dict[str, Any], device: Any) -> dict[str, Any]:
    """Move the tensors in a dict, and in dicts inside it, to a device; return the dict."""
    for key, value in dict_of_tensor.items():
        if isinstance(value, dict):
            move_dict_to_cuda(value, device)
        elif isinstance(value, torch.Tensor):
            dict_of_tensor[key] = value.to(device)
    return dict_of_tensor
