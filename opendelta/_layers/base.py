"""The base class of all delta layers, and the call that a layer wraps."""

from __future__ import annotations

import enum
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._modules import calls, tensors
from .._modules.fitting import Needs
from .._modules.kinds import KINDS
from ..errors import OptionError
from . import costs, seeded
from .costs import Flops
from .dtypes import dtype_for
from .gate import Gate
from .record import Record

Params = dict[str, Tensor]
Call = Callable[..., Any]
X = "\0"  # the input in a formula
WITHIN = "\1"  # where the names of layers inside the module go in a formula


class Handover(threading.local):
    """Passes one value from one site of a delta to the next, within a call of one thread.

    A copy of it, by deepcopy or pickle, is empty.
    """

    def __init__(self) -> None:
        # From the start in each thread's dict: a compiled graph's guard must not see it come.
        self.value: Any = None

    def put(self, value: Any) -> None:
        """Keep `value` until `take` is called."""
        self.value = value

    def take(self) -> Any:
        """Return the last value, and forget it; None if there is none."""
        value, self.value = self.value, None
        return value

    def __reduce__(self) -> tuple:
        return Handover, ()


class Acts(enum.Enum):
    """The place of a delta layer relative to the call f that it wraps.

    The rest of the library relies on it. For example, if a layer says BESIDE but has another
    equation, results are wrong after other deltas are merged. Tests check each registered method.

    Attributes:
        AFTER: the layer changes the module's output: y = g(f(x)).
        BEFORE: the layer changes the module's input: y = f(g(x)). Its gate reads the input.
        BESIDE: the layer adds a term that depends on the input alone: y = f(x) + g(x). A sum has no
            order, so such layers may be attached, moved and merged in any order. On a linear module
            the gate reads the input.
        WITHIN: the layer changes the computation inside the module. All rows of a batch must take
            it, unless the layer `routes_itself`.
        INSTEAD: the layer takes the module's place. It is always the innermost layer. Nothing
            inside the module runs. The layer does not fold; a plain model gets its `stand_in`.
        SERVES: the layer changes nothing by itself, and serves layers on other modules. It is not
            merged, has no place in a formula, and costs nothing.
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


def _reads(code: Any, name: str) -> bool:
    """True if some code, or code in it, reads an attribute or a global of this name."""
    inner = code.co_consts if isinstance(code, CodeType) else ()
    return name in getattr(code, "co_names", ()) or any(_reads(each, name) for each in inner)


class DeltaLayer(nn.Module):
    """One delta on one module: the base class of the layers that authors of methods write.

    A subclass takes `(site, config)` and makes its parameters from the sizes of the site. At the
    start it changes nothing. Its `forward` is the paper's equation around the wrapped `call`. If
    the same change can be made to the weights, its `fold` makes it.

    Attributes:
        kinds: the kinds of module that it can be put on: keys of `KINDS`.
        acts: its place relative to the wrapped call; see `Acts`.
        inside: a module of another kind stands for the modules of these kinds inside it.
        paired: `modified_modules` come in pairs: the start and the end of a branch.
        writes, sets: the method that subclasses must write, and the attributes that their
            `__init__` must set, for the forward of this class. A subclass with its own forward
            needs neither.
        sees_module: the `call` of its forward has `.module` and `.params()`: see `InnerCall`.
        gates_itself: its own equation uses `self.gate`.
        scales: its own equation uses `self.strength()`. A subclass with its own forward or fold
            must set it again.
        runs_as_factors: its equation is y = f(x) + s B A x with its `factors`, beside a linear
            module.
        in_parts: its change is one of the weight of a linear module, computed in no other way, so
            that each of several ranks may add a part of it.
        gate_width: width of the gate's input; None: the width of the module's input or output.
        identity: true if it changes nothing at the start.
        is_block: it combines other deltas by a rule: see `BlockLayer`.
        enters: what it adds goes into the module, which it may run more than once. A block in which
            all do so adds to the input.
        why_not: for messages, why a layer with a `fold` may not fold.
        computes: False for a layer that only holds tensors or facts.
        watches: it has no place in what users are shown: it only watches over its module.
        only_notes: it only notes what a call says of its tokens, for layers inside the module.
        stands_alone: no other delta on the same module may choose its rows of a batch.
        routes_itself: it finds by itself the rows of a batch that take it.
        extra_positions: number of positions that it adds to each sequence.
        shows_config: while it acts, the module shows another config, its `shown_config`.
        grows: its tensors' first rows belong to the first outputs of a linear module, so that it
            can follow a head that gets more outputs.
        resizer: on a transformers model, what `resize` calls; the library sets it.
        any_axis: it can be put on a normalisation whose width is not on the last axis. A subclass
            with its own forward must set it again.
        axis: the axis of the width of the module's output; the library sets it.
        missed: a forward of the whole model did not reach it.
        made_for: sizes of the module for which it was made; the library sets it.
        labels: number of labels of the model while it acts; None: it changes no labels.
        handover: passes a value to or from another site; None: it passes none.
        hands_over: it puts a value into its `handover`; another layer takes the value.
    """

    kinds: tuple[str, ...] = tuple(KINDS)
    acts: Acts = Acts.AFTER
    inside: ClassVar[bool] = False
    paired: ClassVar[bool] = False
    writes: ClassVar[str] = "forward"
    sets: ClassVar[tuple[str, ...]] = ()
    sees_module: ClassVar[bool] = False
    gates_itself: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    runs_as_factors: bool = False
    in_parts: bool = False
    gate_width: int | None = None
    identity: ClassVar[bool] = True
    is_block: ClassVar[bool] = False
    enters: ClassVar[bool] = False
    why_not: ClassVar[str] = ""
    computes: ClassVar[bool] = True
    watches: ClassVar[bool] = False
    only_notes: ClassVar[bool] = False
    stands_alone: ClassVar[bool] = False
    routes_itself: ClassVar[bool] = False
    extra_positions: int = 0
    shows_config: ClassVar[bool] = False
    grows: bool = False
    resizer: Call | None = None
    any_axis: ClassVar[bool] = False
    axis: int = -1
    missed: bool = False
    made_for: tuple[tuple[int, int], ...] = ()
    labels: int | None = None
    handover: Handover | None = None
    hands_over: ClassVar[bool] = False
    record: Record
    gate: Gate | None

    def __init_subclass__(cls) -> None:
        own = vars(cls)
        equations = [own[name] for name in ("forward", "fold") if name in own]
        if "scales" not in own and equations:
            if any(_reads(getattr(f, "__code__", None), "strength") for f in equations):
                raise OptionError(
                    f"{cls.__name__} calls strength() in its own forward or fold: set scales = "
                    "True if that multiplies all of its change, else scales = False"
                )
            cls.scales = False
        if "any_axis" not in own and "forward" in own:
            cls.any_axis = False
        if not isinstance(cls.kinds, tuple) or not {*cls.kinds} <= KINDS.keys():
            raise OptionError(
                f"{cls.__name__}.kinds={cls.kinds!r} must be a tuple of some of {', '.join(KINDS)}"
            )
        if not isinstance(cls.acts, Acts | property):
            raise OptionError(
                f"{cls.__name__}.acts={cls.acts!r} must be one of {', '.join(map(str, Acts))}; "
                "opendelta.author.Acts says what each means"
            )
        if cls.acts is Acts.INSTEAD and cls.stand_in is DeltaLayer.stand_in:
            raise OptionError(f"{cls.__name__} acts INSTEAD of a module, so it needs a `stand_in`")

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["gate"] = None  # not by nn.Module.__setattr__, which is slow

    # ------------------------------------------------------------- methods that authors write
    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        """Compute the equation around `call`: the module's forward with all layers beneath."""
        raise NotImplementedError

    def fold(self, params: Params) -> Params:
        """Make the same change to the weights. The given tensors must not change.

        Args:
            params: `weight`, in the layout of the module, and `bias` if it has one; in at least
                float32.

        Returns:
            The params with new tensors in the place of the changed ones.
        """
        raise NotImplementedError

    @classmethod
    def companions(
        cls, made: Mapping[str, DeltaLayer], modules: Mapping[str, nn.Module], config: Any
    ) -> dict[str, DeltaLayer]:
        """Return the layers that this delta needs on further modules, by full name.

        Args:
            made: its layers so far, by full name.
            modules: all modules of the backbone, by full name.
        """
        return {}

    # ------------------------------------------------------- methods that authors may call
    def strength(self) -> Any:
        """Return the factor of the change, `delta.scale`: a number; in compiled code, a tensor."""
        if not torch.compiler.is_compiling():
            return self.record.scale
        wide = any(parameter.dtype == torch.float64 for parameter in self.parameters())
        return self.record.scale_tensor(wide)

    @property
    def shared(self) -> Any:
        """Return the module that all layers of this delta share, or None; see `shared_for`."""
        return self.__dict__.get("_shared", (None,))[0]

    def share(self, module: nn.Module) -> None:
        """Let `shared` be `module`, without owning its parameters."""
        # In a tuple nn.Module does not see the module, but deepcopy and pickle copy it.
        self.__dict__["_shared"] = (module,)

    # ------------------------------------------------------ methods that the library calls
    def seeded(self) -> list[nn.Module]:
        """Return the modules that may fill buffers by a method `seed`: itself and those in it."""
        return list(self.modules()) if self._modules else [self]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        seeded.moved(self.seeded(), functools.partial(super()._apply, fn, recurse), fn)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        shared = [] if self.shared is None else self.shared.modules()
        seeded.beside(self, [*self.seeded(), *shared])

    @classmethod
    def check_written(cls) -> tuple[str, ...]:
        """Raise unless the class writes the method that its form leaves to subclasses.

        Returns:
            The attributes that `__init__` must set, as the forward of the form reads them.

        Raises:
            OptionError: it does not.
        """
        form = next(base for base in cls.__mro__ if "forward" in vars(base))
        name = vars(form).get("writes", "")
        if name and getattr(cls, name) is getattr(form, name):
            raise OptionError(
                f"{cls.__name__} must write the method {name}: the forward of a {form.__name__} "
                "calls it"
            )
        return vars(form).get("sets", ())

    @classmethod
    def can_fold(cls) -> bool:
        """True if the class writes a `fold`."""
        return cls.fold is not DeltaLayer.fold

    @classmethod
    def can_fold_on(cls, module: nn.Module) -> bool:
        """True if a layer of the class on `module` can be written into its weights."""
        return cls.can_fold()

    @property
    def folds(self) -> bool:
        """True if this layer can be written into the weights of its module."""
        return self.can_fold() and self.gate is None

    @classmethod
    def needs(cls) -> Needs:
        """Return what a layer that acts on the output needs of it."""
        return "hidden" if "other" in cls.kinds else "channels"

    @property
    def joins_blocks(self) -> bool:
        """True if it acts inside a block that names its delta; else it acts by itself, as ever."""
        passes_on = self.hands_over and self.handover is not None
        return self.acts not in (Acts.INSTEAD, Acts.SERVES) and not passes_on

    @property
    def keeps_input(self) -> bool:
        """True if it may look at the input after the call beneath it, or keeps it for gradients.

        A copy of the module does not: it writes to the input as the module would.
        """
        looks = self.gate is not None or self.sees_module or self.is_block
        return self.acts is not Acts.INSTEAD and (looks or self.acts is Acts.BESIDE)

    @property
    def shows_in_weight(self) -> bool:
        """True if it acts where other code reads the module's weight instead of calling it."""
        return self.folds

    def folds_as(self) -> Any:
        """Return the `LowRank` whose product is all that `fold` adds to the weight, or None."""
        return None

    @property
    def for_all_rows(self) -> str | None:
        """Return why all rows of a batch must take the layer, such as "acts inside the module".

        None: each row may choose.
        """
        return "acts inside the module" if self.acts is Acts.WITHIN else None

    @property
    def stand_in(self) -> nn.Module | None:
        """Return the module for a plain model in the place of the site; None: the site's module."""
        return None

    def resize(self, verb: str, call: Call, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Return `call(*args, **kwargs)`, which resizes the embeddings of a transformers model.

        Args:
            verb: the name of the model's method.
            model: the model that carries the layer.
        """
        if self.resizer is None:
            return call(*args, **kwargs)
        return self.resizer(self.record.name, verb, call, model, *args, **kwargs)

    def shows(self, module: nn.Module) -> bool:
        """True if `module` shows the layer's config now; for layers that `shows_config`."""
        return self.record.active

    def shown_config(self, config: Any) -> Any:
        """Return the transformers config that the module shows instead of its own."""
        return config

    def around(
        self, call: Call, module: nn.Module, acting: Sequence[DeltaLayer], raw: bool = False
    ) -> Call:
        """Return `call` with this layer around it, and with its gate.

        Args:
            call: the forward of `module` with the layers beneath.
            acting: the layers beneath.
            raw: `call` is the forward of a Linear or Conv1D, with no layer beneath.
        """
        if self.sees_module:
            call = InnerCall(call, module, acting, raw)
        elif self.enters and (handing := handing_over(acting)):
            call = _repeatable(call, handing)
        if self.gate is not None and not self.gates_itself:
            return functools.partial(_gated, self, call)
        return functools.partial(self, call)

    def formula(self, name: str, inner: str) -> str:
        """Return the formula of `inner` with this layer around it; `X` stands for the input.

        Args:
            name: what the layer is called in it.
        """
        if self.acts is Acts.BESIDE:
            factor = "" if self.record.scale == 1 else f"{self.record.scale:g} "
            return f"{inner} + {factor}{name}({X})"
        if self.acts is Acts.BEFORE:
            return inner.replace(X, f"{name}({X})")
        if self.acts is Acts.INSTEAD:
            return f"{name}({X})"
        return f"{name}({inner})" if self.acts is Acts.AFTER else inner

    def flops(self, module: nn.Module) -> Flops:
        """Count the operations that the layer, on the meta device, adds to a forward of `module`.

        Raises:
            Exception: its own forward may raise anything on tensors without values.
        """
        if not self.acts.in_the_weights:
            return Flops(0, 0)
        width = getattr(self, "width", None)
        reads = None if self.gate_width is None else self.gate_width or width

        floats = (p.dtype for p in self.parameters() if p.is_floating_point())
        dtype = next(floats, torch.get_default_dtype())

        def run(bare: nn.Module, x: Tensor, out: Tensor) -> None:
            self.around(lambda *_: out, bare, ())(x)

        return costs.around(module, run, width, reads, dtype)

    def check_made(self) -> None:
        """Raise if a layer that was made is not what its class promises.

        Raises:
            OptionError: it is not; the text is for the author of the method.
        """

    def fit(
        self, module: nn.Module, device: torch.device, computes: torch.dtype, asked: str | None
    ) -> None:
        """Move the layer to the device of `module`, and give its tensors the dtype that they need.

        A layer that accelerate offloaded stays: accelerate loads its values for each run.

        Args:
            device: where `module` computes.
            computes: the dtype in which it computes.
            asked: the delta's option `dtype`.
        """
        own = list(_tensors(self))
        if device.type != "meta" and any(t.is_meta and isinstance(t, nn.Parameter) for t in own):
            return
        floats = {t.dtype for t in own if t.is_floating_point()}
        wanted = {held: dtype_for(asked, computes, held) for held in floats}
        if any(t.device != device for t in own) or any(held != wanted[held] for held in wanted):
            self._apply(lambda t: t.to(device, wanted.get(t.dtype, t.dtype)))


class Passive(DeltaLayer):
    """A layer that changes nothing: it holds tensors or facts, or watches over its module."""

    acts = Acts.SERVES
    computes = False

    def forward(self, call: Call, *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Return all parameters and buffers in `module`; faster than torch, which makes their names."""
    own = [*module._parameters.values(), *module._buffers.values()]
    found = [tensor for tensor in own if tensor is not None]
    for child in module._modules.values():
        if child is not None:
            found += _tensors(child)
    return found


class InnerCall:
    """The wrapped call of a layer that also needs the module, or the weights beneath it.

    Attributes:
        call: the wrapped call.
        module: the module.
        beneath: the layers beneath.
        raw: the call is the forward of a Linear or Conv1D, with no layer beneath.
    """

    def __init__(
        self, call: Call, module: nn.Module, beneath: Sequence[DeltaLayer], raw: bool = False
    ) -> None:
        self.call, self.module, self.beneath, self.raw = call, module, beneath, raw

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def params(self) -> Params:
        """Return the module's weight and bias with the changes of the layers beneath that fold."""
        return params_beneath(self.module, self.beneath)


def handing_over(layers: Sequence[Any]) -> list[Any]:
    """Return those of these layers, and of those in blocks among them, that have a handover."""
    flat = [layer for each in layers for layer in (each.flat() if each.is_block else [each])]
    return [layer for layer in flat if layer.handover is not None]


def _repeatable(call: Call, handing: Sequence[Any]) -> Call:
    """Return `call`, in which branches that end there add the same each time it runs."""
    first: list[Any] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        if not first:
            first.extend(layer.handover.value for layer in handing)
        for layer, value in zip(handing, first, strict=True):
            layer.handover.put(value)
        return call(*args, **kwargs)

    return run


def params_beneath(module: nn.Module, beneath: Sequence[DeltaLayer]) -> Params:
    """Return weight and bias of a module, or of a copy in its place, with layers folded in.

    Args:
        beneath: the layers that act, the innermost first; those that do not fold are left out.
    """
    params = tensors.stored_params(module)
    for layer in beneath:
        if layer.stand_in is not None:
            params = tensors.stored_params(layer.stand_in)
        elif layer.folds:
            params = layer.fold(params)
    return params


def times(factor: Any, change: Tensor) -> Tensor:
    """Return `change` times `factor`, the result of `DeltaLayer.strength`."""
    return factor * change if isinstance(factor, Tensor) or factor != 1 else change


def towards(old: Tensor, new: Tensor, factor: Any) -> Tensor:
    """Return old + factor (new - old), and `new` to the bit if `factor` is 1.

    Args:
        factor: the result of `DeltaLayer.strength`: a number; in compiled code, a tensor.
    """
    if isinstance(factor, Tensor):
        return torch.where(factor == 1, new, old + factor * (new - old))
    return new if factor == 1 else old + factor * (new - old)


def _gated(layer: DeltaLayer, call: Call, *args: Any, **kwargs: Any) -> Any:
    """Call `layer` around `call`, and multiply its change by its gate.

    The change is of the input, or of the output of `call`. The gate reads the input if the layer
    reads it (`gate.on_input`), else the output.
    """
    gate: Any = layer.gate
    x = calls.first_given(args, kwargs)
    plain: list[Tensor] = []

    def inner(*new: Any, **options: Any) -> Any:
        changed = calls.first_given(new, options)
        if changed is not x:
            plain_x = calls.dense(x)
            mixed = plain_x + gate(x) * (changed - plain_x)
            new, options = calls.replace_input(new, options, mixed)
        out = call(*new, **options)
        plain.append(calls.changed_in(out))
        return out

    beneath: Any = inner
    if isinstance(call, InnerCall):
        beneath = InnerCall(inner, call.module, call.beneath)
    out = layer(beneath, *args, **kwargs)
    before, after = plain[0], calls.changed_in(out)
    if after is before:
        return out
    mixed = before + gate(x if gate.on_input else before) * (after - before)
    return calls.change_hidden(out, after.size(-1), lambda _: mixed)
