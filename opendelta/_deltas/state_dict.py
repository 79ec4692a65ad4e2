"""A hook on the state dict of a backbone that carries deltas."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .._backbone.backbone import Backbone
from .._layers import record as records
from .._layers.record import Record, Shared
from .._sites.stack import stack_of
from ..errors import UnsavedWarning, warn
from ..names import SLOT, ancestors, dotted, join
from .buffers import named, trains_in_place

# Functions of a model and a state dict of another library: they return one with our names of the
# deltas' tensors, or the same object if there are none. `interop`, above, adds them.
TRANSLATORS: list[Callable[[nn.Module, dict[str, Any]], dict[str, Any]]] = []


class LoadHook:
    """Runs before `load_state_dict()` of a backbone that carries deltas: it translates names."""

    def __call__(
        self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any, **__: Any
    ) -> None:
        inside = {key: value for key, value in state.items() if key.startswith(prefix)}
        own = {key.removeprefix(prefix): value for key, value in inside.items()}
        for translate in TRANSLATORS:
            new = translate(module, own)
            if new is not own:
                for key in inside:
                    del state[key]
                state.update({f"{prefix}{key}": value for key, value in new.items()})
                return


class StateDictHook:
    """Runs after `state_dict()` of a backbone that carries deltas.

    After `freeze_module(set_state_dict=True)` it keeps only tensors that train, buffers of what
    trains, and the deltas' tensors. If transformers' `save_pretrained` asked for the state, it
    warns that the deltas will be lost.
    """

    def __init__(self, shared: Shared, on_root: bool) -> None:
        self.shared, self.on_root = shared, on_root

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, _meta: Any) -> None:
        slotted = _slots(module, prefix)
        deltas = {key for key in state if key.startswith(slotted)}
        if self.shared.only_trainable:
            trains = {f"{prefix}{name}" for name in self._trained(module)}
            for key in [k for k in state if k.startswith(prefix)]:
                if key not in trains and key not in deltas:
                    del state[key]
        if deltas and _for_save_pretrained():
            warn(
                f"{self._written(module, len(deltas))}, and from_pretrained will drop the deltas. "
                f"Save a delta with delta.save_finetuned(folder); {_plain_advice(module)}",
                UnsavedWarning,
            )

    def _trained(self, module: nn.Module) -> Iterator[str]:
        """Yield the names of the parameters that train, and of the buffers beside them."""
        kept = named(self.shared.records) if self.on_root else set()
        for name, part in module.named_modules(remove_duplicate=False):
            yield from (join(name, k) for k, p in part._parameters.items() if _trains(p))
            trains = trains_in_place(part)
            buffers = [join(name, key) for key in part._buffers]
            yield from (key for key in buffers if trains or kept & {"", *ancestors(key)})

    def _written(self, module: nn.Module, deltas: int) -> str:
        """Return a text about the tensors that save_pretrained writes into the file."""
        name = type(module).__name__
        if not self.shared.only_trainable:
            return f"save_pretrained writes the backbone and {deltas} delta tensors of {name}"
        return (
            f"save_pretrained writes {deltas} delta tensors and what else trains of {name}: the "
            "backbone is not in the file, as freeze_module(set_state_dict=True) asked"
        )


def _trains(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _plain_advice(module: nn.Module) -> str:
    """Return the advice how to save a plain model instead."""
    stacks = (stack_of(child) for child in module.modules())
    if any(stack is not None and stack.merged() for stack in stacks):
        return (
            "they are merged into the weights: to save the plain model with them in it, save "
            "composition(model).to_backbone()"
        )
    return "to save the plain backbone, detach the deltas first"


def _slots(module: nn.Module, prefix: str) -> tuple[str, ...]:
    """Return the prefixes of all delta keys under `module`."""
    return tuple(
        prefix + dotted(join(name, SLOT))
        for name, child in module.named_modules(remove_duplicate=False)
        if stack_of(child) is not None
    )


def _for_save_pretrained() -> bool:
    """True if transformers' save_pretrained asked for the state, except for Trainer's checkpoints.

    `resume_from_checkpoint` and `load_best_model_at_end` restore the deltas of such checkpoints.
    """
    names = set()
    frame = sys._getframe(1)
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return "save_pretrained" in names and "_save_checkpoint" not in names


def state_hook(module: nn.Module) -> StateDictHook | None:
    """Return the hook on `module`, or None."""
    hooks = module._state_dict_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, StateDictHook)), None)


def all_inside(model: nn.Module) -> list[Record] | None:
    """Return the deltas inside `model` in order, without a walk over its modules.

    A delta whose modules were replaced since is among them. The result is None if only a walk over
    the modules can find the deltas.
    """
    hook = state_hook(model)
    if hook is None or not hook.on_root:
        return None
    # Deltas of another backbone may be on a module that was put into this one.
    if len(records.BACKBONES) > 1:
        return None
    return sorted(hook.shared.records, key=lambda record: record.rank)


def watch_state(backbone: Backbone, shared: Shared) -> None:
    """Put the hook on the backbone, and on transformers models inside it if it is none itself."""
    wanted = [backbone.model]
    if not hasattr(backbone.model, "save_pretrained"):
        outer = [n for n, module in backbone.modules.items() if hasattr(module, "save_pretrained")]
        wanted += [backbone.modules[n] for n in outer if not (set(ancestors(n)) - {n}) & set(outer)]
    for module in wanted:
        if state_hook(module) is None:
            hook = StateDictHook(shared, module is backbone.model)
            module.register_state_dict_post_hook(hook)
    if not any(_is_load_hook(hook) for hook in _load_hooks(backbone.model).values()):
        backbone.model.register_load_state_dict_pre_hook(LoadHook())


def unwatch_state(backbone: Backbone) -> None:
    """Take the hooks away."""
    for module in backbone.modules.values():
        hooks = module._state_dict_hooks
        for key in [k for k, hook in hooks.items() if isinstance(hook, StateDictHook)]:
            del hooks[key]
    before = _load_hooks(backbone.model)
    for key in [k for k, hook in before.items() if _is_load_hook(hook)]:
        del before[key]


def _load_hooks(module: nn.Module) -> dict[int, Any]:
    return module._load_state_dict_pre_hooks


def _is_load_hook(hook: Any) -> bool:
    """True for torch's wrapper around a `LoadHook`."""
    return isinstance(getattr(hook, "hook", None), LoadHook)
