"""What delta layers cost: bytes for training, and FLOPs, counted on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .attention import PrefixLayer
from .bases import Beneath, BranchEnd, DeltaLayer, gated
from .layers import Conv2d, kind_of
from .prompting import PromptLayer


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs for deltas, without activations.

    Attributes:
        parameters: the values, those that do not train and buffers among them.
        gradients: of what trains.
        optimizer: its states of what trains, in the dtype of the parameter.
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of them together."""
        return self.parameters + self.gradients + self.optimizer


def memory_of(layers: Iterable[DeltaLayer], optimizer_states: int) -> Memory:
    """What `layers` need, for an optimizer with so many states a parameter."""
    values: dict[int, Tensor] = {}
    for layer in layers:
        values |= {id(tensor): tensor for tensor in (*layer.parameters(), *layer.buffers())}
    trained = sum(t.nbytes for t in values.values() if t.requires_grad)
    return Memory(sum(t.nbytes for t in values.values()), trained, optimizer_states * trained)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward: those of matrix products, 2 a multiply-add.

    Attributes:
        per_token: for each position that passes the module.
        per_forward: once, however many there are: what the layer computes from its parameters.
    """

    per_token: int
    per_forward: int


def flops_of(layer: DeltaLayer, module: nn.Module) -> Flops | None:
    """What `layer`, on the meta device, adds to a forward of `module`; None: it cannot be told."""
    try:
        if isinstance(layer, PrefixLayer):
            return _of_prefix(layer, module)
        if layer.flow in ("none", "instead") or isinstance(layer, BranchEnd | PromptLayer):
            return Flops(0, 0)
        kind = kind_of(module)
        if isinstance(kind, Conv2d):
            positions = _positions(kind)
            return Flops(_run(layer, module, 1) // positions, 0)
        two, three = _run(layer, module, 2), _run(layer, module, 3)
        return Flops(three - two, two - 2 * (three - two))
    except Exception:  # a method's own forward: it may want what is not known here
        return None


def _counted(call: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def _of_prefix(layer: PrefixLayer, module: nn.Module) -> Flops:
    made: list[tuple[Tensor, Tensor]] = []
    once = _counted(lambda: made.append(layer.keys_and_values()))
    rows, width = made[0][0].size(1), layer.heads.key + layer.heads.value
    queries = layer.heads.count * getattr(module, "num_key_value_groups", 1)
    return Flops(2 * rows * queries * width, once)


def _run(layer: DeltaLayer, module: nn.Module, length: int) -> int:
    """FLOPs of `layer` around a module that does nothing, for so many positions."""
    kind: Any = kind_of(module)
    dtype = next((p.dtype for p in layer.parameters() if p.is_floating_point()), None)
    like: dict[str, Any] = {"device": "meta", "dtype": dtype}
    width: int = kind.out_features if kind is not None else layer.width  # type: ignore[assignment]
    if isinstance(kind, Conv2d):
        x = torch.empty(1, kind.patch[0], *_side(kind), **like)
        out = kind.product(x, torch.empty(width, kind.in_features, **like))
    elif kind is not None and kind.name == "embedding":
        x = torch.zeros(1, length, dtype=torch.long, device="meta")
        out = torch.empty(1, length, width, **like)
    else:
        wide = layer.gate_width or getattr(kind, "in_features", 0) or width
        x = torch.empty(1, length, wide, **like)
        out = torch.empty(1, length, width, **like)
    bare = nn.Module()
    for name, parameter in module._parameters.items():
        if parameter is not None:
            bare.register_parameter(name, nn.Parameter(torch.empty(parameter.shape, **like)))
    call = Beneath(lambda *_: out, bare, []) if layer.sees_module else lambda *_: out
    if layer.gate is not None and not layer.gates_itself:
        return _counted(lambda: gated(layer, call, x))
    return _counted(lambda: layer(call, x))


def _side(kind: Conv2d) -> tuple[int, ...]:
    return tuple(8 * size for size in kind.patch[1:])


def _positions(kind: Conv2d) -> int:
    x = torch.empty(1, kind.patch[0], *_side(kind), device="meta")
    shape = kind.product(x, torch.empty(1, kind.in_features, device="meta")).shape
    return int(shape[-2] * shape[-1])
