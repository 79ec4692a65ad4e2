"""A folder of two files, a JSON config and safetensors weights, replaced in one step.

At any moment it holds the old pair or the new one: the weights file is named by its content, and
the config, which names that file and its sha256, is replaced last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors

from .errors import DeltaError, DeltaLoadError

CONFIG = "config.json"
FORMAT, SCHEMA = "opendelta", 1
LARGEST_CONFIG = 16 * 2**20  # bytes; 70 B models with many deltas need less than one


def own_version() -> str:
    """The installed version of opendelta."""
    with contextlib.suppress(PackageNotFoundError):
        return version("opendelta")
    return "unknown"


# ------------------------------------------------------------------------------------------ writing
def check_free(folder: Path) -> None:
    """Raise if `folder` holds the config of something else, which a save would destroy."""
    with contextlib.suppress(FileNotFoundError):
        try:
            given = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return  # the remains of a damaged delta, as far as one can tell
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            raise DeltaError(
                f"{folder} has a {CONFIG} that is not a delta's, such as a transformers model's; "
                "save into a folder of its own"
            )


def write(folder: Path, config: dict[str, Any], weights: bytes) -> None:
    """Put a config and the content of a safetensors file into `folder`, which is made if need be.

    The weights that an older config named go at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(weights).hexdigest()
    name = f"delta-{digest[:16]}.safetensors"
    facts = {"format": FORMAT, "schema_version": SCHEMA, **config}
    text = json.dumps({**facts, "weights": name, "sha256": digest}, indent=2) + "\n"
    with _locked(folder):
        old = list(folder.glob("delta-*.safetensors"))
        _replace(folder / name, weights)
        _replace(folder / CONFIG, text.encode())
        for file in old:
            if file.name != name:
                file.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into `folder`, where the system can."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step: a temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ------------------------------------------------------------------------------------------ reading
def read_config(folder: Path) -> dict[str, Any]:
    """The JSON of a folder, known to be of this format.

    Raises:
        DeltaLoadError: there is no such file, or it is not one of ours.
    """
    file = folder / CONFIG
    try:
        size = file.stat().st_size
        if size > LARGEST_CONFIG:
            raise DeltaLoadError(f"{file} has {size:,} bytes, more than {LARGEST_CONFIG:,}")
        given = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeltaLoadError(
            f"no delta in {str(folder)!r}: {CONFIG} is missing. Give the folder that "
            "save_finetuned or composition(model).save wrote, or 'user/name' for one on the hub"
        ) from None
    except DeltaLoadError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise DeltaLoadError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise DeltaLoadError(f"{file} was not written by opendelta 1.0 or later")
    if given.get("schema_version") != SCHEMA:
        raise DeltaLoadError(
            f"{file} has schema {given.get('schema_version')!r}; this version of opendelta reads "
            f"{SCHEMA}: update opendelta"
        )
    return given


@contextlib.contextmanager
def open_weights(folder: Path, config: dict[str, Any]) -> Iterator[Any]:
    """The weights that `config` names, open: `keys()`, `get_slice(key)`, `get_tensor(key)`.

    Nothing is read into memory but what is asked for.

    Raises:
        DeltaLoadError: the file is missing, damaged, elsewhere or no safetensors file.
    """
    name = str(config.get("weights"))
    plain = Path(name).name == name and "\\" not in name and name.endswith(".safetensors")
    if not plain:
        raise DeltaLoadError(f"{folder / CONFIG}: {name!r} is no safetensors file beside it")
    path = folder / name
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        _check_cached(path, folder)
    try:
        digest = _sha256(path)
    except OSError as error:
        raise DeltaLoadError(f"{path} cannot be read: {error}") from None
    if digest != config.get("sha256"):
        raise DeltaLoadError(f"{path} is damaged: its sha256 is not the one in {CONFIG}")
    try:
        opened = safetensors.safe_open(path, framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise DeltaLoadError(f"{path} is no safetensors file: {error}") from None
    with opened as weights:
        yield weights


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _check_cached(path: Path, folder: Path) -> None:
    """Raise unless a link out of `folder` is one of the hub cache's, from snapshots/ to blobs/."""
    repository = folder.resolve().parent.parent
    if path.resolve().parent != repository / "blobs":
        raise DeltaLoadError(f"{path} is a link out of its folder, to {path.resolve()}")
