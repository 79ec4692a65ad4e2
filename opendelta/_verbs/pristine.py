"""Find traces of deltas on a backbone."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from .._deltas.first_forward import FirstForward
from .._deltas.pretrained import SavePretrained
from .._deltas.state_dict import StateDictHook
from .._modules.tensors import held_in, is_lazy
from .._sites.stack import stack_of
from .._sites.swap import plain_class
from ..errors import DeltaError, PristineError, quoted
from ..names import SLOT

# This is no trace of a delta: accelerate, and so Trainer, sets it on each model that it prepares.
MARKER = "_is_accelerate_prepared"


def _bits(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    if is_lazy(tensor):
        return "lazy"
    bits = hashlib.blake2b(digest_size=16)
    for part in held_in(tensor):
        if isinstance(part, Tensor):
            part = part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        bits.update(part if isinstance(part, bytes) else part.encode())
    return bits.hexdigest()


def _hooks(module: nn.Module) -> dict[str, int]:
    tables = {k: v for k, v in module.__dict__.items() if "_hooks" in k and isinstance(v, dict)}
    return {name: len(table) for name, table in tables.items()}


def _facts(module: nn.Module) -> dict[str, Any]:
    parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
    return {
        "class": type(module),
        "attributes": sorted(module.__dict__.keys() - {MARKER}),
        "children": [name for name, _ in module.named_children()],
        "hooks": _hooks(module),
        "requires_grad": {k: p.requires_grad for k, p in parameters.items()},
        "values": {k: _bits(t) for k, t in (parameters | buffers).items()},
        "training": module.training,
    }


def snapshot(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return classes, attributes, flags and hashes for `assert_pristine(model, like=...)`."""
    return {name: _facts(module) for name, module in model.named_modules(remove_duplicate=False)}


def _described(name: str, module: nn.Module) -> str:
    return f"{quoted(name)} ({type(module).__name__})"


def assert_pristine(model: nn.Module, like: dict[str, dict[str, Any]] | None = None) -> None:
    """Raise unless `model` shows no trace of any delta.

    Args:
        like: a `snapshot` taken before the first delta; then classes, attributes, children, hooks,
            `requires_grad` flags, the training flag and all bits must equal it.

    Raises:
        PristineError: a trace is left; the message names the module and the trace.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        stack = stack_of(module)
        if stack is not None and len(stack):
            raise PristineError(
                f"{_described(name, module)} carries {', '.join(stack)}; detach first"
            )
    for name, module in modules.items():
        if plain_class(module) is not None:
            raise PristineError(f"{_described(name, module)} still has the class of a site")
        hooks = [*module._state_dict_hooks.values(), *module._forward_hooks.values()]
        hooks += module.__dict__.values()
        if left := [
            h for h in hooks if isinstance(h, StateDictHook | FirstForward | SavePretrained)
        ]:
            raise PristineError(f"{_described(name, module)} still has the hook {left[0]!r}")
    if like is None:
        return
    if not isinstance(like, dict):
        raise DeltaError(
            f"like= takes what opendelta.snapshot(model) gave, not a {type(like).__name__}"
        )
    now = snapshot(model)
    if now.keys() != like.keys():
        own = any(f".{SLOT}." in f".{name}." for name in like.keys() - now.keys())
        raise PristineError(
            f"modules came or went: {sorted(now.keys() ^ like.keys())[:5]}"
            + "; the snapshot was taken while deltas were attached: take it before" * own
        )
    for name, facts in now.items():
        for what, value in facts.items():
            if value != like[name][what]:
                raise PristineError(
                    f"{_described(name, modules[name])}: {what} {_change(like[name][what], value)}"
                )


def _change(was: Any, now: Any) -> str:
    """Return the change in words; for lists and mappings only the items that differ."""
    if isinstance(now, list) and set(was) != set(now):
        parts = {"lost": sorted(set(was) - set(now)), "got": sorted(set(now) - set(was))}
        return " and ".join(f"{verb} {names}" for verb, names in parts.items() if names)
    if isinstance(now, dict) and was.keys() == now.keys():
        return f"changed: {', '.join(key for key in now if now[key] != was[key])}"
    return f"was {was!r} and is {now!r}"
