"""Options of a delta that the readers of several libraries find in the same way."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._backbone.backbone import Backbone
from .._modules.devices import device_and_dtype


def dtype_option(backbone: Backbone, sites: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """Return the option `dtype` for saved tensors: "float32" or None.

    "float32" keeps float32 tensors in float32 on a backbone that computes in 16 bits.

    Args:
        sites: {full name of a module: {name of a tensor: values}}.
    """
    computes = {device_and_dtype(backbone.chain(where))[1] for where in sites}
    kinds = {tensor.dtype for own in sites.values() for tensor in own.values()}
    full = kinds == {torch.float32} and computes & {torch.float16, torch.bfloat16}
    return "float32" if full else None
