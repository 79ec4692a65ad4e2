"""The base class of all delta layers, and the call that a layer wraps."""

from __future__ import annotations

import enum
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._modules import calls, tensors
from .._modules.kinds import KINDS
from ..errors import OptionError
from . import costs
from .costs import Flops
from .gate import Gate
from .record import Record

Params = dict[str, Tensor]
Call = Callable[..., Any]


class Handover(threading.local):
    """Holds one value from one site of a delta to the next, within a call and for each thread.

    A copy of it, by deepcopy or pickle, is empty.
    """

    value: Any = None

    def put(self, value: Any) -> None:
        """Keep `value` until it is taken."""
        self.value = value

    def take(self) -> Any:
        """Return the value that was put last, once; None if there is none."""
        value, self.value = self.value, None
        return value

    def __reduce__(self) -> tuple:
        return Handover, ()


class Acts(enum.Enum):
    """How a delta layer stands to the call that it wraps.

    The rest of the library builds on it: a layer that is BESIDE by name and not by its equation
    gives wrong numbers once others are merged. `tests/` checks it for each registered method.

    Attributes:
        AFTER: it changes the module's output: y = g(f(x)).
        BEFORE: it changes the module's input: y = f(g(x)). Its gate reads the input.
        BESIDE: it adds a term that depends on the input alone: y = f(x) + g(x). Such layers may be
            attached, moved and merged in any order among each other, as a sum has none. On a linear
            module its gate reads the input.
        WITHIN: it changes what the module computes inside. A row of a batch cannot take it alone,
            unless the layer `routes_itself`.
        INSTEAD: it takes the module's place, as the innermost layer whatever the order says.
            Nothing inside the module runs. A plain model gets its `stand_in`, as it does not fold.
        SERVES: it changes nothing by itself and serves layers elsewhere: it is not merged, has no
            place in a formula, and costs nothing.
    """

    AFTER = "acts on the output"
    BEFORE = "acts on the input"
    BESIDE = "adds to the output"
    WITHIN = "acts inside"
    INSTEAD = "takes the module's place"
    SERVES = "serves the delta's other modules"

    @property
    def in_the_weights(self) -> bool:
        """True if a plain model needs the layer folded into its weights to compute the same."""
        return self not in (Acts.INSTEAD, Acts.SERVES)


class DeltaLayer(nn.Module):
    """One delta on one module; the base class of what a method author writes.

    A subclass takes `(site, config)`, makes its parameters from the sizes of the site, starts as
    the identity, and writes the paper's equation around the wrapped `call` in `forward`. If the
    same change can be made to the weights, `fold` makes it.

    Attributes:
        kinds: the kinds of module it can be put on: keys of `KINDS`.
        acts: how it stands to the wrapped call; see `Acts` for what follows from it.
        inside: a module of another kind stands for the modules of these kinds inside it.
        paired: `modified_modules` come in pairs: where a branch starts, and where it ends.
        sees_module: the `call` of its forward has `.module` and `.params()`: see `InnerCall`.
        gates_itself: its own equation heeds `self.gate`.
        scales: its own equation heeds `self.strength()`. A subclass with a forward or a fold of its
            own says so anew.
        runs_as_factors: it computes just what its factors say, beside a linear module.
        gate_width: width of what its gate reads, where that is neither in- nor output of a weight.
        identity: whether it changes nothing at the start.
        why_not: what keeps a layer with a `fold` from folding, for messages.
        computes: False for a layer that only holds something.
        stands_alone: beside it no other delta may choose its rows of a batch.
        routes_itself: it finds out by itself which rows of a batch take it.
        extra_positions: how many positions it adds to every sequence.
        shows_config: while it acts, the module shows another config, its `shown_config`.
        labels: how many labels the model has while it acts; None: as many as before.
        handover: where it leaves a value for another site, or finds one; None: it does not.
        hands_over: it leaves a value in its `handover`, and does not find one there.
    """

    kinds: tuple[str, ...] = tuple(KINDS)
    acts: Acts = Acts.AFTER
    inside: ClassVar[bool] = False
    paired: ClassVar[bool] = False
    sees_module: ClassVar[bool] = False
    gates_itself: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    runs_as_factors: bool = False
    gate_width: int | None = None
    identity: ClassVar[bool] = True
    why_not: ClassVar[str] = ""
    computes: ClassVar[bool] = True
    stands_alone: ClassVar[bool] = False
    routes_itself: ClassVar[bool] = False
    extra_positions: int = 0
    shows_config: ClassVar[bool] = False
    labels: int | None = None
    handover: Handover | None = None
    hands_over: ClassVar[bool] = False
    record: Record
    gate: Gate | None

    def __init_subclass__(cls) -> None:
        own = vars(cls)
        if "scales" not in own and ("forward" in own or "fold" in own):
            cls.scales = False
        if not isinstance(cls.acts, Acts | property):
            raise OptionError(
                f"{cls.__name__}.acts={cls.acts!r} must be one of {', '.join(map(str, Acts))}; "
                "opendelta.author.Acts says what each means"
            )
        if cls.acts is Acts.INSTEAD and cls.stand_in is DeltaLayer.stand_in:
            raise OptionError(f"{cls.__name__} acts INSTEAD of a module, so it needs a `stand_in`")

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["gate"] = None  # past nn.Module, which looks long at each attribute

    # ----------------------------------------------------------------- what an author writes
    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """The equation around `call`, the module's own forward with all layers beneath this one."""
        raise NotImplementedError

    def fold(self, params: Params) -> Params:
        """Make the same change in weight space. Pure.

        Args:
            params: `weight`, in the layout of the module, and `bias` if it has one; in at least
                float32.

        Returns:
            The same with new tensors in the place of those that change.
        """
        raise NotImplementedError

    @classmethod
    def companions(
        cls, made: Mapping[str, DeltaLayer], modules: Mapping[str, nn.Module], config: Any
    ) -> dict[str, DeltaLayer]:
        """The layers that this delta needs on further modules, by full name.

        Args:
            made: its layers so far, by full name.
            modules: all modules of the backbone, by full name.
        """
        return {}

    # ------------------------------------------------------------------- what it can use
    def strength(self) -> Any:
        """What multiplies the change, `delta.scale`: a number; in compiled code, a tensor."""
        record = self.record
        return record.scale_tensor if torch.compiler.is_compiling() else record.scale

    @property
    def shared(self) -> Any:
        """What all layers of this delta share, made by the delta's `shared_for`; or None."""
        return self.__dict__.get("_shared", (None,))[0]

    def share(self, module: nn.Module) -> None:
        """Let `shared` be `module`, without owning its parameters."""
        self.__dict__["_shared"] = (module,)  # hidden from nn.Module, followed by deepcopy, pickle

    # ------------------------------------------------------- what the library asks of it
    @classmethod
    def can_fold(cls) -> bool:
        """True if the class writes a `fold`."""
        return cls.fold is not DeltaLayer.fold

    @property
    def folds(self) -> bool:
        """True if this layer can be written into the weights of its module."""
        return self.can_fold() and self.gate is None

    def folds_as(self) -> Any:
        """The `LowRank` whose product with the weight's layout is all that `fold` adds; or None."""
        return None

    @property
    def for_all_rows(self) -> str | None:
        """Why all rows of a batch must take it, or none: "changes ..."; None: each may choose."""
        return "acts inside the module" if self.acts is Acts.WITHIN else None

    @property
    def stand_in(self) -> nn.Module | None:
        """The module that a plain model has in the place of the layer's module; None: its own."""
        return None

    def shown_config(self, config: Any) -> Any:
        """The transformers config that the module shows in the place of its own."""
        return config

    def around(
        self, call: Call, module: nn.Module, acting: Sequence[DeltaLayer], raw: bool = False
    ) -> Call:
        """Return `call` with this layer around it, and with its gate.

        Args:
            call: the forward of `module` with the layers beneath.
            acting: the layers beneath.
            raw: `call` is the forward of torch's Linear or the like, with nothing beneath.
        """
        if self.sees_module:
            call = InnerCall(call, module, acting, raw)
        if self.gate is not None and not self.gates_itself:
            return functools.partial(_gated, self, call)
        return functools.partial(self, call)

    def formula(self, name: str, inner: Callable[[str], str]) -> Callable[[str], str]:
        """Return the formula of `inner` with this layer around it, as text; both are given x.

        Args:
            name: what the layer is called in it.
        """
        if self.acts is Acts.BESIDE:
            factor = "" if self.record.scale == 1 else f"{self.record.scale:g} "
            return lambda x: f"{inner(x)} + {factor}{name}({x})"
        if self.acts is Acts.BEFORE:
            return lambda x: inner(f"{name}({x})")
        if self.acts is Acts.INSTEAD:
            return lambda x: f"{name}({x})"
        if self.acts is Acts.AFTER:
            return lambda x: f"{name}({inner(x)})"
        return inner

    def flops(self, module: nn.Module) -> Flops:
        """Count what the layer, on the meta device, adds to a forward of `module`.

        Raises:
            Exception: whatever its own forward raises on tensors without values.
        """
        if not self.acts.in_the_weights:
            return Flops(0, 0)
        width = self.__dict__.get("width")
        reads = None if self.gate_width is None else self.gate_width or width

        floats = (p.dtype for p in self.parameters() if p.is_floating_point())
        dtype = next(floats, torch.get_default_dtype())

        def run(bare: nn.Module, x: Tensor, out: Tensor) -> None:
            self.around(lambda *_: out, bare, ())(x)

        return costs.around(module, run, width, reads, dtype)

    def fit(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Move to where `module` computes, unless accelerate offloaded the layer.

        Then accelerate brings its values for every run.
        """
        own = list(_tensors(self))
        if device.type != "meta" and any(t.is_meta and isinstance(t, nn.Parameter) for t in own):
            return
        moved = any(t.device != device for t in own)
        if moved or any(t.dtype != dtype for t in own if t.is_floating_point()):
            self.to(device=device, dtype=dtype)


def _tensors(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers in `module`, in less time than torch takes for their names."""
    own = [*module._parameters.values(), *module._buffers.values()]
    found = [tensor for tensor in own if tensor is not None]
    for child in module._modules.values():
        if child is not None:
            found += _tensors(child)
    return found


class InnerCall:
    """The wrapped call of a layer that also needs the module, or the weights beneath it.

    Attributes:
        raw: it is the forward of torch's Linear or the like, with nothing beneath.
    """

    def __init__(
        self, call: Call, module: nn.Module, beneath: Sequence[DeltaLayer], raw: bool = False
    ) -> None:
        self.call, self.module, self.beneath, self.raw = call, module, beneath, raw

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def params(self) -> Params:
        """The module's weight and bias with the layers beneath folded in, as far as they fold."""
        params = tensors.stored_params(self.module)
        for layer in self.beneath:
            params = layer.fold(params) if layer.folds else params
        return params


def times(factor: Any, change: Tensor) -> Tensor:
    """Return `change`, multiplied by what `DeltaLayer.strength` gives."""
    return change if is_one(factor) else factor * change


def is_one(factor: Any) -> bool:
    """True if `factor` is the number 1; a tensor may be any number."""
    return not isinstance(factor, Tensor) and factor == 1


def _gated(layer: DeltaLayer, call: Call, *args: Any, **kwargs: Any) -> Any:
    """Call `layer` around `call`, as far as its gate is open.

    The gate stands on what the layer changes: its input, or the output that `call` gives. It reads
    the input where the layer reads that, and else the output.
    """
    gate: Any = layer.gate
    x = calls.first_input(args, kwargs)
    plain: list[Tensor] = []

    def inner(*new: Any, **options: Any) -> Any:
        changed = calls.first_input(new, options)
        if changed is not x:
            new, options = calls.replace_input(new, options, x + gate(x) * (changed - x))
        out = call(*new, **options)
        plain.append(calls.hidden(out))
        return out

    beneath: Any = inner
    if isinstance(call, InnerCall):
        beneath = InnerCall(inner, call.module, call.beneath)
    out = layer(beneath, *args, **kwargs)
    before, after = plain[0], calls.hidden(out)
    if after is before:
        return out
    mixed = before + gate(x if gate.on_input else before) * (after - before)
    return calls.change_hidden(out, after.size(-1), lambda _: mixed)
