"""Fingerprints of a backbone: a few values of the weights under the deltas.

A fingerprint shows if a delta was trained on this backbone.
"""

from __future__ import annotations

import base64
import functools
import math
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .._backbone.backbone import Backbone
from .._modules import tensors
from .._modules.kinds import is_packed, kind_of
from .._sites import merged
from ..errors import shown
from ..names import ancestors, is_inside, join, unwrapped

SAMPLES = 16  # values of each weight
WEIGHTS = 4  # weights inside a module that has no weight of its own: the first ones
# A cast to bfloat16 and back changes a value by at most 2**-8 of itself, which is 3.9e-3. Training,
# or another model, changes values by 1e-2 and more.
TOLERANCE = 4e-3
NO_SETTING = ("dtype", "problem_type", "transformers_version")  # fields that a delta allows to vary


@dataclass(frozen=True)
class Comparison:
    """The weights of a backbone beside a fingerprint.

    Attributes:
        differing: {weight that differs: how}.
        same: the weights whose values were compared, and are the same.
        unread: the weights whose values were not compared.
    """

    differing: dict[str, str] = field(default_factory=dict)
    same: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.differing) + len(self.same) + len(self.unread)


def take(backbone: Backbone, names: Collection[str], without: Collection[str]) -> dict[str, Any]:
    """Return the fingerprint of a backbone in the form that JSON holds.

    Args:
        names: full names of the modules that deltas are on.
        without: full names of tensors that are saved with the deltas, and of modules around such
            tensors. They have no part in the fingerprint.

    Returns:
        {full name of a weight: {"shape", "values"}}. The values are base64 of little-endian
        float32, or None if the weight cannot be read: sharded, quantised or without memory.
    """
    prints = {}
    for name, tensor in _weights(backbone, names, without):
        values, text = _values(tensor), None
        if values is not None:
            text = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
        prints[name] = {"shape": list(tensors.shape(tensor)), "values": text}
    return prints


def described(model: Any) -> dict[str, Any]:
    """Return the plain settings of a transformers model, without file names; {} for others."""
    to_dict = getattr(model.__dict__.get("config"), "to_dict", None)
    if to_dict is None:
        return {}
    return {
        key: value
        for key, value in to_dict().items()
        if isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value))
        if key not in NO_SETTING and key[0] != "_"
    }


def compare(
    backbone: Backbone, given: dict[str, Any], names: Collection[str], without: Collection[str]
) -> Comparison:
    """Compare the weights of a backbone with a fingerprint.

    Args:
        names, without: as for `take`.
    """
    own = [name for name, _ in _weights(backbone, names, without)]
    found = Comparison(unread=[name for name in own if name not in given])
    for name, facts in given.items():
        if without and {*without} & {*ancestors(name)}:
            continue
        module, _, key = name.rpartition(".")
        tensor = _own(backbone, module, key) if module in backbone.modules else None
        if tensor is None:
            found.differing[name] = "is missing"
            continue
        values, shape, here = _values(tensor), facts["shape"], list(tensors.shape(tensor))
        read = values is not None and facts["values"] is not None
        if here != shape and (read or not _is_packed(tensor, shape)):
            found.differing[name] = f"is {here} instead of {shown(shape)}"
        elif values is None or facts["values"] is None:
            found.unread.append(name)
        elif not (distance := _distance(values, _decoded(facts["values"]))) <= TOLERANCE:
            found.differing[name] = f"differs by {distance:.2g}"
        else:
            found.same.append(name)
    return found


def _is_packed(tensor: Tensor, shape: Sequence[int]) -> bool:
    """True if this weight, or the weight that had this shape, may be quantised into a column."""
    return not tensor.is_floating_point() or shape[1:] == [1]


def is_fingerprint(value: Any) -> bool:
    """True if `value` has the types of a fingerprint that `take` returns."""
    return isinstance(value, dict) and all(
        isinstance(facts, dict)
        and facts.keys() == {"shape", "values"}
        and isinstance(facts["shape"], list)
        and all(type(length) is int and length >= 0 for length in facts["shape"])
        and (facts["values"] is None or _decoded(facts["values"]) is not None)
        for facts in value.values()
    )


def _decoded(text: Any) -> list[float] | None:
    try:
        content = base64.b64decode(text, validate=True)
        return list(struct.unpack(f"<{len(content) // 4}f", content))
    except (ValueError, TypeError, struct.error):
        return None


def _own(backbone: Backbone, name: str, key: str) -> Tensor | None:
    """Return a parameter of the module `name` as it was before deltas were merged into it.

    Of a packed weight it has the shape alone.
    """
    module = backbone.modules[name]
    kept = merged.original(name, module, key)
    own = dict(module._parameters.items()).get(key) if kept is None else kept
    if own is None and key == "weight" and is_packed(module):
        kind: Any = kind_of(module)
        return torch.empty(kind.out_features, kind.in_features, device="meta")
    return own


def _weights(
    backbone: Backbone, names: Collection[str], without: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield (full name, tensor) of the weights under the deltas that are on the modules `names`."""
    seen = set()
    order = list(backbone.modules)  # each module comes right before the modules inside it
    at = {unwrapped(name): index for index, name in enumerate(order)}
    for name in names:
        count, first = 0, at[unwrapped(name)]
        wrapped_since = name not in backbone.modules
        for module in order[first:]:
            if module != order[first] and not is_inside(module, order[first]):
                break
            tensor, full = _own(backbone, module, "weight"), join(module, "weight")
            full = unwrapped(full) if wrapped_since else full
            if tensor is None or tensors.is_lazy(tensor) or tensor.ndim < 1:
                continue
            if without and {*without} & {*ancestors(full)}:
                continue
            count += 1
            if full not in seen:
                seen.add(full)
                yield full, tensor
            if count >= WEIGHTS or (module == order[first] and count):
                break


def _values(tensor: Any) -> list[float] | None:
    """Return some values of a tensor; its size decides the places. None if it is unreadable."""
    tensor = tensors.full(tensor)
    plain = tensors.is_plain(tensor) or (type(tensor) is Tensor and tensors.is_dense(tensor))
    if not plain or tensor.is_meta:
        return None
    if not tensor.numel():
        return []
    # By coordinates: to flatten a transposed weight would copy all of it.
    return tensor.detach()[_coordinates(tensor.shape)].float().tolist()


@functools.lru_cache(maxsize=64)  # the layers of a model have few shapes
def _coordinates(shape: torch.Size) -> tuple[Tensor, ...]:
    """Return the coordinates of some values: for each axis one tensor."""
    size = shape.numel()
    axes: list[list[int]] = [[] for _ in shape]
    for index in sorted({(i * 2654435761 + size // 2) % size for i in range(SAMPLES)}):
        for axis in reversed(range(len(shape))):
            index, at = divmod(index, shape[axis])
            axes[axis].append(at)
    return tuple(map(torch.tensor, axes))


def _distance(values: list[float], others: list[float] | None) -> float:
    """Return |a - b| / max(|a|, |b|); infinite if the numbers of values differ."""
    if others is None or len(values) != len(others):
        return math.inf
    if values == others:
        return 0.0
    change = math.hypot(*(a - b for a, b in zip(values, others, strict=True) if a != b))
    size = max(math.hypot(*values), math.hypot(*others))
    return change / size if size > 0 else change
