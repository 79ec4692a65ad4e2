"""Make configs and deltas of any method, by the method's name in a dict or a file."""

from __future__ import annotations

import os
from typing import Any, cast

from torch import nn

from .. import interop
from .._backbone.inputs import Samples
from .._checkpoint import hub
from .._checkpoint.source import configs_of
from .._deltas.options import DeltaConfig
from .._deltas.registry import method
from .._files.folder import CONFIG, read_config
from ..errors import DeltaLoadError, OptionError
from ..interop import legacy
from .delta import Delta


class AutoDeltaConfig:
    """Makes the config of the method that `delta_type` names."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> DeltaConfig:
        """Make a config from options by name, changed by `options`.

        Args:
            config_dict: the options and `"delta_type"`.

        Raises:
            OptionError: there is no such method, or it has no such option.

        Example:
            >>> from opendelta import AutoDeltaConfig
            >>> AutoDeltaConfig.from_dict({"delta_type": "lora", "lora_r": 4}).lora_r
            4
        """
        if "delta_type" not in config_dict:
            raise OptionError(f"config_dict needs a 'delta_type'; given: {sorted(config_dict)}")
        config_class = method(config_dict["delta_type"]).config_class
        return config_class.from_dict({**config_dict, **options})

    @classmethod
    def from_finetuned(cls, finetuned_delta_path: str | os.PathLike) -> DeltaConfig:
        """Read the config of a delta that `save_finetuned` wrote, here or in OpenDelta 0.3.

        Args:
            finetuned_delta_path: the folder, or "user/name" on the hub.

        Raises:
            DeltaLoadError: the folder is damaged, holds several deltas, or is another library's.
        """
        folder = hub.folder_of(finetuned_delta_path, argument="finetuned_delta_path")
        reader = interop.reader_of(folder)
        if reader is legacy:
            return legacy.config_of(folder)
        if reader is not None:
            raise DeltaLoadError(
                f"{folder} is another library's, whose options are ours only once they are on a "
                "model: use AutoDeltaModel.from_finetuned(folder, model).config"
            )
        configs = configs_of(folder / CONFIG, read_config(folder))
        if len(configs) > 1:
            raise DeltaLoadError(
                f"{finetuned_delta_path} holds {len(configs)} deltas, so it has no single config; "
                "use opendelta.load(folder, model)"
            )
        return configs[0]


class AutoDeltaModel:
    """Makes the delta of the method that a config or a folder names."""

    @classmethod
    def from_config(cls, config: DeltaConfig, backbone_model: nn.Module, **options: Any) -> Delta:
        """Put a new delta with the options of `config`, changed by `options`, on a backbone.

        Args:
            options: options by name, and `sample_inputs`.
        """
        if not isinstance(config, DeltaConfig):
            raise OptionError(
                f"from_config takes a config, not {type(config).__name__}; make one of a dict with "
                "AutoDeltaConfig.from_dict"
            )
        return cast(type[Delta], method(config.delta_type)).from_config(
            config, backbone_model, **options
        )

    @classmethod
    def from_finetuned(
        cls,
        finetuned_delta_path: str | os.PathLike,
        backbone_model: nn.Module,
        name: str | None = None,
        local_files_only: bool = False,
        check_hash: bool = True,
        check_backbone: bool = True,
        sample_inputs: Samples | None = None,
    ) -> Delta:
        """Put a delta of any method that `save_finetuned` wrote on a backbone.

        Args:
            finetuned_delta_path: the folder, or "user/name" on the hub.
            name: the delta's new name. None: its saved name, or the next free one.
            local_files_only: use only files that were downloaded before.
            check_backbone: raise if the weights under the delta differ from the weights that it was
                trained on. A few values are compared.
            check_hash: OpenDelta 0.3's name for `check_backbone`; both must be true for the check.
            sample_inputs: inputs of the backbone, to find sizes by; see `Delta`.

        Raises:
            DeltaLoadError: the folder is damaged, or does not fit the backbone.
        """
        return Delta.from_finetuned(
            finetuned_delta_path,
            backbone_model,
            name,
            local_files_only,
            check_hash,
            check_backbone,
            sample_inputs,
        )
