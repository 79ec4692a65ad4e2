"""Find parameters with the values of their start: by replayed writes, by marks, by biases of 0."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection, Set
from typing import Any

import torch
from torch import nn

from .._modules.process import kept_random
from .._modules.tensors import is_plain
from ..names import ancestors, join, parent
from .apart import apart
from .backbone import Backbone
from .embeddings import embeddings_of

VALUES = 2**14
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


def replayed(backbone: Backbone, names: Collection[str]) -> dict[str, int]:
    """Return {parameter: in how many writes the models around it have given it its start}.

    `_init_weights` runs on copies. A model that is not from a folder had the start of torch before.

    Args:
        names: full names of parameters. Those of modules that transformers has not initialised are
            left out, and all of a backbone that cannot be copied.
    """
    drawn = [n for n in names if _is_initialised(backbone.modules[parent(n)])]
    if not drawn:
        return {}
    with apart(backbone) as twin, kept_random(), torch.no_grad():
        if twin is backbone:
            return {}
        _take_values(twin, drawn)
        for where in {around for name in drawn for around in [*ancestors(parent(name)), ""]}:
            with contextlib.suppress(Exception):  # of whoever wrote it; the writes before it count
                _owner(twin, where)._init_weights(twin.modules[where])
        own, before = twin.parameters(), {n: int(_is_built(_owner(twin, parent(n)))) for n in drawn}
        return {name: own[name]._version + before[name] for name in drawn if name in own}


def _owner(backbone: Backbone, where: str) -> Any:
    """Return the innermost model of transformers at a module or around it, or None."""
    models = (backbone.modules[around] for around in [*ancestors(where), ""])
    return next(filter(is_pretrained, models), None)


def _is_built(model: Any) -> bool:
    """True for a model of transformers that no folder gave, as those of two models together."""
    return not getattr(model, "name_or_path", "unknown")


def _take_values(backbone: Backbone, names: Collection[str]) -> None:
    """Put tensors into which nothing was written in place of all.

    The named ones are small, but have values enough: `trunc_normal_` writes a second time if some
    of them lie outside. The others have none.
    """
    own = backbone.parameters()
    sizes = {
        id(own[name]): [math.ceil(VALUES ** (1 / own[name].ndim))] * own[name].ndim
        for name in names
        if own[name].ndim
    }
    made: dict[int, Any] = {}
    for table in (t for m in backbone.model.modules() for t in (m._parameters, m._buffers)):
        for key, old in table.items():
            if old is not None and id(old) not in made:
                place = "cpu" if id(old) in sizes else "meta"
                new = torch.empty(sizes.get(id(old), old.shape), dtype=old.dtype, device=place)
                made[id(old)] = nn.Parameter(new, False) if isinstance(old, nn.Parameter) else new
            table[key] = made.get(id(old))


def is_pretrained(module: nn.Module) -> bool:
    """True for a model of transformers."""
    return hasattr(module, "base_model_prefix")


def _is_initialised(module: nn.Module) -> bool:
    """True if transformers has initialised a module, or a part of it."""
    return getattr(module, "_is_hf_initialized", False)


def resized(backbone: Backbone, loaded: bool) -> set[int]:
    """Return the ids of parameters of heads that transformers has resized: most rows are old.

    A head that its checkpoint lacked has the same marks; there the config names a base model.

    Args:
        loaded: transformers has loaded parameters of the backbone.
    """
    found = set[int]()
    for model in filter(is_pretrained, backbone.modules.values()):
        head = embeddings_of(model).get("output")
        if not isinstance(head, nn.Linear) or not _is_initialised(head):
            continue
        classes = getattr(getattr(model, "config", None), "architectures", None) or [""]
        lacked = all(name.endswith("Model") and "Head" not in name for name in classes)
        if not lacked if loaded else head.weight._version == 1:  # made with the model, it has two
            found.update(map(id, head.parameters()))
    return found


def zero_biased(backbone: Backbone, may_be: Set[str], loaded: bool) -> set[str]:
    """Return parameters of layers whose biases are exactly 0, as only those of new heads are.

    Training gives a bias other values. A layer in a block with a number is none of a head, unless
    all layers of the module around the numbers have such biases.

    Args:
        may_be: full names of parameters that nobody may have trained or loaded.
        loaded: the rest is known to be loaded. If not, most other layers must have other biases.
    """
    groups: dict[str, dict[str, nn.Module]] = {}
    for name, module in backbone.modules.items():
        if isinstance(module, LAYERS):
            groups.setdefault(_before_number(name), {})[name] = module
    found, zeros = set[str](), 0
    for group, layers in groups.items():
        own = {join(name, key) for name, m in layers.items() for key in _tensors(m)}
        biases = [b for m in layers.values() if (b := m._parameters.get("bias")) is not None]
        weights = [m._parameters.get("weight") for m in layers.values()]
        if not group or not biases or not own <= may_be or any(b._version > 2 for b in biases):
            continue
        if all(map(_is_zero, biases)) and not any(map(_is_zero, weights)):
            found |= own
            zeros += len(biases)
    if not found or loaded:
        return found
    rest = [m._parameters.get("bias") for layers in groups.values() for m in layers.values()]
    return found if sum(not _is_zero(b) for b in rest if b is not None) > zeros else set()


def has_bias(module: nn.Module) -> bool:
    """True for a layer with a bias, which tells of a head that is new."""
    return module._parameters.get("bias") is not None and isinstance(module, LAYERS)


def _before_number(name: str) -> str:
    """Return a module's full name up to its first step that is a number."""
    return join(*itertools.takewhile(lambda step: not step.isdigit(), name.split(".")))


def _tensors(module: nn.Module) -> list[str]:
    return [key for key, tensor in module._parameters.items() if tensor is not None]


def _is_zero(tensor: Any) -> bool:
    """True if all values of a tensor are 0; False for one whose values are not at hand."""
    return is_plain(tensor) and not tensor.is_meta and not tensor.detach().any()
