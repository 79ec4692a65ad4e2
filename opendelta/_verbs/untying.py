"""Give a plain model weights of its own where the copy of a head untied those of its backbone."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import nn

from .._backbone.backbone import Backbone
from ..errors import TiedWeightWarning, warn

TIED = "tie_word_embeddings"


def untie(backbone: Backbone, copied: nn.Module) -> None:
    """Let the configs of transformers models say so if a copy of a head untied their weights.

    Else the weights would be tied again when the plain model is loaded.

    Args:
        copied: the plain model of `backbone`.
    """
    fresh = Backbone.of(copied)
    modules: list[Any] = [m for m in fresh.modules.values() if _tied(m.__dict__.get("config"))]
    if not modules:
        return
    left = list(fresh.users().values())
    if all(names in left for names in backbone.users().values() if len(names) > 1):
        return
    if not any(_computes_by_it(module) for module in modules):
        _say_untied(modules)
    known: set[int] = set()  # now each module has a weight of its own in the file
    for module in fresh.modules.values():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in known:
                own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[key] = parameter = own
            known.add(id(parameter))
    _warn_tied_again(modules[0])


def _computes_by_it(module: nn.Module) -> bool:
    """True if a forward asks the config if weights are tied, as UMT5's, which scales by it."""
    forward = inspect.unwrap(type(module).forward)
    return TIED in getattr(getattr(forward, "__code__", None), "co_names", ())


def _say_untied(modules: list[Any]) -> None:
    memo: dict[int, Any] = {}  # the modules share configs
    for module in modules:
        module.config = copy.deepcopy(module.config, memo)
        for config in _tied(module.config):
            setattr(config, TIED, False)


def _tied(config: Any) -> list[Any]:
    """Return those of a config and the configs in it that say that weights are tied."""
    inner = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()]
    own = [config] if getattr(config, TIED, False) else []
    return own + [found for each in inner for found in _tied(each)]


def _warn_tied_again(model: Any) -> None:
    """Warn if the config of an untied model says that it is tied as soon as it is loaded."""
    config = model.config
    if not hasattr(config, "to_dict"):
        return
    try:
        loaded = type(config).from_dict(config.to_dict())
    except Exception:  # whatever a config of somebody's own raises: it is for its loading to say
        return
    if _tied(loaded):
        warn(
            f"this plain {type(model).__name__} has weights of its own where its backbone ties "
            f"one, and its {type(config).__name__}, once loaded, says {TIED}=True: "
            "from_pretrained() loads the weights as they are, but do not call tie_weights() or "
            "resize_token_embeddings() on the model, which would tie them again",
            TiedWeightWarning,
        )
