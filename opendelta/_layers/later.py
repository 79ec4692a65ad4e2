"""Find whether the tokens of a model see later ones: change one position, and see which others do.

Known modules say it. A model of somebody's own is run on a few tokens, or on the inputs of its
first forward, without layers. The runs change nothing of the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from .._modules.calls import every, hidden, map_tensors
from .._modules.faking import Restoring
from .._modules.process import eager, ignored_warnings, kept_random
from .._modules.tensors import is_sharded, lasting
from .._modules.trials import at_rest
from .rehearsal import ROWS, drawing_alike, some_ids

SOURCES = 16  # of the first tensors of positions that a run makes: embeddings, tables, angles
NOISE = {torch.float64: 1e-12, torch.float32: 1e-6}  # by which equal results may differ; else 0


def sees_later_on_ids(module: nn.Module, site: str) -> bool | None:
    """Return what `sees_later` finds on a few token ids, as the first argument or by their name."""
    for ids in some_ids(module):
        for args, kwargs in (((), {"input_ids": ids}), ((ids,), {})):
            found = sees_later(module, site, args, kwargs)
            if found is not None:
                return found
    return None


@lasting()
@torch.no_grad()
def sees_later(module: nn.Module, site: str, args: tuple, kwargs: dict[str, Any]) -> bool | None:
    """True if tokens see later ones, or no others; False if earlier ones alone; None: unknown.

    Args:
        module: a model.
        site: the full name inside of a module whose output has an axis of the tokens before the
            last. What is computed of its text is looked at: behind it and beside it.
        args, kwargs: the arguments of a call.
    """
    if any(p.is_meta or is_sharded(p) for p in module.parameters()):
        return None
    with eager(), kept_random(), ignored_warnings(), Restoring():
        try:
            return _tried(module, site, args, kwargs)
        except Exception:  # whatever a forward of somebody's own raises on such an input
            return None


def _tried(module: nn.Module, site: str, args: tuple, kwargs: dict[str, Any]) -> bool | None:
    made = at_rest(module)
    part, seen = made.get_submodule(site), list[Tensor]()
    hook = part.register_forward_hook(lambda _, args, out: seen.append(hidden(out)))
    with drawing_alike(made) as again:

        def run(record: _Record | None) -> list[Tensor]:
            """Return the outputs: those of the site, then those of the module."""
            seen.clear()
            again()
            given = apart((args, kwargs))
            with record or contextlib.nullcontext():
                out = type(made).forward(made, *given[0], **given[1])
            if not seen:
                raise ValueError("a call that does not reach the site tells nothing")
            return [*seen, *every(Tensor, out, objects=True)]

        try:
            length = run(None)[0].size(-2)
            return None if length < 2 else _judged(run, length)
        finally:
            hook.remove()


def few(given: Any) -> Any:
    """Return the arguments of a call for the first rows alone."""
    sizes = [t.size(0) for t in every(Tensor, given) if t.ndim > 1]
    batch = max(sizes, key=sizes.count, default=0)
    return map_tensors(lambda t: t[:ROWS] if t.ndim and t.size(0) == batch else t, given)


def apart(given: Any) -> Any:
    """Return the arguments of a call with copies of the tensors and objects, such as a cache."""
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in every(Tensor, given, objects=True)}
    return copy.deepcopy(given, memo)


def _judged(run: Callable[[_Record | None], list[Tensor]], length: int) -> bool | None:
    plain = _Record(length)
    outputs = run(plain)
    found = set[bool]()
    for source in plain.sources[:SOURCES]:
        verdict = _of_source(run, plain, outputs, source)
        if verdict is False:
            return False
        found |= {verdict} if verdict is not None else set()
    return True if found else None


def _of_source(
    run: Callable[[_Record | None], list[Tensor]],
    plain: _Record,
    outputs: list[Tensor],
    source: int,
) -> bool | None:
    """Return what the changes of one tensor of positions tell; None: they do not reach the site."""
    length = plain.length
    earlier, later, reached = dict[int, bool](), dict[int, bool](), False
    for place in sorted({0, 1, length // 2, length - 2, length - 1}):
        record = _Record(length, (source, place))
        others = run(record)
        reached = reached or _differ(outputs[0], others[0])
        if not reached and place == length - 1:
            return None
        pairs = [*zip(plain.made, record.made, strict=True)]
        pairs += [(a, b) for a, b in zip(outputs[1:], others[1:], strict=True)]
        for number, (one, other) in enumerate(pairs):
            if (axis := _axis(one, length)) is None:
                continue
            before, after = (t.split([place, 1, length - place - 1], axis) for t in (one, other))
            later[number] = later.get(number, False) or _differ(before[0], after[0])
            earlier[number] = earlier.get(number, False) or _differ(before[2], after[2])
    mixed = [number for number in later if later[number] or earlier[number]]
    return later[max(mixed)] if mixed else True


def _differ(one: Tensor, other: Tensor) -> bool:
    most = NOISE.get(one.dtype, 0.0)
    return bool((one.double() - other.double()).norm() > most * one.double().norm())


def _axis(tensor: Tensor, length: int) -> int | None:
    """Return the axis of the positions in a tensor; None: it has none, or they cannot be told."""
    if not tensor.is_floating_point():
        return None
    if tensor.ndim < 3:
        return 0 if tensor.ndim == 2 and tensor.size(0) == length != tensor.size(1) else None
    axes = [axis for axis, size in enumerate(tensor.shape) if size == length]
    if tensor.ndim == 3 and len(axes) > 1:
        return 1 if 1 in axes else None
    inner = [axis for axis in axes if axis or len(axes) == 1]
    return inner[0] if len(inner) == 1 else None


class _Record(TorchDispatchMode):
    """Notes the tensors of positions that a run makes, and changes one position in one of them.

    Args:
        length: number of positions.
        change: the number of the tensor, and the position; None: nothing changes.

    Attributes:
        made: these tensors, in their order.
        sources: the numbers of those that are not computed from others.
    """

    def __init__(self, length: int, change: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.length, self.change = length, change
        self.made: list[Tensor] = []
        self.known = set[int]()
        self.sources: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        first = not func._schema.is_mutable and not any(id(t) in self.known for t in given)
        out = func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, lambda tensor: self._noted(tensor, first), out)

    def _noted(self, tensor: Tensor, first: bool) -> Tensor:
        axis = _axis(tensor, self.length)
        if axis is None:
            return tensor
        number = len(self.made)
        if self.change is not None and self.change[0] == number:
            tensor = _changed(tensor, axis, self.change[1])
        self.made.append(tensor)
        self.known.add(id(tensor))
        self.sources += [number] if first else []
        return tensor


def _changed(tensor: Tensor, axis: int, place: int) -> Tensor:
    """Return a tensor with other values of about the same size at one position."""
    tensor = tensor.clone()
    values = tensor.select(axis, place)
    size = values.abs().amax().clamp(min=0.1)
    steps = torch.linspace(-1, 1.3, values.numel(), device=values.device).view(values.shape)
    values.add_((steps * size).to(values.dtype))
    return tensor
