"""Read the JSON and the tensors of other libraries' files without running any code in them."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from .._files import folder as files
from .._files import reading
from .._files.reading import check_link, open_file
from ..errors import DeltaLoadError
from ._pickle import StateDict

MOST_NAMES = 32  # times that the tensors of a pickle may name its bytes, as tied weights do


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        DeltaLoadError: the file holds no JSON object, or is larger than a configuration can be.
    """
    given = reading.read_json(path, longest=10_000)
    if not isinstance(given, dict):
        raise DeltaLoadError(f"{path} must hold a JSON object, not a {type(given).__name__}")
    return given


def check_names(path: Path, names: Iterable[str]) -> None:
    """Raise for a name of a tensor that no module can have."""
    most, limit = max(map(len, names), default=0), reading.LONGEST
    if most > limit:
        raise DeltaLoadError(
            f"{path} holds a tensor with a name of {most:,} characters, more than {limit:,}"
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        DeltaLoadError: the file is damaged, or a link out of its folder.
    """
    check_link(path)
    try:
        with open_file(path) as file, files.open_safetensors(path, file) as opened:
            check_names(path, opened.keys())
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise DeltaLoadError(f"{path} cannot be read: {error}") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict that `torch.save` wrote; unpickle nothing.

    Raises:
        DeltaLoadError: the file holds something else than named tensors, or claims more of them
            than it has bytes for.
    """
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:  # as since torch 1.6
            size = os.fstat(file.fileno()).st_size
            if sum(part.file_size for part in archive.infolist()) > size:
                raise ValueError("it is compressed, as torch's own files never are")
            given = StateDict(archive, size).run()
    except DeltaLoadError:
        raise
    except zipfile.BadZipFile as error:
        raise DeltaLoadError(
            f"{path} is no state dict of plain tensors, and nothing else is unpickled: it is "
            f"damaged, or in the format of torch before 1.6 ({error}). In the second case save it "
            "anew: torch.save(torch.load(path, weights_only=True), path)"
        ) from None
    except Exception as error:  # a damaged program may do any step at any time
        first = f"{type(error).__name__}: " * (type(error) is not ValueError) + str(error)
        raise DeltaLoadError(
            f"{path} is no state dict of plain tensors, and nothing else is unpickled: {first}"
        ) from None
    if not isinstance(given, dict) or not all(
        isinstance(value, Tensor) for value in given.values()
    ):
        raise DeltaLoadError(f"{path} must hold named tensors, as a state dict does")
    check_names(path, map(str, given))
    if sum(tensor.numel() * tensor.itemsize for tensor in given.values()) > MOST_NAMES * size:
        raise DeltaLoadError(f"{path}: its tensors claim more values than the file holds")
    return given


def repeats_too_much(pattern: str) -> bool:
    """True if a regular expression could run forever: a repeated group, or over 3 repetitions.

    A repeated group of one sign, such as (\\d)+, is no more than the sign repeated.
    """
    return bool(re.search(r"(?<!\(\\\w)\)[*+{]", pattern)) or len(re.findall(r"[*+{]", pattern)) > 3
