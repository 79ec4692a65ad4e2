"""A hook on the state dict of a backbone that carries deltas."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from .._backbone.backbone import Backbone
from .._layers import record as records
from .._layers.record import PICKLED, TRAINED, Record, Shared
from .._sites.stack import stack_of
from ..errors import UnsavedWarning, warn
from ..names import SLOT, ancestors, dotted, join
from .buffers import named, trains_in_place

# True while `save_pretrained` writes a plain backbone: no state dict has deltas, or lacks a tensor.
PLAIN: ContextVar[bool] = ContextVar("plain", default=False)
MARK = "opendelta"  # in the metadata of a state dict that lacks what does not train: its keys
DCP = "_get_model_state_dict"  # by which torch takes a model's state dict for its checkpoints
PEFT = "get_peft_model_state_dict"  # by which PEFT takes its own tensors out of a state dict


class BackboneState(OrderedDict[str, Any]):
    """A state dict that is whole, and that lacks frozen tensors of the backbone once it is pickled.

    So `torch.save(model.state_dict(), file)` writes a small file, a plain `OrderedDict`. Copies
    are whole.
    """

    def __init__(self, state: OrderedDict[str, Any], frozen: Iterable[str] = ()) -> None:
        self.frozen: set[str] = set()
        super().__init__(state)
        self._metadata = getattr(state, "_metadata", OrderedDict())
        self.frozen = set(frozen)

    def __setitem__(self, key: str, value: Any) -> None:
        self.frozen.discard(key)  # what a user puts in is pickled
        super().__setitem__(key, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        small = OrderedDict((key, self[key]) for key in self if key not in self.frozen)
        of_root = {**self._metadata.get("", {}), **({MARK: list(small)} if self.frozen else {})}
        small._metadata = OrderedDict({**self._metadata, "": of_root})  # type: ignore[attr-defined]
        return small.__reduce_ex__(protocol)

    def copy(self) -> BackboneState:
        return BackboneState(self, self.frozen)

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> BackboneState:
        twin = OrderedDict((key, copy.deepcopy(value, memo)) for key, value in self.items())
        twin._metadata = copy.deepcopy(self._metadata, memo)  # type: ignore[attr-defined]
        return BackboneState(twin, self.frozen)


class StateDictHook:
    """Runs after `state_dict()` of a backbone that carries deltas, or of a model inside it.

    On the backbone it leaves out what does not train, as `freeze_module(set_state_dict=...)` asked.
    In `save_pretrained` it leaves out the deltas.
    """

    _from_public_api = False  # so that torch takes the dict that it returns

    def __init__(self, shared: Shared, on_root: bool) -> None:
        self.shared, self.on_root = shared, on_root

    def __call__(
        self, module: nn.Module, state: OrderedDict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> BackboneState | None:
        if PLAIN.get():
            for key in delta_keys(module, state, prefix):
                del state[key]
            return None
        if not self.on_root:
            return None
        small = self.shared.in_state_dict
        if small == TRAINED and not _torch_leaves_out():
            left_out = frozen(module, state, prefix)
            for key in left_out:
                del state[key]
            if left_out:
                inside = [key for key in state if key.startswith(prefix)]
                metadata[MARK] = [key.removeprefix(prefix) for key in inside]
        callers = {frame.f_code.co_name for frame in frames()}
        if _for_save_pretrained(callers) and (deltas := delta_keys(module, state, prefix)):
            fate = (
                f"writes {len(deltas)} delta tensors into its file, and from_pretrained drops them"
            )
            if PEFT in callers:
                fate = f"leaves out {len(deltas)} delta tensors"
            warn(
                f"save_pretrained of a model around this {type(module).__name__} {fate}. Save the "
                "deltas with composition(model).save(folder)",
                UnsavedWarning,
            )
        if small == PICKLED and not prefix:
            return BackboneState(state, frozen(module, state, prefix))
        return None


def frozen(backbone: nn.Module, state: Iterable[str], prefix: str = "") -> list[str]:
    """Return the keys in `state`, of `backbone`, of what does not train and is no delta's.

    A key that is in none of its modules is of somebody's own, such as of a hook that renames keys.
    """
    kept = {f"{prefix}{name}" for name in _trained(backbone)}
    kept.update(delta_keys(backbone, state, prefix))
    inside = {name for name, _ in backbone.named_modules(remove_duplicate=False) if name}
    own = {*backbone._parameters, *backbone._buffers, "_extra_state"}
    keys = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    known = [key for key in keys if key in own or inside & {*ancestors(key)}]
    return [f"{prefix}{key}" for key in known if f"{prefix}{key}" not in kept]


def _trained(backbone: nn.Module) -> Iterator[str]:
    """Yield the names of the parameters that train, and of the buffers beside them."""
    hook = state_hook(backbone)
    kept = named(hook.shared.records) if hook is not None else set()
    for name, part in backbone.named_modules(remove_duplicate=False):
        yield from (join(name, k) for k, p in part._parameters.items() if _trains(p))
        trains = trains_in_place(part)
        buffers = [join(name, key) for key in part._buffers]
        yield from (key for key in buffers if trains or kept & {"", *ancestors(key)})


def _trains(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad


def delta_keys(module: nn.Module, state: Iterable[str], prefix: str = "") -> set[str]:
    """Return the keys in `state` of the tensors of all deltas under `module`."""
    slots = tuple(
        prefix + dotted(join(name, SLOT))
        for name, child in module.named_modules(remove_duplicate=False)
        if stack_of(child) is not None
    )
    return {key for key in state if key.startswith(slots)}


def _for_save_pretrained(callers: Collection[str]) -> bool:
    """True in a `save_pretrained` that is not ours, but for a checkpoint that Trainer reads back.

    `resume_from_checkpoint` and `load_best_model_at_end` restore the deltas of such checkpoints.
    """
    return "save_pretrained" in callers and "_save_checkpoint" not in callers


def _torch_leaves_out() -> bool:
    """True in torch's `get_model_state_dict`, if it takes out itself what is frozen."""
    infos = (frame.f_locals.get("info") for frame in frames() if frame.f_code.co_name == DCP)
    return any(getattr(info, "ignore_frozen_params", False) for info in infos)


def frames() -> Iterator[Any]:
    """Yield the frames of the calls that are running, the last call first."""
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back  # type: ignore[assignment]


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
    """Put the hook on the backbone, and on the models in it that have a `save_pretrained`."""
    for module in (backbone.model, *saveable(backbone)):
        if state_hook(module) is None:
            module._register_state_dict_hook(StateDictHook(shared, module is backbone.model))


def saveable(backbone: Backbone) -> list[nn.Module]:
    """Return the modules of the backbone, itself too, that have a `save_pretrained`."""
    return [m for m in backbone.modules.values() if hasattr(type(m), "save_pretrained")]


def unwatch_state(backbone: Backbone) -> None:
    """Take the hooks away."""
    for module in backbone.modules.values():
        hooks = module._state_dict_hooks
        for key in [k for k, hook in hooks.items() if isinstance(hook, StateDictHook)]:
            del hooks[key]
