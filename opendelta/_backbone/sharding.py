"""Fit deltas to models that several ranks share: the same start values, shards like the site's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._layers.base import Acts, DeltaLayer
from .._modules.calls import map_tensors
from .._modules.kinds import Kind, kind_of
from .._modules.tensors import is_dtensor, is_sharded, shape, stored
from .._sites.split import Split
from ..errors import SiteError
from .backbone import Backbone


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The ranks that share a model, for a delta layer in it.

    Attributes:
        meshes: the device meshes over which parameters of the model are spread.
        group: the FSDP2 parameter group by which a layer is sharded, or None.
        split: how they share the module in tensor parallelism; None: the model is not so split.
    """

    meshes: list[Any]
    group: Any
    split: Split | None


def settle(backbone: Backbone) -> None:
    """Put the shards of an FSDP2 model in place.

    After a forward some of its tensors are still gathered. They are in the dtype in which the model
    computes, which may differ from the dtype of its parameters.
    """
    for unit in _units(backbone.modules.values()):
        unit.reshard()


def group_of(backbone: Backbone, where: str, reads: bool, layer: DeltaLayer) -> Ranks | None:
    """Return the ranks that share the module `where`; None if this process has it alone.

    Args:
        reads: the parent reads the module's weight instead of calling the module.
        layer: the layer that will go there.

    Raises:
        SiteError: the layer would diverge between ranks, or cannot act on a split module.
    """
    if not is_distributed():
        return None
    settle(backbone)
    _check_wrappers(backbone, where)
    group = _group_around(backbone, where)
    split = _split(backbone, where, group, reads, layer)
    if reads and group is not None and (layer is None or not _has_shards(layer)):
        raise SiteError(
            f"{where!r}: its parent reads .weight, which is sharded; attach before fully_shard, so "
            "that the delta is gathered together with the weight",
            where=where,
        )
    meshes = _meshes(backbone, group)
    if group is None and meshes and split is None:
        split = Split()
    return Ranks(meshes, group, split) if meshes else None


def shard(layer: nn.Module, ranks: Ranks) -> None:
    """Give each rank the first rank's values, then shard `layer` like the site around it.

    A layer that has shards already, from an earlier time on the model, keeps them.
    """
    if _has_shards(layer):
        return
    group = ranks.group
    if group is not None:
        layer.to(group.device)
    _start_alike(layer, ranks.meshes)
    if group is None:
        return
    mesh, offload = group.mesh_info.mesh, group.offload_policy
    apart(layer, mesh=mesh, mp_policy=group.mp_policy, offload_policy=offload)


def apart(layer: nn.Module, mp_policy: Any = None, **options: Any) -> None:
    """Shard `layer` in an FSDP2 group of its own, or in one for each dtype of its parameters.

    FSDP2 refuses a group that trains parameters of two dtypes.

    Args:
        mp_policy: a policy, as `fully_shard` takes it; None: the default one.
        options: further options of `fully_shard`.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    first = next(layer.parameters(), None)
    if first is None or _has_shards(layer):
        return
    layer.register_forward_hook(_return_no_view)
    # Casts: the site casts its inputs and outputs. If the layer cast them too, it would cast the
    # input that it passes on to the module.
    policy = dataclasses.replace(
        mp_policy or MixedPrecisionPolicy(), cast_forward_inputs=False, output_dtype=None
    )
    # Resharding: a unit that is added after the first forward is a root of its own, and roots stay
    # gathered. An optimizer made then would hold tensors that never get a gradient.
    options |= {"mp_policy": policy, "reshard_after_forward": True}
    for part in layer.modules():
        own = {parameter.dtype for parameter in part._parameters.values() if parameter is not None}
        if own and own != {first.dtype}:
            fully_shard(part, **options)
    fully_shard(layer, **options)


def check_uniform(backbone: Backbone) -> None:
    """Raise if FSDP2 will refuse the model, because a group trains parameters of two dtypes.

    Raises:
        SiteError: a group does.
    """
    names = {id(parameter): name for name, parameter in backbone.model.named_parameters()}
    for unit in _units(backbone.modules.values()):
        for group in unit._get_fsdp_state()._fsdp_param_groups:
            own = [each.sharded_param for each in group.fsdp_params]
            first = {p.dtype: names.get(id(p), "a parameter") for p in own if p.requires_grad}
            if len(first) > 1:
                found = ", ".join(f"{name!r} ({dtype})" for dtype, name in first.items())
                raise SiteError(
                    f"{found} train in one FSDP2 group, which takes one dtype only; call "
                    "delta.shard() before fully_shard, or make the delta with dtype='backbone'"
                )


def check_copy(backbone: Backbone, name: str) -> None:
    """Raise if the module `name` is sharded: a copy of its shards would not run.

    Raises:
        SiteError: the module is sharded.
    """
    if not is_distributed():
        return
    sharded = any(map(is_sharded, backbone.modules[name].parameters()))
    if sharded or _group_around(backbone, name) is not None:
        raise SiteError(
            f"modules_to_save={name!r}: the module is sharded, and a copy of its shards would not "
            "run; make the delta before the model is sharded",
            where=name,
        )


def is_distributed() -> bool:
    """True if this process is one of several."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _check_wrappers(backbone: Backbone, where: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    for module in backbone.chain(where):
        if isinstance(module, DistributedDataParallel | FullyShardedDataParallel):
            raise SiteError(
                f"{where!r} is inside {type(module).__name__}, which would not synchronise the "
                "delta's gradients; attach to the module first, wrap it then",
                where=where,
            )


def _split(
    backbone: Backbone, where: str, group: Any, reads: bool, layer: DeltaLayer
) -> Split | None:
    """Return how tensor parallelism splits the module `where`; None: it does not.

    Raises:
        SiteError: the layer cannot act there.
    """
    module, mesh = backbone.modules[where], None if group is None else group.mesh_info.mesh

    def parts(part: nn.Module) -> list[Any]:
        return [p for p in part._parameters.values() if is_dtensor(p) and p.device_mesh != mesh]

    split, why = None, None
    if layer.acts is Acts.WITHIN and any(map(parts, module.modules())):
        why = f"{type(layer).__name__} acts among its parts, of which a rank has some"
    elif (own := parts(module)) or _is_parallel(module):
        split = _understood(module, own)
        why = _misfit(module, split, reads, layer)
        why = why if group is None else "FSDP2 shards it too, so attach before fully_shard"
    if why is not None:
        raise SiteError(
            f"{where!r} ({type(module).__name__}) is split by tensor parallelism: {why}. Choose a "
            "module that is not split, such as the block around it, or another method",
            where=where,
        )
    return split


def _understood(module: nn.Module, own: list[Any]) -> Split | None:
    """Return how the parameters `own` of `module` are split; None: in no way that is known."""
    from torch.distributed.tensor import Replicate, Shard

    if any(p.device_mesh.ndim > 1 or type(p.placements[0]) not in (Shard, Replicate) for p in own):
        return None
    kind, weight = kind_of(module), module._parameters.get("weight")
    if kind is None or not is_dtensor(weight):
        return None
    layout: Any = weight.placements[0]
    if type(kind) is Kind and layout.is_shard():
        axis = layout.dim % weight.ndim
        return Split(weight.device_mesh, axis, (kind.in_features, kind.out_features))
    return None if _is_parallel(module) and not kind.takes_ids else Split()


def _misfit(module: nn.Module, split: Split | None, reads: bool, layer: DeltaLayer) -> str | None:
    """Return why a layer cannot act on a split module; None: it can."""
    kind = type(layer).__name__
    if split is None:
        return f"{kind} would see a slice or a partial sum"
    if reads:
        return "its parent reads .weight, which would show no change"
    if layer.sees_module:
        return f"{kind} needs the whole weight"
    adds = layer.acts in (Acts.BEFORE, Acts.BESIDE) and layer.gate is None
    if _is_parallel(module) and split.axis == 1 and not adds and stored(module, "bias") is not None:
        return f"its bias is added after {kind} has seen the output"
    return None


def _is_parallel(module: nn.Module) -> bool:
    """True if transformers has put a parallel forward on `module`; its weights may be whole."""
    return "forward" in module.__dict__ and getattr(module, "_is_hooked", False)


def _units(modules: Iterable[nn.Module]) -> list[Any]:
    """Return the units of FSDP2 among `modules`."""
    if not is_distributed():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in modules if isinstance(module, FSDPModule)]


def own_class(model: nn.Module) -> type:
    """Return the class of a model; the one that its author wrote, if FSDP2 put another before."""
    classes = type(model).__mro__
    if _units([model]):
        from torch.distributed.fsdp import FSDPModule

        return classes[classes.index(FSDPModule) + 1]
    return classes[0]


def has_units(backbone: Backbone) -> bool:
    """True if FSDP2 shards the model, or a part of it."""
    return bool(_units(backbone.modules.values()))


def _group_around(backbone: Backbone, where: str) -> Any:
    """Return the FSDP2 parameter group nearest to the module `where`; None outside of FSDP2."""
    units = _units(backbone.chain(where))
    if units:  # a unit has no group if its children hold all parameters: then use a child's group
        units += _units(backbone.modules.values())
    groups = (group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups)
    return next(groups, None)


def _has_shards(layer: nn.Module) -> bool:
    return any(map(is_dtensor, layer.parameters()))


def _meshes(backbone: Backbone, group: Any) -> list[Any]:
    """Return the meshes of all ranks that share the model, in the same order on each rank."""
    meshes = [] if group is None else [group.mesh_info.mesh]
    for module in backbone.modules.values():
        sharded = filter(is_dtensor, module._parameters.values())
        meshes += [parameter.device_mesh for parameter in sharded]
    return list(dict.fromkeys(meshes))


def _start_alike(layer: nn.Module, meshes: list[Any]) -> None:
    for tensor in (*layer.parameters(), *layer.buffers()):
        for mesh in meshes:
            for axis in range(mesh.ndim):
                group = mesh.get_group(axis)
                torch.distributed.broadcast(tensor.detach(), group=group, group_src=0)


def _return_no_view(_layer: nn.Module, _args: Any, output: Any) -> Any:
    """Copy a view in the layer's output, such as the output of F.linear.

    FSDP2 attaches a hook to the output, which gathers parameters in the backward. The hook is lost
    when the model writes into a view in place.
    """

    def own(tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.requires_grad and tensor._is_view() else tensor

    return map_tensors(own, output)


@contextlib.contextmanager
def whole(root: nn.Module) -> Iterator[None]:
    """Let `root` run inside the block as if it were not sharded, on parameters without values.

    It is for runs on shapes: they must not communicate, and FSDP2 would keep gathered tensors.
    """
    if not is_distributed():
        yield
        return
    kept: list[tuple[dict, dict]] = []
    try:
        for module in root.modules():
            if isinstance(module, torch.jit.ScriptModule):  # its tables are views
                continue
            hooks = (module._forward_pre_hooks, module._forward_hooks)
            kept += [(table, dict(table)) for table in (module._parameters, *hooks)]
            for name, parameter in module._parameters.items():
                if parameter is not None and is_sharded(parameter):
                    module._parameters[name] = _stand_in(parameter)
            for table in hooks:
                for key in [key for key, hook in table.items() if _gathers(hook)]:
                    del table[key]
            if _is_parallel(module):
                kept.append((module.__dict__, dict(module.__dict__)))
                del module.__dict__["forward"]
        yield
    finally:
        for table, before in kept:
            table.clear()
            table.update(before)


def _stand_in(parameter: Tensor) -> nn.Parameter:
    """Return a parameter like `parameter`, of full shape, with one element of memory."""
    one = torch.empty((), dtype=parameter.dtype, device=parameter.device)
    return nn.Parameter(one.expand(shape(parameter)), requires_grad=False)


def _gathers(hook: Callable[..., Any]) -> bool:
    theirs = ("torch.distributed.fsdp", "torch.distributed.tensor", "deepspeed")
    return (getattr(hook, "__module__", None) or "").startswith(theirs)
