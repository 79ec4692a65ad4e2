"""A folder of two files, a JSON config and safetensors weights, replaced in one step.

At any moment the folder holds the old pair or the new pair. The name of the weights file depends on
its content. The config holds this name and the sha256 of the weights, and is replaced last.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from torch import Tensor

from ..errors import DeltaError, DeltaLoadError, listed, shown
from .reading import (
    LARGEST,
    check_link,
    excess,
    open_file,
    parsed,
    read_json,
    read_start,
    readable,
)

CONFIG = "config.json"
FORMAT, SCHEMA = "opendelta", 1
OPTIONS = "opendelta options"  # the format of a config without weights
FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
TRIES = 50  # how often to try to open the weights while other processes save
WEIGHTS = "delta-{}.safetensors"
OWN = WEIGHTS.format(16 * "[0-9a-f]")  # as a shell's pattern; other files are the user's
TEMPORARY = re.compile(r"\.delta-[0-9a-f]{16}\.tmp")


@functools.cache
def own_version() -> str:
    """Return the installed version of opendelta, or "unknown"."""
    with contextlib.suppress(PackageNotFoundError):
        return version("opendelta")
    return "unknown"


# ------------------------------------------------------------------------------------------ writing
@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turn errors of the file system inside into one that names `folder`.

    Raises:
        DeltaError: it cannot be made, or what is in the way cannot be read or replaced.
        OSError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise
        raise DeltaError(
            f"cannot write into {shown(str(folder))}: {error.strerror}; give another folder"
        ) from None


def check_folder(folder: Path) -> None:
    """Raise if `folder` is no folder, such as a pipe, or safetensors could read no file in it."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise DeltaError(f"{folder} is no UTF-8, as safetensors asks; give another name") from None
    if "\0" in str(folder):
        raise DeltaError(f"{shown(str(folder))} holds a NUL, which no name of a file may hold")
    with writable(folder):
        around = next((each for each in folder.parents if each.exists()), None)
        if around is not None and not around.is_dir():
            where = shown(str(folder))
            raise DeltaError(f"cannot write into {where}: {around} is a file; give another folder")
        there = folder.exists() or folder.is_symlink()
        what = "a file" if folder.exists() else "a link to nothing"
        if there and not folder.is_dir():
            raise DeltaError(f"{folder} is {what}; give a folder, which is made if need be")


def check_free(folder: Path) -> None:
    """Raise if `folder` is a file, or holds a config that is not ours and would be lost."""
    check_folder(folder)
    with writable(folder), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        content = read_start(folder / CONFIG)
        try:
            given = json.loads(content)
        except (ValueError, RecursionError):  # the remains of a damaged delta begin like one
            begins = content.startswith(f'{{\n  "format": "{FORMAT}"'.encode())
            given = {"format": FORMAT} if begins else None
        if not isinstance(given, dict) or given.get("format") not in (FORMAT, OPTIONS):
            raise DeltaError(
                f"{folder} has a {CONFIG} that is not a delta's, such as a transformers model's; "
                "save into a folder of its own"
            )


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Raise if a tensor that is to be saved has no values."""
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise DeltaError(
            f"{len(empty)} tensors have no values, being on the meta device: {listed(empty)}. If "
            "accelerate has offloaded them, call accelerate.hooks.remove_hook_from_submodules(model"
            "); else load the model with its weights, and the deltas on it. Nothing was saved"
        )


def write(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put a config and tensors into `folder`, which is made if need be.

    At the end the old weights are deleted, and temporary folders that a killed process left.

    Args:
        tensors: whole and detached, on any device.

    Raises:
        DeltaError: the config or the header of the weights is larger than `open_folder` reads, or
            `folder` cannot be written to. The folder is then as it was before.
        OSError: the disk is full. The folder is then as it was before.
    """
    facts = {"format": FORMAT, "schema_version": SCHEMA, **config}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items()]
    refused = f"what is to be saved in {folder}"
    if problem := excess(_text(lines, "0" * 64)):
        raise DeltaError(f"{refused} {problem}: save fewer deltas in one")
    with writable(folder), made(folder), locked(folder) as alone:
        old = [*folder.glob(OWN)]
        with replacing(folder) as (new, put):
            write_tensors(new, tensors)
            with open(new, "rb") as file:
                if problem := _header_excess(file.read(8)):
                    raise DeltaError(f"{refused} {problem}: save fewer deltas in one")
                digest = _sha256(file)
            put(WEIGHTS.format(digest[:16]))
        replace(folder / CONFIG, _text(lines, digest))
        for path in old:
            if path.name != WEIGHTS.format(digest[:16]):
                with contextlib.suppress(OSError):  # the new pair is complete in any case
                    path.unlink()
        if alone:
            clear_left(folder)


def write_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Write the options of a delta, without weights, into `folder`, which is made if need be.

    Raises:
        DeltaError: `folder` holds a saved delta, or a config that is not ours, or it cannot be
            written to.
        OSError: the disk is full.
    """
    check_free(folder)
    if is_ours(folder):
        raise DeltaError(f"{folder} holds a saved delta; save a config into a folder of its own")
    text = json.dumps({"format": OPTIONS, **options}, indent=2)
    with writable(folder), made(folder):
        replace(folder / CONFIG, f"{text}\n".encode())


def read_options(folder: Path) -> dict[str, Any] | None:
    """Return the options that `write_options` wrote into `folder`; None if it wrote none.

    Raises:
        DeltaLoadError: there is a config, and it cannot be read.
    """
    if not (folder / CONFIG).is_file():
        return None
    given = read_json(folder / CONFIG)
    ours = isinstance(given, dict) and given.get("format") == OPTIONS
    return {key: value for key, value in given.items() if key != "format"} if ours else None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into an existing file as safetensors; copy tensors that share memory.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if storage in storages else own
        storages.add(storage)
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(plain, path, metadata={"format": "pt"})
        path.chmod(mode)  # with the mode that safetensors sets, no other user could read the file
    except safetensors.SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def _text(lines: Iterable[str], digest: str) -> bytes:
    """Return the JSON of these lines, and of the two entries that name weights of this sha256."""
    own = [f'  "weights": "{WEIGHTS.format(digest[:16])}"', f'  "sha256": "{digest}"']
    return "{{\n{}\n}}\n".format(",\n".join([*lines, *own])).encode()


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make `folder` if need be; remove a new folder if an error is raised and it is empty."""
    there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not there:
            with contextlib.suppress(OSError):  # another process has put files into it
                folder.rmdir()
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep other processes from writing into `folder`; yield False if the system has no locks."""
    if os.name != "posix":
        yield False
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        alone = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # some network file systems have no locks
            alone = False
        yield alone
    finally:
        os.close(handle)


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """Yield the path of a new file, and a function that moves it into `folder` under a name.

    The move is one step, and may be asked for again. The new file is in a temporary folder, and so
    is the file that safetensors leaves if it is killed.
    """
    temporary = folder / f".delta-{os.urandom(8).hex()}.tmp"
    new = temporary / "new"

    def put(name: str) -> None:
        if new.exists():
            flush(new)
            os.replace(new, folder / name)
        if os.name == "posix":
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    temporary.mkdir()
    try:
        new.touch()
        yield new, put
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Write a file in one step."""
    with replacing(path.parent) as (new, put):
        new.write_bytes(content)
        put(path.name)


def clear_left(folder: Path) -> None:
    """Delete the temporary folders that killed processes left; no other may be writing."""
    for path in folder.glob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------------------------------ reading
def is_ours(folder: Path) -> bool:
    """True if the config in `folder` has our format; other files do not matter.

    Raises:
        DeltaLoadError: there is a config, and it cannot be read.
    """
    if not (folder / CONFIG).is_file():
        return False
    given = parsed(folder / CONFIG)
    return isinstance(given, dict) and given.get("format") == FORMAT


def _header_excess(start: bytes) -> str | None:
    """Return how a safetensors header is too large, from the file's first 8 bytes; else None."""
    size = int.from_bytes(start[:8], "little")
    return f"has a header of {size:,} bytes, more than {LARGEST:,}" if size > LARGEST else None


def read_config(folder: Path) -> dict[str, Any]:
    """Return the JSON of a folder of our format.

    Raises:
        DeltaLoadError: there is no such file, or opendelta did not write it.
    """
    file = folder / CONFIG
    if not file.exists():
        what = f"{CONFIG} is missing" if folder.exists() else "there is no such folder"
        inside = _folders_inside(folder)
        raise DeltaLoadError(
            f"no delta in {str(folder)!r}: {what}. Give the folder that save_finetuned or "
            "composition(model).save wrote, or 'user/name' for one on the hub"
            + (f"; the folders {listed(inside)} in it may hold one each" if inside else "")
        )
    given = read_json(file)
    if isinstance(given, dict) and given.get("format") == OPTIONS:
        raise DeltaLoadError(
            f"{file} holds options only, of a delta that was not saved: "
            "AutoDeltaConfig.from_finetuned reads them"
        )
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise DeltaLoadError(
            f"{file} was not written by opendelta 1.0 or later. If it is a Trainer's "
            "checkpoint: resume from it, and save deltas with save_finetuned to load them elsewhere"
        )
    if type(given.get("schema_version")) is not int or given["schema_version"] != SCHEMA:
        raise DeltaLoadError(
            f"{file} has schema {shown(given.get('schema_version'))}; this version of opendelta "
            f"reads {SCHEMA}: update opendelta"
        )
    return given


def _folders_inside(folder: Path) -> list[str]:
    """Return the names of the folders inside that may hold a delta; another process may save."""
    with contextlib.suppress(OSError):
        return sorted({repr(each.parent.name) for each in folder.glob("*/*config.json")})
    return []


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[tuple[dict[str, Any], Any, BinaryIO]]:
    """Open a folder: yield its JSON, and its weights as safetensors and as a binary file.

    A tensor is read into memory only when it is asked for. The weights stay readable when another
    process replaces the file.

    Raises:
        DeltaLoadError: the folder holds no delta; the weights are missing, elsewhere or damaged.
    """
    with contextlib.ExitStack() as stack:
        for left in reversed(range(TRIES)):
            with readable(folder):
                config = read_config(folder)
                path = weights_path(folder, config)
            try:
                file = stack.enter_context(open_file(path))
                weights = stack.enter_context(open_safetensors(path, file))
                break
            except OSError as error:
                # Another process may have replaced the weights after the config was read.
                if not isinstance(error, FileNotFoundError):
                    raise DeltaLoadError(f"{path} cannot be read: {error}") from None
                if not left:
                    raise DeltaLoadError(f"{path} is missing, though {CONFIG} names it") from None
        yield config, weights, file


def weights_path(folder: Path, config: dict[str, Any]) -> Path:
    """Return the path of the weights that a folder's JSON names.

    Raises:
        DeltaLoadError: the path is not in the folder.
    """
    name = str(config.get("weights"))
    plain = Path(name).name == name and "\\" not in name and name.endswith(".safetensors")
    if not plain or "\0" in name:
        raise DeltaLoadError(f"{folder / CONFIG}: {name!r} is no safetensors file beside it")
    check_link(folder / name)
    return folder / name


def open_safetensors(path: Path, file: BinaryIO) -> Any:
    """Open the safetensors file at `path`.

    Args:
        file: the same file, open as bytes, at its start.

    Raises:
        DeltaLoadError: it is no safetensors file, or its header is too large.
        FileNotFoundError: another process has removed it since `file` was opened.
    """
    if problem := _header_excess(file.read(8)):
        raise DeltaLoadError(f"{path} is no safetensors file: it {problem}")
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise DeltaLoadError(f"{path} is damaged, or no safetensors file: {error}") from None
    except RuntimeError as error:  # torch maps it into memory, and opens it by its name again
        if path.exists():
            raise DeltaLoadError(f"{path} cannot be read: {error}") from None
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None


def check_digest(folder: Path, config: dict[str, Any], file: BinaryIO) -> None:
    """Raise if the open weights have changed since they were saved.

    Raises:
        DeltaLoadError: their sha256 is not the one in the JSON.
    """
    if _sha256(file) != config.get("sha256"):
        raise DeltaLoadError(
            f"{folder / str(config['weights'])} is damaged: its sha256 is not the one in {CONFIG}"
        )


def _sha256(file: BinaryIO) -> str:
    """Return the sha256 of a file's content in hex."""
    digest, part = hashlib.sha256(), memoryview(bytearray(2**18))
    file.seek(0)
    while size := file.readinto(part):  # type: ignore[attr-defined]
        digest.update(part[:size])
    return digest.hexdigest()
