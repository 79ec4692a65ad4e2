"""The dtype of a delta's tensors."""

from __future__ import annotations

import torch

from .._modules.tensors import HALVES

BACKBONE = "backbone"  # the value of the option `dtype` that follows the backbone


def dtype_for(
    asked: str | None, computes: torch.dtype, held: torch.dtype = torch.float32
) -> torch.dtype:
    """Return the dtype for a tensor of a delta.

    By default it is float32 on a 16-bit module: a 16-bit parameter loses steps that are smaller
    than its spacing. A 16-bit tensor, such as a file's, stays as it is: no value is lost or won.

    Args:
        asked: the delta's option `dtype`.
        computes: the dtype in which the module computes.
        held: the dtype that the tensor has now.
    """
    if asked == BACKBONE:
        return computes
    if asked is not None:
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    return torch.promote_types(held if held in HALVES else torch.float32, computes)
