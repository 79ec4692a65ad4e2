"""Let deltas on the head follow a resize of a transformers model, or undo it and refuse it.

transformers puts a new module in the place of an untied head, and changes embeddings in place; a
model's own class may change more. So what was changed is looked at after the call.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import zip_longest
from typing import Any, cast

import torch
from torch import nn

from .._backbone.backbone import Backbone
from .._backbone.embeddings import TOKENS, embeddings_of
from .._layers.base import Acts, DeltaLayer, Passive
from .._layers.site import Site
from .._modules import tensors
from .._modules.kinds import kind_of
from .._modules.undoing import Remembered
from .._sites import swap, tables
from .._sites.showing import own_parts
from .._sites.stack import Stack, stack_of
from ..errors import DeltaError, quoted
from ..names import NUMBER, ancestors, is_inside, relative
from .base import HANDLES
from .head_watch import watch_heads
from .taking import sizes_for

LABELS = swap.RESIZING[-1]
MERGED, ROUTED = "is merged", "is routed"


# -------------------------------------------------------------------------------------- who watches
class WatchLayer(Passive):
    """A layer on a model that changes nothing, for a delta that has no other layer there."""

    watches = True


def guard(backbone: Backbone, made: dict[str, DeltaLayer]) -> None:
    """Let layers watch over the resizes of transformers models that may change what `made` needs.

    Each model around a delta can be resized, in a model of somebody's own too; and a model beside
    it, whose table the delta's module shares.
    """
    models = {n: m for n, m in backbone.modules.items() if hasattr(type(m), TOKENS)}
    needs = _needs(backbone, models.values(), made) if models else {}
    for where, model in models.items():
        inside = {part: sites for part, sites in needs.items() if is_inside(part, where)}
        tied = {
            relative(part, where): site
            for part, sites in inside.items()
            for site in sites
            if site != where and not is_inside(site, where)
        }
        if inside or (hasattr(type(model), LABELS) and any(is_inside(n, where) for n in made)):
            layer = made.setdefault(where, WatchLayer())
            layer.__dict__["resizer"] = functools.partial(resize, tied)


def _needs(
    backbone: Backbone, models: Iterable[nn.Module], made: Mapping[str, DeltaLayer]
) -> dict[str, list[str]]:
    """Return {full name of a module that a resize may change: the sites in `made` that need it}.

    These are tables, heads, what shares their weights, and what has the size of the vocabulary
    outside of numbered blocks.
    """
    ends = [part for model in models for part in embeddings_of(model).values()]
    parts = [module for part in ends for module in part.modules()]
    weights = [weight for weight in map(_weight_of, parts) if weight is not None]
    rows = {size for weight in weights for size in tensors.shape(weight)[:1]}
    needs = {n: [n] for n in made if not NUMBER.search(n) and _has(backbone.modules[n], rows)}
    parts += [m for m in backbone.modules.values() if isinstance(m, nn.Embedding)]
    known = {id(weight) for weight in map(_weight_of, parts) if weight is not None}
    users: dict[int, list[str]] = defaultdict(list)
    for name, module in backbone.modules.items():
        if (key := id(module._parameters.get("weight"))) in known:
            users[key].append(name)
    for names in users.values():
        sites = [
            outer
            for name in names
            for outer in (*ancestors(name), "")
            if outer in made and (outer == name or _depends(made[outer], rows))
        ]
        if sites:
            needs |= dict.fromkeys(names, sites)
    return needs


def _weight_of(module: nn.Module) -> Any:
    """Return the stored weight of a module, if it has a shape; or None."""
    weight = module._parameters.get("weight")
    return None if weight is None or tensors.is_lazy(weight) else weight


def _shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    own = module._parameters.items()
    return {n: tensors.shape(p) for n, p in own if p is not None and not tensors.is_lazy(p)}


def _has(module: nn.Module, sizes: set[int]) -> bool:
    """True if a module's weight has one of these sizes."""
    weight = _weight_of(module)
    return weight is not None and not sizes.isdisjoint(tensors.shape(weight))


def _depends(layer: DeltaLayer, sizes: set[int]) -> str:
    """Return why a layer around modules depends on sizes that these have; or ""."""
    if layer.acts is Acts.INSTEAD:
        return "holds a copy of what it changes"
    own = {size for p in layer.parameters() for size in p.shape}
    return "has the size of the vocabulary" if own & sizes else ""


# ----------------------------------------------------------------------------------------- a resize
def resize(
    tied: Mapping[str, str],
    delta: str,
    verb: str,
    call: Callable[..., Any],
    model: nn.Module,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Resize a model by `call`; deltas on an untied head are put on the new head.

    Args:
        tied: {name of a module: the site outside of the model that shares its weight}.
        delta: the name of the delta on these sites.
        verb: the name of the model's method, one of `swap.RESIZING`.

    Raises:
        DeltaError: a delta cannot follow; nothing has changed.
    """
    before, remembered = Before(model), Remembered(model)
    head = before.growing() if verb == TOKENS else None
    try:
        with tables.watched(), own_parts():
            out = call(*args, **kwargs)
        for part, site in tied.items():
            if before.is_moved(part):
                raise _refusal(verb, delta, site, "is tied")
        before.check(verb, model, head)
        if head is not None:
            _follow(model, head, embeddings_of(model)["output"])
            watch_heads(Backbone.of(model))
    except BaseException:
        remembered.put_back()
        raise
    return out


class Before:
    """How a model was before its resize."""

    def __init__(self, model: nn.Module) -> None:
        self.backbone = Backbone.of(model)
        self.there = embeddings_of(model)
        self.layers = {where: stack.in_order() for where, stack in self.backbone.stacks.items()}
        self.shapes = {name: _shapes_of(m) for name, m in self.backbone.modules.items()}
        self.weights = {name: _weight_of(m) for name, m in self.backbone.modules.items()}

    def is_moved(self, name: str) -> bool:
        """True if the weight that a module had, which others may share, has another shape now."""
        weight = self.weights[name]
        return weight is not None and tensors.shape(weight) != self.shapes[name]["weight"]

    def growing(self) -> nn.Module | None:
        """Return the head, if all layers on it can follow it; else None."""
        head = self.there.get("output")
        stack = None if head is None else stack_of(head)
        if head is None or stack is None or self._is_tied(head):
            return None
        return None if any(_why_not(stack, layer) for layer in stack.values()) else head

    def check(self, verb: str, model: nn.Module, head: nn.Module | None) -> None:
        """Raise if a layer does not fit what the resize has changed.

        Args:
            head: its layers are made anew.
        """
        now = Backbone.of(model)
        changed = {
            name: _shapes_of(now.modules[name]) if name in now.modules else {}
            for name, module in self.backbone.modules.items()
            if now.modules.get(name) is not module or self.shapes[name] != _shapes_of(module)
        }
        for where, layers in self.layers.items():
            if not changed or self.backbone.modules[where] is head:
                continue
            gone = {
                was
                for name, shapes in changed.items()
                if name == where or is_inside(name, where)
                for key, shape in self.shapes[name].items()
                for was, size in zip_longest(shape, shapes.get(key, ()))
                if was != size
            }
            for name, layer in layers:
                if not layer.watches and self._is_unfit(now, where, layer, gone):
                    own = self._reason(verb, where, layer) if where in changed else ""
                    raise _refusal(verb, name, where, own or _depends(layer, gone))

    def _is_unfit(self, now: Backbone, where: str, layer: DeltaLayer, gone: set[Any]) -> bool:
        if now.modules.get(where) is not self.backbone.modules[where]:
            return True
        if not gone or not layer.made_for or layer.acts is Acts.INSTEAD:
            return bool(gone and _depends(layer, gone))
        rows = all(size for size, _ in layer.made_for)  # a Linear that is tied keeps out_features
        return rows or layer.made_for != sizes_for(now, where, layer)

    def _reason(self, verb: str, where: str, layer: DeltaLayer) -> str:
        module = self.backbone.modules[where]
        if verb == TOKENS and module is self.there.get("input"):
            return "is on embeddings that are resized in place"
        if verb == TOKENS and self._is_tied(module):
            return "is tied"
        if verb == TOKENS and module is self.there.get("output"):
            return _why_not(self.backbone.stacks[where], layer)
        return "is on what it changes"

    def _is_tied(self, module: nn.Module) -> bool:
        others = {id(w) for n, w in self.weights.items() if self.backbone.modules[n] is not module}
        own = [w for n, w in self.weights.items() if self.backbone.modules[n] is module]
        return own[0] is not None and id(own[0]) in others


def _why_not(stack: Stack, layer: DeltaLayer) -> str:
    """Return why a layer on an untied head cannot follow it; or ""."""
    if stack.steps:
        return MERGED
    if stack.routed is not None:
        return ROUTED
    grows = layer.grows and (layer.gate is None or layer.gate.on_input)
    return "" if grows else f"({type(layer).__name__}) cannot grow"


def _refusal(verb: str, name: str, where: str, why: str) -> DeltaError:
    again = f"Resize first, then attach; or detach {name!r}, resize, and attach a new delta"
    way = {MERGED: "Call unmerge() first, then resize", ROUTED: "Resize outside of route()"}
    return DeltaError(
        f"{verb}: {name!r} on {quoted(where)} {why}, and would not fit the new size. "
        f"{way.get(why, again)}"
    )


def _follow(model: nn.Module, head: nn.Module, now: nn.Module) -> None:
    """Put the layers of a head on the one that is now in its place, with as many outputs."""
    backbone, layers = Backbone.of(model), cast(Stack, stack_of(head)).in_order()
    where = next(name for name, module in backbone.modules.items() if module is now)
    own: list[DeltaLayer] = []
    for _, layer in layers:
        fits = layer.made_for == sizes_for(backbone, where, layer)
        own.append(layer if fits else _grown(backbone, where, layer, [*own]))
    reads = swap.weight_is_read(head, False)
    now.train(head.training)
    for (name, layer), each in zip(layers, own, strict=True):
        if each is not layer or now is not head:
            swap.remove(head, name)
            swap.add(now, name, each, reads).ran.add(name)
    instead = {layer: each for (_, layer), each in zip(layers, own, strict=True)}
    records = {layer.record for layer in own}
    for handle in HANDLES:
        if getattr(handle, "record", None) in records:
            handle.layers.update({k: instead.get(ly, ly) for k, ly in handle.layers.items()})


@tensors.lasting()
@torch.no_grad()
def _grown(
    backbone: Backbone, where: str, layer: DeltaLayer, beneath: list[DeltaLayer]
) -> DeltaLayer:
    """Return a layer like `layer` for the module `where`, with more or fewer outputs.

    The first rows of its tensors are those of `layer`; the rest are as at the start.
    """
    module = backbone.modules[where]
    first, make = next(iter(layer.parameters())), cast(Any, type(layer))
    site = Site(
        where, module, kind_of(module), first.device, first.dtype, _unknown, _unknown,
        beneath=beneath,
    )  # fmt: skip
    made: DeltaLayer = make(site, layer.record.config)
    made.record, made.gate = layer.record, layer.gate
    made.__dict__["made_for"] = sizes_for(backbone, where, made)
    made.train(layer.training)
    old = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        rows = min(len(tensor), len(old[name]))
        tensor[:rows] = old[name][:rows]
        tensor.requires_grad_(old[name].requires_grad)
    return made


def _unknown(name: str) -> Any:
    raise AssertionError(f"the widths of {name!r} are in the table of kinds")
