"""Find heads that nobody trained or loaded, while the rest of the model was."""

from __future__ import annotations

from collections.abc import Set
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from .._layers.base import Acts
from .._modules.tensors import is_plain
from ..errors import UntrainedWarning, warn
from ..names import SLOT, ancestors, is_inside, join, last, parent
from .backbone import Backbone
from .drawn import LAYERS, has_bias, is_pretrained, replayed, resized, zero_biased

TWICE = 2
MOST = 8  # writes that give a parameter the values of its start: `trunc_normal_` alone has several
_stepped_by_fused: Any = WeakIdKeyDictionary()  # parameters
# with a hash of those that it changed last
_noted: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()


def untrained(backbone: Backbone) -> list[str]:
    """Return the outermost modules, with linear layers, that are frozen as they were made.

    Frozen, such a module is in no file, and another process makes it anew with other values. Only
    models of which most parameters were loaded or trained are looked at. Copies that deltas have of
    such modules are named too, with the names of their layers.
    """
    own = backbone.parameters()
    loaded = any(map(_is_loaded, own.values()))
    # A copy of a model has no marks of transformers, and nothing was written into it.
    least = 1 if loaded or any(map(_writes, own.values())) else 0
    if not least and not any(map(has_bias, backbone.modules.values())):
        return []
    young = {name for name, p in own.items() if _is_fresh(p, MOST, least)}
    if not young:
        return []
    copies = _copies(backbone)
    pretrained = {name for name, m in backbone.modules.items() if is_pretrained(m)}
    fresh = zero_biased(backbone, young, loaded)
    # pickle keeps the marks of transformers, and gives each parameter the count of one write.
    if not loaded or any(_writes(p) != 1 for p in own.values() if _is_loaded(p)):
        fresh |= _as_written(backbone, young, None if loaded else pretrained, copies.keys())
    if not fresh or 2 * len(fresh) >= len(own):
        return []
    old = resized(backbone, loaded)
    fresh = {name for name in fresh if id(own[name]) not in old}
    bases = _bases(backbone, pretrained)
    fresh = {n for n in fresh if not any(_is_spare(n, bases[b]) for b in _around(n) & bases.keys())}
    untrained_copies = [
        join(where, SLOT, layer.record.name) for where, layer in copies.items()
        if _is_untrained(layer.stand_in, {n: own[n] for n in fresh if is_inside(n, where)}, where)
    ]  # fmt: skip
    fresh = {n for n in fresh if not own[n].requires_grad and not _around(n) & copies.keys()}
    mixed = {where for name in own.keys() - fresh for where in _around(name)}
    found = {where for name in fresh for where in _around(name)} - mixed
    linear = {n for n, m in backbone.modules.items() if n in found and isinstance(m, LAYERS)}
    heads = {where for name in linear for where in _around(f"{name}.weight")} & found
    outermost = [n for n in backbone.modules if n in heads and parent(n) not in heads]
    return outermost + untrained_copies


def _as_written(
    backbone: Backbone, young: set[str], built: set[str] | None, copied: Set[str]
) -> set[str]:
    """Return those of the `young` parameters that have as many writes as their start took.

    Args:
        built: the models of transformers, if no checkpoint gave them values; None: one did.
        copied: the modules of which deltas have copies.
    """
    own = backbone.parameters()
    fresh = {name for name in young if _is_fresh(own[name], 1)}
    more = {n for n in young - fresh if _writes(own[n]) > 1}
    if built is None:
        asked = {n for n in more if not own[n].requires_grad or _around(n) & copied}
        fresh |= {n for n, most in replayed(backbone, asked).items() if own[n]._version <= most}
    else:  # transformers draws the values that the layers drew before, too
        fresh |= {n for n in more if own[n]._version == TWICE and _around(n) & built}
    return fresh | (_beside_biases(backbone, fresh) & young)


def _beside_biases(backbone: Backbone, fresh: set[str]) -> set[str]:
    """Return the weights of layers with fresh biases: who loads or trains a layer writes both."""
    users, own = backbone.users(), backbone.parameters()
    found = {join(parent(name), "weight") for name in fresh if last(name) == "bias"}
    return {name for name in found & own.keys() if len(users[id(own[name])]) == 1}


def _bases(backbone: Backbone, pretrained: set[str]) -> dict[str, nn.Module]:
    """Return the models of transformers that are the base of others, and hold no other model.

    Not those in a model for a task, which may use the pooler.
    """
    models = {name: backbone.modules[name] for name in pretrained}
    tasks = {n for n, m in models.items() if getattr(m, "base_model", None) is not m}
    tasks |= {name for name, m in models.items() if "For" in type(m).__name__}
    composites = {around for name in pretrained if name for around in _around(name)}
    return {n: m for n, m in models.items() if not {n, *_around(n)} & tasks and n not in composites}


def _is_spare(name: str, base: nn.Module) -> bool:
    """True for a parameter that the checkpoint of a base model may lack, as nobody uses it.

    Such is a pooler. A base model of one's own may have a head.
    """
    return type(base).__module__.startswith("transformers.") or "pooler" in name


def _copies(backbone: Backbone) -> dict[str, Any]:
    """Return {site: the layer of the copy that acts in its place}."""
    layers = ((where, layer) for where, _, layer in backbone.delta_layers())
    return {where: ly for where, ly in layers if ly.acts is Acts.INSTEAD and ly.record.active}


def _is_untrained(copied: nn.Module, fresh: dict[str, nn.Parameter], where: str) -> bool:
    """True if a copy with linear layers is frozen, and has the values of the start.

    Args:
        fresh: the parameters of the module that have those values, by full name.
        where: the full name of the module.
    """
    own = dict(copied.named_parameters())
    pairs = [(p, fresh[full]) for key, p in own.items() if (full := join(where, key)) in fresh]
    linear = any(isinstance(part, LAYERS) for part in copied.modules())
    if not linear or len(pairs) < len(own) or any(p.requires_grad for p in own.values()):
        return False
    return all(_is_as_made(p, start) for p, start in pairs)


def _is_as_made(parameter: nn.Parameter, start: Any) -> bool:
    if parameter.shape != start.shape:  # it has another number of labels: no copy of values
        return _is_fresh(parameter, TWICE)
    return torch.equal(parameter.to(start), start)


def _around(name: str) -> set[str]:
    """Return the full names of the modules around a parameter."""
    return {*list(ancestors(name))[1:], ""}


def _is_loaded(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def _writes(parameter: nn.Parameter) -> int:
    """Return how often torch counted a write into a parameter; tensors of inference mode: 0."""
    return 0 if parameter.is_inference() else parameter._version


def _is_fresh(parameter: nn.Parameter, most: int, least: int = 1) -> bool:
    """True if a parameter has the values of its start, as far as torch and transformers know.

    torch counts the writes into a tensor. transformers marks what it loaded.

    Args:
        most, least: the numbers of writes that may have given it the values of the start.
    """
    if _is_loaded(parameter) or not is_plain(parameter) or parameter.is_meta:
        return False
    if parameter.is_inference() or not least <= parameter._version <= most:
        return False
    return parameter not in _stepped_by_fused


def _note_fused(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Note the parameters that a fused optimizer changes: torch does not count that."""
    groups = (group["params"] for group in optimizer.param_groups if group.get("fused"))
    stepped = [p for parameters in groups for p in parameters if p.grad is not None]
    which = hash(tuple(map(id, stepped)))
    if stepped and _noted.get(optimizer) != which:
        _noted[optimizer] = which
        _stepped_by_fused.update((p, True) for p in stepped)


register_optimizer_step_post_hook(_note_fused)


def warn_of_untrained(backbone: Backbone, verb: str) -> None:
    """Warn of heads that nobody trained, and nobody will.

    Args:
        verb: a text about what happens to them, such as "is frozen".
    """
    found = untrained(backbone)
    kind = type(backbone.model).__name__
    if copies := [name for name in found if _is_copy(name)]:
        warn(
            f"{', '.join(map(repr, copies))} of {kind} is frozen, and was never trained: it is a "
            f"copy of a random start, so the outputs are random. To {advice(copies)}",
            UntrainedWarning,
        )
    if heads := [name for name in found if not _is_copy(name)]:
        what = f"{', '.join(map(repr, heads))} of {kind} {verb}"
        warn(
            f"{what}, with the values of a random start: the outputs are random too, and another "
            f"process makes others. To {advice(heads)}. If you wrote its values through .data, "
            "which torch does not count, or gave it a bias of zeros, all is well",
            UntrainedWarning,
        )


def advice(heads: list[str]) -> str:
    """Return what to do with an untrained head."""
    if heads and all(map(_is_copy, heads)):
        return "train it with the deltas: freeze_module(exclude=['deltas']) lets it train"
    heads = [name for name in heads if not _is_copy(name)]
    return (
        f"train it with the deltas, call freeze_module(exclude={['deltas', *heads]}), or make the "
        f"delta with modules_to_save={heads}"
    )


def _is_copy(name: str) -> bool:
    return SLOT in name.split(".")
