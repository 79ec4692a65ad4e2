"""Counting parameters, noticing layers that never ran, and what is left on a backbone."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import freezing
from .addressing import Survey, survey, unwrapped
from .errors import DeltaError, PristineError, UnreachedWarning, called
from .layers import is_sharded
from .record import SLOT
from .shapes import PROBING
from .site import plain_class, stack_of


@dataclass(frozen=True)
class Statistics:
    """Parameter counts of a backbone with its deltas; a tied weight counts once."""

    total_parameters: int
    trainable_parameters: int
    delta_parameters: int

    @property
    def trainable_ratio(self) -> float:
        """Share of all parameters that train."""
        return self.trainable_parameters / max(1, self.total_parameters)

    @property
    def delta_ratio(self) -> float:
        """Share of all parameters that belong to deltas."""
        return self.delta_parameters / max(1, self.total_parameters)


def statistics(model: nn.Module) -> Statistics:
    """Count the parameters of `model`, deltas included."""
    parameters = list(model.parameters())
    deltas = freezing.delta_parameters(survey(model))
    return Statistics(
        total_parameters=sum(p.numel() for p in parameters),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        delta_parameters=sum(p.numel() for p in {id(p): p for p in deltas.values()}.values()),
    )


# -------------------------------------------------------------------------------------- never fired
def unreached(model: nn.Module) -> list[str]:
    """The active delta layers that have not run yet outside of compiled code, by full name."""
    return unreached_in(survey(model))


def unreached_in(found: Survey) -> list[str]:
    """The same, of a backbone that was walked over before."""
    return [*_silent(found), *_lost(found)]


def _silent(found: Survey, compiled: bool = True) -> list[str]:
    """The active layers that have not run; without `compiled`, but those in compiled code."""
    return [
        f"{where}.{SLOT}.{name}".lstrip(".")
        for where, name, layer in found.layers()
        if layer.record.active and name not in found.stacks[where].ran
        if not found.stacks[where].holds(name)
        if compiled or not _in_compiled(found, where)
    ]


def _in_compiled(found: Survey, where: str) -> bool:
    return any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in found.chain(where)
    )


def _lost(found: Survey) -> list[str]:
    """The layers that went along when somebody put another module in the place of theirs."""
    there: dict[int, list[str]] = {}
    for where, _, layer in found.layers():
        there.setdefault(id(layer.record), []).append(f".{unwrapped(where)}")
    missing = []
    for record in found.records():
        own = there[id(record)]
        if len(own) == len(record.sites):
            continue
        for name in sorted(record.sites):
            # A name is relative to the module through which the delta was attached.
            if not any(w.endswith(f".{name}") or f".{name}".endswith(w) for w in own):
                missing.append(f"{name}.{SLOT}.{record.name}".lstrip("."))
    return missing


class FirstForward:
    """After the first whole forward of a backbone: names the active layers that did not run."""

    def __call__(self, model: nn.Module, _args: Any, _output: Any) -> None:
        if torch.compiler.is_compiling() or PROBING.get():
            return
        found = survey(model)
        unwatch_forward(found)
        missed = [*_silent(found, compiled=False), *_lost(found)]
        if missed:
            shown = ", ".join(missed[:3]) + (", ..." if len(missed) > 3 else "")
            warnings.warn(
                f"{len(missed)} delta layers did not run in the first forward of "
                f"{type(model).__name__}: {shown}. If the parent reads the module's weight instead "
                "of calling it, choose the parent, or pass reads=True; if the module was replaced "
                "since, attach anew; if this forward skipped it (experts, layer drop), all is well",
                UnreachedWarning,
                stacklevel=2,
            )


def watch_forward(found: Survey) -> None:
    """Check the backbone's next whole forward."""
    unwatch_forward(found)
    found.root.register_forward_hook(FirstForward())


def unwatch_forward(found: Survey) -> None:
    """Take the check away."""
    for module in found.modules.values():
        hooks = module._forward_hooks
        for key in [k for k, hook in hooks.items() if isinstance(hook, FirstForward)]:
            del hooks[key]


# ----------------------------------------------------------------------------------------- pristine
# No trace of a delta: accelerate, and so Trainer, leaves it on each model that it prepares.
MARKER = "_is_accelerate_prepared"


def _bits(tensor: Tensor) -> str:
    if is_sharded(tensor):
        tensor = tensor.to_local()
    if tensor.device.type == "meta":
        return "meta"
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=16).hexdigest()


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
    """What `assert_pristine(model, like=...)` compares: classes, attributes, flags, hashed bits."""
    return {name: _facts(module) for name, module in model.named_modules(remove_duplicate=False)}


def _called(name: str, module: nn.Module) -> str:
    return f"{called(name)} ({type(module).__name__})"


def assert_pristine(model: nn.Module, like: dict[str, dict[str, Any]] | None = None) -> None:
    """Raise unless `model` shows no trace of any delta.

    Args:
        like: a `snapshot` taken before the first delta; then classes, attributes, children, hooks,
            `requires_grad` flags, the training flag and all bits must equal it.

    Raises:
        PristineError: names the module and what is left of a delta.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        stack = stack_of(module)
        if stack is not None and len(stack):
            raise PristineError(f"{_called(name, module)} carries {', '.join(stack)}; detach first")
    for name, module in modules.items():
        if plain_class(module) is not None:
            raise PristineError(f"{_called(name, module)} still has the class of a site")
        hooks = [*module._state_dict_hooks.values(), *module._forward_hooks.values()]
        if left := [h for h in hooks if isinstance(h, freezing.StateDictHook | FirstForward)]:
            raise PristineError(f"{_called(name, module)} still has the hook {left[0]!r}")
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
                    f"{_called(name, modules[name])}: {what} {_change(like[name][what], value)}"
                )


def _change(was: Any, now: Any) -> str:
    """What is other in `now`, in words; of lists and mappings only the items that differ."""
    if isinstance(now, list) and set(was) != set(now):
        parts = {"lost": sorted(set(was) - set(now)), "got": sorted(set(now) - set(was))}
        return " and ".join(f"{verb} {names}" for verb, names in parts.items() if names)
    if isinstance(now, dict) and was.keys() == now.keys():
        return f"changed: {', '.join(key for key in now if now[key] != was[key])}"
    return f"was {was!r} and is {now!r}"
