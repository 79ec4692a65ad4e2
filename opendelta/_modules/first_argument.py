"""Find out by one run whether a module multiplies its weight by the first argument of its call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from .facts import facts, remembered
from .faking import on_shapes
from .kinds import Kind, kind_of
from .probing import is_known
from .trials import without_values

_found: dict[tuple, str | None] = {}
BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def misfit(module: nn.Module, cls: type[nn.Module]) -> str | None:
    """Return in words why the first argument of a module's call is not its input; None: it may be.

    Only a forward of a class's own that needs several arguments, or names none, is looked at.

    Args:
        cls: the module's own class, without deltas.
    """
    kind = None if is_known(cls) else kind_of(module)
    names = None if kind is None else _needed(cls.forward)
    if kind is None or names is None or len(names) == 1:
        return None
    if not names:
        return "takes arguments of any name, and does not tell its input"
    known = facts(module)
    key = None if known is None else (cls.forward, kind, *known)
    name = remembered(_found, key, lambda: _multiplied(module, cls.forward, kind, names))
    if name in (None, names[0]):
        return None
    return f"takes its input as {name!r}, behind {names[0]!r}, which a delta would take for it"


def _needed(forward: Callable[..., Any]) -> list[str] | None:
    """Return the names of the arguments that every call has; None: the forward does not tell."""
    try:
        parameters = [*inspect.signature(forward).parameters.values()][1:]
    except (TypeError, ValueError):  # compiled by TorchScript, or written in C
        return None
    by_place = [p for p in parameters if p.kind in BY_PLACE]
    if not by_place and any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    needed = [p.name for p in by_place if p.default is p.empty]
    others = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return needed or ([] if others and not by_place else None)


class _Watch(TorchFunctionMode):
    """Note which of `given` is in one operation with `weight`."""

    def __init__(self, weight: Tensor, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.weight, self.given = weight, given
        self.index: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        if self.index is None and any(t is self.weight for t in operands):
            found = (n for n, each in enumerate(self.given) if any(t is each for t in operands))
            self.index = next(found, None)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _multiplied(
    module: nn.Module, forward: Callable[..., Any], kind: Kind, names: list[str]
) -> str | None:
    with on_shapes(module) as mode:
        try:
            made = without_values(module, mode)
            weight = made._parameters["weight"]
            assert weight is not None
            x = kind.example(3, weight.dtype)[0]
            given = [mode.empty(x.shape, x.dtype, weight.device) for _ in names]
            with _Watch(weight, given) as watch:
                forward(made, *given)
        except Exception:  # whatever a forward of somebody's own raises on such inputs
            return None
    return None if watch.index is None else names[watch.index]
