"""The facts about one module that a delta layer may know when it is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from .._modules.arithmetic import LayerNorm, Linear
from .._modules.kinds import Kind
from ..errors import SiteError


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
        known_kind: its row in the table of kinds; None where its class says nothing of its sizes.
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
    known_kind: Kind | None
    device: torch.device
    dtype: torch.dtype
    width_of: Callable[[str], int]
    heads_of: Callable[[str], Heads]
    new: bool = True
    end: Site | None = None
    shared: Any = None

    @property
    def kind(self) -> Kind:
        """The module's row in the table of kinds, for layers whose `kinds` leave out "other".

        Raises:
            SiteError: its class says nothing of its sizes.
        """
        if self.known_kind is None:
            raise SiteError(
                f"{self.name!r} ({type(self.module).__name__}) is of no known kind: the layer's "
                "`kinds` must leave out 'other', or it must not ask for the kind",
                where=self.name,
            )
        return self.known_kind

    @property
    def in_features(self) -> int:
        """Columns of the module's weight matrix."""
        return self.kind.in_features

    @cached_property
    def out_features(self) -> int:
        """Width of the module's output: the last axis of its hidden states."""
        known = self.known_kind
        return self.width_of(self.name) if known is None else known.out_features

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
