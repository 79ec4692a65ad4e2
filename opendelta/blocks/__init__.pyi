# Written by tools/write_stubs.py: the signatures, made from the configs.
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..author import Block, Delta
from .average import AverageConfig as AverageConfig
from .fuse import FuseConfig as FuseConfig
from .gate import GateConfig as GateConfig

__all__ = [
    "AverageConfig",
    "AverageModel",
    "FuseConfig",
    "FuseModel",
    "GateConfig",
    "GateModel",
]

class AverageModel(Block):
    def __init__(
        self,
        backbone_model: nn.Module,
        deltas: Sequence[str | Delta] | None = None,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        weights: list[float] | None = None,
        learn: bool = False,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> AverageConfig: ...

class FuseModel(Block):
    def __init__(
        self,
        backbone_model: nn.Module,
        deltas: Sequence[str | Delta] | None = None,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        value: bool = True,
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> FuseConfig: ...

class GateModel(Block):
    def __init__(
        self,
        backbone_model: nn.Module,
        deltas: Sequence[str | Delta] | None = None,
        modified_modules: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        unfrozen_modules: str | Sequence[str] | None = None,
        common_structure: bool | dict[str, str | None] | None = None,
        interactive_modify: bool | int = False,
        *,
        top_k: int | None = None,
        temperature: float = 1.0,
        noise: float = 0.0,
        per: Literal["token", "sequence"] = "token",
        init: Literal["normal", "arrow"] = "normal",
        modules_to_save: str | Sequence[str] | None = None,
        num_labels: int | None = None,
        name: str | None = None,
        dtype: str | torch.dtype | None = None,
        reads: bool = False,
        gate: bool = False,
        sample_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor | None = None,
    ) -> None: ...
    @property
    def config(self) -> GateConfig: ...
