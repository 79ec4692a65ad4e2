"""Buffers that change while a model trains, such as a BatchNorm's, and tensors without values."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from .._backbone.backbone import Backbone
from .._layers.record import Record
from .._modules.tensors import is_plain
from ..errors import DeltaError, UnsavedWarning, listed, warn
from ..names import ancestors, join, parent

FEW = 64  # values of a parameter that are compared


def trains_in_place(module: nn.Module) -> bool:
    """True if a parameter of the module's own trains."""
    return any(p is not None and p.requires_grad for p in module._parameters.values())


def _moves(backbone: Backbone, name: str) -> bool:
    """True if the module is a normalisation that moves its statistics when the model trains.

    One in eval() inside a model in train() is kept there by its user.
    """
    module = backbone.modules[name]
    if not isinstance(module, _NormBase) or module.running_mean is None:
        return False
    averages = isinstance(module, _BatchNorm) and module.momentum is None
    if not (averages or module.momentum):
        return False
    if isinstance(module, _BatchNorm) and not module.track_running_stats:
        return False  # its user has switched off what it kept
    return module.training or not backbone.model.training


def named(records: list[Record]) -> set[str]:
    """Return the names of the backbone's modules and tensors that are saved with deltas."""
    of_configs = {name for r in records for name in r.config.unfrozen_modules or ()}
    return of_configs.union(*(record.shared.excluded for record in records))


def saved(backbone: Backbone, records: list[Record]) -> dict[str, Tensor]:
    """Return the backbone's tensors that are saved with deltas, and the buffers beside them."""
    around, own = named(records), backbone.tensors()
    parameters = backbone.parameters()
    found = {name for name in own if around and around & {"", *ancestors(name)}}
    beside = {parent(name) for name in found if name in parameters}
    return {
        name: tensor
        for name, tensor in own.items()
        if name in found or (name not in parameters and parent(name) in beside)
    }


def moving(backbone: Backbone, changed: Collection[str] = ()) -> list[str]:
    """Return the frozen modules whose tensors move in training, and are in no file.

    A module does not count if nothing is frozen, or if an active delta's own copy takes its place,
    unless it is known to move: a hook on it, as of the old spectral_norm, runs all the same.

    Args:
        changed: modules whose tensors are known to move, beside normalisations with statistics.
    """
    if all(parameter.requires_grad for parameter in backbone.parameters().values()):
        return []
    kept, replaced = named(backbone.records()), backbone.replaced()
    return [
        name
        for name, module in backbone.modules.items()
        if name in changed or _moves(backbone, name)
        if name in changed or not replaced & {"", *ancestors(name)}
        if not trains_in_place(module)
        if not kept & {"", *ancestors(name), *(join(name, key) for key in module._buffers)}
    ]


def copies(backbone: Backbone) -> dict[str, dict[str, Tensor]]:
    """Return copies of what a forward may change, of all modules in training mode.

    That is the floating buffers in a state dict, and a few values of each frozen parameter, which a
    momentum encoder moves. The result is {full name of a module: {name in it: the copy}}.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, module in backbone.modules.items():
        tables = (module._buffers, module._parameters) if module.training else ()
        for key, tensor in [item for table in tables for item in table.items()]:
            values = None if tensor is None else _values(tensor)
            if values is not None and key not in module._non_persistent_buffers_set:
                found.setdefault(name, {})[key] = values.clone()
    return found


def _values(tensor: Tensor) -> Tensor | None:
    """Return the values of a buffer, or a few of a frozen parameter; None: it is of no use here."""
    own = tensor.detach()
    if own.is_meta or not own.is_floating_point() or own.layout is not torch.strided:
        return None
    if not isinstance(tensor, nn.Parameter):
        return own
    if tensor.requires_grad or not is_plain(tensor) or not own.is_contiguous():
        return None
    return own.view(-1)[:: own.numel() // FEW + 1]


def changed(backbone: Backbone, before: dict[str, dict[str, Tensor]]) -> set[str]:
    """Return the names of the modules whose tensors differ from the `copies` before."""

    def differs(name: str, key: str, old: Tensor) -> bool:
        module = backbone.modules[name]
        tensor = {**module._buffers, **module._parameters}.get(key)
        now = None if tensor is None else _values(tensor)
        return now is None or now.shape != old.shape or not torch.equal(now, old)

    return {n for n, own in before.items() if any(differs(n, key, b) for key, b in own.items())}


def warn_of_moving(backbone: Backbone) -> None:
    """Warn of the modules of `moving`."""
    if left := moving(backbone):
        warn(
            f"{len(left)} normalisations of the frozen {type(backbone.model).__name__} keep "
            f"statistics, which move in train() though nothing else of them trains: {listed(left)}"
            ". No file of a delta holds them, and they stay when the deltas leave. Name them in "
            "modules_to_save=[...], so that the delta has its own, or keep them in eval()",
            UnsavedWarning,
        )


def require_values(backbone: Backbone) -> None:
    """Raise if deltas on a model with values have none, and accelerate does not hold them."""
    empty = [
        name
        for where, name, layer in backbone.delta_layers()
        if any(p.is_meta for p in layer.parameters()) and not backbone.is_meta
        if not any(hasattr(m, "_hf_hook") for m in (*layer.modules(), *backbone.chain(where)))
    ]
    if empty:
        raise DeltaError(
            f"tensors of {listed([*dict.fromkeys(empty)])} have no values, being on the meta "
            "device as the model once was: load the deltas again, or a state dict that has them"
        )
