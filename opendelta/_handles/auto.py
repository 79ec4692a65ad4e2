"""Make configs and deltas of any method, by the method's name in a dict or a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from .. import interop
from .._checkpoint import hub
from .._checkpoint.source import configs_of
from .._deltas.options import DeltaConfig
from .._deltas.registry import method
from .._files.folder import CONFIG, read_config, read_options
from .._files.reading import undamaged
from ..errors import DeltaLoadError, OptionError
from ..interop import legacy
from .delta import Delta


class AutoDeltaConfig:
    """Makes the config of the method that `delta_type` names."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **options: Any) -> DeltaConfig:
        """Make a config from a dict of options, changed by `options`; see `DeltaConfig.from_dict`.

        Args:
            config_dict: `"delta_type"`, the options, and other keys, which are ignored.

        Warns:
            UnusedWarning: keys of `config_dict` are no options of the method.

        Raises:
            OptionError: there is no such method, a value is wrong, or one of `options` is unknown.

        Example:
            >>> from opendelta import AutoDeltaConfig
            >>> AutoDeltaConfig.from_dict({"delta_type": "lora", "lora_r": 4}).lora_r
            4
        """
        if "delta_type" not in config_dict:
            raise OptionError(f"config_dict needs a 'delta_type'; given: {sorted(config_dict)}")
        config_class = method(config_dict["delta_type"]).config_class
        return config_class.from_dict(config_dict, **options)

    @classmethod
    def from_finetuned(
        cls,
        finetuned_delta_path: str | os.PathLike,
        *,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> DeltaConfig:
        """Read the config that `save_finetuned` of a delta or a config wrote, here or in 0.3.

        Args:
            finetuned_delta_path: the folder, or "user/name" on the hub.
            cache_dir: as for `AutoDeltaModel.from_finetuned`.
            local_files_only: as for `AutoDeltaModel.from_finetuned`.
            force_download: as for `AutoDeltaModel.from_finetuned`.

        Raises:
            DeltaLoadError: the folder is damaged, holds several deltas, or is another library's.
        """
        folder = hub.folder_of(
            finetuned_delta_path,
            local_files_only,
            "finetuned_delta_path",
            cache_dir=cache_dir,
            force_download=force_download,
        )
        with undamaged(folder):
            options = read_options(folder)
            if options is None and legacy.holds_options(folder):
                options = legacy.options_in(folder)
        if options is not None:
            return cls.from_dict(options)
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


DeltaConfig.reader = AutoDeltaConfig.from_finetuned


class AutoDeltaModel:
    """Makes the delta of the method that a config or a folder names."""

    @classmethod
    def from_config(
        cls,
        config: DeltaConfig | Mapping[str, Any],
        backbone_model: nn.Module,
        check_hash: bool = True,
        **options: Any,
    ) -> Delta:
        """Put a new delta with the options of `config`, changed by `options`, on a backbone.

        Args:
            config: a config, or a dict, which `AutoDeltaConfig.from_dict` reads.
            check_hash: ignored; OpenDelta 0.3 had it. A new delta has nothing to compare.
            options: options by name, and `sample_inputs`.
        """
        if isinstance(config, Mapping):
            config = AutoDeltaConfig.from_dict(config)
        if not isinstance(config, DeltaConfig):
            raise OptionError(f"from_config takes a config or a dict, not {type(config).__name__}")
        return cast(type[Delta], method(config.delta_type)).from_config(
            config, backbone_model, **options
        )

    from_finetuned = Delta.from_finetuned  # of any method
