"""The one table of module kinds: sizes, layout of the weight, products beside the module.

Sizes come from this table, and never from the shape of a weight: quantised modules pack weights."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..names import SLOT
from .arithmetic import linear, widened
from .tensors import shape, size, stored
from .trials import norm_axis, takes_transposed
from .trials import scales_by_weight as scales


@dataclass(frozen=True)
class Kind:
    """A kind of module whose type tells its output width; this one is a linear layer.

    Attributes:
        is_product: the module computes x W^T + b over the last axis.
        takes_ids: its input is indices.
        in_features: number of columns of the weight as a matrix [out_features, in_features]; 0 if
            there is no matrix.
        out_features: width of the output.
    """

    name: ClassVar[str] = "linear"
    is_product: ClassVar[bool] = True
    takes_ids: ClassVar[bool] = False
    in_features: int
    out_features: int

    @property
    def axis(self) -> int:
        """Return the axis of the output whose size is `out_features`."""
        return -1

    @property
    def channels(self) -> tuple[int, ...]:
        """Return the shape of a bias."""
        return (self.out_features,)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return the module's result on `x` for the weight B @ A, without its bias.

        Args:
            x: the module's input.
            A: [rank, in_features].
            B: [out_features, rank].
        """
        return linear(linear(x, A), B)

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Return the module's result on `x` for the weight `matrix` [out_features, in_features]."""
        return linear(x, matrix)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as a matrix [out_features, in_features]; `like_weight` undoes this."""
        return weight

    def like_weight(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """Return a matrix [out_features, in_features] in the layout and dtype of `weight`."""
        return matrix.to(weight.dtype)

    def per_channel(self, values: Tensor, out: Tensor) -> Tensor:
        """Return a view of values [*channels] that broadcasts along the other axes of `out`."""
        return values

    def example(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
        """Return an input and an output on the meta device, and their number of positions.

        Args:
            length: a larger length gives more positions.
        """
        like: Any = {"device": "meta", "dtype": dtype}
        x = torch.empty(1, length, self.in_features or self.out_features, **like)
        return x, torch.empty(1, length, self.out_features, **like), length


class TransposedLinear(Kind):
    """transformers' Conv1D (GPT-2): a linear layer that stores its weight as (in, out)."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def like_weight(self, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.T.to(weight.dtype)


@dataclass(frozen=True)
class Embedding(TransposedLinear):
    """An embedding; its matrix is [embedding_dim, num_embeddings]."""

    name: ClassVar[str] = "embedding"
    is_product: ClassVar[bool] = False
    takes_ids: ClassVar[bool] = True
    padding: int | None = None  # an index whose embedding no gradient reaches
    scale: float = 1.0  # factor of the output, as in the embeddings of BART and Gemma

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return linear(widened(F.embedding(x, A.T, self.padding)), B) * self.scale

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.embedding(x, matrix.T, self.padding) * self.scale

    def example(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
        _, out, positions = super().example(length, dtype)
        return torch.zeros(1, length, dtype=torch.long, device="meta"), out, positions


@dataclass(frozen=True)
class Conv2d(Kind):
    """A Conv2d; its matrix is [out_channels, in_channels * kernel height * kernel width]."""

    name: ClassVar[str] = "conv2d"
    is_product: ClassVar[bool] = False
    patch: tuple[int, ...] = ()  # (in_channels, kernel height, kernel width)
    stride: tuple[int, ...] = (1, 1)
    padding: Any = 0
    dilation: tuple[int, ...] = (1, 1)
    pad_mode: str = "zeros"
    pad_sizes: tuple[int, ...] = ()

    @property
    def axis(self) -> int:
        return 1

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.conv2d(self.product(x, A), B.to(x.dtype)[..., None, None])

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        padding = self.padding
        if self.pad_mode != "zeros":
            x, padding = F.pad(x, self.pad_sizes, mode=self.pad_mode), 0
        weight = matrix.to(x.dtype).view(-1, *self.patch)
        return F.conv2d(x, weight, None, self.stride, padding, self.dilation)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def like_weight(self, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.view_as(weight).to(weight.dtype)

    def per_channel(self, values: Tensor, out: Tensor) -> Tensor:
        return values.view(-1, 1, 1)

    def example(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
        like: Any = {"device": "meta", "dtype": dtype}
        x = torch.empty(length, self.patch[0], *(8 * size for size in self.patch[1:]), **like)
        out = self.product(x, torch.empty(self.out_features, self.in_features, **like))
        return x, out, length * out.size(-2) * out.size(-1)


class Convolution(Kind):
    """Any other convolution: no delta is defined on it."""

    name: ClassVar[str] = "convolution"
    is_product: ClassVar[bool] = False


@dataclass(frozen=True)
class Norm(Kind):
    """A normalisation; a delta on it folds only if it scales by its weight.

    Attributes:
        shape: the shape of its weight: the last axes of the output, or the one of its channels.
        channel_axis: where the channels are in the output, from the end or from the front: -3 for
            images [batch, channels, height, width].
        settled: this does not depend on the number of axes.
    """

    name: ClassVar[str] = "norm"
    is_product: ClassVar[bool] = False
    shape: tuple[int, ...] = ()
    channel_axis: int = -1
    settled: bool = True
    scales_by_weight: bool = True

    @property
    def axis(self) -> int:
        return self.channel_axis

    @property
    def channels(self) -> tuple[int, ...]:
        return self.shape

    def per_channel(self, values: Tensor, out: Tensor) -> Tensor:
        after = -1 - self.axis if self.axis < 0 else out.ndim - self.axis - 1
        return values.view(*values.shape, *(1,) * after)

    def example(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int]:
        if self.axis == -1:
            shape = (2, length, *self.shape)
        elif self.axis < 0:
            shape = (2, *self.shape, *(length, 3, 4)[: -1 - self.axis])
        else:
            shape = (*(2, 3)[: self.axis], *self.shape, length)
        x = torch.empty(shape, device="meta", dtype=dtype)
        return x, x, x.numel() // self.out_features


ALSO_SIZES = (("nx", "nf"), ("dim_in", "dim_out"))  # as in GPT-2's code, and in ModelCenter
CONV1D = "Conv1D.forward"
LINEAR = nn.Linear.forward  # as torch has it: others may put another one there
KINDS = {
    "linear": "Linear, Conv1D and quantised linears",
    "embedding": "Embedding",
    "conv2d": "Conv2d without groups",
    "norm": "LayerNorm, RMSNorm and others like them",
    "other": "any other module that returns hidden states [..., width]",
    "attention": "attention modules that use transformers' attention interface",
    "stack": "modules that embed tokens, with input_ids, inputs_embeds, attention_mask",
}


def _convolution(module: Any) -> Kind:
    if not isinstance(module, nn.Conv2d) or module.groups != 1:
        return Convolution(module.in_channels, module.out_channels)
    patch = (module.in_channels, *module.kernel_size)
    return Conv2d(
        patch[0] * patch[1] * patch[2], module.out_channels, patch, module.stride, module.padding,
        module.dilation, module.padding_mode, tuple(module._reversed_padding_repeated_twice),
    )  # fmt: skip


ACROSS_CHANNELS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # they normalise another axis


def _is_norm(module: nn.Module) -> bool:
    """True if `module` is a normalisation that is not torch's, such as transformers' RMSNorms."""
    if "norm" not in type(module).__name__.lower() or isinstance(module, ACROSS_CHANNELS):
        return False
    own = {name: p for name, p in module._parameters.items() if p is not None}
    children = module._modules.keys() - {SLOT}
    if children or not {"weight"} <= own.keys() <= {"weight", "bias"}:
        return False
    return own["weight"].ndim == 1 and size(own["weight"]) != 1  # one scale is for all channels


def _norm(module: nn.Module, shape: tuple[int, ...], scales_by_weight: bool) -> Norm:
    known = type(module).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward) or len(shape) > 1
    axis = -1 if known else norm_axis(module, shape[0])
    settled = axis is not None
    norm = Norm(0, shape[-1], shape, axis if axis is not None else -1, settled, scales_by_weight)
    weight = module._parameters.get("weight")
    tried = weight is not None and weight.numel()  # a partitioned one is empty for a while
    if scales_by_weight or not tried or not settled or norm.axis >= 0:
        return norm
    given = norm.example(3, torch.float32)[0].shape
    return dataclasses.replace(norm, scales_by_weight=scales(module, given, norm.axis))


def _embed_scale(module: nn.Embedding) -> float:
    """Return the factor of an embedding's output that BART's and Gemma's classes have.

    NaN: it has no value yet.
    """
    if inspect.unwrap(type(module).forward) is nn.Embedding.forward:
        return 1.0
    scale: Any = getattr(module, "embed_scale", 1.0)  # a float, or a buffer of one element
    if isinstance(scale, Tensor) and scale.is_meta:  # a backbone without values
        scale = getattr(module, "scalar_embed_scale", math.nan)
    one = isinstance(scale, int | float) or (isinstance(scale, Tensor) and scale.numel() == 1)
    return float(scale) if one else 1.0


def _is_matrix(module: nn.Module) -> bool:
    """True unless a module with two sizes has a weight of more axes, as several experts have.

    A weight of one axis may be a shard, and one of whole numbers is packed.
    """
    if "weight" not in module._parameters:
        return True
    weight = module._parameters["weight"]  # a ScriptModule's have no get
    return weight is None or not weight.is_floating_point() or weight.ndim <= 2


def _linear(module: nn.Module, inputs: int, outputs: int) -> Kind:
    """Return the row of a linear module, which may store its weight as (in, out)."""
    if isinstance(module, torch.jit.ScriptModule) or _is_torchs(module):
        return Kind(inputs, outputs)
    weight = module._parameters.get("weight")
    turned = weight is not None and weight.is_floating_point()
    turned = turned and tuple(shape(weight)) == (inputs, outputs)  # type: ignore[arg-type]
    if turned and inputs == outputs:
        turned = takes_transposed(module)
    return (TransposedLinear if turned else Kind)(inputs, outputs)


def _is_torchs(module: nn.Module) -> bool:
    """True if `module` computes what torch's Linear does."""
    return vars(type(module)).get("_site_of", type(module)).forward is LINEAR


def kind_of(module: nn.Module) -> Kind | None:
    """Return the table's row for `module`; None if its type says nothing about its sizes."""
    if isinstance(module, nn.Linear) and _is_torchs(module) and _is_matrix(module):
        return Kind(module.in_features, module.out_features)
    if isinstance(module, nn.Embedding):
        rows, width = module.num_embeddings, module.embedding_dim
        return Embedding(rows, width, module.padding_idx, _embed_scale(module))
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(module)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return _norm(module, tuple(module.normalized_shape), module.elementwise_affine)
    if _is_norm(module):
        return _norm(module, tuple(module._parameters["weight"].shape), False)  # type: ignore
    if is_conv1d(type(module)):
        return TransposedLinear(int(module.nx), int(module.nf))  # type: ignore[arg-type]
    sizes = _size(module, "in_features"), _size(module, "out_features")
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return _linear(module, sizes[0], sizes[1]) if _is_matrix(module) else None
    for names in ALSO_SIZES:
        sizes = _size(module, names[0]), _size(module, names[1])
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            weight = dict(module._parameters.items()).get("weight")
            if weight is not None and tuple(shape(weight)) in (sizes, sizes[::-1]):
                return _linear(module, sizes[0], sizes[1])
    return None


def _size(module: nn.Module, name: str) -> object:
    """Return an attribute; None if there is none, without torch's slow search for it."""
    plain = type(module).__getattr__ is nn.Module.__getattr__
    if plain and name not in vars(module) and not hasattr(type(module), name):
        return None
    return getattr(module, name, None)


def is_conv1d(cls: type[nn.Module]) -> bool:
    """True if a class computes what transformers' Conv1D does; see `probing` for what it names."""
    forward: Any = getattr(cls, "forward", None)  # a ScriptModule's class has none
    package = (getattr(forward, "__module__", None) or "").partition(".")[0]
    return package == "transformers" and getattr(forward, "__qualname__", "") == CONV1D


def is_packed(module: nn.Module) -> bool:
    """True if a linear module holds its weight in tensors of other names, as HQQ's and GPTQ's do.

    Its values are then unknown; the sizes are those of the table.
    """
    own = dict(module._parameters.items())  # a ScriptModule has no get
    if own.get("weight") is not None or {*dict(module._modules.items())} - {SLOT}:
        return False
    if not {*own, *dict(module._buffers.items())} - {"weight", "bias"}:
        return False
    kind = kind_of(module)
    return kind is not None and kind.is_product and not isinstance(stored(module, "weight"), Tensor)


def raw_forward(base: type[nn.Module], named: bool = False) -> Callable[..., Tensor] | None:
    """Return the forward of a Linear or Conv1D on its stored parameters; None for other classes.

    Args:
        named: also of a class that is called Conv1D, which may compute something else.
    """
    if not reads_plainly(base) or not _is_stored(base, "weight"):
        return None
    if base.forward is LINEAR:
        return _raw_linear
    named = named and getattr(base.forward, "__qualname__", "") == CONV1D
    return _raw_conv1d if named or is_conv1d(base) else None


def reads_plainly(cls: type[nn.Module]) -> bool:
    """True if the attributes of a module of this class are found as those of every module."""
    own: Any = cls
    return (
        own.__getattribute__ is object.__getattribute__ and own.__getattr__ is nn.Module.__getattr__
    )


def _is_stored(base: type[nn.Module], name: str) -> bool:
    """True if a class has nothing in the place of a parameter, but torch's parametrizations."""
    own = getattr(base, name, None)
    made = getattr(getattr(own, "fget", None), "__module__", "")
    return own is None or made == "torch.nn.utils.parametrize"


def _raw_linear(self: nn.Module, input: Tensor) -> Tensor:
    return F.linear(input, stored(self, "weight"), stored(self, "bias"))  # type: ignore[arg-type]


def _raw_conv1d(self: nn.Module, x: Tensor) -> Tensor:
    flat = torch.addmm(stored(self, "bias"), x.view(-1, x.size(-1)), stored(self, "weight"))  # type: ignore
    return flat.view(*x.shape[:-1], flat.size(-1))
