"""Copy a backbone for a run on shapes, so that other threads never see what the run puts on it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._modules import wrappers
from .._modules.holding import held_by, is_foreign
from . import sharding
from .backbone import Backbone

TRIES = 3


class _Sharing(TorchFunctionMode):
    """Inside, a copy of a tensor is the tensor itself."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.__deepcopy__, Tensor.clone):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def apart(backbone: Backbone) -> Iterator[Backbone]:
    """Yield a copy of a backbone with the same tensors, or itself if it cannot be copied.

    It cannot if the ranks of a job share it, if other objects than modules keep its modules in a
    closure, or if something on it refuses to be copied.
    """
    model = _copied(backbone.model) if _can_be_copied(backbone) else None
    if model is None:
        yield backbone
        return
    twin = replace(Backbone.of(model), samples=backbone.samples)
    try:
        yield twin
    finally:
        for module in [*model.modules()]:  # they hold each other, and the tensors, for long
            module.__dict__.clear()


def _can_be_copied(backbone: Backbone) -> bool:
    modules = backbone.model.modules()
    parts = {id(module) for module in backbone.modules.values()}
    return not sharding.is_distributed() and not any(
        isinstance(module, torch.jit.ScriptModule)
        or ("forward" in module.__dict__ and wrappers.closes_over(module, parts))
        for module in modules
    )


def _copied(model: nn.Module) -> nn.Module | None:
    for _ in range(TRIES):  # another thread may change an attribute meanwhile
        try:
            with _Sharing():
                return copy.deepcopy(model, _kept(model))
        except Exception:  # whatever an object on a module raises
            continue
    return None


def _kept(model: nn.Module) -> dict[int, Any]:
    """Return {id: object} of what a copy shares: tensors, hooks, and what holds no module of it.

    Our own hooks know the deltas of their model, so that a copy has its own.
    """
    modules = [*model.modules()]
    parts = {id(module) for module in modules}
    kept: dict[int, Any] = {}
    for module in modules:
        own = module.__dict__
        for key, value in own.items():
            if key in ("_parameters", "_buffers"):
                kept.update({id(tensor): tensor for tensor in value.values()})
            elif "_hooks" in key and isinstance(value, dict):
                hooks = [hook for hook in value.values() if not _is_of_model(hook, parts)]
                kept.update({id(hook): hook for hook in hooks})
            elif is_foreign(value) and not held_by([value]) & parts:
                kept[id(value)] = value
    return kept


def _is_of_model(hook: Any, parts: set[int]) -> bool:
    own = hook.__self__ if isinstance(hook, MethodType) else hook
    return id(own) in parts or type(own).__module__.startswith("opendelta.")
