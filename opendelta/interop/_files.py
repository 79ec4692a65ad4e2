"""Read the JSON and the tensors of other libraries' files without running any code in them."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import folder as files
from ..errors import DeltaLoadError


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        DeltaLoadError: the file holds no JSON object, or is larger than a configuration can be.
    """
    given = files.read_json(path, longest=10_000)
    if not isinstance(given, dict):
        raise DeltaLoadError(f"{path} must hold a JSON object, not a {type(given).__name__}")
    return given


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        DeltaLoadError: the file is damaged, or a link out of its folder.
    """
    files.check_link(path)
    try:
        with open(path, "rb") as file, files.open_safetensors(path, file) as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise DeltaLoadError(f"{path} cannot be read: {error}") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict that `torch.save` wrote; unpickle nothing else.

    Raises:
        DeltaLoadError: the file holds something else than named tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # as torch has written them since 1.6
            if sum(part.file_size for part in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed, as torch's own files never are")
        given = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # for a damaged file torch raises nearly any exception
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise DeltaLoadError(
            f"{path} is no state dict of plain tensors, and nothing else is unpickled: {first}"
        ) from None
    if not isinstance(given, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in given.items()
    ):
        raise DeltaLoadError(f"{path} must hold named tensors, as a state dict does")
    size = path.stat().st_size
    for key, value in given.items():
        plain = value.layout == torch.strided and not value.is_meta
        if not plain or value.numel() * value.itemsize > size:
            raise DeltaLoadError(f"{path}: {key} claims more values than the file holds")
    return given


def repeats_too_much(pattern: str) -> bool:
    """True if a regular expression could run forever: a repeated group, or over 3 repetitions."""
    return bool(re.search(r"\)[*+{]", pattern)) or len(re.findall(r"[*+{]", pattern)) > 3
