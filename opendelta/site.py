"""One module's ordered stack of delta layers: the class swap, the onion call, pickling.

    f0 = the module's own forward;  f(i+1) = layer_i around f_i;  the module now computes f_n

The stack is data, an ordered mapping: any layer may leave, return or move at any time. A module
becomes a site by getting a generated subclass of its own class and one child, `deltas`; when the
last layer leaves, both leave too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import attention, compiling, foreign, labels, layers, neighbours, products
from .bases import Beneath, DeltaLayer, Params, gated
from .errors import SiteError
from .record import SLOT

if TYPE_CHECKING:
    from . import routing

LONGEST_NAME = 64
NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_NAME}}}")


def _step_aside(*_: Any) -> None:
    """Does nothing: torch's fused paths see a hook in the subtree and then call the children."""


@dataclass
class Step:
    """One merging of layers into the weights of their module.

    Attributes:
        layers: the layers by name, the innermost first.
        kept: {name of a parameter: what puts its old values back}.
        marks: {name of a parameter: a number that tells whether its new values changed since}.
    """

    layers: dict[str, DeltaLayer] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)


class Stack(nn.ModuleDict):
    """The ordered delta layers of one site; the first is the innermost.

    An empty stack computes what the plain module computes. `ran` holds the names of the layers that
    have run outside of compiled code; DataParallel's replicas share it. Layers that `steps` merged
    do not act.
    """

    ran: set[str]
    steps: list[Step]
    frozen: neighbours.Frozen | None = None
    routed: routing.Routed | None = None

    def __init__(self) -> None:
        super().__init__()
        self.__dict__.update(ran=set(), steps=[])  # nn.Module would look at each attribute
        self.register_forward_pre_hook(_step_aside)

    def _acting(self) -> list[DeltaLayer]:
        acting: list[Any] = []
        ran, steps = self.ran, self.steps
        watched = not torch.compiler.is_compiling()  # no side effect, hence no guard, in a graph
        for name, layer in self._modules.items():
            if layer.record.active and not (steps and self.holds(name)):  # type: ignore
                acting.append(layer)
                if watched:
                    ran.add(name)
        return acting

    def holds(self, name: str) -> bool:
        """Whether the layer of this name is merged into the module's weights."""
        return any(name in step.layers for step in self.steps)

    def merged(self) -> list[str]:
        """The names of the layers that are merged into the weights, the innermost first."""
        return [name for step in self.steps for name in step.layers]

    def forward(self, input: Any) -> Any:
        """`input`, unchanged: for modules such as Sequential, which call all of their children."""
        return input

    def in_order(self) -> list[tuple[str, DeltaLayer]]:
        """(name of the delta, layer), the innermost first."""
        return list(self._modules.items())  # type: ignore[arg-type]

    def around(
        self, call: Callable[..., Any], module: nn.Module, raw: bool = False
    ) -> Callable[..., Any]:
        """`call`, the forward of `module`, with all active layers around it.

        Args:
            raw: whether `call` is the forward of torch's Linear or the like.
        """
        acting = self._acting()
        if self.routed is not None:
            return functools.partial(self.routed.run, self, acting, call, module, raw)
        return self.onion(acting, call, module, raw)

    def onion(
        self, acting: list[DeltaLayer], call: Callable[..., Any], module: nn.Module, raw: bool
    ) -> Callable[..., Any]:
        """`call` with these layers around it, the first as the innermost."""
        index = 0
        while index < len(acting):
            layer = acting[index]
            if torch.compiler.is_compiling() or self.frozen is None:  # no guard on what is kept
                run = neighbours.pairs(acting, index)
                count = len(run)
            else:
                run, count = self.frozen.run(acting, index)
            if run:
                call = functools.partial(products.add, call, run, raw and index == 0)
                index += count
                continue
            if layer.sees_module:
                call = Beneath(call, module, acting[:index], raw and index == 0)
            if layer.gate is not None and not layer.gates_itself:
                call = functools.partial(gated, layer, call)
            else:
                call = functools.partial(layer, call)
            index += 1
        return call

    def fold(self, params: Params) -> Params:
        """`params` with all active layers folded in."""
        acting = self._acting()
        if self.routed is not None:
            self.routed.check_alike(acting)
        for layer in acting:
            params = layer.fold(params)
        return params

    def sort(self) -> None:
        """Put the layers into the total order, those in the module's place beneath all others.

        The mapping object itself stays the same.
        """
        ordered = sorted(
            self.in_order(), key=lambda item: (item[1].flow != "instead", item[1].record.place)
        )
        if [name for name, _ in ordered] != list(self._modules):
            self._modules.clear()
            self._modules.update(ordered)


RESERVED = frozenset(dir(Stack()))
_cache: Any = functools.cache  # its own annotation takes no classes of modules as arguments


# ----------------------------------------------------------- the generated class
def _reading(name: str) -> property:
    """A property that shows a parameter as the parent must see it: with the deltas folded in."""

    def read(self: nn.Module) -> Tensor | None:
        raw = layers.stored(self, name)
        stack = stack_of(self)
        if not stack or layers.is_sharded(raw):  # FSDP2 reads the parameter while it shards it
            return raw
        return stack.fold(layers.stored_params(self)).get(name)

    def write(self: nn.Module, value: Tensor) -> None:
        # nn.Module stores Parameters itself; this gets the plain tensors of a replica
        self.__dict__[name] = value

    return property(read, write)


def _showing_config(shown: Callable[[nn.Module], Any]) -> property:
    """The attribute `config`, as `shown` gives it."""

    def read(self: nn.Module) -> Any:
        return shown(self)

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
    raw = layers.raw_forward(base)
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
    if attention.uses_interface(base):
        body["config"] = _showing_config(attention.shown_config)
    elif hasattr(base, "config_class"):  # a transformers model
        body |= {
            "config": _showing_config(labels.shown_config),
            "num_labels": labels.showing_count(),
        }
    made = _site_meta(type(base))(base.__name__, (base,), body)
    compiling.SITES.update((id(base), id(made)))
    return made


def _unpickle(base: type[nn.Module], reads: bool) -> nn.Module:
    cls = site_class(base, reads)
    return cls.__new__(cls)


def plain_class(module: nn.Module) -> type[nn.Module] | None:
    """The class under the site; None if the class is not ours (plain, or subclassed on top)."""
    return vars(type(module)).get("_site_of")


def stack_of(module: nn.Module) -> Stack | None:
    """The stack that `module` carries, or None. A stack may be empty."""
    children = module._modules
    child = children[SLOT] if SLOT in children else None  # noqa: SIM401  a ScriptModule has no get
    return child if isinstance(child, Stack) else None


# ------------------------------------------------------------------------- verbs
def wants_reads(module: nn.Module, asked: bool) -> bool:
    """Whether the site must show folded weights: asked for, known to be read, or so already."""
    known = (
        type(module).__name__ == "NonDynamicallyQuantizableLinear"
    )  # MultiheadAttention.out_proj
    return asked or known or getattr(type(module), "_site_reads", False)


def check_name(name: str) -> None:
    """Raise unless `name` can be the key of a layer in every stack."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SiteError(f"{name!r} is no name for a delta: use 1 to 64 letters, digits, '_' or '-'")
    if name in RESERVED:
        raise SiteError(
            f"{name!r} is no name for a delta: torch.nn.ModuleDict has an attribute of that name; "
            f"use another, such as '{name}_delta'"
        )


def check_called(where: str, module: nn.Module) -> None:
    """Raise if `module`, at `where`, has no forward, as ModuleList has none."""
    if getattr(type(module), "forward", None) is nn.Module.forward:
        raise SiteError(
            f"{where!r} ({type(module).__name__}) is never called, having no forward; choose its "
            rf"items, such as r'[r]{where.rpartition('.')[2]}\.\d+'"
        )


def check(
    where: str,
    module: nn.Module,
    name: str,
    layer: DeltaLayer,
    reads: bool,
    planned: Stack | None = None,
) -> None:
    """Raise if `module`, at `where`, cannot take the layer. Nothing is changed.

    Args:
        planned: the stack that it would have by then. None: the one that it has.
    """
    stack = stack_of(module) if planned is None else planned
    here = f"{where!r} ({(plain_class(module) or type(module)).__name__})"
    if isinstance(module, torch.jit.ScriptModule):
        raise SiteError(f"{here} is compiled by TorchScript; attach before torch.jit.script")
    if stack_of(module) is None and hasattr(module, SLOT):
        raise SiteError(
            f"{here} has an attribute {SLOT!r} of its own, which is where the layers would live; "
            "rename it, or choose its parent or its children"
        )
    check_called(where, module)
    if stack is not None and name in stack:
        raise SiteError(f"{here} carries a delta {name!r} already; pass another name=")
    if foreign.hides_forward(module):
        raise SiteError(
            f"{here} had its forward replaced by {module.__dict__['forward']!r}: the delta would "
            "never run. Attach before that replacement, or remove it"
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
    if layers.raw_forward(base) is None or "weight" not in module._parameters:
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
        foreign.set_class(module, site_class(type(module), reads))
    elif base is not None and reads != vars(type(module))["_site_reads"]:
        foreign.set_class(module, site_class(base, reads))
    stack[name] = layer
    return stack


def remove(module: nn.Module, name: str) -> None:
    """Take a layer off, at any position; the last one takes the generated class along.

    Where somebody subclassed the site meanwhile (FSDP2, parametrizations), the class cannot be
    reset: the empty stack stays and computes what the plain module does.
    """
    stack, base = stack_of(module), plain_class(module)
    assert stack is not None
    if stack.frozen is not None:
        stack.frozen.forget(stack[name])  # type: ignore[arg-type]
    del stack[name]
    stack.ran.discard(name)
    if not len(stack) and base is not None:
        foreign.set_class(module, base)
        del module._modules[SLOT]
