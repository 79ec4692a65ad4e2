"""A block as it runs in one forward: its layer, with the deltas that act in it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SiteError
from .base import WITHIN, Acts, Call, DeltaLayer, Params
from .beneath import Beneath, Child
from .block import BlockLayer, Chosen
from .runs import pairs


class Bound:
    """A block at one site for one forward: its layer, with the children that act.

    To the other layers of the stack it looks like a layer.

    Args:
        children: (the child's place in the option `deltas`, its layer or what is bound of it).
        stack: the stack of the site; None: the block is only looked at.
    """

    is_block = True
    runs_as_factors = False
    handover = stand_in = None
    computes = True

    def __init__(
        self, layer: BlockLayer, children: list[tuple[int, Any]], stack: Any = None
    ) -> None:
        self.layer, self.children, self.stack = layer, children, stack
        self.numbers = [number for number, _ in children]
        self.takes: Tensor | None = None

    @property
    def record(self) -> Any:
        """Return the record of the block."""
        return self.layer.record

    @property
    def gate(self) -> Any:
        """Return the gate of the block."""
        return self.layer.gate

    @property
    def acts(self) -> Acts:
        """Return WITHIN if a delta in it acts inside the module, else AFTER."""
        within = any(child.acts is Acts.WITHIN for _, child in self.children)
        return Acts.WITHIN if within else Acts.AFTER

    @property
    def sees_module(self) -> bool:
        """True if a delta in it looks at the weights beneath."""
        return any(child.sees_module for _, child in self.children)

    @property
    def why_not(self) -> str:
        """Return why it may not fold."""
        if not self.layer.is_sum():
            return "its rule is no weighted sum"
        if not self.layer.constant:
            return "its weights depend on the input"
        stop = next((child for _, child in self.children if not child.folds), None)
        return "" if stop is None else f"{stop.record.name!r} in it does not"

    @property
    def enters(self) -> bool:
        """True if what it adds goes into the module."""
        return all(child.enters for _, child in self.children)

    @property
    def is_product(self) -> bool:
        """True if it runs as one weighted pair of matrix products."""
        run = pairs([child for _, child in self.children], 0) if self.layer.weighs else []
        return len(run) == len(self.children) and not any(pair.dropout for pair in run)

    def for_rows(self, takes: Tensor) -> Bound:
        """Return the block with children of their own for the rows; see `Chosen.takes`."""
        own = Bound(self.layer, self.children, self.stack)
        own.takes = takes
        return own

    @property
    def training(self) -> bool:
        """Return the mode of the block's layer."""
        return self.layer.training

    def around(
        self, call: Call, module: nn.Module, acting: Sequence[Any], raw: bool = False
    ) -> Call:
        """Return `call` with the block around it; see `DeltaLayer.around`."""
        return functools.partial(self._run, call, module, acting, raw)

    def _run(
        self,
        call: Call,
        module: nn.Module,
        acting: Sequence[Any],
        raw: bool,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # compiled code must not depend on the kept factors
        kept = None if torch.compiler.is_compiling() else self.stack.frozen
        beneath = Beneath(call, module, acting, raw, kept, self)
        return self.layer((beneath, *self._inside(beneath), None), *args, **kwargs)

    def change(self, beneath: Beneath, out: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Return what it adds to `out` as a child of the block around `beneath`."""
        # by a call, so that hooks run: those of FSDP2 gather the block's tensors
        return self.layer((beneath, *self._inside(beneath), out), *args, **kwargs)

    def _inside(self, beneath: Beneath) -> tuple[list[Child], Chosen]:
        children = [Child(child, beneath) for _, child in self.children]
        watcher = None
        if (seen := self.record.watched) is not None:
            if torch.compiler.is_compiling():
                told = (
                    f"watching() cannot look into compiled code, where the block "
                    f"{self.record.name!r} runs: watch the model before torch.compile"
                )
                torch._dynamo.graph_break(msg=told)  # with fullgraph=True torch raises with this
                raise SiteError(told)
            seen.acted.add(self.record.name)
            watcher = functools.partial(seen.note, self.stack, self.record.name)
        return children, Chosen(self.numbers, len(self.layer.names), self.takes, watcher)

    # --------------------------------------------------------------------------- the weights
    @property
    def folds(self) -> bool:
        """True if the block and all that acts in it can be written into the weights."""
        inside = all(child.folds for _, child in self.children)
        return inside and self.layer.constant and self.gate is None

    def fold(self, params: Params) -> Params:
        """Return W + s sum_i w_i (W_i - W), and the same of the bias."""
        g = self.layer.weights(None, Chosen(self.numbers, len(self.layer.names)))
        self.layer.check_weights(g, len(self.children), None)
        folded = dict(params)
        for index, (_, child) in enumerate(self.children):
            for key, tensor in child.fold(params).items():
                if tensor is not params.get(key):
                    factor = g[index] * self.layer.strength()
                    folded[key] = folded[key] + factor * (tensor - params[key])
        return folded

    def folds_as(self) -> None:
        """Return None: a block adds no single product."""
        return None

    # ------------------------------------------------------------------------------ to people
    def formula(self, name: str, inner: str) -> str:
        """Return the formula of `inner` with the block around it; see `DeltaLayer.formula`."""
        texts = [(number, _around(child, inner)) for number, child in self.children]
        return self.layer.formula_of(name, inner, texts)

    def flat(self) -> list[DeltaLayer]:
        """Return the layers in it, and its own."""
        inside = [ly for _, c in self.children for ly in (c.flat() if c.is_block else [c])]
        return [*inside, self.layer]


def _around(layer: Any, inner: str) -> str:
    """Return the formula of `inner` with a layer around it, or with a prefix in it."""
    name = layer.record.name
    if layer.acts is Acts.WITHIN and not layer.is_block:
        return inner.replace(WITHIN, f"[{name}]{WITHIN}")
    return layer.formula(name, inner)


def arranged(acting: Sequence[Any], stack: Any = None) -> list[Any]:
    """Return layers as they run: those in a block inside of it, all others in their order.

    A block in which nothing acts is left out.

    Args:
        acting: layers of one site; blocks among them may be bound already.
        stack: the stack of the site, if they are to run.
    """
    by_name = {layer.record.name: layer for layer in acting if not isinstance(layer, Bound)}
    blocks = [layer for layer in by_name.values() if layer.is_block]
    if not blocks:
        return list(acting)
    inside = {name for block in blocks for name in block.names if name in by_name}
    inside = {name for name in inside if by_name[name].joins_blocks}

    def bound(layer: Any) -> Any:
        if not layer.is_block or isinstance(layer, Bound):
            return layer
        own = [(n, bound(by_name[name])) for n, name in enumerate(layer.names) if name in inside]
        own = [(number, child) for number, child in own if child is not None]
        return Bound(layer, own, stack) if own else None

    runs = [bound(layer) for layer in acting if layer.record.name not in inside]
    return [layer for layer in runs if layer is not None]
