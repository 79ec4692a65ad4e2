"""transformers' Trainer trains a quantised model only if the model carries what trains."""

from __future__ import annotations

import sys

from .._backbone.backbone import Backbone
from .state_dict import saveable

FLAG = "_hf_peft_config_loaded"  # by which transformers knows that PEFT's adapters are in a model
TRAINER = "transformers.trainer"  # it and `transformers.trainer_utils`


class Adapted:
    """Stands for the flag: true for Trainer, and not for what would hand the model on to PEFT."""

    def __bool__(self) -> bool:
        return sys._getframe(1).f_globals.get("__name__", "").startswith(TRAINER)


def watch_quantised(backbone: Backbone) -> None:
    """Let Trainer take the models of the backbone that are quantised."""
    for model in saveable(backbone):
        if getattr(model, "is_quantized", False) and not getattr(model, FLAG, False):
            model.__dict__[FLAG] = Adapted()


def unwatch_quantised(backbone: Backbone) -> None:
    """Give the models their own flags back."""
    for model in saveable(backbone):
        if isinstance(model.__dict__.get(FLAG), Adapted):
            del model.__dict__[FLAG]
