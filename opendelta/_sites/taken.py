"""Refuse code that would take the tensors of a site into another module, without its deltas."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..errors import SiteError
from .stack import stack_of

COPIERS = {  # {file whose functions copy modules: what they would do}
    "torch.nn.utils.fusion": (
        "write new weights into a copy of this {}, under its deltas: fuse a plain model, "
        "composition(model).to_backbone()"
    ),
    "peft.utils.other": (
        "copy this {} for its modules_to_save, with deltas that no detach() reaches: attach them "
        "after get_peft_model, or name the module in modules_to_save of a delta"
    ),
}
# {attribute of a normalisation: {function that asks for it: what to do instead}}
TAKERS = {
    "running_mean": {
        "fuse_conv_bn_eval": "fuse a plain model, composition(model).to_backbone()",
        "fuse_linear_bn_eval": "fuse a plain model, composition(model).to_backbone()",
    },
    "num_features": {"convert_sync_batchnorm": "convert the model before attaching"},
}


def check_copier(base: type, copier: FrameType | None) -> None:
    """Raise if the code that copies a site would lose its deltas, or write under them.

    Args:
        base: the class under the site's.
        copier: the frame that asks for its state.
    """
    while copier is not None and copier.f_globals.get("__name__") == "copy":
        copier = copier.f_back
    name = copier.f_globals.get("__name__") if copier is not None else None
    if name in COPIERS:
        raise SiteError(f"{name} would {COPIERS[name].format(base.__name__)}")


def refusing(name: str) -> property:
    """Return an attribute of a site that refuses the functions that `TAKERS` names for it."""
    advice = TAKERS[name]

    def read(self: nn.Module) -> Any:
        if not torch.compiler.is_compiling():
            asker = sys._getframe(1).f_code.co_name
            if asker in advice and stack_of(self):
                raise SiteError(
                    f"{asker} would make another module of this {type(self).__name__}, without "
                    f"its deltas: {advice[asker]}"
                )
        return self.__dict__[name] if name in self.__dict__ else self.__getattr__(name)

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__[name] = value

    return property(read, write)


def refusals(base: type) -> dict[str, property]:
    """Return {name: attribute} by which a site of a normalisation with statistics refuses."""
    if not issubclass(base, nn.modules.batchnorm._NormBase):
        return {}
    return {name: refusing(name) for name in TAKERS}
