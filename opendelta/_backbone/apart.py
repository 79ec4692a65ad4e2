"""Copy a backbone for a run on shapes, so that other threads never see what the run puts on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from .._modules import wrappers
from .._modules.copies import copied, hooks_of, is_of_model
from .._modules.holding import closed_over, held_by
from . import sharding
from .backbone import Backbone


@contextlib.contextmanager
def apart(backbone: Backbone) -> Iterator[Backbone]:
    """Yield a copy of a backbone with the same tensors, or itself if it cannot be copied.

    It cannot if the ranks of a job share it; if a function or a hook would run the modules of the
    backbone from a copy, too; if deleting or copying one of its modules does more than that.
    """
    model = copied(backbone.model) if _can_be_copied(backbone) else None
    if model is None:
        yield backbone
        return
    try:
        twin = Backbone.of(model)
        yield replace(twin, samples=backbone.samples, before=backbone.before)
    finally:
        for module in [*model.modules()]:  # they hold each other, and the tensors, for long
            module.__dict__.clear()


def _can_be_copied(backbone: Backbone) -> bool:
    if sharding.is_distributed():
        return False
    modules = [*backbone.model.modules()]
    parts = {id(module) for module in modules}
    values = [value for module in modules for value in module.__dict__.values()]
    hooks = [hook for hook in hooks_of(modules) if not is_of_model(hook, parts)]
    bound = any(
        isinstance(module, torch.jit.ScriptModule)
        or hasattr(type(module), "__del__")
        or wrappers.closes_over(module, parts)
        for module in modules
    )
    return not bound and not closed_over(values) & parts and not held_by(hooks) & parts
