"""Find classification heads that were never trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._layers.base import Acts
from .._layers.labels import count_of, head_of
from .._modules.tensors import is_plain
from ..errors import UntrainedWarning, warn
from ..names import ancestors, join
from .backbone import Backbone


def untrained(backbone: Backbone) -> list[str]:
    """Return the parts of classification heads that are frozen with the values of their start.

    transformers gives a head that a checkpoint lacks random weights, and biases of zero. Frozen,
    such a head is in no file, and another process makes it anew with other values.
    """
    found: list[str] = []
    for name, model in backbone.modules.items():
        base = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
        if not isinstance(base, nn.Module) or base is model:
            continue
        heads = {key: m for key, m in model._modules.items() if m is not None and m is not base}
        if any(head_of(module, count_of(model)) is not None for module in heads.values()):
            std = getattr(model.config, "initializer_range", 0.02)
            names = [join(name, key) for key in heads]
            found += [head for head in names if _is_untrained(backbone, head, std)]
    return found


def warn_of_untrained(backbone: Backbone, verb: str) -> None:
    """Warn of classification heads that were never trained, and will not be.

    Args:
        verb: a text about what happens to them, such as "stays frozen".
    """
    if heads := untrained(backbone):
        what = f"{', '.join(map(repr, heads))} of {type(backbone.model).__name__} {verb}"
        warn(
            f"{what}, with the values of a random start: the outputs are random too, and another "
            f"process makes others. To {advice(heads)}",
            UntrainedWarning,
        )


def advice(heads: list[str]) -> str:
    """Return what to do with an untrained head."""
    return (
        f"train it with the deltas, call freeze_module(exclude={['deltas', *heads]}), or make the "
        f"delta with modules_to_save={heads}"
    )


def _is_untrained(backbone: Backbone, head: str, std: float) -> bool:
    """True if the linear layers of a head are frozen, and each looks like one that just began."""
    copied = {
        where
        for where, _, layer in backbone.delta_layers()
        if layer.acts is Acts.INSTEAD and layer.record.active
    }
    inner = {name: {*ancestors(name)} for name in backbone.modules}
    parts = [
        backbone.modules[name]
        for name, around in inner.items()
        if head in around and not around & copied and isinstance(backbone.modules[name], nn.Linear)
    ]
    return bool(parts) and all(_begins(part, std) for part in parts)


def _begins(module: Any, std: float) -> bool:
    """True if a linear layer is frozen with a bias of zero, or without one, with drawn weights.

    Args:
        std: the standard deviation with which the weights were drawn.
    """
    own = [p for p in module._parameters.values() if p is not None]
    if any(p.requires_grad or p.is_meta or not is_plain(p) for p in own):
        return False
    if module.bias is not None:
        return not module.bias.any()
    weight, few = module.weight.detach().float(), 3 * module.weight.numel() ** -0.5
    return bool(weight.mean().abs() < few * std and (weight.std() / std - 1).abs() < few)
