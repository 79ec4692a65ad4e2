"""Put back what a forward changes in a model: buffers, parts, modes, hooks, and whole weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .._backbone.backbone import Backbone
from .._modules.hooks import is_users
from .._modules.process import kept_random
from .._modules.tensors import is_dense, is_partitioned

PACKED = 2**20  # a larger buffer of whole numbers holds packed weights: no forward changes them


@contextlib.contextmanager
def put_back(backbone: Backbone) -> Iterator[None]:
    """Put back what the block changes in a model, and random number generators.

    What is written into a parameter stays.
    """
    modules = [m for m in backbone.model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    before = [_remembered(module) for module in modules]
    tables = [(m._buffers, k, b) for m in modules for k, b in m._buffers.items()]
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
                    if buffer.layout is not torch.strided or not torch.equal(buffer, copy):
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
    parameters = [p for p in parameters if p.is_leaf]  # others are given by functional_call
    had = [(p.requires_grad, p.grad, p.data) for p in parameters]
    tables = [(table, {*table}) for table in (module._parameters, module._buffers)]
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
        for parameter, (trained, grad, data) in zip(parameters, had, strict=True):
            if _is_replaced(parameter, data):
                parameter.data = data
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
            if parameter.grad is not grad:
                parameter.grad = grad
        for table, known in tables:
            for key in [key for key in table if key not in known]:
                del table[key]
        for table, known in hooks:
            for key in [key for key in table if key not in known and is_users(table[key])]:
                del table[key]

    return undo


def _is_replaced(parameter: nn.Parameter, data: Tensor) -> bool:
    """True if a parameter has other memory than its `data` before, and nobody shards it."""
    if type(parameter) is not nn.Parameter or is_partitioned(parameter) or not is_dense(data):
        return False
    now = parameter.data
    same = now.data_ptr() == data.data_ptr() and now.stride() == data.stride()
    return not same or now.shape != data.shape
