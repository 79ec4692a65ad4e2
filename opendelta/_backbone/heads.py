"""Find heads that nobody trained or loaded, while the rest of the model was."""

from __future__ import annotations

from torch import nn

from .._modules.tensors import is_plain
from ..errors import UntrainedWarning, warn
from ..names import ancestors, parent
from .backbone import Backbone


def untrained(backbone: Backbone) -> list[str]:
    """Return the outermost modules, with linear layers, that are frozen as they were made.

    Frozen, such a module is in no file, and another process makes it anew with other values. Only
    models of which most parameters were loaded or trained are looked at.
    """
    own = backbone.parameters()
    pretrained = {name for name, m in backbone.modules.items() if hasattr(m, "base_model_prefix")}
    if "" in pretrained and getattr(backbone.model, "base_model", None) is backbone.model:
        return []  # it has no head; a pooler that its checkpoint lacked may not be in use
    fresh = {name for name, p in own.items() if _is_fresh(p, bool(_around(name) & pretrained))}
    if 2 * len(fresh) >= len(own):
        return []
    copied = backbone.replaced()
    fresh = {n for n in fresh if not own[n].requires_grad and not _around(n) & copied}
    mixed = {where for name in own.keys() - fresh for where in _around(name)}
    found = {where for name in fresh for where in _around(name)} - mixed
    linear = {n for n, m in backbone.modules.items() if n in found and isinstance(m, nn.Linear)}
    heads = {where for name in linear for where in _around(f"{name}.weight")} & found
    return [name for name in backbone.modules if name in heads and parent(name) not in heads]


def _around(name: str) -> set[str]:
    """Return the full names of the modules around a parameter."""
    return {*list(ancestors(name))[1:], ""}


def _is_fresh(parameter: nn.Parameter, pretrained: bool) -> bool:
    """True if a parameter has the values of its start, as far as torch and transformers know.

    torch counts the writes into a tensor. transformers marks what it loaded, and draws the other
    values once more, by a method of the model.

    Args:
        pretrained: the parameter is inside a transformers model.
    """
    if parameter.is_meta or parameter.is_inference() or not is_plain(parameter):
        return False
    if getattr(parameter, "_is_hf_initialized", False):
        return False
    return 1 <= parameter._version <= (2 if pretrained else 1)


def warn_of_untrained(backbone: Backbone, verb: str) -> None:
    """Warn of heads that nobody trained, and nobody will.

    Args:
        verb: a text about what happens to them, such as "is frozen".
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
