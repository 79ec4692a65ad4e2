"""Linear algebra, norms and activations in the dtype of their input."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import OptionError, nearest


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `F.linear` in the dtype of `x`, so that float32 deltas fit 16-bit backbones."""
    if weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    return F.linear(x, weight, bias)


def widened(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `tensor` in a dtype that holds all values of its own dtype and of `dtype`."""
    wide = torch.promote_types(tensor.dtype, dtype)
    return tensor if tensor.dtype == wide else tensor.to(wide)


class Linear(nn.Linear):
    """An `nn.Linear` that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """An `nn.LayerNorm` that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.type_as(input), self.bias.type_as(input)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


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
    """Return the activation `name`, one of transformers' activations too if it is installed."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]()
    known = set(ACTIVATIONS)
    if importlib.util.find_spec("transformers"):
        from transformers.activations import ACT2FN

        if name in ACT2FN:
            return ACT2FN[name]
        known |= set(ACT2FN)
    raise OptionError(f"no activation {name!r}; nearest: {', '.join(nearest(name, known))}")
