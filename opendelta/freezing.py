"""Which backbone parameters train, what `state_dict` shows, and how both go back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from . import record
from .addressing import Survey, ancestors, compile_pattern, no_match
from .errors import DeltaError, UnsavedWarning
from .record import SLOT, Record, Shared
from .site import stack_of


def backbone_parameters(found: Survey) -> dict[str, nn.Parameter]:
    """The backbone's parameters by full name, without the deltas'; a tied one under each name."""
    return {
        f"{name}.{key}" if name else key: parameter
        for name, module in found.modules.items()
        for key, parameter in module._parameters.items()
        if parameter is not None
    }


def backbone_tensors(found: Survey) -> dict[str, Tensor]:
    """The backbone's parameters and saved buffers by full name, without the deltas'."""
    buffers = {
        f"{name}.{key}" if name else key: buffer
        for name, module in found.modules.items()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }
    return {**backbone_parameters(found), **buffers}


def delta_parameters(found: Survey) -> dict[str, nn.Parameter]:
    """The parameters of all attached deltas by full name."""
    prefixes = {w: f"{w}.{SLOT}." if w else f"{SLOT}." for w in found.stacks}
    return {
        f"{prefixes[where]}{name}": parameter
        for where, stack in found.stacks.items()
        for name, parameter in stack.named_parameters()
    }


def freeze(
    found: Survey,
    shared: Shared,
    module: nn.Module | None,
    exclude: Sequence[str],
    unfrozen: Collection[str],
) -> None:
    """Freeze all parameters of `module` but those that are named; the last call decides.

    Args:
        exclude: patterns for a parameter, a module around it, or a delta; "deltas" is all deltas.
        unfrozen: full names of parameters or of modules around them.

    Raises:
        AddressError: a pattern names nothing. Nothing is frozen then.
        DeltaError: `module` is not a module of the backbone.
    """
    within = _name_of(found, module)
    inside = f"{within}." if within else ""
    own, added = backbone_tensors(found), delta_parameters(found)
    tests = {pattern: compile_pattern(pattern) for pattern in exclude if pattern != SLOT}
    every = {part for name in (*own, *added) for part in ancestors(name)} if tests else set()
    hits = {pattern: {n for n in every if test(n)} for pattern, test in tests.items()}
    for pattern, hit in hits.items():
        if not hit:
            raise no_match(pattern, every, found.root, "name")
    kept = {*unfrozen}.union(*hits.values())
    everything = {**own, **added}
    spared = {  # by identity: a tied weight is spared under all of its names
        id(tensor)
        for name, tensor in everything.items()
        if (SLOT in exclude and name in added) or (kept and kept & {"", *ancestors(name)})
    }
    restore(found, shared, within)
    shared.excluded -= {name for name in shared.excluded if name.startswith(inside)}
    for name, tensor in everything.items():
        if not name.startswith(inside):
            continue
        if id(tensor) in spared:
            shared.excluded |= {name} & own.keys()
        elif tensor.requires_grad:
            tensor.requires_grad_(False)
            shared.frozen.add(name)


def _name_of(found: Survey, module: nn.Module | None) -> str:
    if module is None:
        return ""
    for name, candidate in found.modules.items():
        if candidate is module:
            return name
    raise DeltaError(
        f"freeze_module(module=...): that {type(module).__name__} is not a module of the backbone, "
        f"a {type(found.root).__name__}"
    )


def restore(found: Survey, shared: Shared, within: str = "") -> None:
    """Make trainable again what `freeze` froze inside `within`, and forget it."""
    if not shared.frozen:
        return
    inside = f"{within}." if within else ""
    for name, parameter in {**backbone_tensors(found), **delta_parameters(found)}.items():
        if name in shared.frozen and name.startswith(inside):
            parameter.requires_grad_(True)
            shared.frozen.discard(name)


# --------------------------------------------------------------------------------------- state dict
class StateDictHook:
    """Runs after `state_dict()` of a backbone that carries deltas.

    It keeps only what trains, if `freeze_module(set_state_dict=True)` asked for that, and says what
    becomes of the deltas when transformers' `save_pretrained` asked for the state.
    """

    def __init__(self, shared: Shared, on_root: bool) -> None:
        self.shared, self.on_root = shared, on_root

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, _meta: Any) -> None:
        slotted = _slots(module, prefix)
        deltas = {key for key in state if key.startswith(slotted)}
        if self.shared.only_trainable:
            trains = {
                f"{prefix}{name}"
                for name, parameter in module.named_parameters(remove_duplicate=False)
                if parameter.requires_grad
            }
            for key in [k for k in state if k.startswith(prefix)]:
                if key not in trains and key not in deltas:
                    del state[key]
        if deltas and _for_save_pretrained():
            warnings.warn(
                f"{self._written(module, len(deltas))}, and from_pretrained will drop the deltas. "
                f"Save a delta with delta.save_finetuned(folder); {_plain_advice(module)}",
                UnsavedWarning,
                stacklevel=2,
            )

    def _written(self, module: nn.Module, deltas: int) -> str:
        """What save_pretrained puts into the file."""
        name = type(module).__name__
        if not self.shared.only_trainable:
            return f"save_pretrained writes the backbone and {deltas} delta tensors of {name}"
        return (
            f"save_pretrained writes {deltas} delta tensors and what else trains of {name}: the "
            "backbone is not in the file, as freeze_module(set_state_dict=True) asked"
        )


def _plain_advice(module: nn.Module) -> str:
    """How to save a plain model instead."""
    stacks = (stack_of(child) for child in module.modules())
    if any(stack is not None and stack.merged() for stack in stacks):
        return (
            "they are merged into the weights: to save the plain model with them in it, save "
            "composition(model).to_backbone()"
        )
    return "to save the plain backbone, detach the deltas first"


def _slots(module: nn.Module, prefix: str) -> tuple[str, ...]:
    """The prefixes of all delta keys under `module`."""
    return tuple(
        f"{prefix}{name}.{SLOT}." if name else f"{prefix}{SLOT}."
        for name, child in module.named_modules(remove_duplicate=False)
        if stack_of(child) is not None
    )


def _for_save_pretrained() -> bool:
    """Whether transformers' save_pretrained asked for the state, and not for Trainer's checkpoints,

    whose deltas `resume_from_checkpoint` and `load_best_model_at_end` do restore.
    """
    names = set()
    frame = sys._getframe(1)
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return "save_pretrained" in names and "_save_checkpoint" not in names


def state_hook(module: nn.Module) -> StateDictHook | None:
    """The hook on `module`, if there is one."""
    hooks = module._state_dict_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, StateDictHook)), None)


def all_inside(model: nn.Module) -> list[Record] | None:
    """The deltas inside `model`, in order, or None where only a look at its modules can tell.

    One that went along when somebody replaced its modules is among them.
    """
    hook = state_hook(model)
    if hook is None or not hook.on_root:
        return None
    # Those of another backbone may have come with a module that was put into this one.
    if len(record.BACKBONES) > 1:
        return None
    return sorted(hook.shared.records, key=lambda record: record.place)


def watch_state(found: Survey, shared: Shared) -> None:
    """Put the hook on the backbone, and on the transformers models inside a wrapping module."""
    wanted = [found.root]
    if not hasattr(found.root, "save_pretrained"):
        outer = [n for n, module in found.modules.items() if hasattr(module, "save_pretrained")]
        wanted += [found.modules[n] for n in outer if not (set(ancestors(n)) - {n}) & set(outer)]
    for module in wanted:
        if state_hook(module) is None:
            hook = StateDictHook(shared, module is found.root)
            module.register_state_dict_post_hook(hook)


def unwatch_state(found: Survey) -> None:
    """Take the hooks away."""
    for module in found.modules.values():
        hooks = module._state_dict_hooks
        for key in [k for k, hook in hooks.items() if isinstance(hook, StateDictHook)]:
            del hooks[key]
