"""Copy modules with the same tensors, for runs that must leave nothing in what is copied."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..names import SLOT
from .holding import LARGEST, beside_tables, is_foreign, walk

TRIES = 3
MOST = 10_000  # objects that one on a module may hold, to be copied


class _Sharing(TorchFunctionMode):
    """Inside, a copy of a tensor is the tensor itself."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.__deepcopy__, Tensor.clone):
            return args[0]
        return func(*args, **(kwargs or {}))


def copied(model: nn.Module, layers: bool = True) -> nn.Module | None:
    """Return a copy of a module, with copies of those inside and of what they hold, but tensors.

    None: it cannot be copied, or its copy holds modules of the first one.

    Args:
        layers: the copy has copies of the layers on them, too; else None is in their place.
    """
    modules = [*model.modules()] if layers else [*_without_layers(model, {})]
    stacks = [] if layers else [m._modules[SLOT] for m in modules if SLOT in m._modules]
    for _ in range(TRIES):  # another thread may change an attribute meanwhile
        try:
            with _Sharing():
                kept = _kept(modules) | dict.fromkeys(map(id, stacks))
                copied = copy.deepcopy(model, kept)
        except Exception:  # whatever an object on a module raises
            continue
        return None if {*map(id, copied.modules())} & {*map(id, model.modules())} else copied
    return None


def _without_layers(module: nn.Module, seen: dict[int, nn.Module]) -> Iterable[nn.Module]:
    """Return a module and those inside, each once, but no layers on them."""
    if id(module) not in seen:
        seen[id(module)] = module
        for key, child in module._modules.items():
            if child is not None and key != SLOT:
                _without_layers(child, seen)
    return seen.values()


def _kept(modules: list[nn.Module]) -> dict[int, Any]:
    """Return {id: object} of what a copy shares: tensors, hooks, and what is not to be copied.

    Our own hooks know the deltas of their model, so that a copy has its own. It also has a copy of
    each object of somebody's own, in which a forward may keep something, if that is simple.
    """
    parts = {id(module) for module in modules}
    shared: list[Any] = [hook for hook in hooks_of(modules) if not is_of_model(hook, parts)]
    for module in modules:
        own = module.__dict__
        shared += [*own["_parameters"].values(), *own["_buffers"].values()]
    memo = {id(value): value for value in shared}
    for module in modules:
        for value in filter(is_foreign, module.__dict__.values()):
            if not isinstance(value, nn.Module) and not _is_simple(value, memo):
                memo[id(value)] = value
    return memo


def _is_simple(value: Any, memo: dict[int, Any]) -> bool:
    """True if an object can be copied and its copy deleted, which puts it into `memo`."""
    held = list(itertools.islice(walk([value], simple=True), MOST + 1))
    if len(held) > MOST or any(hasattr(type(each), "__del__") or _is_data(each) for each in held):
        return False
    try:
        copy.deepcopy(value, memo)
    except Exception:  # such as a lock
        return False
    return True


def _is_data(value: Any) -> bool:
    """True for a large array of numpy's, which may lie in a file."""
    is_array = is_foreign(value) and not isinstance(value, Tensor)
    return is_array and getattr(value, "nbytes", 0) > LARGEST


def computed_in(module: nn.Module) -> dict[int, Any]:
    """Return {id: copy} of the computed tensors that modules hold beside others, for a deep copy.

    The old weight_norm holds such, and lists of losses; torch copies none.
    """
    held = walk(beside_tables(module.modules()))
    computed = [v for v in held if isinstance(v, Tensor) and not v.is_leaf]
    return {id(tensor): tensor.detach().clone() for tensor in computed}


def hooks_of(modules: Iterable[nn.Module]) -> list[Any]:
    tables = [t for m in modules for key, t in m.__dict__.items() if "_hooks" in key]
    return [hook for table in tables if isinstance(table, dict) for hook in table.values()]


def is_of_model(hook: Any, parts: set[int]) -> bool:
    own = hook.__self__ if isinstance(hook, MethodType) else hook
    return id(own) in parts or type(own).__module__.startswith("opendelta.")
