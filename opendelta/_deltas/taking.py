"""Which modules a layer takes: by their kinds, sizes and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest

import torch
from torch import nn

from .._backbone.backbone import Backbone
from .._layers.base import Acts, DeltaLayer
from .._modules.kinds import KINDS, Kind, Norm, kind_of
from .._modules.tensors import is_lazy
from .._sequences import embedders, prefix
from ..errors import SiteError, quoted
from ..names import is_inside
from .options import DeltaConfig
from .registry import method


def kinds_of(backbone: Backbone, name: str) -> set[str]:
    """Return the kinds of the module `name`, as in `KINDS`: from the table of kinds or "other".

    It may be "attention" or "stack" too.
    """
    module = backbone.modules[name]
    kind = kind_of(module)
    kinds = {"other" if kind is None else kind.name}
    if prefix.is_attention(module):
        kinds.add("attention")
    if set(embedders.arguments(module)) >= embedders.TAKES:
        kinds |= {"stack"} if embedders.embedders(backbone.modules).get(name) is False else set()
    return kinds


def is_empty(kind: Kind | None) -> bool:
    """True if a module of this kind has no inputs or no outputs."""
    if kind is None:
        return False
    return 0 in kind.channels or (kind.in_features == 0 and not isinstance(kind, Norm))


def _check_parameters(name: str, module: nn.Module) -> None:
    """Raise if the module's own parameters have no shape yet, or are complex."""
    for parameter in module._parameters.values():
        problem = None
        if is_lazy(parameter):
            problem = "gets its sizes in its first forward: run the model once, then attach"
        elif parameter is not None and parameter.is_complex():
            problem = "has complex weights, for which no delta is defined; choose other modules"
        if problem is not None:
            raise SiteError(f"{quoted(name)} ({type(module).__name__}) {problem}", where=name)


def other_axis(kind: Kind | None, config: DeltaConfig, layer_class: type[DeltaLayer]) -> str | None:
    """Return in words why the layer does not act on the axis of a normalisation, or None."""
    if isinstance(kind, Norm) and not kind.settled:
        how = "how many axes its input has, or on their sizes"
        return f"an axis that depends on {how}, so that no delta knows it"
    if isinstance(kind, Norm) and kind.axis != -1 and not layer_class.any_axis:
        axis = f"axis {kind.axis} of its input"
        return f"{axis}, and {config.delta_type!r} acts on the last axis"
    return None


def check_kind(
    backbone: Backbone,
    name: str,
    kind: Kind | None,
    config: DeltaConfig,
    layer_class: type[DeltaLayer],
) -> None:
    """Raise unless the layer takes the module `name`, which has this kind."""
    _check_parameters(name, backbone.modules[name])
    wanted = {*layer_class.kinds}
    if (axis := other_axis(kind, config, layer_class)) is not None:
        raise SiteError(
            f"{quoted(name)} ({type(backbone.modules[name]).__name__}) normalises {axis}; choose "
            f"other modules, or leave it out: exclude_modules=[{name!r}]",
            where=name,
        )
    if is_empty(kind):
        raise SiteError(
            f"{quoted(name)} ({type(backbone.modules[name]).__name__}) has a size of 0, on which "
            f"{config.delta_type!r} has nothing to change; choose other modules",
            where=name,
        )
    if (kind is not None and kind.name in wanted) or kinds_of(backbone, name) & wanted:
        return
    takes = "; ".join(KINDS[k] for k in layer_class.kinds)
    inner = [n for n in backbone.modules if is_inside(n, name)]
    advice = ""
    if fitting := [n for n in inner if kinds_of(backbone, n) & (wanted - {"other"})]:
        advice = f" Inside it there are {', '.join(map(repr, fitting[:4]))}"
    elif linear := [n for n in inner if "linear" in kinds_of(backbone, n)]:
        advice = f" Other methods, such as LoRA, take {', '.join(map(repr, linear[:4]))} inside it"
    usual = method(config.delta_type).layer_class
    variant = "" if layer_class is usual else f" as {layer_class.__name__}, for these options"
    raise SiteError(
        f"{quoted(name)} ({type(backbone.modules[name]).__name__}) cannot carry "
        f"{config.delta_type!r}{variant}, which takes: {takes}.{advice}",
        where=name,
    )


# ------------------------------------------------------------------------------------------- sizes
def sizes_for(backbone: Backbone, where: str, layer: DeltaLayer) -> tuple[tuple[int, int], ...]:
    """Return (in, out) of the module `where`, if its kind tells, on which the layer depends.

    For a copy, it is all modules inside too. What acts on the output of an embedding does not
    depend on the number of indices.
    """
    parts = _parts(backbone, where) if layer.stand_in is not None else [backbone.modules[where]]
    kinds = [kind for part in parts if (kind := kind_of(part)) is not None]
    after = layer.acts is Acts.AFTER
    return tuple((0 if k.takes_ids and after else k.in_features, k.out_features) for k in kinds)


def check_sizes(backbone: Backbone, layers: Mapping[str, DeltaLayer]) -> None:
    """Raise if a module has another size than when its layer was made, as after a resize."""
    for where, layer in layers.items():
        if not layer.made_for or where not in backbone.modules:
            continue
        for was, now in zip_longest(layer.made_for, sizes_for(backbone, where, layer)):
            if was != now:
                raise SiteError(
                    f"{quoted(where)}: the module has other sizes than when the layer was made: "
                    f"{now} instead of {was} (in, out); make a new delta",
                    where=where,
                )


def check_copies(backbone: Backbone, name: str, where: str, new: DeltaLayer | None = None) -> None:
    """Raise if a delta's own copy of a module has other sizes than the layers on the module.

    So it is with a copy of a head for another number of labels.

    Args:
        name: a delta that the module is to carry, too.
        new: its layer; None: a layer of its method, which is not made yet.
    """
    both = backbone.stacks[where].in_order() + ([] if new is None else [(name, new)])
    copies = [(owner, layer.stand_in) for owner, layer in both if layer.stand_in is not None]
    if not copies:
        return
    others = [n for n, layer in both if layer.acts.in_the_weights] + [name] * (new is None)
    parts = _shapes(_parts(backbone, where))
    for owner, own in copies:
        if others and _shapes(own.modules()) != parts:
            raise SiteError(
                f"{where!r} ({type(backbone.modules[where]).__name__}): {owner!r} puts its own "
                f"copy in its place, with other sizes (num_labels) than {others[0]!r} on it was "
                f"made for; put {others[0]!r} on other modules, or give it a copy of its own "
                "(modules_to_save)",
                where=where,
            )


def _parts(backbone: Backbone, where: str) -> list[nn.Module]:
    """Return the module `where` and all modules inside it, without the layers on them."""
    return [m for n, m in backbone.modules.items() if n == where or is_inside(n, where)]


def _shapes(modules: Iterable[nn.Module]) -> list[torch.Size]:
    parameters = [p for module in modules for p in module._parameters.values()]
    return [parameter.shape for parameter in parameters if parameter is not None]
