"""The one table of module kinds: sizes, how a low-rank pair runs beside the module, weight layout.

Sizes come from here and never from a weight's shape, which quantised modules pack. What a method
may know about the module it is put on is a `Site`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import foreign
from .errors import OptionError, SiteError, nearest
from .record import SLOT

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# -------------------------------------------------------------------- arithmetic


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in the dtype of `x`, so that float32 deltas serve 16-bit backbones."""
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """An `nn.Linear` that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """An `nn.LayerNorm` that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.type_as(input), self.bias.type_as(input)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def first_input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The first argument of a call, positional or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


def replace_input(args: tuple, kwargs: dict[str, Any], new: Tensor) -> tuple[tuple, dict[str, Any]]:
    """The same arguments with another first one."""
    if args:
        return (new, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): new}


def _is_hidden(value: Any, width: int | None) -> bool:
    """Whether `value` is a floating tensor [..., width]; with no width, any of two or more axes."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        return False
    return width is None or value.size(-1) == width  # a nested tensor has no shape


def hidden_key(output: Any, width: int | None = None) -> Any:
    """Where an output keeps its hidden states: an index, a field, or None for the tensor itself.

    Args:
        output: a tensor, a tuple or list, or a mapping such as a ModelOutput.
        width: the size of the last axis that is asked for.

    Raises:
        SiteError: nothing in it is a floating tensor [..., width].
    """
    items: list[tuple[Any, Any]]
    if isinstance(output, Tensor):
        items = [(None, output)]
    elif isinstance(output, dict):
        items = list(output.items())
    else:
        items = list(enumerate(output)) if isinstance(output, tuple | list) else []
    for key, value in items:
        if _is_hidden(value, width):
            return key
    raise SiteError(
        f"no floating tensor [..., {'width' if width is None else width}] in the module's output, "
        f"a {type(output).__name__}; choose a module that returns one"
    )


def hidden(output: Any) -> Tensor:
    """The hidden states in an output: its first floating tensor of two or more axes."""
    key = hidden_key(output)
    return output if key is None else output[key]


def every(kind: type[Any], value: Any) -> Iterator[Any]:
    """All instances of `kind` in `value`, however deep in mappings, lists and tuples."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from every(kind, item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from every(kind, item)


def change_hidden(output: Any, width: int, change: Callable[[Tensor], Tensor]) -> Any:
    """`output` with its hidden states [..., width] replaced by `change(hidden states)`."""
    if isinstance(output, Tensor):
        return change(output)
    key = hidden_key(output, width)
    new = change(output[key])
    if type(output) is dict:
        return {**output, key: new}
    if isinstance(output, dict):  # a ModelOutput keeps its fields and items in step by itself
        output[key] = new
        return output
    if hasattr(output, "_replace"):
        return output._replace(**{output._fields[key]: new})
    return type(output)([*output[:key], new, *output[key + 1 :]])


GLOROT = {"glorot-uniform": nn.init.xavier_uniform_, "glorot-normal": nn.init.xavier_normal_}

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "linear": nn.Identity,
}


def activation(name: str) -> nn.Module:
    """The activation called `name`; transformers' others too, where it is installed."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]()
    known = set(ACTIVATIONS)
    if importlib.util.find_spec("transformers"):
        from transformers.activations import ACT2FN

        if name in ACT2FN:
            return ACT2FN[name]
        known |= set(ACT2FN)
    raise OptionError(f"no activation {name!r}; nearest: {', '.join(nearest(name, known))}")


# ------------------------------------------------------------------------- kinds
@dataclass(frozen=True)
class Kind:
    """A module whose output width is known from its type; weights, if any, are (out, in) matrices.

    Attributes:
        in_features: columns of the weight matrix; 0 where there is no matrix.
        out_features: width of the output.
    """

    name: ClassVar[str] = "linear"
    in_features: int
    out_features: int

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """What the module would compute from `x` if its weight were B @ A.

        Args:
            x: the module's input.
            A: [rank, in_features].
            B: [out_features, rank].
        """
        return linear(linear(x, A), B)

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """What the module would compute from `x` if its weight were [out_features, in_features]."""
        return linear(x, matrix)

    def matrix(self, weight: Tensor) -> Tensor:
        """The module's weight as a matrix [out_features, in_features]; undone by `like_weight`."""
        return weight

    def like_weight(self, matrix: Tensor, weight: Tensor) -> Tensor:
        """A matrix [out_features, in_features] in the layout and dtype of the module's weight."""
        return matrix.to(weight.dtype)


class TransposedLinear(Kind):
    """transformers' Conv1D (GPT-2): a linear layer that stores its weight as (in, out)."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def like_weight(self, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.T.to(weight.dtype)


@dataclass(frozen=True)
class Embedding(TransposedLinear):
    """The matrix is [embedding_dim, num_embeddings]."""

    name: ClassVar[str] = "embedding"
    scale: float = 1.0  # of the embeddings that multiply their output, such as BART's and Gemma's

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return linear(F.embedding(x, A.T), B) * self.scale

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return F.embedding(x, matrix.T) * self.scale


@dataclass(frozen=True)
class Conv2d(Kind):
    """The matrix is [out_channels, in_channels * kernel height * kernel width]."""

    name: ClassVar[str] = "conv2d"
    patch: tuple[int, ...] = ()  # (in_channels, kernel height, kernel width)
    stride: tuple[int, ...] = (1, 1)
    padding: Any = 0
    dilation: tuple[int, ...] = (1, 1)
    pad_mode: str = "zeros"
    pad_sizes: tuple[int, ...] = ()

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


class Convolution(Kind):
    """Any other convolution: no delta is defined on it."""

    name: ClassVar[str] = "convolution"


@dataclass(frozen=True)
class Norm(Kind):
    """A normalisation over the last axis; it scales by its weight, or else does not fold."""

    name: ClassVar[str] = "norm"
    scales_by_weight: bool = True


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


ACROSS_CHANNELS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # not over the last axis


def _is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalisation that somebody wrote, such as transformers' RMSNorms."""
    if "norm" not in type(module).__name__.lower() or isinstance(module, ACROSS_CHANNELS):
        return False
    own = {name: p for name, p in module._parameters.items() if p is not None}
    children = module._modules.keys() - {SLOT}
    return (
        not children and {"weight"} <= own.keys() <= {"weight", "bias"} and own["weight"].ndim == 1
    )


def kind_of(module: nn.Module) -> Kind | None:
    """The row of the table for `module`, or None if its type says nothing about its sizes."""
    if isinstance(module, nn.Embedding):
        scale = getattr(module, "embed_scale", 1.0)  # a float, or a buffer of one element
        if isinstance(scale, Tensor) and scale.is_meta:  # as on a backbone without weights
            scale = getattr(module, "scalar_embed_scale", 1.0)
        return Embedding(module.num_embeddings, module.embedding_dim, float(scale))
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(module)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return Norm(0, module.normalized_shape[-1], len(module.normalized_shape) == 1)
    if _is_norm(module):
        return Norm(0, module._parameters["weight"].numel(), False)  # type: ignore[union-attr]
    if hasattr(module, "nx") and hasattr(module, "nf"):
        return TransposedLinear(int(module.nx), int(module.nf))  # type: ignore[arg-type]
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return Kind(sizes[0], sizes[1])
    return None


def raw_forward(base: type[nn.Module]) -> Callable[..., Tensor] | None:
    """The forward of a Linear or Conv1D on its stored parameters, or None for another class."""
    if base.forward is nn.Linear.forward:
        return _raw_linear
    if getattr(base.forward, "__qualname__", "") == "Conv1D.forward":
        return _raw_conv1d
    return None


def stored(module: nn.Module, name: str) -> Tensor | None:
    """The stored parameter, or on a DataParallel replica the plain tensor that stands for it."""
    own = module._parameters
    return own[name] if name in own else module.__dict__.get(name)


def stored_params(module: nn.Module) -> dict[str, Tensor]:
    """The stored weight and bias of `module`, as far as it has them."""
    return {name: t for name in ("weight", "bias") if (t := stored(module, name)) is not None}


def _raw_linear(self: nn.Module, input: Tensor) -> Tensor:
    return F.linear(input, stored(self, "weight"), stored(self, "bias"))  # type: ignore[arg-type]


def _raw_conv1d(self: nn.Module, x: Tensor) -> Tensor:
    flat = torch.addmm(stored(self, "bias"), x.view(-1, x.size(-1)), stored(self, "weight"))  # type: ignore
    return flat.view(*x.shape[:-1], flat.size(-1))


def is_sharded(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """Whether `tensor` is a DTensor, as FSDP2 and tensor parallelism make them."""
    if type(tensor) in (Tensor, nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


# -------------------------------------------------------------------------- site
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Heads:
    """Sizes of the keys and values of an attention module, and of its input."""

    count: int
    key: int
    value: int
    hidden: int


@dataclass
class Site:
    """What a delta layer may know about the module it is put on.

    Attributes:
        name: the module's full name.
        module: the module itself; a layer must not keep it.
        kind: its row in the table of kinds, or None.
        device: where the layer's tensors belong.
        dtype: their dtype.
        width_of: finds the output width of a module that the table does not know.
        heads_of: finds the sizes of an attention module's keys and values.
        new: whether the layer's values start here, and do not come from a file.
        end: where the branch that starts here ends, for layers that are `paired`.
        shared: the tensors that the delta's layers share, where its method has some.
    """

    name: str
    module: nn.Module
    kind: Kind | None
    device: torch.device
    dtype: torch.dtype
    width_of: Callable[[str], int]
    heads_of: Callable[[str], Heads]
    new: bool = True
    end: Site | None = None
    shared: Any = None

    @property
    def in_features(self) -> int:
        """Columns of the module's weight matrix."""
        assert self.kind is not None  # the core has checked the kinds that the layer claims
        return self.kind.in_features

    @cached_property
    def out_features(self) -> int:
        """Width of the module's output: the last axis of its hidden states."""
        return self.kind.out_features if self.kind is not None else self.width_of(self.name)

    @property
    def heads(self) -> Heads:
        """Sizes of an attention module's keys and values."""
        return self.heads_of(self.name)

    def parameter(self, *shape: int) -> nn.Parameter:
        """A new parameter of the right device and dtype; its values are not set."""
        return nn.Parameter(torch.empty(*shape, device=self.device, dtype=self.dtype))

    def linear(self, in_features: int, out_features: int) -> Linear:
        """A new linear layer of the right device and dtype, with bias."""
        return Linear(in_features, out_features, device=self.device, dtype=self.dtype)

    def layer_norm(self, width: int) -> LayerNorm:
        """A new normalisation of the right device and dtype."""
        return LayerNorm(width, device=self.device, dtype=self.dtype)


def _tensors(
    module: nn.Module, computing: torch.device | None
) -> Iterator[tuple[Tensor, torch.device]]:
    """The tensors of `module` without those of deltas, its own first, and where they compute."""
    computing = foreign.computing_device(module) or computing
    for own in (module._parameters, module._buffers):
        for tensor in own.values():
            if tensor is not None:
                yield tensor, computing or tensor.device
    for name, child in module._modules.items():
        if child is not None and name != SLOT:
            yield from _tensors(child, computing)


def is_meta(module: nn.Module) -> bool:
    """Whether nothing in `module` has memory, or gets some when it computes."""
    return all(where.type == "meta" for _, where in _tensors(module, None))


def device_and_dtype(
    chain: Iterable[nn.Module], on_meta: bool = False
) -> tuple[torch.device, torch.dtype]:
    """Where a delta on the first module of `chain` computes, and in what.

    The chain goes on with the module's ancestors, and the first floating tensor in it decides: a
    quantised module has none of its own, and the backbone around it tells what it computes in.
    What accelerate offloaded is on the meta device, and computes where a hook at or around it says.

    Args:
        on_meta: everything in the chain is known to be on the meta device.
    """
    device = meta = None
    dtype = None
    for module in chain:
        for tensor, where in _tensors(module, None):
            meta = meta or (where if where.type == "meta" else None)
            device = device or (where if where.type != "meta" else None)
            dtype = dtype or (tensor.dtype if tensor.dtype in FLOATS else None)
            if dtype is not None and (device is not None or on_meta):
                return device or where, dtype
    return device or meta or torch.device("cpu"), dtype or torch.get_default_dtype()
