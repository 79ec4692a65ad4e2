"""Run the layers of a module that tensor parallelism splits, or to which it hands DTensors.

The tensors of the layers are plain and whole on each rank, and so are their gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .._layers.base import DeltaLayer, times
from .._layers.runs import is_watched
from .._modules.calls import replace_input
from .._modules.tensors import is_dtensor
from .stack import Stack, now

KEY = ".split"  # no delta has such a name


class Split(NamedTuple):
    """How ranks share one module of a model that they hold in parallel.

    Attributes:
        mesh: the ranks that hold parts of a linear module; None: it is whole, or of another kind.
        axis: 0: each rank has a part of the outputs; 1: of the inputs.
        sizes: the whole number of inputs, and of outputs.
    """

    mesh: Any = None
    axis: int = 0
    sizes: tuple[int, int] = (0, 0)


def divide(stack: Stack, split: Split) -> None:
    """Let the layers of `stack` heed how ranks share their module."""
    stack.__class__ = SplitStack
    stack.__dict__[KEY] = split


def _adds_parts(layer: DeltaLayer) -> bool:
    """True if each rank can add its part of the layer's change to its part of the output."""
    return layer.in_parts and layer.gate is None and not is_watched(layer.__dict__)


class SplitStack(Stack):
    """A stack whose layers act on whole values, or on the parts of a weight that this rank has.

    Where all layers add to a weight, each rank adds its part, and only gradients of the layers'
    tensors travel. For other layers the ranks gather the input and the output of the module.
    """

    def around(
        self, call: Callable[..., Any], module: nn.Module, raw: bool = False
    ) -> Callable[..., Any]:
        (acting, router), split = now(self), self.__dict__[KEY]
        if not acting:
            return call
        if split.mesh is not None and router is None and all(map(_adds_parts, acting)):
            return functools.partial(_in_parts, call, acting, split)
        return functools.partial(_on_wholes, super().around, call, module, split)


def _in_parts(
    call: Callable[..., Tensor], acting: Sequence[Any], split: Split, /, *args: Any, **kwargs: Any
) -> Tensor:
    """Return the rank's part of the output, with the rank's parts of the changes."""
    from torch.distributed.tensor import DTensor, Partial

    out, x = call(*args, **kwargs), _first(args, kwargs)
    taken, given = _layouts(split, x.ndim - 1)
    if is_dtensor(x):
        seen = [Partial()] if taken.is_replicate() else None
        x = _laid(x, (taken,)).to_local(grad_placements=seen)
    parts = [times(layer.strength(), _part_of(layer, x, split)) for layer in acting]
    change = functools.reduce(torch.add, parts).to(out.dtype)
    if is_dtensor(out):
        change = DTensor.from_local(
            change, split.mesh, [given], run_check=False, shape=out.shape, stride=out.stride()
        )
    return out + change


def _part_of(layer: Any, x: Tensor, split: Split) -> Tensor:
    """Return the rank's part of a change, without the factor `delta.scale`; `x` is its input."""
    x = F.dropout(x, layer.dropout, layer.training) if layer.dropout else x
    factors = layer.factors()
    if factors is None:
        return layer.kind.product(x, _part(layer.delta_weight(), split.mesh, split.axis))
    A, B, scale = factors
    of_A, of_B = (None, 0) if split.axis == 0 else (1, None)
    A, B = _part(A, split.mesh, of_A), _part(B, split.mesh, of_B)
    return scale * layer.kind.low_rank(x, A, B)


def _part(tensor: Tensor, mesh: Any, axis: int | None) -> Tensor:
    """Return the rank's part of a tensor that each rank has whole; its gradient will be whole.

    Args:
        axis: the axis that is split; None: the part is all of it, of which each rank sees a part of
            the gradient.
    """
    from torch.distributed.tensor import Partial, Shard

    whole = _spread(tensor, mesh)
    if axis is None:
        return whole.to_local(grad_placements=[Partial()])
    return whole.redistribute(placements=[Shard(axis)]).to_local()


def _on_wholes(
    around: Callable[..., Any],
    call: Callable[..., Any],
    module: nn.Module,
    split: Split,
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run layers on whole tensors around a module that takes and returns parts of them."""
    x = _first(args, kwargs)
    parts = split.mesh is not None and not is_dtensor(x)  # the module itself sees plain parts
    taken, given = _layouts(split, x.ndim - 1) if parts else (None, None)
    if parts:
        x = _joined(x, split.mesh, taken, split.sizes[0])
    meshes: list[Any] = []

    def inner(*args: Any, **kwargs: Any) -> Any:
        if is_dtensor(x):
            new = _laid(_spread(_first(args, kwargs), x.device_mesh), x.placements)
            args, kwargs = replace_input(args, kwargs, new.to_local() if parts else new)
        out = call(*args, **kwargs)
        if parts:
            out = _joined(out, split.mesh, given, split.sizes[1])
        leaves, form = tree_flatten(out)
        meshes[:] = [leaf.device_mesh if is_dtensor(leaf) else None for leaf in leaves]
        return tree_unflatten([_whole(t) if is_dtensor(t) else t for t in leaves], form)

    if is_dtensor(x):
        args, kwargs = replace_input(args, kwargs, _whole(x))
    out = around(inner, module)(*args, **kwargs)
    if not any(meshes):
        return out
    leaves, form = tree_flatten(out)
    pairs = zip(leaves, meshes, strict=True)
    leaves = [leaf if mesh is None else _spread(leaf, mesh) for leaf, mesh in pairs]
    if parts:
        leaves = [_own_part(leaf, given) for leaf in leaves]
    return tree_unflatten(leaves, form)


def _first(args: tuple, kwargs: dict[str, Any]) -> Any:
    return next(iter((*args, *kwargs.values())), None)


def _layouts(split: Split, last: int) -> tuple[Any, Any]:
    """Return the layouts of the input that a split linear module takes, and of its output.

    Args:
        last: the number of the last axis.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    return (Replicate(), Shard(last)) if split.axis == 0 else (Shard(last), Partial())


def _laid(tensor: Any, placements: tuple) -> Any:
    return tensor if tensor.placements == placements else tensor.redistribute(placements=placements)


def _own_part(tensor: Any, layout: Any) -> Tensor:
    """Return the rank's part of a tensor that each rank has whole, without gradients."""
    if not layout.is_partial():
        return tensor.redistribute(placements=[layout]).to_local()
    whole = tensor.to_local()
    return whole if tensor.device_mesh.get_local_rank() == 0 else torch.zeros_like(whole)


def _spread(tensor: Tensor, mesh: Any) -> Any:
    """Return a tensor that each rank has whole as a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def _joined(part: Tensor, mesh: Any, layout: Any, width: int) -> Any:
    """Return the ranks' parts of a tensor [..., width] as one DTensor."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size([*part.shape[:-1], width])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [layout], run_check=False, shape=shape, stride=stride)


def _whole(tensor: Any) -> Tensor:
    everywhere = all(layout.is_replicate() for layout in tensor.placements)
    return tensor.to_local() if everywhere else tensor.full_tensor()
