"""Turn a module into a site: give it a generated subclass of its class, and a child for the layers.

When the last layer leaves, the class and the child leave too.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._layers import labels
from .._layers.base import DeltaLayer
from .._modules import calls, kinds, probing, tensors, trials, wrappers
from .._sequences import prefix
from ..errors import SiteError, quoted
from ..names import SLOT, join, last
from . import compile_limit, intact, items, nested, noting, one_tensor, showing, tables, taken
from .blocks import note_blocks
from .split import Split, divide
from .stack import Stack, acting_on, stack_of

_cache: Any = functools.cache  # Any: its annotation allows no class of a module as argument


def _showing_config() -> property:
    """Return a property `config`: the config of the last active layer that `shows_config`."""

    def read(self: nn.Module) -> Any:
        config, stack = self.__dict__["config"], stack_of(self)
        layers = [layer for layer in stack.values() if layer.shows_config] if stack else []
        showing = [layer for layer in layers if layer.shows(self)]
        return showing[-1].shown_config(config) if showing else config

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__["config"] = value

    return property(read, write)


RESIZING = (
    "resize_token_embeddings", "resize_position_embeddings", "resize_decoder_token_embeddings",
    "resize_num_qa_labels",
)  # fmt: skip


def _resizing(base: Any, verb: str) -> Callable[..., Any]:
    """Return the method by which a transformers model resizes its embeddings, with its layers."""

    @functools.wraps(getattr(base, verb))
    def resize(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(getattr(base, verb), self)
        stack = stack_of(self)
        for layer in stack.values() if stack is not None else ():
            call = functools.partial(layer.resize, verb, call, self)
        return call(*args, **kwargs)

    return resize


def _registering(base: type[nn.Module]) -> Callable[..., None]:
    """Return the method by which other code gives a module another weight, or parts of its own."""

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        stack, before = stack_of(self), self._parameters.get(name)
        if stack and tensors.is_dtensor(param) and not tensors.is_dtensor(before):
            raise SiteError(
                f"{', '.join(stack)} on this {base.__name__} cannot be split with it: call "
                "detach(), parallelize the model, then attach()"
            )
        if issubclass(base, nn.Embedding):
            tables.check_rows(self, before, param)
        base.register_parameter(self, name, param)

    return register_parameter


def _reducing(base: type[nn.Module], *shows: Any) -> Callable[..., tuple]:
    """Return the method by which pickle and deepcopy take a site."""

    def __reduce_ex__(self: nn.Module, protocol: object) -> tuple:
        taken.check_copier(base, sys._getframe(1))
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _unpickle, (base, *shows), state

    return __reduce_ex__


@_cache
def _site_meta(meta: type) -> type:
    """Return the metaclass of sites: other code may use a site's class in the place of its base.

    Plain modules are instances of the site's class: accelerate finds a class by its name, and wraps
    each instance of it, and the class that it finds may be a site's. Calling the class makes a
    plain module: `type(model).from_pretrained(...)` means a plain model.
    """

    def __instancecheck__(cls: type, instance: object) -> bool:
        return meta.__instancecheck__(vars(cls).get("_site_of", cls), instance)  # type: ignore

    def __call__(cls: type, *args: Any, **kwargs: Any) -> Any:
        return meta.__call__(vars(cls).get("_site_of", cls), *args, **kwargs)

    return type(
        meta.__name__, (meta,), {"__instancecheck__": __instancecheck__, "__call__": __call__}
    )


def _forward(base: type[nn.Module], folds: bool, copied: bool) -> Callable[..., Any]:
    """Return the forward of a site, which runs the stack; see `site_class`."""
    raw: Any = kinds.raw_forward(base, folds)
    own, known, names = base.forward, raw is not None, calls.names_of(base.forward)
    hiding: Any = None if known or not items.is_hidden_from(base) else items.hiding(base)

    # It is in the class body, because transformers' checkpointing layers look there. It is wrapped,
    # because Trainer and generate() read its signature. It does not use super(), because other code
    # may keep this bound forward after the site is gone.
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Asked each time, as other code may replace a class's forward.
        call: Callable[..., Any] = functools.partial(raw if folds else base.forward, self)
        stack: Any = (self.__dict__["_modules"] if hiding else self._modules).get(SLOT)
        if stack is not None:
            if hiding is not None:
                call = functools.partial(hiding, self)
            if copied and not folds and stack.routed is not None:  # for rows without the copy
                plain = showing.itself(self, site_class(base, False, ()))
                call = functools.partial(hiding or base.forward, plain)
            kwargs = calls.in_order(names, args, kwargs)
            around = stack.around
            if not known:
                call, around = _of_own(call, self, stack)
            call = around(call, self, known and base.forward is own)
            if args and nested.is_nested(args[0]) and (on := acting_on(stack)):
                return nested.run(call, on, args, kwargs)
        return call(*args, **kwargs)

    return forward


@_cache
def site_class(
    base: type[nn.Module],
    folds: bool,
    copied: tuple[str, ...],
    notes: tuple[str, ...] | None = None,
) -> type[nn.Module]:
    """Return the subclass of `base` whose forward runs the stack; other code sees it as `base`.

    Args:
        folds: `.weight` and `.bias` show the folded values, for a parent that reads them instead of
            calling the module.
        copied: the attributes that show those of a delta's own copy while it acts.
        notes: the attributes of which `noting.uses_of` tells who reads them, as it does of calls;
            None: it tells nothing.
    """
    body: dict[str, Any] = {
        "forward": _forward(base, folds, bool(copied)),
        "register_parameter": _registering(base),
        "__reduce_ex__": _reducing(base, folds, copied, notes),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_site_of": base,
        "_site_reads": folds or bool(copied),
        "_site_copied": copied,
        "_site_notes": notes,
        **tables.counting(base),
        **taken.refusals(base),
    }
    body |= items.methods(base, bool(copied), notes is not None)
    body |= {name: showing.of_copy(name) for name in copied}
    if folds:
        body |= {"weight": showing.folded("weight"), "bias": showing.folded("bias")}
    if notes is not None:
        body["forward"] = noting.noting(body["forward"])
        body |= {name: noting.Reading(name) for name in notes}
    if prefix.uses_interface(base) or hasattr(base, "config_class"):
        body["config"] = _showing_config()
    if hasattr(base, "config_class"):  # a transformers model
        body["num_labels"] = labels.showing_count()
    body |= {verb: _resizing(base, verb) for verb in RESIZING if hasattr(base, verb)}
    for verb in ("tie_weights", *(("_apply", "__setstate__") if copied else ())):
        if hasattr(base, verb):
            body[verb] = showing.with_own_parts(base, verb)
    body |= items.in_forwards(base, body)
    made = _site_meta(type(base))(base.__name__, (base,), body)
    compile_limit.SITE_CLASSES.update((id(base), id(made)))
    return made


def _of_own(call: Any, module: nn.Module, stack: Stack) -> tuple[Any, Any]:
    """Return a forward of somebody's own, and what puts the layers of a stack around it."""
    call = functools.partial(one_tensor.called, call, module, stack)
    needed = intact.is_needed(stack)
    return call, functools.partial(intact.around, stack) if needed else stack.around


def _unpickle(
    base: type[nn.Module], folds: bool, copied: tuple[str, ...], notes: tuple[str, ...] | None
) -> nn.Module:
    cls = site_class(base, folds, copied, notes)
    return cls.__new__(cls)


def _class_for(module: nn.Module, base: type[nn.Module], reads: bool) -> type[nn.Module]:
    """Return the class of a site for `module`, of the class `base`.

    Args:
        reads: other code reads its weight.
    """
    if not reads:
        return site_class(base, False, ())
    if not _folds(module):
        return site_class(base, False, showing.parts_of(module))
    copied = tuple(name for name in showing.parts_of(module) if name not in ("weight", "bias"))
    return site_class(base, True, copied)


def _folds(module: nn.Module) -> bool:
    """True if a module can show its own weight with layers folded in."""
    return "weight" in module._parameters and shows_weight(module)


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the class under a site's class; None if the class of `module` is not generated by us.

    That is a plain class, or one that other code derived from a site's class.
    """
    return vars(type(module)).get("_site_of")


def weight_is_read(module: nn.Module, asked: bool) -> bool:
    """True if the site must show folded weights: the option asks, or its parent is known to read.

    A site that shows them already goes on.
    """
    known = (
        type(module).__name__ == "NonDynamicallyQuantizableLinear"
    )  # MultiheadAttention.out_proj
    return asked or known or getattr(type(module), "_site_reads", False)


def note_uses(module: nn.Module) -> bool:
    """Let `noting.uses_of` tell from now on how a site is used; False: its class cannot."""
    base, own = plain_class(module), type(module)
    if base is not None and not vars(own)["_site_reads"]:
        names = noting.readings(module, base)
        wrappers.set_class(module, site_class(base, False, (), names))
    return getattr(type(module), "_site_notes", None) is not None


def shows_weight(module: nn.Module) -> bool:
    """True if a module can show folded weights: it computes nothing but its weight and bias."""
    base = plain_class(module) or type(module)
    if kinds.raw_forward(base) is not None:
        return True
    bare = trials.bare(module, base)
    turned = isinstance(kinds.kind_of(bare), kinds.TransposedLinear)
    return turned and kinds.raw_forward(base, True) is not None and probing.factor_of(bare) == 1


def check_has_forward(where: str, module: nn.Module) -> None:
    """Raise if the module `where` has no forward; ModuleList, for example, has none."""
    if calls.has_forward(module):
        return
    first = next(iter(module._modules), "")
    item = rf"r'[r]{last(where)}\.\d+'" if first.isdecimal() else repr(join(where, first))
    advice = f"modules inside it, such as {item}" if first else "others"
    raise SiteError(
        f"{quoted(where)} ({type(module).__name__}) is never called, having no forward; choose "
        f"{advice}",
        where=where,
    )


# {only the option `reads` asks for it: (who reads a weight, what to do if it cannot show)}
READERS = {
    False: ("its parent reads", "Choose the parent module instead"),
    True: (
        "reads=True lets other code read its",
        "Leave reads=True out, or let the delta own a copy of what is read (modules_to_save)",
    ),
}


def check(
    where: str,
    module: nn.Module,
    name: str,
    layer: DeltaLayer,
    reads: bool,
    stack: Stack | None,
    asked: bool = False,
) -> None:
    """Raise if the module `where` cannot take the layer. Nothing is changed.

    Args:
        reads: other code reads its weight.
        stack: the stack that the module will have before the layer, or None.
        asked: only the option `reads` says that it does.
    """
    here = f"{quoted(where)} ({(plain_class(module) or type(module)).__name__})"
    if isinstance(module, torch.jit.ScriptModule):
        raise SiteError(
            f"{here} is compiled by TorchScript; attach before torch.jit.script", where=where
        )
    if stack_of(module) is None and hasattr(module, SLOT):
        raise SiteError(
            f"{here} has an attribute {SLOT!r} of its own, which is where the layers would live; "
            "rename it, or choose its parent or its children",
            where=where,
        )
    if layer.computes:
        check_has_forward(where, module)
    if stack is not None and name in stack:
        raise SiteError(f"{here} carries a delta {name!r} already; pass another name=", where=where)
    if wrappers.hides_forward(module):
        raise SiteError(
            f"{here} had its forward replaced by {wrappers.replacement(module)}: the delta would "
            "never run. Attach before that replacement, or remove it",
            where=where,
        )
    if reads and (why := why_unshown(module, name, layer, stack)):
        reader, advice = READERS[asked]
        raise SiteError(
            f"{here}: {reader} .weight instead of calling it, {why}. {advice}", where=where
        )
    if stack_of(module) is None:
        _check_class(where, here, module, reads)


def _check_class(where: str, here: str, module: nn.Module, reads: bool) -> None:
    """Raise if the class of `module` lets no subclass be made."""
    try:
        _class_for(module, type(module), reads)
    except Exception as error:  # of the author of the class
        raise SiteError(
            f"{here}: its class refuses a subclass, which a module with deltas gets: {error}",
            where=where,
        ) from None


def why_unshown(module: nn.Module, name: str, layer: DeltaLayer, stack: Stack | None) -> str | None:
    """Return in words why `module` cannot show its weight with all its layers; None: it can.

    Args:
        name: the delta of `layer`, the new one.
        stack: the stack that the module will have before it, or None.
    """
    before = stack.in_order() if stack is not None else []
    acting = [(n, each) for n, each in (*before, (name, layer)) if each.computes]
    folds = _folds(module)
    other = next((each for each in acting if not _is_shown(each[1], folds)), None)
    if other is not None and not other[1].shows_in_weight:
        return (
            "so only layers that fold into the weight act there; "
            f"{other[0]!r} ({type(other[1]).__name__}) does not"
        )
    if other is not None:
        return (
            f"and folded weights can be shown on Linear and Conv1D only; {other[0]!r} would not "
            "show here"
        )
    weight = module._parameters.get("weight")
    if folds and not tensors.is_plain(weight) and not tensors.is_sharded(weight):
        return f"and one that is quantised or sparse ({type(weight).__name__}) can show no change"
    shown = getattr(type(module), "_site_reads", False)
    if stack_of(module) is not None and plain_class(module) is None and not shown:
        return (
            f"and it was subclassed by {type(module).__module__}: pass reads=True when the first "
            "delta is attached"
        )
    return None


def _is_shown(layer: DeltaLayer, folds: bool) -> bool:
    """True if a layer acts on what a module shows.

    Args:
        folds: the module shows its own weight with layers folded in.
    """
    return layer.stand_in is not None or (folds and layer.shows_in_weight)


def add(
    module: nn.Module, name: str, layer: DeltaLayer, reads: bool, split: Split | None = None
) -> Stack:
    """Put `layer` on the stack of `module` as the outermost layer; call `check` before.

    After an interrupted call, call `remove` and `clear`.

    Args:
        split: how the ranks share `module` in tensor parallelism; None: there is none.
    """
    stack, base = stack_of(module), plain_class(module)
    layer.train(module.training)
    if stack is None:
        stack = module._modules[SLOT] = Stack().train(module.training)
        wrappers.set_class(module, _class_for(module, type(module), reads))
    elif base is not None and reads != vars(type(module))["_site_reads"]:
        wrappers.set_class(module, _class_for(module, base, reads))
    if split is not None:
        divide(stack, split)
    stack[name] = layer
    note_blocks(stack)
    intact.note(stack, module)
    return stack


def remove(module: nn.Module, name: str) -> None:
    """Take a layer off, at any position; after an interrupted call, call it again."""
    stack = stack_of(module)
    if stack is not None and name in stack:
        if stack.frozen is not None:
            stack.frozen.forget(stack[name])  # type: ignore[arg-type]
        stack.ran.discard(name)
        del stack[name]
        note_blocks(stack)
        intact.note(stack, module)


def clear(module: nn.Module) -> None:
    """Make a module without layers what it was; after an interrupted call, call it again.

    If other code has subclassed the site's class since (FSDP2, parametrizations), the class cannot
    be reset. Then the empty stack stays, and changes nothing.
    """
    stack = stack_of(module)
    if stack is None or len(stack):
        return
    if (base := plain_class(module)) is not None:
        wrappers.set_class(module, base)
    if not hasattr(type(module), "_site_reads"):
        del module._modules[SLOT]
