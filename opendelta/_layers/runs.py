"""Join consecutive layers of a stack to one pair of factors, and keep the pair inside `frozen()`.

Each forward joins the factors again. A kept copy could be wrong: fused optimizers and `.data`
change parameters, and torch does not count these changes. So a copy is kept only if the user says
that nothing changes; see `KeptFactors`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as modules

from ..errors import DeltaError
from . import low_rank
from .base import DeltaLayer
from .low_rank import LowRank, side_by_side


def pairs(acting: Sequence[DeltaLayer], start: int) -> list[LowRank]:
    """Return the factors of the layers from `start` on, up to the first that cannot run as one."""
    found: list[LowRank] = []
    if not low_rank.ENABLED or modules._has_any_global_hook():  # a hook must see each layer's call
        return found
    for index in range(start, len(acting)):
        layer: Any = acting[index]
        if not layer.runs_as_factors or layer.gate is not None or is_watched(layer.__dict__):
            break
        pair = layer.low_rank()
        if pair is None:
            break
        found.append(pair)
    return found


class KeptFactors:
    """The joined factors of the runs of one site, kept while one block of `frozen()` lasts.

    Args:
        dtype: the dtype in which the module computes; the factors are kept in it.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        # {layers from one on: (their states, the joined factors, number of layers, parameters)}
        self.runs: dict[tuple, tuple[list[tuple[float, bool]], list[LowRank], int, list]] = {}
        # {(layer, name of a tensor): (the tensor, torch's count of its changes, a copy)}
        self.sources: dict[tuple[DeltaLayer, str], tuple[Tensor, int, Tensor]] = {}
        self.made: tuple[list[Any], Any] = [], None
        self.late = False

    def run(self, acting: Sequence[DeltaLayer], start: int) -> tuple[list[LowRank], int]:
        """Return the joined factors of the run at `start`, and the number of layers in it.

        Raises:
            DeltaError: a gradient would have to reach the factors.
        """
        if torch._C._functorch.peek_interpreter_stack() is not None:  # in vmap and the like
            run = pairs(acting, start)
            return run, len(run)
        key = tuple(acting[start:])
        states = [(layer.record.scale, layer.training) for layer in acting[start:]]
        if key not in self.runs or self.runs[key][0] != states:
            run = pairs(acting, start)
            if any(pair.dropout for pair in run):
                return run, len(run)
            whole = [LowRank(*map(self._values, side_by_side(run, self.dtype)))] if run else run
            joined = acting[start : start + len(run)] if key not in self.runs else ()
            for layer, name, t in [(ly, *own) for ly in joined for own in _tensors_of(ly)]:
                if (layer, name) not in self.sources:
                    self.sources[layer, name] = t, _changes(t), t.detach().clone()
            parts = [part for layer in acting[start : start + len(run)] for part in layer.modules()]
            own = [(t, *item) for t in (p._parameters for p in parts) for item in t.items()]
            self.runs[key] = states, whole, len(run), own
        elif any(table[name] is not p for table, name, p in self.runs[key][3]):
            run = pairs(acting, start)  # with other parameters, as in functional_call
            return run, len(run)
        if torch.is_grad_enabled() and any(t.requires_grad for t, *_ in self.sources.values()):
            raise DeltaError(
                "frozen() keeps copies of the deltas' tensors, which no gradient reaches: run the "
                "model under torch.no_grad() inside it, or train outside of it"
            )
        return self.runs[key][1:3]

    def once(self, parts: list[Any], make: Callable[[list[Any]], Any]) -> Any:
        """Return `make(parts)`; call `make` again only for other parts.

        Args:
            parts: results of `run`.
        """
        known, made = self.made
        if len(known) != len(parts) or any(map(operator.is_not, known, parts)):
            made = make(parts)
            self.made = parts, made
        return made

    def forget(self, layer: DeltaLayer) -> None:
        """Drop the factors of a layer that is taken off."""
        self.late = self.changed()
        self.runs = {key: run for key, run in self.runs.items() if layer not in key}
        self.sources = {key: kept for key, kept in self.sources.items() if key[0] is not layer}
        self.made = [], None

    def changed(self) -> bool:
        """True if tensors changed since they were copied, even if their values are back.

        The values are compared too: torch counts no changes by fused optimizers and through
        `.data`.
        """
        now = {
            (layer, name): tensor
            for layer in {layer for layer, _ in self.sources}
            for name, tensor in _tensors_of(layer)
        }
        return self.late or any(
            key not in now or _changes(tensor) != count or not _same(now[key], copy)
            for key, (tensor, count, copy) in self.sources.items()
        )

    def _values(self, part: Any) -> Any:
        return part.detach().to(self.dtype) if isinstance(part, Tensor) else part


def _tensors_of(layer: DeltaLayer) -> Iterator[tuple[str, Tensor]]:
    yield from layer.named_parameters()
    yield from layer.named_buffers()


def _changes(tensor: Tensor) -> int:
    """Return torch's count of the changes of a tensor in place; 0 where it does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _same(one: Tensor, other: Tensor) -> bool:
    alike = (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
    return alike and torch.equal(one, other)


def is_watched(own: dict[str, Any]) -> bool:
    """True if a layer with these attributes has hooks or a replaced forward, which must run."""
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )
