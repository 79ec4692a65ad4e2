"""Measure how large the change is that each delta layer makes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._backbone.backbone import Backbone
from .._layers.base import DeltaLayer
from .._layers.low_rank import LowRank
from .._modules.tensors import full, in_full
from .._sites.merged import change_of, original
from ..errors import SiteError, quoted
from ..names import SLOT, parent


@dataclass(frozen=True)
class Norm:
    """The size of one layer of a delta.

    Attributes:
        delta: the name of the delta.
        module: full name of the module that the layer is on.
        of: "weight": of the change dW that the layer makes to the weight W; "parameters": of all
            parameters of the layer.
        norm: the root of the sum of all squared entries.
        relative: |dW| / |W|; None: not known.
    """

    delta: str
    module: str
    of: str
    norm: float
    relative: float | None = None


@torch.no_grad()
def norms(backbone: Backbone, not_measured: list[str]) -> list[Norm]:
    """Return the norm of each delta layer of a model that has parameters or changes a weight.

    Args:
        not_measured: gets the changes of weights that cannot be read, each with the reason.
    """
    found, sizes = [], {}
    for where, name, layer in backbone.delta_layers():
        if layer.watches or not layer.computes:
            continue
        change = None
        try:
            change = _of_change(backbone, where, layer)
        except SiteError as error:
            not_measured.append(f"the weight change of {name} on {quoted(where)}: {error}")
        if change is not None:
            if where not in sizes:
                sizes[where] = _of_weight(where, backbone.modules[where])
            whole = sizes[where]
            found.append(Norm(name, where, "weight", change, change / whole if whole else None))
        elif own := list(layer.parameters()):
            found.append(Norm(name, where, "parameters", _together(own)))
    return found


def _of_change(backbone: Backbone, where: str, layer: DeltaLayer) -> float | None:
    """Return |dW| of what a layer makes of the weight alone; None: it makes something else.

    Raises:
        SiteError: it cannot be read.
    """
    if layer.is_block or not layer.folds:
        return None
    pair = layer.folds_as()
    if pair is not None:
        return _of_product(pair)
    if backbone.stacks[where].steps:
        raise SiteError("deltas are merged into the weight; unmerge() makes it readable")
    change, biased = change_of(where, backbone.modules[where], layer)
    norm = _norm(change)
    return None if biased and norm == 0 else norm


def _of_product(pair: LowRank) -> float:
    """Return |s B A|: by the Gram matrices of the factors, as the product may be large."""
    A, B = (full(t.detach()).double() for t in (pair.A, pair.B))
    square = ((B.T @ B) * (A @ A.T)).sum().clamp_min(0)
    return abs(float(pair.scale)) * float(square.sqrt())


def _of_weight(where: str, module: nn.Module) -> float | None:
    """Return |W| of a module without its deltas; None: its weight cannot be read."""
    weight = original(where, module, "weight")
    if weight is None and isinstance(module._parameters.get("weight"), Tensor):
        weight = in_full(module, "weight")
    return None if weight is None or weight.is_meta else _norm(weight)


def of_tensors(values: Mapping[str, Tensor]) -> list[Norm]:
    """Return the norm of each delta layer's parameters, by the tensors in a folder.

    The delta of other tensors is "": those of the model, and those that another library wrote.
    """
    layers: dict[tuple[str, str], list[Tensor]] = {}
    for key, tensor in values.items():
        before, slot, after = f".{key}".rpartition(f".{SLOT}.")
        name = after.partition(".")[0] if slot else ""
        layers.setdefault((name, before[1:] if slot else parent(key)), []).append(tensor)
    found = [Norm(*at, "parameters", _together(own)) for at, own in layers.items()]
    return sorted(found, key=lambda norm: _counted(norm.module))


def _counted(name: str) -> list[tuple[int, str]]:
    """Return a key to sort full names by, in which numbers count as numbers."""
    return [(len(step), step) if step.isdecimal() else (-1, step) for step in name.split(".")]


def _together(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(_norm(full(t.detach())) for t in tensors))


def _norm(tensor: Any) -> float:
    """Return the norm of a tensor, computed in at least float32."""
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    return float(torch.linalg.vector_norm(wide))
