"""The call beneath a block, and the deltas of the block around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .._modules import caches, calls
from .._modules.kinds import kind_of
from .._modules.tensors import stored
from ..errors import SiteError
from .alone import change_alone, input_change
from .base import Acts, Call, handing_over
from .runs import KeptFactors


class Beneath:
    """The call beneath a block. It runs once for the same arguments, whoever asks.

    Args:
        call: the forward of `module` with the layers beneath.
        layers: these layers, the innermost first.
        raw: `call` is the forward of a Linear or Conv1D.
        kept: the joined factors inside `frozen()`, or None.
        block: the block, as it is bound.
    """

    def __init__(
        self,
        call: Call,
        module: nn.Module,
        layers: Sequence[Any],
        raw: bool,
        kept: KeptFactors | None,
        block: Any,
    ) -> None:
        self.call, self.module, self.layers, self.raw = call, module, layers, raw
        self.kept, self.block = kept, block
        self.known: tuple[Any, Any] | None = None
        self.before: caches.Snapshot | None = None
        self.handed: list[tuple[Any, Any]] = []  # a layer, and what it was handed for the first run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.known is None:
            handing = handing_over([*self.layers, self.block])
            self.handed = [(layer, layer.handover.value) for layer in handing]
            self.known = (args, kwargs), self.call(*args, **kwargs)
        elif not calls.same(self.known[0], (args, kwargs)):
            if caches.found(args, kwargs):
                raise SiteError(
                    f"a delta in the block {self.block.record.name!r} changes the input of a "
                    f"{type(self.module).__name__} that fills a KV cache, which would need a cache "
                    "for each of them: call it with use_cache=False, or take the delta out"
                )
            self.hand_again()
            return self.call(*args, **kwargs)
        return calls.fresh(self.known[1])

    def hand_again(self) -> None:
        """Give branches that end here what they had for the first run, which took it."""
        for layer, value in self.handed:
            layer.handover.put(value)

    def keep_caches(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Remember the KV caches as they are before the first run, for `again`."""
        if given := caches.found(args, kwargs):
            self.before = caches.Snapshot(given, getattr(self.module, "layer_idx", None))

    def again(self, *args: Any, **kwargs: Any) -> Any:
        """Run it on the arguments of the first run, from the same KV caches.

        The caches come out as the first run left them.
        """
        if self.before is None:
            return self.call(*args, **kwargs)
        after = caches.Snapshot(caches.found(args, kwargs), getattr(self.module, "layer_idx", None))
        self.before.restore()
        try:
            return self.call(*args, **kwargs)
        finally:
            after.restore()

    def without_bias(self, x: Tensor) -> Tensor:
        """Return W x, for a raw call W x + b, without the digits that a sum with b would lose."""
        kind: Any = kind_of(self.module)
        return kind.product(x, kind.matrix(stored(self.module, "weight")))


class Child:
    """A delta in a block, around the call of the block.

    Attributes:
        layer: its layer on the module, or a `Bound` block.
        beneath: the call of the block.
    """

    def __init__(self, layer: Any, beneath: Beneath) -> None:
        self.layer, self.beneath = layer, beneath

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module would give with this child alone."""
        beneath = self.beneath
        call = beneath.again if self.layer.acts is Acts.WITHIN else beneath
        around = self.layer.around(call, beneath.module, beneath.layers)
        return around(*args, **kwargs)

    def change(self, out: Any, args: tuple, kwargs: dict[str, Any], enters: bool) -> Tensor:
        """Return z [..., width]: what the child alone adds to `out`, the output without it.

        Args:
            enters: return what it adds to the input instead.
        """
        layers = [layer for layer, _ in self.beneath.handed]
        after = [layer.handover.value if layer.hands_over else None for layer in layers]
        self.beneath.hand_again()
        z = self._change(out, args, kwargs, enters)
        for layer, value in zip(layers, after, strict=True):
            layer.handover.put(value)  # what the first run handed over; a branch that ended is gone
        return z

    def _change(self, out: Any, args: tuple, kwargs: dict[str, Any], enters: bool) -> Tensor:
        if self.layer.is_block:
            if enters or not self.layer.enters:
                return self.layer.change(self.beneath, out, args, kwargs)
        elif enters:
            return input_change(self.layer, out, args, kwargs)
        else:
            bare = self.beneath.without_bias if self.beneath.raw else None
            inner = self.beneath.module, self.beneath.layers
            z = change_alone(self.layer, bare, inner, out, args, kwargs)
            if z is not None:
                return z
        return calls.hidden(self(*args, **kwargs)) - calls.hidden(out)
