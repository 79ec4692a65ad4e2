"""Say why a method cannot go on a module, by the first three steps of attaching."""

from __future__ import annotations

import dataclasses

from .._backbone.backbone import Backbone
from .._modules.kinds import kind_of
from .._sites import swap
from ..errors import DeltaError, kept_warnings
from . import choosing
from .base import BaseDelta
from .making import make
from .options import DeltaConfig
from .order import check_root, known_records
from .placing import place
from .taking import check_kind


def why_not(
    backbone: Backbone, method: type[BaseDelta], config: DeltaConfig, name: str
) -> str | None:
    """Return why a delta with these options cannot go on the module `name`; None: it can.

    Of a module whose class tells no sizes, such as a whole block, only the kind is looked at: its
    sizes need a run of the model on shapes, which `plan` makes.

    Args:
        config: the options; other modules in them are not looked at.
    """
    layer_class = method.layer_for(config)
    names = [name] * (2 if layer_class.paired else 1)
    alone = dataclasses.replace(
        config, name=None, modified_modules=names, modules_to_save=None, unfrozen_modules=None
    )
    kind = kind_of(backbone.modules[name])
    try:
        check_root(backbone)
        swap.check_has_forward(name, backbone.modules[name])
        check_kind(backbone, name, kind, alone, layer_class)
        if kind is not None:
            with kept_warnings():
                known = known_records(backbone)
                choice = choosing.as_chosen(backbone, method, alone, known)
                place(backbone, make(backbone, choice, values="never"))
    except DeltaError as error:
        return str(error)
    return None
