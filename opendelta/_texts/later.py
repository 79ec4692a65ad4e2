"""Find whether the tokens of a model see later ones: change one position, and see which others do.

Known modules say it. A model of somebody's own is run on a few tokens, or on the inputs of its
first forward, without layers. The runs change nothing of the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from .._modules.calls import every, map_tensors
from .._modules.tensors import is_sharded, lasting
from .rehearsal import ROWS, leaving_nothing, some_ids, watched

SOURCES = 16  # of the first tensors of positions of each kind: embeddings; tables, angles
# The outputs of sites by full name, and those of the model.
Results = tuple[dict[str, Tensor], list[Tensor]]
Pairs = list[tuple[Tensor, Tensor]]
NOISE = {torch.float64: 1e-12, torch.float32: 1e-6}  # by which equal results may differ; else 0


def sees_later_on_ids(module: nn.Module, sites: Sequence[str]) -> dict[str, bool]:
    """Return what `sees_later` finds on a few token ids, as the first argument or by their name."""
    for ids in some_ids(module):
        for args, kwargs in (((), {"input_ids": ids}), ((ids,), {})):
            if found := sees_later(module, sites, args, kwargs):
                return found
    return {}


@lasting()
@torch.no_grad()
def sees_later(
    module: nn.Module, sites: Sequence[str], args: tuple, kwargs: dict[str, Any]
) -> dict[str, bool]:
    """Return for sites of a model, by full name, whether tokens see later ones, or no others.

    False if they see earlier ones alone; a site is left out if nothing shows it. What is computed
    of its text is looked at: behind it and beside it.

    Args:
        module: the model.
        sites: modules inside whose output has the axis of the tokens before the last.
        args, kwargs: the arguments of a call.
    """
    if any(p.is_meta or is_sharded(p) for p in module.parameters()):
        return {}
    with leaving_nothing(module):
        try:
            return _tried(module, sites, args, kwargs)
        except Exception:  # whatever a forward of somebody's own raises on such an input
            return {}


def _tried(
    module: nn.Module, sites: Sequence[str], args: tuple, kwargs: dict[str, Any]
) -> dict[str, bool]:
    with watched(module, sites) as called:

        def run(record: _Record | None) -> Results:
            given = apart((args, kwargs))
            if record:
                record.given |= {id(t): t for t in every(Tensor, given, objects=True)}
            with record or contextlib.nullcontext():
                seen, out = called(*given)
            return seen, list(every(Tensor, out, objects=True))

        lengths = {name: out.size(-2) for name, out in run(None)[0].items() if out.ndim > 1}
        found = dict[str, bool]()
        for length in {*lengths.values()} - {1}:
            found |= _judged(run, length, [name for name in sites if lengths.get(name) == length])
        return found


def few(given: Any) -> Any:
    """Return the arguments of a call for the first rows alone."""
    sizes = [t.size(0) for t in every(Tensor, given) if t.ndim > 1]
    batch = max(sizes, key=sizes.count, default=0)
    return map_tensors(lambda t: t[:ROWS] if t.ndim and t.size(0) == batch else t, given)


def apart(given: Any) -> Any:
    """Return the arguments of a call with copies of the tensors and objects, such as a cache."""
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in every(Tensor, given, objects=True)}
    return copy.deepcopy(given, memo)


def _judged(run: Run, length: int, sites: list[str]) -> dict[str, bool]:
    plain = _Record(length)
    results = run(plain)
    found, decided = dict[str, bool](), set[str]()
    for sources in (plain.of_call, plain.others):
        for source in sources[:SOURCES]:
            reached, sees = _of_source(run, plain, results, source)
            told = sees is not False
            found |= {name: found.get(name, True) and told for name in sites if name in reached}
            decided |= set() if sees is None else reached
            if len(found) == len(sites) and not any(found.values()):
                return found
        if decided.issuperset(sites):
            break
    return found


def _of_source(
    run: Run, plain: _Record, results: Results, source: int
) -> tuple[set[str], bool | None]:
    """Return the sites that a tensor of positions reaches, and whether tokens see later ones.

    None: it is mixed nowhere with those of other positions.
    """
    length, reached = plain.length, set[str]()
    ends = {0, length - 1}
    pairs = list[tuple[int, Pairs]]()
    sees: bool | None = None
    for places in (ends, {1, length // 2, length - 2} - ends):
        for place in places:
            record = _Record(length, (source, place))
            at_sites, outputs = run(record)
            reached |= {name for name, out in results[0].items() if _differ(out, at_sites[name])}
            made = [*plain.made, *results[1]], [*record.made, *outputs]
            pairs.append((place, [*zip(*made, strict=True)]))
        if sees := _last_mixed(pairs, length):
            break
    return reached, sees


def _last_mixed(changed: list[tuple[int, Pairs]], length: int) -> bool | None:
    """Return whether changes show at earlier positions in the last tensors where they show at any.

    Args:
        changed: the position that was changed, with the tensors before and after, in their order.
        length: number of positions.
    """
    for number in reversed(range(len(changed[0][1]))):
        earlier = later = False
        for place, pairs in changed:
            one, other = pairs[number]
            if (axis := _axis(one, length)) is None:
                continue
            before, after = (t.split([place, 1, length - place - 1], axis) for t in (one, other))
            later = later or _differ(before[0], after[0])
            earlier = earlier or _differ(before[2], after[2])
        if earlier or later:
            return later
    return None


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
        given: by id, the tensors of the call's arguments, and those that are computed from them.
        made: these tensors, in their order.
        of_call: the numbers of those that are computed from the arguments, but from no other one.
        others: the numbers of those that are computed from neither.
    """

    def __init__(self, length: int, change: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.length, self.change = length, change
        self.given: dict[int, Tensor] = {}
        self.made: list[Tensor] = []
        self.known: dict[int, Tensor] = {}  # these tensors, and all that is computed from them
        self.of_call: list[int] = []
        self.others: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = [id(t) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        known, of_call = (any(i in table for i in used) for table in (self.known, self.given))
        sources = self.of_call if of_call else self.others
        first = not known and not func._schema.is_mutable

        def noted(tensor: Tensor) -> Tensor:
            tensor = self._noted(tensor, sources if first else None)
            self.known |= {id(tensor): tensor} if known else {}
            self.given |= {id(tensor): tensor} if of_call else {}
            return tensor

        return tree_map_only(Tensor, noted, func(*args, **(kwargs or {})))

    def _noted(self, tensor: Tensor, sources: list[int] | None) -> Tensor:
        axis = _axis(tensor, self.length)
        if axis is None:
            return tensor
        number = len(self.made)
        if self.change is not None and self.change[0] == number:
            tensor = _changed(tensor, axis, self.change[1])
        self.made.append(tensor)
        self.known[id(tensor)] = tensor
        if sources is not None:
            sources.append(number)
        return tensor


def _changed(tensor: Tensor, axis: int, place: int) -> Tensor:
    """Return a tensor with other values of about the same size at one position."""
    tensor = tensor.clone()
    values = tensor.select(axis, place)
    size = values.abs().amax().clamp(min=0.1)
    steps = torch.linspace(-1, 1.3, values.numel(), device=values.device).view(values.shape)
    values.add_((steps * size).to(values.dtype))
    return tensor


Run = Callable[[_Record | None], Results]
