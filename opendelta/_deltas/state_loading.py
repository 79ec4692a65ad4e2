"""Hooks on `load_state_dict()` of a backbone that carries deltas."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._sites.stack import MERGED, merge_mark, stack_of
from ..errors import DeltaLoadError, listed
from ..names import SLOT, join
from .state_dict import MARK, delta_keys, frames, frozen

# Functions of a model and a state dict: they return one with our names of the deltas' tensors, or
# the same object if they have none to add. The rooms above add these functions.
TRANSLATORS: list[Callable[[nn.Module, dict[str, Any]], dict[str, Any]]] = []
DELTA = re.compile(rf"(?:^|\.){SLOT}\.([^.]+)\.")  # in the key of a tensor of a delta
RESUMES = "_load_from_checkpoint", "_load_best_model"


class LoadHook:
    """Runs before and after `load_state_dict()` of a backbone that carries deltas."""

    def __init__(self) -> None:
        self.prefix = ""
        self.small = False  # the dict lacks what does not train
        self.held: list[str] | None = None  # its keys at the saving, if it was marked as small
        self.loaded: set[int] = set()  # ids of the tensors that the dict has values for

    def before(
        self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *_: Any
    ) -> None:
        """Translate names, and refuse a strict loading that would leave deltas as they are.

        Raises:
            DeltaLoadError: tensors of deltas are missing, or are of no delta here; other deltas are
                merged in it than here; or `assign=True` would leave tensors of the backbone without
                values. Nothing of the backbone is copied then.
        """
        self.prefix = prefix
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
        if own and missing and (_is_strict() or _resumes()):
            raise DeltaLoadError(
                f"load_state_dict: {len(missing)} of {len(deltas)} tensors of the deltas on this "
                f"{type(module).__name__} are missing: {listed(sorted(missing))}. "
                f"{_advice(own.keys() - deltas)}. Nothing was loaded"
            )
        if _is_strict():
            _check_unknown(module, own)
        for key in _checked_merges(module, own):
            del state[f"{prefix}{key}"]
        self.loaded = {id(tensor) for key, tensor in tensors.items() if key in own}
        self.held = metadata.get(MARK)
        first_names = dict(module.named_parameters())
        self.small = not missing and first_names.keys().isdisjoint(frozen(module, own))
        lacks = self.held is not None or self.small
        if lacks and metadata.get("assign_to_params_buffers") and _is_strict():
            _check_values(module, own)

    def after(self, module: nn.Module, incompatible: Any) -> None:
        """Take what need not be there from the list of missing tensors.

        A small state dict that is marked lacks what did not train when it was made; another one
        what does not train now. In a strict loading a tied tensor may have its values from another
        name. Tools that know what is tied load otherwise, and expect its names in the list.
        """
        missing, prefix = incompatible.missing_keys, self.prefix
        lacking = {key for key in missing if key.startswith(prefix)}
        if not lacking:
            return
        tensors = module.state_dict(prefix=prefix, keep_vars=True)
        tied = {key for key in lacking if id(tensors.get(key)) in self.loaded}
        meant = tied if _is_strict() else set()
        if self.held is not None:
            held = {f"{prefix}{key}" for key in self.held}
            meant |= lacking - delta_keys(module, lacking, prefix) - held
        elif self.small:
            meant |= set(frozen(module, lacking, prefix))
        missing[:] = [key for key in missing if key not in meant]


def _check_unknown(module: nn.Module, state: dict[str, Any]) -> None:
    """Raise if tensors of deltas in a state dict are of no delta of the model."""
    own = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    own.update(name for name, _ in module.named_buffers(remove_duplicate=False))
    if unknown := [key for key in state.keys() - own if DELTA.search(key)]:
        raise DeltaLoadError(
            f"load_state_dict: {len(unknown)} tensors in the state dict are of no delta on this "
            f"{type(module).__name__}: {listed(sorted(unknown))}. Attach these deltas first, or "
            "leave them out by strict=False. Nothing was loaded"
        )


def _checked_merges(module: nn.Module, state: dict[str, Any]) -> list[str]:
    """Return the keys in `state` of what says which deltas are merged.

    Raises:
        DeltaLoadError: others are merged here, so that weights would hold a change that acts beside
            them too, or lack it; or merged weights would not hold the changes of the given deltas.
    """
    marks, wrong = [], []
    for where, site in module.named_modules(remove_duplicate=False):
        stack = stack_of(site)
        if stack is None:
            continue
        mark = join(where, SLOT, MERGED)
        marks += [mark] * (mark in state)
        if any(join(where, key) in state for key in site._parameters):
            unlike = (state[mark].tolist() if mark in state else []) != merge_mark(stack)
        else:
            unlike = any(
                _differs(state.get(join(where, SLOT, name, key)), tensor)
                for name in stack.merged()
                for key, tensor in stack[name].state_dict().items()
            )
        if unlike:
            wrong.append(where)
    if wrong:
        raise DeltaLoadError(
            f"load_state_dict: in the state dict other deltas are merged into the weights of "
            f"{len(wrong)} modules than in this {type(module).__name__}, so that their changes "
            f"would count twice or be lost: {listed(wrong)}. Take it and load it while no delta is "
            "merged: composition(model).unmerge(). Nothing was loaded"
        )
    return marks


def _differs(given: Any, own: Tensor) -> bool:
    return given is not None and not torch.equal(given.to(own), own)


def _check_values(module: nn.Module, state: dict[str, Any]) -> None:
    """Raise if parameters without memory are to get none from a small state dict."""
    named = list(module.named_parameters(remove_duplicate=False))
    given = {id(parameter) for name, parameter in named if name in state}
    empty = [name for name, p in named if p.is_meta and id(p) not in given]
    if empty:
        raise DeltaLoadError(
            f"load_state_dict(assign=True): {len(empty)} parameters of this "
            f"{type(module).__name__} have no values, being on the meta device, and the state dict "
            f"has none for them: {listed(empty)}. It holds only what trains, because of "
            "freeze_module(set_state_dict=True): use freeze_module() with its defaults where a "
            "tool takes the state dict before it shards (cpu_ram_efficient_loading of accelerate)"
        )


def _advice(strangers: Iterable[str]) -> str:
    """Return what to do if deltas are missing in a state dict.

    Args:
        strangers: the keys in it that are no delta's of the model.
    """
    found = map(DELTA.search, strangers)
    if names := sorted({match[1] for match in found if match}):
        return f"It has tensors of {', '.join(names)}: attach the deltas by these names, with name="
    return (
        "If the state dict is of the plain backbone: load it before the deltas are attached, or "
        "with strict=False"
    )


def _resumes() -> bool:
    """True while transformers' Trainer loads a checkpoint, which it does not do strictly."""
    return any(frame.f_code.co_name in RESUMES for frame in frames())


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
