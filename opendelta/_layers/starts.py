"""Start values of a low-rank change: random, or from the weight that it changes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._modules.tensors import is_dtensor, is_plain
from ..errors import SiteError
from .site import Site

START = ("kaiming", "gaussian", "pissa", "olora")


def plain_weight(site: Site, reason: str) -> Tensor:
    """Return the stored weight of the site's module in at least float32.

    Args:
        reason: the option that needs it, for the message.

    Raises:
        SiteError: the weight is quantised, sharded or offloaded.
    """
    weight = site.module._parameters.get("weight")
    offloaded = weight is not None and weight.is_meta and site.device.type != "meta"
    here = f"{site.name!r} ({type(site.module).__name__}): {reason} needs the module's weight"
    if is_dtensor(weight):
        raise SiteError(
            f"{here} whole, and it is sharded: attach before fully_shard; in tensor parallelism, "
            "choose LoRA without it",
            where=site.name,
        )
    if weight is None or not is_plain(weight) or offloaded:
        raise SiteError(
            f"{here} as a plain floating tensor, not quantised, sparse, sharded or offloaded",
            where=site.name,
        )
    values = weight.detach().to("meta") if site.device.type == "meta" else weight.detach()
    return values.to(torch.promote_types(weight.dtype, torch.float32))


def start(layer: Any, site: Site, init: str) -> None:
    """Set the start values of `layer.lora_A` [rank, in] and `layer.lora_B` [out, rank].

    "pissa" and "olora" start with a part of the weight itself. The buffers `start_A` and `start_B`
    keep this part, and the layer subtracts their product. (PEFT subtracts it from the weight.)
    """
    A, B = layer.lora_A, layer.lora_B
    if init in ("pissa", "olora"):
        _start_from_weight(layer, site, init)
    elif A.is_meta:
        return  # the values come later, or never
    elif site.kind.takes_ids:
        nn.init.zeros_(A)  # as in loralib; Kaiming's bound for A would be 1 / sqrt(vocabulary)
        nn.init.normal_(B)
    else:
        nn.init.zeros_(B)
        if init == "gaussian":
            nn.init.normal_(A, std=1 / A.size(0))
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))


@torch.no_grad()
def _start_from_weight(layer: Any, site: Site, init: str) -> None:
    if not site.kind.is_product:
        what = f"{site.name!r} ({type(site.module).__name__})"
        raise SiteError(f"{what}: init={init!r} is for linear modules", where=site.name)
    rank, most = layer.lora_A.size(0), min(site.in_features, site.out_features)
    weight = plain_weight(site, f"init={init!r}") if site.new else None
    if rank > most:
        raise SiteError(
            f"{site.name!r}: init={init!r} needs a rank of at most {most}, not {rank}",
            where=site.name,
        )
    if weight is None or layer.lora_A.is_meta:
        layer.register_buffer("start_A", torch.empty_like(layer.lora_A, requires_grad=False))
        layer.register_buffer("start_B", torch.empty_like(layer.lora_B, requires_grad=False))
        return
    matrix = site.kind.matrix(weight)
    if init == "pissa":
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        root = (S[:rank] / layer.scaling).sqrt()
        A, B = root[:, None] * V[:rank], U[:, :rank] * root
    else:
        Q, R = torch.linalg.qr(matrix)
        A, B = R[:rank], Q[:, :rank]
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)
    layer.register_buffer("start_A", layer.lora_A.detach().clone())
    layer.register_buffer("start_B", layer.lora_B.detach().clone())
