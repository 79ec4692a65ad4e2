"""Memory that calls of one module returned or wrote to, which its later calls are given again.

It holds earlier tokens, whatever the argument is called. A compiled graph looks at none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .._modules.calls import every
from .states import CACHES, NO_STATES

TOKENS = ("input_ids", "inputs_embeds")
RETURNED = (
    "which an earlier call returned or wrote to: it may hold earlier tokens, and nothing tells how "
    "many; call it 'past_key_values', or give position_ids"
)
# {what watches a module's calls: ({address of memory: a reference that keeps none}, the shapes of
# what was returned beside the first tensor)}
_known: WeakKeyDictionary[Any, tuple[dict[int, StorageWeakRef], set[torch.Size]]]
_known = WeakKeyDictionary()


class Watch:
    """Tensors that one call of a module is given, to know them again.

    Args:
        owner: what watches the calls of the module.
        given: the call's arguments by name.
    """

    def __init__(self, owner: Any, given: Mapping[str, Any]) -> None:
        self.owner = owner
        self.given: list[tuple[str, Tensor, float]] = []
        if torch.compiler.is_compiling():
            return
        tokens = [given.get(name) for name in TOKENS]
        self.given = [
            (name, tensor, _writes_to(tensor))
            for name, value in given.items()
            if name not in (*TOKENS, *CACHES) and not name.startswith(NO_STATES)
            for tensor in _states(value)
            if not any(tensor is each for each in tokens)
        ]

    @property
    def known(self) -> str:
        """Return the name of an argument that an earlier call returned or wrote to; or ""."""
        if not self.given:
            return ""
        known, shapes = _known.get(self.owner, ({}, set()))
        for name, tensor, _ in self.given:
            reference = known.get(tensor.untyped_storage()._cdata)
            if reference is not None and not reference.expired():
                return name
            if tensor.shape in shapes and bool(tensor.any()):  # maybe a copy, and no fresh state
                return name
        return ""

    def end(self, out: Any) -> None:
        """Remember what the call returned, and what of its arguments it wrote to."""
        if torch.compiler.is_compiling():
            return
        written = [tensor for _, tensor, version in self.given if _writes_to(tensor) != version]
        known, shapes = _known.get(self.owner, ({}, set()))
        kept = {address: each for address, each in known.items() if not each.expired()}
        returned = [*_states(out)]
        for tensor in (*returned, *written):
            reference = StorageWeakRef(tensor.untyped_storage())
            kept[reference.cdata] = reference
        _known[self.owner] = kept, shapes | {tensor.shape for tensor in returned[1:]}


def _states(value: Any) -> Iterator[Tensor]:
    """Return the tensors in a value that have the form of a state."""
    for tensor in every(Tensor, value, objects=True):
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if plain and tensor.ndim > 1 and tensor.is_floating_point() and not tensor.is_meta:
            yield tensor


def _writes_to(tensor: Tensor) -> float:
    """Return a number that another one follows where a tensor was written to."""
    return tensor.nansum().item() if tensor.is_inference() else tensor._version
