"""Hooks on `load_state_dict()` of a backbone that carries deltas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import DeltaLoadError, listed
from .state_dict import MARK, delta_keys, frames, frozen

# Functions of a model and a state dict: they return one with our names of the deltas' tensors, or
# the same object if they have none to add. The rooms above add these functions.
TRANSLATORS: list[Callable[[nn.Module, dict[str, Any]], dict[str, Any]]] = []


class LoadHook:
    """Runs before and after `load_state_dict()` of a backbone that carries deltas."""

    def __init__(self) -> None:
        self.prefix = ""
        self.small: str | None = None  # a small dict is "marked" as such, or looks so: "unmarked"
        self.loaded: set[int] = set()  # ids of the tensors that the dict has values for

    def before(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *_: Any
    ) -> None:
        """Translate names, and refuse a strict loading that would leave deltas as they are.

        Raises:
            DeltaLoadError: tensors of deltas are missing. Nothing of the backbone is copied then.
        """
        self.prefix, self.small = prefix, None
        inside = {key: value for key, value in state.items() if key.startswith(prefix)}
        own = {key.removeprefix(prefix): value for key, value in inside.items()}
        for translate in TRANSLATORS:
            new = translate(module, own)
            if new is not own:
                for key in inside:
                    del state[key]
                state.update({f"{prefix}{key}": value for key, value in new.items()})
                own = new
                break
        tensors = module.state_dict(keep_vars=True)
        deltas = delta_keys(module, tensors)
        missing = deltas - own.keys()
        if own and missing and _is_strict():
            raise DeltaLoadError(
                f"load_state_dict: {len(missing)} of {len(deltas)} tensors of the deltas on this "
                f"{type(module).__name__} are missing: {listed(sorted(missing))}. If the state "
                "dict is of the plain backbone: load it before the deltas are attached, or with "
                "strict=False. Nothing was loaded"
            )
        self.loaded = {id(tensor) for key, tensor in tensors.items() if key in own}
        if MARK in metadata:
            self.small = "marked"
        elif not (missing or frozen(module, own)):
            self.small = "unmarked"

    def after(self, module: nn.Module, incompatible: Any) -> None:
        """Take what need not be there from the list of missing tensors.

        A small state dict that is marked lacks what did not train when it was made; another one
        what does not train now. A tied tensor has its values from another name.
        """
        missing, prefix = incompatible.missing_keys, self.prefix
        lacking = {key for key in missing if key.startswith(prefix)}
        if not lacking:
            return
        tensors = module.state_dict(prefix=prefix, keep_vars=True)
        meant = {key for key in lacking if id(tensors.get(key)) in self.loaded}
        if self.small == "marked":
            meant |= lacking - delta_keys(module, lacking, prefix)
        elif self.small:
            meant |= set(frozen(module, lacking, prefix))
        missing[:] = [key for key in missing if key not in meant]


def _is_strict() -> bool:
    """True in a call of torch's `load_state_dict(..., strict=True)`."""
    code = nn.Module.load_state_dict.__code__
    calls = (frame for frame in frames() if frame.f_code is code)
    return next((bool(call.f_locals["strict"]) for call in calls), False)


def watch_loading(model: nn.Module) -> None:
    """Put the hooks on the backbone."""
    if not any(_is_ours(hook) for hook in model._load_state_dict_post_hooks.values()):
        hook = LoadHook()
        model.register_load_state_dict_pre_hook(hook.before)
        model.register_load_state_dict_post_hook(hook.after)


def unwatch_loading(model: nn.Module) -> None:
    """Take the hooks away."""
    for hooks in (model._load_state_dict_pre_hooks, model._load_state_dict_post_hooks):
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]


def _is_ours(hook: Any) -> bool:
    """True for a method of a `LoadHook`, also in torch's wrapper around it."""
    return isinstance(getattr(getattr(hook, "hook", hook), "__self__", None), LoadHook)
