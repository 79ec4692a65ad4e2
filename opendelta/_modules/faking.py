"""Run modules on shapes alone, or with values, and leave all that they keep as it was."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from .kept import around_copies
from .process import eager, ignored_warnings, kept_random_beside, silent_fakes
from .tensors import is_dense, memory_of

MOST = 2**22  # values of a tensor that a run makes


class Shapes(FakeTensorMode):
    """Fake tensors beside the real ones that a run makes from numbers and real ones."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        # {memory: a tensor that has it}; kept, so that no other tensor gets the memory's number
        self.made: dict[int, Any] = {}
        self.without_values: dict[int, Any] = {}
        self.all_fake = False

    def empty(self, shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a fake tensor."""
        self.all_fake = True
        try:
            return torch.empty(shape, dtype=dtype, device=device)
        finally:
            self.all_fake = False

    def like(self, tensor: Tensor) -> Tensor:
        """Return a fake tensor that is like `tensor`, which may be on the meta device."""
        return self.from_tensor(tensor.detach())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if _makes_new(func, args, given):
            first = torch.empty((), dtype=args[0].dtype, device=args[0].device)
            return self._noted(func(first, *args[1:], **given), ())
        tensors = [t for t in tree_iter((args, given)) if isinstance(t, Tensor)]
        if not self.all_fake and self._has_values(func, tensors):
            return self._noted(func(*args, **given), tensors)
        if func._schema.is_mutable:  # what is written there has no values
            self.without_values |= {memory_of(t): t for t in tensors}
        args, given = tree_map_only(Tensor, self._faked, (args, given))
        return super().__torch_dispatch__(func, types, args, given)

    def _has_values(self, func: Any, tensors: list[Tensor]) -> bool:
        """True if an operation on real tensors has a result that is known and changes none.

        It may change tensors that the run has made.
        """
        lost = self.without_values
        if any(isinstance(t, FakeTensor) or memory_of(t) in lost for t in tensors):
            return False
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func._schema.name:
            return False
        return not func._schema.is_mutable or all(memory_of(t) in self.made for t in tensors)

    def _faked(self, tensor: Tensor) -> Any:
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.is_leaf:
            return self.from_tensor(tensor)
        like = {"dtype": tensor.dtype, "device": tensor.device}
        sizes = tensor.shape, tensor.stride()
        return super().__torch_dispatch__(torch.ops.aten.empty_strided.default, (), sizes, like)

    def _noted(self, out: Any, given: Sequence[Tensor]) -> Any:
        """Note the new tensors that an operation on `given` made: here a view does not say so."""
        known = {memory_of(tensor) for tensor in given}
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and memory_of(tensor) not in known:
                self.made[memory_of(tensor)] = tensor
        return out


def _makes_new(func: Any, args: Any, given: dict[str, Any]) -> bool:
    """True for `new_ones` and the like, which look at a tensor's dtype and device alone."""
    name = func._schema.name
    if not name.startswith("aten::new_") or "empty" in name or len(args) < 2:
        return False
    return math.prod(map(int, args[1])) <= MOST


@contextlib.contextmanager
def on_shapes(*modules: nn.Module) -> Iterator[Shapes]:
    """Let tensors have no values inside; yield torch's mode of fake tensors.

    A forward may keep what it makes from numbers alone, such as positions, in a cache that other
    models and threads use: such tensors have their values. Torch draws nothing at random, what is
    drawn by Python and numpy is put back, and tensors from before do not change.

    Args:
        modules: those whose code runs; what it keeps elsewhere is put back, see `around_copies`.
    """
    kept = around_copies(part for module in modules for part in module.modules())
    # eager: the compiler takes no such mode
    with silent_fakes(), ignored_warnings(), kept_random_beside(), kept, eager(), Shapes() as mode:
        yield mode


class Restoring(TorchDispatchMode):
    """A block that puts back, at its end, the values of tensors from before that it writes to.

    Values are kept of those alone that are written to. A fused step of an optimizer is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Tensor] = {}  # kept, so that no other tensor gets the memory's number
        self.before: dict[int, tuple[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        written = given if func._schema.is_mutable else []
        if "batch_norm" in func._schema.name:  # of its statistics the schema does not tell
            written = [t for t in args[3:5] if isinstance(t, Tensor)]
        for tensor in written:
            self._keep(tensor)
        out = func(*args, **(kwargs or {}))
        known = {memory_of(tensor) for tensor in given}
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and memory_of(tensor) not in known:
                self.made[memory_of(tensor)] = tensor
        return out

    def _keep(self, tensor: Tensor) -> None:
        memory = memory_of(tensor)
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and is_dense(tensor)
        if plain and not tensor.is_meta and memory not in self.made and memory not in self.before:
            storage = tensor.untyped_storage()
            self.before[memory] = storage, storage.clone()

    def wrote_to(self, tensors: Iterable[Tensor]) -> bool:
        """True if one of these was written to so far."""
        return any(memory_of(tensor) in self.before for tensor in tensors)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for storage, values in self.before.values():
            storage.copy_(values)
