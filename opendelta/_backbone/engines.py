"""Find what is around a model and trains it: DDP, the first FSDP, DeepSpeed's engine."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import SiteError
from ..names import SLOT, join, parent
from .backbone import Backbone
from .sharding import is_distributed

# {class of what is around a model: where it keeps the parameters that it found when it was made}
ENGINES = {
    "DistributedDataParallel": ("reducer",),
    "FullyShardedDataParallel": ("_handle.flat_param._params",),
    "DeepSpeedEngine": (
        "optimizer.bit16_groups",
        "optimizer.bf16_groups",
        "optimizer.fp16_groups",
        "optimizer.param_groups",
    ),
}


def check_synchronised(
    backbone: Backbone, places: Iterable[str], new: Sequence[nn.Parameter]
) -> None:
    """Raise if what is around a model will not synchronise parameters, or not train them.

    Args:
        places: the names of the modules whose layers have them.
        new: the parameters that are to train.
    """
    if not new:
        return
    sites = [backbone.modules[where] for where in places if where in backbone.modules]
    for engine, inside, known in _around(backbone):
        site = next((site for site in sites if id(site) in inside), None)
        if site is not None and any(id(p) not in known for p in new):
            raise SiteError(
                f"this {type(site).__name__} is inside {type(engine).__name__}, which would not "
                "synchronise the gradients of what is to train, nor train it: each rank would have "
                "other values; attach and unfreeze first, wrap or initialize then; if the wrapper, "
                "or the trainer that holds it, has done its work, delete it first"
            )


def check_trains(backbone: Backbone, names: Collection[str]) -> None:
    """Raise if what is around a model would not train these parameters, by full name."""
    chosen = [(where, p) for where, name, p in _named(backbone) if name in names]
    check_synchronised(backbone, {where for where, _ in chosen}, [p for _, p in chosen])


def unsynchronised(backbone: Backbone) -> list[str]:
    """Return the parameters that train, and that what is around does not synchronise."""
    engines = _around(backbone)
    return [
        name
        for where, name, parameter in (_named(backbone) if engines else ())
        if parameter.requires_grad
        if any(
            id(backbone.modules[where]) in inside and id(parameter) not in known
            for _, inside, known in engines
        )
    ]


def _named(backbone: Backbone) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield (module, full name, parameter) of the parameters of the backbone and the deltas."""
    for name, parameter in backbone.parameters().items():
        yield parent(name), name, parameter
    for where, delta, layer in backbone.delta_layers():
        for key, parameter in layer.named_parameters():
            yield where, join(where, SLOT, delta, key), parameter


_ENGINES: ContextVar[list[Any] | None] = ContextVar("opendelta_engines", default=None)


@contextlib.contextmanager
def one_look() -> Iterator[None]:
    """Look for engines once inside, however many deltas are attached."""
    token = _ENGINES.set(_engines())
    try:
        yield
    finally:
        _ENGINES.reset(token)


def _around(backbone: Backbone) -> list[tuple[nn.Module, set[int], set[int]]]:
    """Return (engine, ids of the modules inside, ids of the parameters that it found) of each.

    Such an engine looks for the parameters when it wraps a model, and never again.
    """
    inner = {*map(id, backbone.modules.values())}
    found = _ENGINES.get()
    engines = _engines() if found is None else found
    return [
        (each, {*map(id, each.modules())}, _known_to(each, tables))
        for each, tables in engines
        if id(each) not in inner
    ]


def _engines() -> list[Any]:
    """Return (engine, tables of its parameters) of all that there are in this process."""
    if not is_distributed():
        return []
    kinds: dict[type, str] = {}
    for cls in _kinds_of(nn.Module):
        if name := next((b.__name__ for b in cls.__mro__ if b.__name__ in ENGINES), ""):
            kinds[cls] = name
    return [(each, ENGINES[kinds[type(each)]]) for each in _frozen.instances(kinds)]


def _kinds_of(cls: type) -> set[type]:
    """Return all classes that derive from `cls`."""
    found, left = set[type](), [cls]
    while left:
        new: set[type] = {*left.pop().__subclasses__()} - found
        found |= new
        left += new
    return found


class _Frozen:
    """Finds instances of classes, once among what gc.freeze() set aside, not for each delta.

    To be looked through, it must be among all objects for a moment; then all are set aside.
    """

    def __init__(self) -> None:
        self.found: list[weakref.ref[Any]] = []
        self._mark()

    def _mark(self) -> None:
        self.target = object()
        self.mark = [self.target]  # is no longer among all objects after the next gc.freeze()

    def instances(self, kinds: Collection[type]) -> list[Any]:
        """Return all instances of these classes, which they refer to and know nothing of."""
        around = gc.get_referrers(*kinds, self.target)
        if any(each is self.mark for each in around):
            known = [each for ref in self.found if (each := ref()) is not None]
            return [*{id(each): each for each in (*_of_kinds(kinds, around), *known)}.values()]
        gc.unfreeze()
        try:
            found = _of_kinds(kinds, gc.get_referrers(*kinds))
        finally:
            gc.freeze()
        self.found = [*map(weakref.ref, found)]
        self._mark()
        return found


_frozen = _Frozen()


def _of_kinds(kinds: Collection[type], objects: Iterable[Any]) -> list[Any]:
    return [each for each in objects if type(each) in kinds]


def _known_to(engine: nn.Module, tables: Sequence[str]) -> set[int]:
    """Return the ids of the parameters that an engine, and others inside it, found."""
    found: set[int] = set()
    for part in engine.modules():
        for name in tables:
            table: Any = part
            for step in name.split("."):
                table = getattr(table, step, None)
            if hasattr(table, "_get_zeros_like_grad_buckets"):  # the one door to what it reduces
                table = [b.parameters() for b in table._get_zeros_like_grad_buckets()]
            found |= {id(each) for each in tree_leaves(table)}
    return found
