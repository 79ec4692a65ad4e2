"""The base classes of delta layers: what a method author subclasses, and what the core adds.

A layer writes the paper's equation around the wrapped `call`; the bases below write the common
forms of it once: a change of the output, of the weight, of a branch around several modules.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import layers, products
from .errors import SiteError
from .layers import Kind, Site
from .products import LowRank
from .record import Record

Params = dict[str, Tensor]


class Cell(threading.local):
    """Holds one value from one site of a delta to the next, within a call and for each thread.

    A copy of it, by deepcopy or pickle, is empty.
    """

    value: Any = None

    def put(self, value: Any) -> None:
        """Keep `value` until it is taken."""
        self.value = value

    def take(self) -> Any:
        """What was put last, once; None if nothing was."""
        value, self.value = self.value, None
        return value

    def __reduce__(self) -> tuple:
        return Cell, ()


class DeltaLayer(nn.Module):
    """One delta on one module; the base class of what a method author writes.

    A subclass takes `(site, config)`, makes its parameters from the sizes of the site, starts as
    the identity, and writes the paper's equation around the wrapped `call` in `forward`. If the
    same change can be made to the weights, `fold` makes it.

    Attributes:
        kinds: the kinds of module it can be put on: keys of `layers.KINDS`.
        flow: how it stands to the wrapped call, for drawings: "after", "before", "beside" (a
            summand), "within" (what the module computes inside) or "instead".
        inside: a module of another kind stands for the modules of these kinds inside it.
        paired: `modified_modules` come in pairs: where a branch starts, and where it ends.
        sees_module: the `call` of its forward has `.module` and `.params()`: see `Beneath`.
        gates_itself: its own equation heeds `self.gate`.
        scales: its own equation heeds `self.strength()`. A subclass with a forward or a fold of its
            own says so anew.
        runs_as_factors: it computes just what its factors say, beside a linear module.
        gate_width: width of what its gate reads, where that is neither in- nor output of a weight.
        identity: whether it changes nothing at the start.
        why_not: what keeps a layer with a `fold` from folding, for messages.
    """

    kinds: tuple[str, ...] = tuple(layers.KINDS)
    flow: str = "after"
    inside: ClassVar[bool] = False
    paired: ClassVar[bool] = False
    sees_module: ClassVar[bool] = False
    gates_itself: ClassVar[bool] = False
    scales: ClassVar[bool] = False
    runs_as_factors: bool = False
    gate_width: int | None = None
    identity: ClassVar[bool] = True
    why_not: ClassVar[str] = ""
    record: Record
    gate: Gate | None

    def __init_subclass__(cls) -> None:
        own = vars(cls)
        if "scales" not in own and ("forward" in own or "fold" in own):
            cls.scales = False

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["gate"] = None  # past nn.Module, which looks long at each attribute

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The equation around `call`, the module's own forward with all layers beneath this one."""
        raise NotImplementedError

    def fold(self, params: Params) -> Params:
        """The same change in weight space: new `weight` (and `bias`) from the given ones. Pure."""
        raise NotImplementedError

    @property
    def folds(self) -> bool:
        """Whether this layer can be written into the weights of its module."""
        return type(self).fold is not DeltaLayer.fold and self.gate is None

    def strength(self) -> Any:
        """What multiplies the change, `delta.scale`: a number; in compiled code, a tensor."""
        record = self.record
        return record.scale_tensor if torch.compiler.is_compiling() else record.scale

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

    @property
    def shared(self) -> Any:
        """What all layers of this delta share, made by the delta's `shared_for`; or None."""
        return self.__dict__.get("_shared", (None,))[0]

    def share(self, module: nn.Module) -> None:
        """Let `shared` be `module`, without owning its parameters."""
        self.__dict__["_shared"] = (module,)  # hidden from nn.Module, followed by deepcopy, pickle


class Beneath:
    """The wrapped call of a layer that also needs the module, or the weights beneath it.

    Attributes:
        raw: it is the forward of torch's Linear or the like, with nothing beneath.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        module: nn.Module,
        beneath: list[DeltaLayer],
        raw: bool = False,
    ) -> None:
        self.call, self.module, self.beneath, self.raw = call, module, beneath, raw

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def params(self) -> Params:
        """The module's weight and bias with the layers beneath folded in, as far as they fold."""
        params = layers.stored_params(self.module)
        for layer in self.beneath:
            params = layer.fold(params) if layer.folds else params
        return params


def times(factor: Any, change: Tensor) -> Tensor:
    """`change`, multiplied by what `DeltaLayer.strength` gives."""
    return change if _is_one(factor) else factor * change


def _is_one(factor: Any) -> bool:
    return not isinstance(factor, Tensor) and factor == 1


# ----------------------------------------------------------------------------- the common equations
class OutputLayer(DeltaLayer):
    """A delta layer on the module's hidden states; a subclass sets `width` and writes `change`.

    The module may return a tensor, a tuple or a ModelOutput: the first floating tensor [..., width]
    in it is changed.
    """

    kinds: tuple[str, ...] = ("linear", "embedding", "norm", "other")
    scales = True
    width: int

    def change(self, h: Tensor) -> Tensor:
        """The hidden states [..., width] that take the place of `h`."""
        raise NotImplementedError

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return layers.change_hidden(call(*args, **kwargs), self.width, self.scaled)

    def scaled(self, h: Tensor) -> Tensor:
        """`change(h)`, as far as `delta.scale` goes."""
        changed, factor = self.change(h), self.strength()
        return changed if _is_one(factor) else h + factor * (changed - h)


class WeightLayer(DeltaLayer):
    """y = f(x) + D x; a subclass writes `delta_weight`.

    Where D need not be built it writes `factors`, if D is a product of two matrices, or `product`.
    Neighbours with `factors` run as one; see `neighbours`.

    Attributes:
        kind: the module's row in the table of kinds.
        dropout: probability of dropping an input of the change while training.
    """

    kinds: tuple[str, ...] = ("linear",)
    flow = "beside"
    scales = True
    kind: Kind
    dropout: float

    def __init__(self, site: Site, dropout: float = 0.0) -> None:
        super().__init__()
        assert site.kind is not None
        cls, name = type(self), site.kind.name
        common = cls.forward is WeightLayer.forward and cls.product is WeightLayer.product
        self.__dict__.update(
            kind=site.kind,
            dropout=dropout if name != "embedding" else 0.0,
            runs_as_factors=common and name == "linear",
        )

    def delta_weight(self) -> Tensor:
        """D, the change of the weight [out_features, in_features]."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """A [rank, in_features], B [out_features, rank] and s of D = s B A; None: it has none."""
        return None

    def low_rank(self) -> LowRank | None:
        """The factors with the dropout that acts now, or None."""
        factors = self.factors()
        if factors is None:
            return None
        A, B, scale = factors
        return LowRank(A, B, scale * self.strength(), self.dropout if self.training else 0.0)

    def product(self, x: Tensor) -> Tensor:
        """D x: what the module would compute from its input if its weight were D."""
        factors = self.factors()
        if factors is None:
            return self.kind.product(x, self.delta_weight())
        A, B, scale = factors
        return scale * self.kind.low_rank(x, A, B)

    def forward(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        pair = self.low_rank() if products.ENABLED and self.runs_as_factors else None
        if pair is not None:
            return products.add(call, [pair], False, *args, **kwargs)
        out, x = call(*args, **kwargs), layers.first_input(args, kwargs)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return out + times(self.strength(), self.product(x)).type_as(out)

    def fold(self, params: Params) -> Params:
        matrix, factors = self.kind.matrix(params["weight"]), self.factors()
        if factors is not None and factors[0].dtype == matrix.dtype and matrix.is_contiguous():
            A, B, scale = factors
            matrix = torch.addmm(matrix, times(self.strength(), B), A, alpha=scale)
        else:
            matrix = matrix + times(self.strength(), self.delta_weight())
        return params | {"weight": self.kind.like_weight(matrix, params["weight"])}


class BranchLayer(DeltaLayer):
    """A branch from one module's input to the same or another module's output, where it is added.

    A subclass sets `width`, that of the output, and writes `branch`.
    """

    kinds = ("linear", "norm", "other")
    flow = "beside"
    paired = True
    gates_itself = True
    scales = True
    width: int
    cell: Cell | None = None

    def branch(self, x: Tensor) -> Tensor:
        """What is added [..., width], from the input of the module where the branch starts."""
        raise NotImplementedError

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = layers.first_input(args, kwargs)
        branch = times(self.strength(), self.branch(x))
        branch = branch if self.gate is None else self.gate(x) * branch
        if self.cell is None:
            out = call(*args, **kwargs)
            return layers.change_hidden(out, self.width, lambda h: h + branch.type_as(h))
        self.cell.put(branch)
        return call(*args, **kwargs)

    @classmethod
    def companions(
        cls, made: Mapping[str, DeltaLayer], modules: Mapping[str, nn.Module], config: Any
    ) -> dict[str, DeltaLayer]:
        ends: dict[str, DeltaLayer] = {}
        names = config.modified_modules
        for start, end in zip(names[::2], names[1::2], strict=True):
            if start != end:
                layer: Any = made[start]
                layer.cell = Cell()
                ends[end] = BranchEnd(layer.width, layer.cell, start)
        return ends


class BranchEnd(OutputLayer):
    """Adds what a branch computed from the input of another module."""

    flow = "beside"

    def __init__(self, width: int, cell: Cell, start: str) -> None:
        super().__init__()
        self.width, self.cell, self.start = width, cell, start

    def scaled(self, h: Tensor) -> Tensor:
        return self.change(h)  # the branch was scaled where it starts

    def change(self, h: Tensor) -> Tensor:
        branch = self.cell.take()
        if branch is None:
            raise SiteError(
                f"{self.record.name!r}: the branch from {self.start!r} ends here, but "
                f"{self.start!r} did not run first; pair modules that run in that order"
            )
        return h + branch.type_as(h)


# ------------------------------------------------------------------------------ what the core adds
class SharedTensors(DeltaLayer):
    """Holds what all layers of a delta share, on a module around all of them; computes nothing."""

    flow = "none"

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.tensors = shared

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    def fold(self, params: Params) -> Params:
        return params


class OwnedModule(DeltaLayer):
    """The delta's own copy of a module, which acts in the module's place (`modules_to_save`)."""

    flow = "instead"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Not through __call__: a hook for all modules of this class sees the site already.
        return self.module.forward(*args, **kwargs)


class Gate(nn.Module):
    """UniPELT's learned gate, g = sigmoid(w h + b) at each position. arXiv:2110.07577.

    The paper averages the gate over the sequence; here every position has its own, so that a causal
    model stays causal and generates the same with and without its cache. It starts at 1/2.

    Args:
        width: size of the last axis of `h`, or of axis 1 for images; 0 for a gate that depends on
            nothing.
        on_input: whether `h` is the module's input, and not its output.
    """

    def __init__(self, site: Site, width: int, on_input: bool) -> None:
        super().__init__()
        self.on_input = on_input
        self.axis = 1 if site.kind is not None and site.kind.name == "conv2d" else -1
        self.weight = site.parameter(1, width) if width else None
        self.bias = site.parameter(1)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def logit(self, h: Tensor) -> Tensor:
        """w h + b, of size 1 on the axis of the width."""
        if self.weight is None:
            return self.bias
        h = h.movedim(self.axis, -1)
        return layers.linear(h, self.weight, self.bias).movedim(-1, self.axis)

    def forward(self, h: Tensor) -> Tensor:
        return torch.sigmoid(self.logit(h))


def gated(layer: DeltaLayer, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`layer` around `call`, as far as its gate is open.

    The gate stands on what the layer changes: its input, or the output that `call` gives. It reads
    the input where the layer reads that, and else the output.
    """
    gate: Any = layer.gate
    x = layers.first_input(args, kwargs)
    plain: list[Tensor] = []

    def inner(*new: Any, **options: Any) -> Any:
        changed = layers.first_input(new, options)
        if changed is not x:
            new, options = layers.replace_input(new, options, x + gate(x) * (changed - x))
        out = call(*new, **options)
        plain.append(layers.hidden(out))
        return out

    beneath: Any = inner
    if isinstance(call, Beneath):
        beneath = Beneath(inner, call.module, call.beneath)
    out = layer(beneath, *args, **kwargs)
    before, after = plain[0], layers.hidden(out)
    if after is before:
        return out
    mixed = before + gate(x if gate.on_input else before) * (after - before)
    return layers.change_hidden(out, after.size(-1), lambda _: mixed)
