"""The files of other libraries: JSON and tensors, read without running anything in them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from .. import folder as files
from ..errors import DeltaLoadError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DeltaLoadError: it is no JSON object, or larger than a configuration can be.
    """
    try:
        if (size := path.stat().st_size) > files.LARGEST_CONFIG:
            raise DeltaLoadError(f"{path} has {size:,} bytes, more than {files.LARGEST_CONFIG:,}")
        given = json.loads(path.read_text(encoding="utf-8"))
    except DeltaLoadError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise DeltaLoadError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(given, dict):
        raise DeltaLoadError(f"{path} must hold a JSON object, not a {type(given).__name__}")
    return given


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name.

    Raises:
        DeltaLoadError: the file is damaged, or a link out of its folder.
    """
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        files._check_cached(path, path.parent)
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise DeltaLoadError(f"{path} is no safetensors file: {error}") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that `torch.save` wrote; of a pickle nothing else is read.

    Raises:
        DeltaLoadError: it holds something else than named tensors.
    """
    try:
        given = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise DeltaLoadError(
            f"{path} is no state dict of plain tensors, and nothing else is unpickled: {first}"
        ) from None
    if not isinstance(given, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in given.items()
    ):
        raise DeltaLoadError(f"{path} must hold named tensors, as a state dict does")
    return given
