"""Refuse code that would take the tensors of a site into another module, without its deltas."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn

from ..errors import SiteError
from .stack import stack_of

FUSES = "torch.nn.utils.fusion"  # its functions write new weights into a copy of a module
# {attribute of a normalisation: {function that asks for it: what to do instead}}
TAKERS = {
    "running_mean": {
        "fuse_conv_bn_eval": "fuse a plain model, composition(model).to_backbone()",
        "fuse_linear_bn_eval": "fuse a plain model, composition(model).to_backbone()",
    },
    "num_features": {"convert_sync_batchnorm": "convert the model before attaching"},
}


def check_copier(base: type, copier: FrameType | None) -> None:
    """Raise if the code that copies a site would write new weights under its deltas.

    Args:
        base: the class under the site's.
        copier: the frame that asks `copy.deepcopy` or pickle for a copy.
    """
    if copier is not None and copier.f_globals.get("__name__") == FUSES:
        raise SiteError(
            f"{FUSES} would write new weights into a copy of this {base.__name__}, under its "
            "deltas: fuse a plain model, composition(model).to_backbone()"
        )


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
