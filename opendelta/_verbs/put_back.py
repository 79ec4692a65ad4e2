"""Put back what a forward changes in a model: buffers, parts, modes and hooks, but no weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .._backbone.backbone import Backbone
from .._modules.hooks import is_users
from .._modules.process import kept_random
from .._modules.tensors import is_lazy

PACKED = 2**20  # a larger buffer of whole numbers holds packed weights: no forward changes them


@contextlib.contextmanager
def put_back(backbone: Backbone) -> Iterator[None]:
    """Put back what the block changes in a model, and random number generators.

    Of its parameters it is whether they train. A lazy module that gets its weights stays so.
    """
    before = [_remembered(module) for module in backbone.model.modules()]
    tables = [(m._buffers, k, b) for m in backbone.model.modules() for k, b in m._buffers.items()]
    copies = {
        id(b): (b, b.detach().clone())
        for _, _, b in tables
        if b is not None and (b.is_floating_point() or b.numel() <= PACKED) and not b.is_meta
    }
    with kept_random():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, copy in copies.values():
                    if not torch.equal(buffer, copy):
                        buffer.copy_(copy)
            for table, key, was in tables:
                if table.get(key) is not was:
                    table[key] = was
            for undo in before:
                undo()


def _remembered(module: nn.Module) -> Callable[[], None]:
    """Return a function that gives a module the parts, mode and hooks that it has now."""
    own = module.__dict__
    children, training = dict(module._modules), module.training
    parameters = [p for p in module._parameters.values() if p is not None]
    trains = [p.requires_grad for p in parameters]
    hooks = [
        (table, {*table})
        for key, table in own.items()
        if key.endswith("_hooks") and table is not None
    ]

    def undo() -> None:
        if [*map(id, module._modules.values())] != [*map(id, children.values())]:
            module._modules.clear()
            module._modules.update(children)
        own["training"] = training
        for parameter, trained in zip(parameters, trains, strict=True):
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
        for table, known in hooks:
            for key in [key for key in table if key not in known and is_users(table[key])]:
                del table[key]

    return undo if not any(map(is_lazy, parameters)) else lambda: None
