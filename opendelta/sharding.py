"""Deltas on sharded modules: the same start on every rank, then shards like those of the site."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .addressing import Survey
from .errors import SiteError
from .layers import is_sharded


def group_of(found: Survey, where: str, reads: bool) -> Any:
    """FSDP2's parameter group around the module called `where`, or None if it is not sharded.

    Raises:
        SiteError: a delta there would diverge between ranks, or see a slice only.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from torch.distributed.fsdp import FSDPModule

    group = None
    for module in found.chain(where):
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise SiteError(
                f"{where!r} is inside DistributedDataParallel, which would not synchronise the "
                "delta's gradients; attach to the module first, wrap it then"
            )
        if group is None and isinstance(module, FSDPModule):
            groups = module._get_fsdp_state()._fsdp_param_groups
            group = groups[0] if groups else None
    for name, parameter in found.modules[where]._parameters.items():
        if not is_sharded(parameter):
            continue
        if group is None or parameter.device_mesh != group.mesh_info.mesh:  # type: ignore
            raise SiteError(
                f"{where}.{name} is split by tensor parallelism ({parameter.placements}): a delta "  # type: ignore
                "there would see a slice. Choose a module that is not split, such as the block or "
                "its norm"
            )
    if group is not None and reads:
        raise SiteError(
            f"{where!r}: its parent reads .weight, which is sharded; attach before fully_shard, so "
            "that the delta is gathered together with the weight"
        )
    return group


def shard(layer: nn.Module, group: Any) -> None:
    """Give every rank rank 0's values, then shard `layer` like the site around it.

    A layer that comes back with its shards keeps them. Resharding after forward is asked for
    explicitly: a unit added after the first forward is a root of its own, roots stay gathered, and
    an optimizer made then would hold tensors that never get a gradient.
    """
    from torch.distributed.fsdp import fully_shard

    mesh, own = group.mesh_info.mesh, list(layer.parameters())
    if not own or all(is_sharded(parameter) for parameter in own):
        return
    for parameter in own:
        for axis in range(mesh.ndim):
            torch.distributed.broadcast(parameter.data, group=mesh.get_group(axis), group_src=0)
    fully_shard(
        layer,
        mesh=mesh,
        mp_policy=group.mp_policy,
        offload_policy=group.offload_policy,
        reshard_after_forward=True,
    )
