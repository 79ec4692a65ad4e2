"""Is this the backbone that a delta was trained on? A few values of the weights under it."""

from __future__ import annotations

import base64
import functools
import math
import struct
from collections.abc import Collection, Iterator
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .._backbone.backbone import Backbone
from .._modules import tensors
from .._modules.tensors import is_sharded
from .._sites import merged
from ..errors import shown
from ..names import ancestors, inside

SAMPLES = 16  # values of each weight
WEIGHTS = 4  # of a module that has none of its own, those of the first inside it
# A cast to half precision and back changes values by up to 1.7e-3 in relative norm, training or
# another model by 1e-2 and more.
TOLERANCE = 4e-3
NO_SETTING = ("dtype", "problem_type", "transformers_version")  # they may change under a delta


def take(backbone: Backbone, names: Collection[str], without: Collection[str]) -> dict[str, Any]:
    """The fingerprint of a backbone, as JSON holds it.

    Args:
        names: full names of the modules that deltas stand on.
        without: full names of tensors, and of modules around them, that are saved with the deltas.

    Returns:
        {full name of a weight: {"shape", "values"}}, where values are base64 of little-endian
        float32 and None where they cannot be read: sharded, quantised or without memory.
    """
    prints = {}
    for name, tensor in _weights(backbone, names, without):
        values, text = _values(tensor), None
        if values is not None:
            text = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
        prints[name] = {"shape": list(tensor.shape), "values": text}
    return prints


def described(model: Any) -> dict[str, Any]:
    """The plain settings of a transformers model, without names of files; {} for other models."""
    to_dict = getattr(model.__dict__.get("config"), "to_dict", None)
    if to_dict is None:
        return {}
    return {
        key: value
        for key, value in to_dict().items()
        if isinstance(value, bool | int | str) or (isinstance(value, float) and isfinite(value))
        if key not in NO_SETTING and key[0] != "_"
    }


def differences(
    backbone: Backbone, given: dict[str, Any], without: Collection[str]
) -> tuple[dict[str, str], list[str]]:
    """{weight that differs from a fingerprint: how}, and the weights that cannot be compared.

    Args:
        without: as for `take`.
    """
    differ: dict[str, str] = {}
    unchecked = []
    for name, facts in given.items():
        if without and {*without} & {*ancestors(name)}:
            continue
        module, _, key = name.rpartition(".")
        tensor = _own(backbone, module, key) if module in backbone.modules else None
        if tensor is None:
            differ[name] = "is missing"
            continue
        values = _values(tensor)
        if values is None or facts["values"] is None:
            unchecked.append(name)
        elif list(tensor.shape) != facts["shape"]:
            differ[name] = f"is {list(tensor.shape)} instead of {shown(facts['shape'])}"
        elif not (distance := _distance(values, _decoded(facts["values"]))) <= TOLERANCE:
            differ[name] = f"differs by {distance:.2g}"
    return differ, unchecked


def is_fingerprint(value: Any) -> bool:
    """Whether `value` is what `take` gives, as far as types go."""
    return isinstance(value, dict) and all(
        isinstance(facts, dict)
        and facts.keys() == {"shape", "values"}
        and isinstance(facts["shape"], list)
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
    """A parameter of the module called `name`, as it was before deltas were merged into it."""
    kept = merged.original(name, backbone.modules[name], key)
    return dict(backbone.modules[name]._parameters.items()).get(key) if kept is None else kept


def _weights(
    backbone: Backbone, names: Collection[str], without: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """(full name, tensor) of the weights that deltas on the modules called `names` stand on."""
    seen = set()
    order = list(backbone.modules)  # a module, then those inside it
    at = {name: place for place, name in enumerate(order)}
    for name in names:
        count = 0
        for place in range(at[name], len(order)):
            module = order[place]
            if module != name and not module.startswith(inside(name)):
                break
            tensor, full = _own(backbone, module, "weight"), f"{module}.weight".lstrip(".")
            if tensor is None or tensor.ndim < 1 or (without and {*without} & {*ancestors(full)}):
                continue
            count += 1
            if full not in seen:
                seen.add(full)
                yield full, tensor
            if count >= WEIGHTS or (module == name and count):
                break


def _values(tensor: Any) -> list[float] | None:
    """Some values of a tensor at places that its size decides; None if it has none to read."""
    plain = tensors.is_plain(tensor) or type(tensor) is Tensor
    if is_sharded(tensor) or not plain or tensor.is_meta:
        return None
    if not tensor.numel():
        return []
    # By coordinates: to flatten a transposed weight would copy all of it.
    return tensor.detach()[_coordinates(tensor.shape)].float().tolist()


@functools.lru_cache(maxsize=64)  # the layers of a model have few shapes
def _coordinates(shape: torch.Size) -> tuple[Tensor, ...]:
    """Where some values are: their coordinates on each axis."""
    size = shape.numel()
    axes: list[list[int]] = [[] for _ in shape]
    for place in sorted({(i * 2654435761 + size // 2) % size for i in range(SAMPLES)}):
        for axis in reversed(range(len(shape))):
            place, at = divmod(place, shape[axis])
            axes[axis].append(at)
    return tuple(map(torch.tensor, axes))


def _distance(values: list[float], others: list[float] | None) -> float:
    """|a - b| over the larger of |a| and |b|; infinite where they are not as many."""
    if others is None or len(values) != len(others):
        return math.inf
    if values == others:
        return 0.0
    change = math.hypot(*(a - b for a, b in zip(values, others, strict=True) if a != b))
    size = max(math.hypot(*values), math.hypot(*others))
    return change / size if size > 0 else change
