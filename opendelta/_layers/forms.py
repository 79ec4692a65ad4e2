"""The common forms of a delta layer: a change of output, input or weight, and a branch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._modules import calls
from .._modules.fitting import Needs
from .._modules.kinds import Kind
from ..errors import OptionError, SiteError
from . import low_rank
from .base import Acts, DeltaLayer, Handover, Params, times, towards
from .costs import Flops
from .low_rank import LowRank
from .site import Site


class OutputLayer(DeltaLayer):
    """A delta layer on the module's hidden states; a subclass sets `width` and writes `change`.

    The module may return a tensor, a tuple or a ModelOutput. The layer changes the first floating
    tensor [..., width] in it.
    """

    kinds: tuple[str, ...] = ("linear", "embedding", "norm", "other")
    writes = "change"
    sets = ("width",)
    scales = True
    any_axis = True
    width: int

    def change(self, h: Tensor) -> Tensor:
        """Return the hidden states [..., width] that replace `h`."""
        raise NotImplementedError

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return calls.change_hidden(call(*args, **kwargs), self.width, self.scaled, self.axis)

    def scaled(self, h: Tensor) -> Tensor:
        """Return h + s (change(h) - h), where s is `delta.scale`."""
        return towards(h, self.change(h), self.strength())


class InputLayer(DeltaLayer):
    """y = f(g(x)); a subclass writes `change`, which is g.

    If both `change` and the module are linear, `fold` may make the same change to the weight's
    columns.
    """

    kinds: tuple[str, ...] = ("linear",)
    acts = Acts.BEFORE
    writes = "change"
    scales = True

    def change(self, x: Tensor) -> Tensor:
        """Return the input [..., in_features] that replaces `x`."""
        raise NotImplementedError

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = calls.dense(calls.first_input(args, kwargs))
        changed = towards(x, self.change(x), self.strength())
        args, kwargs = calls.replace_input(args, kwargs, changed)
        return call(*args, **kwargs)


class WeightLayer(DeltaLayer):
    """y = f(x) + D x; a subclass writes `delta_weight`.

    It may also write `factors`, if D is a product of two matrices, or `product`: then D is not
    built. Consecutive layers with `factors` run as one pair of products; see `_layers/runs.py`.

    Attributes:
        kind: the module's row in the table of kinds.
        dropout: probability of dropping an input of the change while training.
    """

    kinds: tuple[str, ...] = ("linear",)
    acts = Acts.BESIDE
    writes = "delta_weight"
    scales = True
    kind: Kind
    dropout: float

    def __init__(self, site: Site, dropout: float = 0.0) -> None:
        super().__init__()
        cls, kind = type(self), site.kind
        if math.isnan(getattr(kind, "scale", 1.0)):
            raise SiteError(
                f"{site.name!r} ({type(site.module).__name__}) multiplies its output by its "
                "embed_scale, which is on the meta device: load the backbone first, then attach",
                where=site.name,
            )
        common = cls.forward is WeightLayer.forward and cls.product is WeightLayer.product
        self.__dict__.update(
            kind=kind,
            dropout=0.0 if kind.takes_ids else dropout,
            runs_as_factors=common and kind.is_product,
            in_parts=cls.forward is WeightLayer.forward and kind.is_product,
        )

    @classmethod
    def needs(cls) -> Needs:
        return "product"

    def delta_weight(self) -> Tensor:
        """Return D, the change of the weight [out_features, in_features]."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return A [rank, in_features], B [out_features, rank] and s of D = s B A, or None."""
        return None

    def check_made(self) -> None:
        given = self.factors() if type(self).factors is not WeightLayer.factors else None
        if given is None:
            return
        sizes = [getattr(part, "ndim", 0) for part in given]
        fits = sizes[:2] == [2, 2] and sizes[2:] == [0]
        wanted = self.kind.in_features, self.kind.out_features
        if not fits or (given[0].size(1), given[1].size(0)) != wanted:
            raise OptionError(
                f"{type(self).__name__}.factors must return A [rank, {wanted[0]}], "
                f"B [{wanted[1]}, rank] and a number s, with D = s B A, not "
                f"{[list(getattr(part, 'shape', ())) or type(part).__name__ for part in given]}"
            )

    def low_rank(self) -> LowRank | None:
        """Return the factors with the current scale and dropout, or None."""
        factors = self.factors()
        if factors is None:
            return None
        A, B, scale = factors
        return LowRank(A, B, scale * self.strength(), self.dropout if self.training else 0.0)

    def folds_as(self) -> LowRank | None:
        """Return the factors, if `fold` only adds their product to the weight; else None."""
        return self.low_rank() if type(self).fold is WeightLayer.fold else None

    def product(self, x: Tensor) -> Tensor:
        """Return D x, the module's result on its input for the weight D, without its bias."""
        factors = self.factors()
        if factors is None:
            return self.kind.product(x, self.delta_weight())
        A, B, scale = factors
        return scale * self.kind.low_rank(x, A, B)

    def forward(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        pair = self.low_rank() if low_rank.ENABLED and self.runs_as_factors else None
        if pair is not None:
            return low_rank.add(call, [pair], False, *args, **kwargs)
        out, x = call(*args, **kwargs), calls.dense(calls.first_input(args, kwargs))
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        return out + times(self.strength(), self.product(x)).type_as(out)

    def fold(self, params: Params) -> Params:
        matrix, factors = self.kind.matrix(params["weight"]), self.factors()
        if factors is not None and matrix.is_contiguous() and _holds(matrix.dtype, factors[0]):
            A, B, scale = factors[0].type_as(matrix), factors[1].type_as(matrix), factors[2]
            matrix = torch.addmm(matrix, times(self.strength(), B), A, alpha=scale)
        else:
            matrix = matrix + times(self.strength(), self.delta_weight())
        return params | {"weight": self.kind.like_weight(matrix, params["weight"])}


def _holds(dtype: torch.dtype, tensor: Tensor) -> bool:
    """True if `dtype` loses no value of a tensor."""
    return torch.promote_types(dtype, tensor.dtype) == dtype


class BranchLayer(DeltaLayer):
    """A branch from one module's input; it is added to the output of the same or another module.

    A subclass sets `width`, the width of this output, and writes `branch`.
    """

    kinds: tuple[str, ...] = ("linear", "norm", "other")
    acts = Acts.BESIDE
    paired = True
    writes = "branch"
    sets = ("width",)
    gates_itself = True
    scales = True
    width: int
    hands_over = True

    def branch(self, x: Tensor) -> Tensor:
        """Return the term [..., width] to add; `x` is the input of the module at the start."""
        raise NotImplementedError

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        x = calls.first_input(args, kwargs)
        branch = times(self.strength(), self.branch(x))
        branch = branch if self.gate is None else self.gate(x) * branch
        if self.handover is None:
            out = call(*args, **kwargs)
            return calls.change_hidden(out, self.width, lambda h: joined(self, h, branch))
        self.handover.put(branch)
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
                layer.handover = Handover()
                ends[end] = BranchEnd(layer.width, layer.handover, start)
        return ends


def joined(layer: DeltaLayer, h: Tensor, branch: Tensor) -> Tensor:
    """Return h + the result of a layer's branch; raise if torch would stretch one of them."""
    if h.shape != branch.shape:
        raise SiteError(
            f"{layer.record.name!r}: its branch gives {list(branch.shape)}, and the output that it "
            f"is added to is {list(h.shape)}: choose modules between which rows and tokens stay as "
            "they are, such as a block's feed-forward"
        )
    return h + branch.type_as(h)


class BranchEnd(OutputLayer):
    """The end of a branch: adds the term that was computed at the start of the branch."""

    acts = Acts.BESIDE
    keeps_input = False

    def __init__(self, width: int, handover: Handover, start: str) -> None:
        super().__init__()
        self.width, self.handover, self.start = width, handover, start

    def scaled(self, h: Tensor) -> Tensor:
        return self.change(h)  # the term was scaled at the start of the branch

    def change(self, h: Tensor) -> Tensor:
        assert self.handover is not None
        branch = self.handover.take()
        if branch is None:
            raise SiteError(
                f"{self.record.name!r}: the branch from {self.start!r} ends here, but "
                f"{self.start!r} did not run first; pair modules that run in that order"
            )
        return joined(self, h, branch)

    def flops(self, module: nn.Module) -> Flops:
        """Return 0: the branch is counted at its start."""
        return Flops(0, 0)
