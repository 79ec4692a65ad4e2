"""Freeze parameters, and restore their `requires_grad` flags."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor, nn

from .._backbone import engines
from .._backbone.backbone import Backbone
from .._backbone.patterns import compile_pattern, no_match, warn_unused
from .._backbone.sharding import is_distributed
from .._layers.record import Shared
from ..errors import DeltaError
from ..names import SLOT, ancestors, dotted, is_inside, join


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
        AddressError: no pattern selects anything. Nothing is frozen then.
        DeltaError: `module` is not a module of the backbone.
        SiteError: what is around the model, such as DistributedDataParallel, would not train a
            delta. Nothing is frozen then.
    """
    within = _name_of(backbone, module)
    own, added = backbone.tensors(), backbone.delta_parameters()
    tests = {pattern: compile_pattern(pattern) for pattern in exclude if pattern != SLOT}
    every = {part for name in (*own, *added) for part in ancestors(name)} if tests else set()
    hits = {pattern: {n for n in every if test(n)} for pattern, test in tests.items()}
    unused = [no_match(p, every, backbone.model, "name") for p, hit in hits.items() if not hit]
    if exclude and len(unused) == len(exclude):
        raise unused[0]
    for error in unused:
        warn_unused("freeze_module(exclude=...)", error)
    kept = {*unfrozen}.union(*hits.values())
    everything = {**own, **added}
    spared = {  # by identity: a tied weight is spared under all of its names
        id(tensor)
        for name, tensor in everything.items()
        if (SLOT in exclude and name in added) or (kept and kept & {"", *ancestors(name)})
    }
    if spared and is_distributed():
        trains = ((n, t) for n, t, m in _remembered(backbone, shared) if t.requires_grad or n in m)
        chosen = {n for n, t in trains if id(t) in spared and is_inside(n, within)}
        engines.check_trains(backbone, chosen)
    restore(backbone, shared, within)
    memories = {name: memory for name, _, memory in _remembered(backbone, shared)}
    shared.excluded -= {name for name in shared.excluded if is_inside(name, within)}
    for name, tensor in everything.items():
        if not is_inside(name, within):
            continue
        if id(tensor) in spared:
            shared.excluded |= {name} & own.keys()
        elif tensor.requires_grad:
            memories[name].add(name)
            tensor.requires_grad = False  # the method would ask a lazy one for its values


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
    if not _any_frozen(shared):
        return
    for name, parameter, memory in _remembered(backbone, shared):
        if name in memory and is_inside(name, within):
            parameter.requires_grad = True
            memory.discard(name)


def _any_frozen(shared: Shared) -> bool:
    return bool(shared.frozen) or any(record.frozen for record in shared.records)


def _remembered(backbone: Backbone, shared: Shared) -> Iterator[tuple[str, Tensor, set[str]]]:
    """Yield (full name, tensor, the set that remembers if `freeze` froze it) of each tensor."""
    for name, tensor in backbone.tensors().items():
        yield name, tensor, shared.frozen
    for where, delta, layer in backbone.delta_layers():
        prefix = dotted(join(where, SLOT, delta))
        for name, tensor in layer.named_parameters():
            yield f"{prefix}{name}", tensor, layer.record.frozen
