"""`opendelta.utils.cuda` of OpenDelta 0.3."""

from typing import Any

import torch
from torch import nn

from opendelta.errors import OptionError

__all__ = ["get_device", "move_dict_to_cuda"]


def get_device(module: nn.Module | nn.Parameter) -> torch.device | None:
    """Return the device of a parameter, or of all parameters of a module; None if it has none.

    Raises:
        OptionError: `module` is something else, or is on several devices.
    """
    if isinstance(module, torch.Tensor):
        return module.device
    if not isinstance(module, nn.Module):
        raise OptionError(
            f"get_device takes a module or a parameter, not a {type(module).__name__}"
        )
    devices = {parameter.device for parameter in module.parameters()}
    if len(devices) > 1:
        where = ", ".join(sorted(map(str, devices)))
        raise OptionError(
            f"this {type(module).__name__} is on several devices: {where}; ask for the device of a "
            "module inside it"
        )
    return devices.pop() if devices else None


def move_dict_to_cuda(dict_of_tensor: dict[str, Any], device: Any) -> dict[str, Any]:
    """Move the tensors in a dict, and in dicts inside it, to a device; return the dict."""
    for key, value in dict_of_tensor.items():
        if isinstance(value, dict):
            move_dict_to_cuda(value, device)
        elif isinstance(value, torch.Tensor):
            dict_of_tensor[key] = value.to(device)
    return dict_of_tensor
