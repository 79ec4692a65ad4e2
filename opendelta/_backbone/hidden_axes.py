"""Refuse a module whose output has its width on another axis than the last one."""

from __future__ import annotations

from torch import Tensor, nn

from .._modules.kinds import ACROSS_CHANNELS
from .._modules.trials import own_axis
from ..errors import SiteError

ConvolutionOfTime = nn.Conv1d | nn.ConvTranspose1d


def check_hidden(name: str, module: nn.Module, hidden: Tensor) -> None:
    """Raise unless the output of a module of unknown kind is hidden states [..., width].

    Args:
        name: its full name.
        hidden: the first floating tensor in its output.

    Raises:
        SiteError: another axis is the width, or the width is 0.
    """
    if (why := _misfit(module, hidden)) is not None:
        raise SiteError(f"{name!r} ({type(module).__name__}) {why}", where=name)


def _misfit(module: nn.Module, hidden: Tensor) -> str | None:
    shape, wanted = list(hidden.shape), "hidden states must be [..., width]"
    if hidden.ndim > 3 and not _ends_in_width(module, hidden):
        return f"returns an image or so, {shape}: {wanted} in 2 or 3 axes"
    if hidden.ndim > 2 and isinstance(module, ACROSS_CHANNELS):
        return f"returns [batch, channels, ...], {shape}: {wanted}"
    if hidden.ndim == 3 and _is_channels_first(module, hidden):
        return f"returns [batch, channels, time], {shape}: {wanted}"
    width, axis = own_axis(module) or (0, -1)
    axis = axis % hidden.ndim if -hidden.ndim <= axis < hidden.ndim else -1
    if width and axis not in (-1, hidden.ndim - 1) and hidden.size(axis) == width:
        return f"has its width, {width}, on axis {axis} of its output {shape}: {wanted}"
    if not hidden.size(-1):
        return (
            "returns hidden states of width 0, on which a delta has nothing to change; choose "
            "other modules"
        )
    return None


def _ends_in_width(module: nn.Module, output: Tensor) -> bool:
    """True if a weight shows that the last axis is the width, as a norm's weight does for heads."""
    sizes = {p.numel() for p in module.parameters() if p.ndim == 1}
    return output.size(-1) in sizes and output.size(1) not in sizes


def _is_channels_first(module: nn.Module, output: Tensor) -> bool:
    """True if convolutions over time show that axis 1 is the channels, and the last is no width."""
    convolutions = [part for part in module.modules() if isinstance(part, ConvolutionOfTime)]
    sizes = {p.numel() for p in module.parameters() if p.ndim == 1}
    sizes |= {part.out_channels for part in convolutions}
    return bool(convolutions) and output.size(1) in sizes and output.size(-1) not in sizes
