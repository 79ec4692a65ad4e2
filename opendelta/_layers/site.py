"""The facts about one module for a delta layer that is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .._modules.arithmetic import LayerNorm, Linear
from .._modules.kinds import Kind
from ..errors import OptionError, SiteError

LARGEST = 2**56  # values of a tensor


@dataclass(frozen=True)
class Heads:
    """Sizes of an attention module.

    Attributes:
        count: number of key-value heads.
        key: width of a key of one head.
        value: width of a value of one head.
        hidden: width of the module's input.
    """

    count: int
    key: int
    value: int
    hidden: int


@dataclass(frozen=True)
class Widths:
    """Sizes of the last axis of a module's first input and of its hidden states.

    Attributes:
        input: None if the first input is no floating tensor, such as token ids.
        output: width of the hidden states.
        moved: the other axes of that input and of the hidden states, if they differ.
    """

    input: int | None
    output: int
    moved: tuple[list[int], list[int]] | None = None


@dataclass
class Site:
    """The facts about the module that a delta layer is put on.

    Attributes:
        name: the module's full name.
        module: the module itself; a layer must not keep it.
        known_kind: its row in the table of kinds; None if its class says nothing about its sizes.
        device: the device of the layer's tensors.
        dtype: their dtype.
        widths_of: finds the widths of a module that is not in the table of kinds.
        heads_of: finds the sizes of an attention module.
        new: the layer sets its start values; false: the values come from a file.
        end: the site at the end of the branch that starts here, for `paired` layers.
        shared: the tensors that the delta's layers share, or None.
        beneath: the layers that act on the module when this one is made, the innermost first.
    """

    name: str
    module: nn.Module
    known_kind: Kind | None
    device: torch.device
    dtype: torch.dtype
    widths_of: Callable[[str], Widths]
    heads_of: Callable[[str], Heads]
    new: bool = True
    end: Site | None = None
    shared: Any = None
    beneath: Sequence[Any] = ()

    @property
    def kind(self) -> Kind:
        """Return the module's row in the table of kinds, for layers whose `kinds` lack "other".

        Raises:
            SiteError: its class says nothing about its sizes.
        """
        if self.known_kind is None:
            raise SiteError(
                f"{self.name!r} ({type(self.module).__name__}) is of no known kind: the layer's "
                "`kinds` must leave out 'other', or it must not ask for the kind",
                where=self.name,
            )
        return self.known_kind

    @property
    def axis(self) -> int:
        """Return the axis of the output whose size is `out_features`."""
        return -1 if self.known_kind is None else self.known_kind.axis

    @property
    def takes_ids(self) -> bool:
        """True if the module is an embedding: its input are token ids, no hidden states."""
        return self.known_kind is not None and self.known_kind.takes_ids

    @property
    def in_features(self) -> int:
        """Return the number of columns of the module's weight matrix."""
        return self.kind.in_features

    @cached_property
    def out_features(self) -> int:
        """Return the width of the module's output: the last axis of its hidden states."""
        known = self.known_kind
        return self.widths_of(self.name).output if known is None else known.out_features

    @cached_property
    def input_width(self) -> int:
        """Return the width of the module's first input: the size of its last axis.

        Raises:
            SiteError: the input is no hidden states, such as the token ids of an embedding.
        """
        known = self.known_kind
        if known is None:
            width = self.widths_of(self.name).input
        else:
            width = None if self.takes_ids else known.in_features or known.out_features
        if width is None:
            raise SiteError(
                f"{self.name!r} ({type(self.module).__name__}) takes no hidden states [..., width] "
                "as its first input; choose another module",
                where=self.name,
            )
        return width

    @property
    def heads(self) -> Heads:
        """Return the sizes of an attention module."""
        return self.heads_of(self.name)

    def parameter(self, *shape: int) -> nn.Parameter:
        """Make a parameter on the site's device, in its dtype; its values are not set."""
        self._check_size(*shape)
        return nn.Parameter(torch.empty(*shape, device=self.device, dtype=self.dtype))

    def linear(self, in_features: int, out_features: int) -> Linear:
        """Make a linear layer with bias on the site's device, in its dtype."""
        self._check_size(in_features, out_features)
        return Linear(in_features, out_features, device=self.device, dtype=self.dtype)

    def _check_size(self, *shape: int) -> None:
        """Raise if no machine could ever hold a tensor of this shape, so that torch cannot say it.

        Raises:
            OptionError: an option is too large.
        """
        if math.prod(shape) > LARGEST:
            sizes = " x ".join(f"{size:,}" for size in shape)
            raise OptionError(f"{self.name!r}: no memory holds {sizes} values; lower the option")

    def layer_norm(self, width: int) -> LayerNorm:
        """Make a normalisation on the site's device, in its dtype."""
        return LayerNorm(width, device=self.device, dtype=self.dtype)
