"""Let deltas on the head follow `resize_token_embeddings` of a transformers model, or refuse it.

transformers puts a new module in the place of an untied head, and changes embeddings in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from .._backbone.backbone import Backbone
from .._layers.base import Acts, DeltaLayer, Passive
from .._layers.site import Site
from .._modules.kinds import kind_of
from .._modules.tensors import lasting
from .._sites import swap
from .._sites.showing import own_parts
from .._sites.stack import stack_of
from ..errors import DeltaError, quoted
from ..names import ancestors, is_inside
from .base import HANDLES
from .taking import sizes_for


def embeddings_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return a transformers model's embeddings of inputs and outputs, as "input" and "output"."""
    if not hasattr(type(model), "resize_token_embeddings"):
        return {}
    found: dict[str, Any] = {}
    for which in ("input", "output"):
        try:
            with own_parts():
                found[which] = getattr(model, f"get_{which}_embeddings")()
        except Exception:  # models without one raise whatever they like
            continue
    return {which: module for which, module in found.items() if isinstance(module, nn.Module)}


def guard(backbone: Backbone, made: dict[str, DeltaLayer]) -> None:
    """Let layers watch over the resizes of transformers models that change what `made` is on.

    Each model around a delta can be resized, in a model of somebody's own too.
    """
    for where, model in backbone.modules.items():
        if hasattr(type(model), swap.RESIZING[0]):  # all models of transformers
            inside = {n: layer for n, layer in made.items() if is_inside(n, where)}
            if inside and _changes(backbone, model, inside):
                made.setdefault(where, WatchLayer()).__dict__["resizer"] = resize


def _changes(backbone: Backbone, model: nn.Module, inside: dict[str, DeltaLayer]) -> bool:
    """True if a resize of a model changes the module of one of these layers."""
    there = embeddings_of(model)
    parts = [part for verb in GETTERS for part in _changed_by(verb, model)]
    own = {id(module) for module in (*there.values(), *parts)}
    if not own:
        return False
    changed = {name for name, module in backbone.modules.items() if id(module) in own}
    weight = _weight_of(there.get("input"))
    if weight is not None and any(
        _weight_of(backbone.modules.get(name)) is weight for name in inside
    ):
        return True
    around = {outer for name in changed for outer in ancestors(name)} & inside.keys()
    return any(name in changed or _is_bound(inside[name], there) for name in around)


def _is_bound(layer: DeltaLayer, there: dict[str, nn.Module]) -> str:
    """Return why a layer around the embeddings or the head depends on their size; or ""."""
    if layer.acts is Acts.INSTEAD:
        return "holds a copy of them"
    kind = kind_of(there["output"]) if "output" in there else None
    sizes = {size for p in layer.parameters() for size in p.shape}
    return "has the size of the vocabulary" if kind and kind.out_features in sizes else ""


def _changed_by(verb: str, model: nn.Module) -> list[nn.Module]:
    """Return the modules that a resize, other than that of all token embeddings, changes."""
    found: list[Any] = []
    for getter in GETTERS[verb] if hasattr(type(model), verb) else ():
        for holder in (model, getattr(model, "model", None)):
            try:
                with own_parts():
                    each = getattr(holder, getter)()
            except Exception:  # models without one raise whatever they like
                continue
            found += each if isinstance(each, tuple) else (each,)
            break
    return [module for module in found if isinstance(module, nn.Module)]


def _weight_of(module: nn.Module | None) -> Any:
    return None if module is None else module._parameters.get("weight")


# {how a model resizes a part: how it gives what is changed}
GETTERS = {
    "resize_position_embeddings": ("get_position_embeddings",),
    "resize_decoder_token_embeddings": ("get_decoder_input_embeddings", "get_output_embeddings"),
    "resize_num_qa_labels": ("get_qa_logit_layer",),
}


class WatchLayer(Passive):
    """A layer on a model that changes nothing, for a delta that has no other layer there."""

    watches = True


def resize(verb: str, call: Callable[..., Any], model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Resize the embeddings by `call`; deltas on an untied head are put on the new head.

    Args:
        verb: the name of the model's method: "resize_token_embeddings" or one of `GETTERS`.

    Raises:
        DeltaError: a delta cannot follow; nothing has changed.
    """
    if verb not in GETTERS:
        return _resize_tokens(call, model, *args, **kwargs)
    tables = {id(module) for module in _changed_by(verb, model)}
    for where, module in Backbone.of(model).modules.items():
        stack = stack_of(module) if where else None
        if stack is not None and len(stack) and tables & {*map(id, module.modules())}:
            name, layer = stack.in_order()[-1]
            if id(module) in tables or layer.acts is Acts.INSTEAD:
                raise _refusal(verb, name, where, "is on what it changes")
    return call(*args, **kwargs)


def _resize_tokens(
    call: Callable[..., Any],
    model: nn.Module,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    there = embeddings_of(model)
    head, weight = there.get("output"), there["input"]._parameters["weight"]
    same = new_num_tokens in (None, len(weight)) and pad_to_multiple_of is None  # type: ignore
    if not same:
        for which, module in there.items():
            _check(model, which, module, weight)
        _check_around(model, there)
    for module in model.modules():  # such as an encoder's, whose place the inputs' one may take
        if _weight_of(module) is weight and all(module is not each for each in there.values()):
            _check(model, "tied", module, weight)
    taken = _take_off(head)
    now = head
    try:
        out = call(new_num_tokens, pad_to_multiple_of, *args, **kwargs)
        now = embeddings_of(model).get("output")
    finally:
        if now is not None:
            _put_on(model, now, taken, anew=now is not head)
    return out


def _check(model: nn.Module, which: str, module: nn.Module, shared: Any) -> None:
    """Raise if a delta on `module` cannot follow a resize of the model's embeddings."""
    stack = stack_of(module)
    if stack is None or not len(stack):
        return
    alone = which == "output" and module._parameters["weight"] is not shared
    for name, layer in stack.in_order():
        why = None
        if not alone:
            why = "is on embeddings that are resized in place" if which == "input" else "is tied"
        elif stack.steps:
            why = "is merged"
        elif stack.routed is not None:
            why = "is routed"
        elif not layer.grows or (layer.gate is not None and not layer.gate.on_input):
            why = f"({type(layer).__name__}) cannot grow"
        if why is not None:
            where = next(n for n, m in Backbone.of(model).modules.items() if m is module)
            raise _refusal("resize_token_embeddings", name, where, why)


def _check_around(model: nn.Module, there: dict[str, nn.Module]) -> None:
    """Raise if a delta on a module around the embeddings or the head cannot follow a resize."""
    own = {id(module) for module in there.values()}
    for where, module in Backbone.of(model).modules.items():
        stack = stack_of(module) if where else None
        if stack is None or id(module) in own or not own & {*map(id, module.modules())}:
            continue
        for name, layer in stack.in_order():
            if why := _is_bound(layer, there):
                raise _refusal("resize_token_embeddings", name, where, why)


def _refusal(verb: str, name: str, where: str, why: str) -> DeltaError:
    return DeltaError(
        f"{verb}: {name!r} on {quoted(where)} {why}, and would not fit the new size. Resize first, "
        f"then attach; or detach {name!r}, resize, and attach a new delta"
    )


class Taken(NamedTuple):
    """The layers of a head that is resized, and how they were on it."""

    layers: list[tuple[str, DeltaLayer]]
    reads: bool
    training: bool


def _take_off(head: nn.Module | None) -> Taken:
    """Take the layers off a head, so that its weight shows none of them."""
    stack = None if head is None else stack_of(head)
    if head is None or stack is None:
        return Taken([], False, False)
    taken = Taken(stack.in_order(), swap.weight_is_read(head, False), head.training)
    for name, _ in taken.layers:
        swap.remove(head, name)
    return taken


def _put_on(model: nn.Module, head: nn.Module, taken: Taken, anew: bool) -> None:
    """Put layers on a head.

    Args:
        anew: the head is a new module; the layers get its size.
    """
    if not taken.layers:
        return
    backbone = Backbone.of(model)
    where = next(name for name, module in backbone.modules.items() if module is head)
    head.train(taken.training)
    beneath: list[DeltaLayer] = []
    for name, layer in taken.layers:
        own = _grown(backbone, where, layer, beneath) if anew else layer
        swap.add(head, name, own, taken.reads).ran.add(name)
        beneath.append(own)
        for handle in HANDLES:
            if getattr(handle, "record", None) is layer.record:
                handle.layers.update({k: own for k, each in handle.layers.items() if each is layer})


@lasting()
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
