"""Freeze parameters, and restore their `requires_grad` flags."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from .._backbone.backbone import Backbone
from .._backbone.patterns import compile_pattern, no_match
from .._layers.record import Shared
from ..errors import DeltaError
from ..names import SLOT, ancestors


def freeze(
    backbone: Backbone,
    shared: Shared,
    module: nn.Module | None,
    exclude: Sequence[str],
    unfrozen: Collection[str],
) -> None:
    """Freeze all parameters of `module` except the named ones; the last call decides.

    Args:
        exclude: patterns for parameters, modules around them, or deltas; "deltas" means all deltas.
        unfrozen: full names of parameters, or of modules around them, that are not frozen.

    Raises:
        AddressError: a pattern selects nothing. Nothing is frozen then.
        DeltaError: `module` is not a module of the backbone.
    """
    within = _name_of(backbone, module)
    inside = f"{within}." if within else ""
    own, added = backbone.tensors(), backbone.delta_parameters()
    tests = {pattern: compile_pattern(pattern) for pattern in exclude if pattern != SLOT}
    every = {part for name in (*own, *added) for part in ancestors(name)} if tests else set()
    hits = {pattern: {n for n in every if test(n)} for pattern, test in tests.items()}
    for pattern, hit in hits.items():
        if not hit:
            raise no_match(pattern, every, backbone.model, "name")
    kept = {*unfrozen}.union(*hits.values())
    everything = {**own, **added}
    spared = {  # by identity: a tied weight is spared under all of its names
        id(tensor)
        for name, tensor in everything.items()
        if (SLOT in exclude and name in added) or (kept and kept & {"", *ancestors(name)})
    }
    restore(backbone, shared, within)
    shared.excluded -= {name for name in shared.excluded if name.startswith(inside)}
    for name, tensor in everything.items():
        if not name.startswith(inside):
            continue
        if id(tensor) in spared:
            shared.excluded |= {name} & own.keys()
        elif tensor.requires_grad:
            tensor.requires_grad_(False)
            shared.frozen.add(name)


def _name_of(backbone: Backbone, module: nn.Module | None) -> str:
    if module is None:
        return ""
    for name, candidate in backbone.modules.items():
        if candidate is module:
            return name
    raise DeltaError(
        f"freeze_module(module=...): that {type(module).__name__} is not a module of the backbone, "
        f"a {type(backbone.model).__name__}"
    )


def restore(backbone: Backbone, shared: Shared, within: str = "") -> None:
    """Make the parameters inside `within` that `freeze` froze trainable again, and forget them."""
    if not shared.frozen:
        return
    inside = f"{within}." if within else ""
    for name, parameter in {**backbone.tensors(), **backbone.delta_parameters()}.items():
        if name in shared.frozen and name.startswith(inside):
            parameter.requires_grad_(True)
            shared.frozen.discard(name)
