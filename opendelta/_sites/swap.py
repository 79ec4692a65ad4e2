"""How a module becomes a site: a generated subclass of its class, and one child for the layers.

When the last layer leaves, both leave too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._layers import labels, prefix
from .._layers.base import DeltaLayer
from .._modules import kinds, tensors, wrappers
from ..errors import SiteError
from ..names import SLOT
from . import compile_limit
from .stack import Stack, stack_of

_cache: Any = functools.cache  # its own annotation takes no classes of modules as arguments


def _reading(name: str) -> property:
    """A property that shows a parameter as the parent must see it: with the deltas folded in."""

    def read(self: nn.Module) -> Tensor | None:
        raw = tensors.stored(self, name)
        stack = stack_of(self)
        if not stack or tensors.is_sharded(raw):  # FSDP2 reads the parameter while it shards it
            return raw
        return stack.fold(tensors.stored_params(self)).get(name)

    def write(self: nn.Module, value: Tensor) -> None:
        # nn.Module stores Parameters itself; this gets the plain tensors of a replica
        self.__dict__[name] = value

    return property(read, write)


def _showing_config() -> property:
    """The attribute `config`, as the last layer that acts and `shows_config` wants it shown."""

    def read(self: nn.Module) -> Any:
        config, stack = self.__dict__["config"], stack_of(self)
        showing = [layer for layer in stack.layers if layer.shows_config] if stack else []
        acting = [layer for layer in showing if layer.record.active]
        return acting[-1].shown_config(config) if acting else config

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__["config"] = value

    return property(read, write)


@_cache
def _site_meta(meta: type) -> type:
    """The metaclass under which a site's class stands for its base when others use it as a class.

    Sites and plain modules are instances of each other's classes, because accelerate wraps every
    module that is an instance of the first class it finds by name, and that may be a site's. A new
    instance is a plain module, because `type(model).from_pretrained(...)` means a plain model.
    """

    def __instancecheck__(cls: type, instance: object) -> bool:
        return meta.__instancecheck__(vars(cls).get("_site_of", cls), instance)  # type: ignore

    def __call__(cls: type, *args: Any, **kwargs: Any) -> Any:
        return meta.__call__(vars(cls).get("_site_of", cls), *args, **kwargs)

    return type(
        meta.__name__, (meta,), {"__instancecheck__": __instancecheck__, "__call__": __call__}
    )


@_cache
def site_class(base: type[nn.Module], reads: bool = False) -> type[nn.Module]:
    """The subclass of `base` whose forward runs the stack; it looks like `base` to everybody else.

    With `reads`, `.weight` and `.bias` show the folded values, for parents that read them instead
    of calling the module.
    """
    raw = kinds.raw_forward(base)
    plain, is_raw = (raw if reads else base.forward), raw is not None
    assert plain is not None

    # In the class body and wrapped, because transformers' checkpointing layers look at the body,
    # and Trainer and generate() at the signature. No super(): somebody may keep this bound forward
    # until after the site is gone.
    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call: Callable[..., Any] = functools.partial(plain, self)
        stack = self._modules.get(SLOT)
        if stack is not None:
            call = stack.around(call, self, is_raw)  # type: ignore[operator]
        return call(*args, **kwargs)

    def __reduce_ex__(self: nn.Module, protocol: object) -> tuple:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _unpickle, (base, reads), state

    body: dict[str, Any] = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_site_of": base,
        "_site_reads": reads,
    }
    if issubclass(base, nn.Sequential):  # its items are its own modules, without the stack
        body["__iter__"] = lambda self: iter([m for n, m in self._modules.items() if n != SLOT])
        body["__len__"] = lambda self: len(self._modules) - (SLOT in self._modules)
    if reads:
        body |= {"weight": _reading("weight"), "bias": _reading("bias")}
    if prefix.uses_interface(base) or hasattr(base, "config_class"):
        body["config"] = _showing_config()
    if hasattr(base, "config_class"):  # a transformers model
        body["num_labels"] = labels.showing_count()
    made = _site_meta(type(base))(base.__name__, (base,), body)
    compile_limit.SITES.update((id(base), id(made)))
    return made


def _unpickle(base: type[nn.Module], reads: bool) -> nn.Module:
    cls = site_class(base, reads)
    return cls.__new__(cls)


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The class under the site; None if the class is not ours (plain, or subclassed on top)."""
    return vars(type(module)).get("_site_of")


def weight_is_read(module: nn.Module, asked: bool) -> bool:
    """Whether the site must show folded weights: asked for, known to be read, or so already."""
    known = (
        type(module).__name__ == "NonDynamicallyQuantizableLinear"
    )  # MultiheadAttention.out_proj
    return asked or known or getattr(type(module), "_site_reads", False)


def check_has_forward(where: str, module: nn.Module) -> None:
    """Raise if `module`, at `where`, has no forward, as ModuleList has none."""
    if getattr(type(module), "forward", None) is nn.Module.forward:
        raise SiteError(
            f"{where!r} ({type(module).__name__}) is never called, having no forward; choose its "
            rf"items, such as r'[r]{where.rpartition('.')[2]}\.\d+'",
            where=where,
        )


def check(
    where: str,
    module: nn.Module,
    name: str,
    layer: DeltaLayer,
    reads: bool,
    stack: Stack | None,
) -> None:
    """Raise if `module`, at `where`, cannot take the layer. Nothing is changed.

    Args:
        stack: the stack that it has by then.
    """
    here = f"{where!r} ({(plain_class(module) or type(module)).__name__})"
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
    check_has_forward(where, module)
    if stack is not None and name in stack:
        raise SiteError(f"{here} carries a delta {name!r} already; pass another name=", where=where)
    if wrappers.hides_forward(module):
        raise SiteError(
            f"{here} had its forward replaced by {module.__dict__['forward']!r}: the delta would "
            "never run. Attach before that replacement, or remove it",
            where=where,
        )
    if reads:
        _check_reads(here, module, stack, (name, layer))


def _check_reads(
    here: str, module: nn.Module, stack: Stack | None, new: tuple[str, DeltaLayer]
) -> None:
    """Raise if `module` cannot show its weight with the layers of `stack` and the new one."""
    acting = [*(stack.in_order() if stack is not None else ()), new]
    for each, other in acting:
        if not other.folds:
            raise SiteError(
                f"{here}: its parent reads .weight instead of calling it, so only layers that fold "
                f"into the weight act there; {each!r} ({type(other).__name__}) does not. Choose "
                "the parent module instead"
            )
    base = plain_class(module) or type(module)
    if kinds.raw_forward(base) is None or "weight" not in module._parameters:
        raise SiteError(f"{here}: folded weights can be shown on Linear and Conv1D only")
    shown = getattr(type(module), "_site_reads", False)
    if stack_of(module) is not None and plain_class(module) is None and not shown:
        raise SiteError(
            f"{here} was subclassed by {type(module).__module__}; pass reads=True when the first "
            "delta is attached"
        )


def add(module: nn.Module, name: str, layer: DeltaLayer, reads: bool) -> Stack:
    """Put `layer` on the stack of `module`, as the outermost; `check` comes first."""
    stack, base = stack_of(module), plain_class(module)
    layer.train(module.training)
    if stack is None:
        stack = module._modules[SLOT] = Stack().train(module.training)
        wrappers.set_class(module, site_class(type(module), reads))
    elif base is not None and reads != vars(type(module))["_site_reads"]:
        wrappers.set_class(module, site_class(base, reads))
    stack[name] = layer
    return stack


def remove(module: nn.Module, name: str) -> None:
    """Take a layer off, at any position; the last one takes the generated class along.

    Where somebody subclassed the site meanwhile (FSDP2, parametrizations), the class cannot be
    reset: the empty stack stays and computes what the plain module does.
    """
    stack, base = stack_of(module), plain_class(module)
    assert stack is not None
    if stack.kept_factors is not None:
        stack.kept_factors.forget(stack[name])  # type: ignore[arg-type]
    del stack[name]
    stack.ran.discard(name)
    if not len(stack) and base is not None:
        wrappers.set_class(module, base)
        del module._modules[SLOT]
