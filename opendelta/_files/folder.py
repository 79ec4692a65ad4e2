"""A folder of two files, a JSON config and safetensors weights, replaced in one step.

At any moment the folder holds the old pair or the new pair. The name of the weights file depends on
its content. The config holds this name and the sha256 of the weights, and is replaced last.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from torch import Tensor

from ..errors import DeltaError, DeltaLoadError, shown

CONFIG = "config.json"
FORMAT, SCHEMA = "opendelta", 1
# A file beyond these limits is refused unread. 70 B models with many deltas need a tenth of them.
LARGEST = 16 * 2**20  # bytes of a JSON file, and of the header of a weights file
MOST_ITEMS = 500_000  # items in a JSON file
LONGEST, DEEPEST = 1_000, 32  # characters of a text in our JSON, and how deep lists are nested
TRIES = 50  # how often to try to open the weights while other processes save
WEIGHTS = "delta-{}.safetensors"
OWN = re.compile(r"delta-[0-9a-f]{16}\.safetensors")  # other files are the user's
TEMPORARY = re.compile(r"\.delta-[0-9a-f]{16}\.tmp")


@functools.cache
def own_version() -> str:
    """Return the installed version of opendelta, or "unknown"."""
    with contextlib.suppress(PackageNotFoundError):
        return version("opendelta")
    return "unknown"


# ------------------------------------------------------------------------------------------ writing
def check_free(folder: Path) -> None:
    """Raise if `folder` is a file, or holds a config that is not ours and would be lost."""
    if folder.is_file():
        raise DeltaError(f"{folder} is a file; give a folder, which is made if need be")
    with contextlib.suppress(FileNotFoundError):
        try:
            given = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return  # the file may be the remains of a damaged delta
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            raise DeltaError(
                f"{folder} has a {CONFIG} that is not a delta's, such as a transformers model's; "
                "save into a folder of its own"
            )


def write(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put a config and tensors into `folder`, which is made if need be.

    At the end the old weights are deleted, and temporary folders that a killed process left.

    Args:
        tensors: whole and detached, on any device.

    Raises:
        DeltaError: the config or the header of the weights is larger than `open_folder` reads.
        OSError: the disk is full, or cannot be written to. The folder is then as it was before.
    """
    facts = {"format": FORMAT, "schema_version": SCHEMA, **config}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items()]
    refused = f"what is to be saved in {folder}"
    if problem := _excess(_text(lines, "0" * 64)):
        raise DeltaError(f"{refused} {problem}: save fewer deltas in one")
    with _made(folder), locked(folder) as alone:
        old = [path for path in folder.glob("delta-*") if OWN.fullmatch(path.name)]
        if alone:  # then no other process is writing into these temporary folders
            old += [path for path in folder.glob(".*.tmp") if TEMPORARY.fullmatch(path.name)]
        with _replacing(folder) as (new, put):
            write_tensors(new, tensors)
            with open(new, "rb") as file:
                if problem := _header_excess(file.read(8)):
                    raise DeltaError(f"{refused} {problem}: save fewer deltas in one")
                digest = _sha256(file)
            put(WEIGHTS.format(digest[:16]))
        replace(folder / CONFIG, _text(lines, digest))
        for path in old:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != WEIGHTS.format(digest[:16]):
                with contextlib.suppress(OSError):  # the new pair is complete in any case
                    path.unlink()


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
def _made(folder: Path) -> Iterator[None]:
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
def _replacing(folder: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """Yield the path of a new file, and a function that moves it into `folder` under a name.

    The move is one step. The new file is in a temporary folder, and so is the file that safetensors
    leaves if it is killed.
    """
    temporary = folder / f".delta-{secrets.token_hex(8)}.tmp"
    new = temporary / "new"

    def put(name: str) -> None:
        with open(new, "r+b") as file:
            os.fsync(file.fileno())
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


def replace(path: Path, content: bytes | Mapping[str, Tensor]) -> None:
    """Write a file in one step: bytes, or tensors as a safetensors file."""
    with _replacing(path.parent) as (new, put):
        if isinstance(content, bytes):
            new.write_bytes(content)
        else:
            write_tensors(new, content)
        put(path.name)


# ------------------------------------------------------------------------------------------ reading
@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors of the file system inside into one that names `path`.

    Raises:
        DeltaLoadError: a name is too long, a link leads to itself, a folder may not be entered.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise DeltaLoadError(f"{shown(str(path))} cannot be read: {shown(str(error))}") from None


def read_json(path: Path, longest: int = LONGEST) -> Any:
    """Return the content of a JSON file; refuse one that is too large.

    Args:
        longest: largest number of characters in a text.

    Raises:
        DeltaLoadError: the file is no JSON, or larger than any configuration.
    """
    given = _parsed(path)
    _check_items(path, given, longest)
    return given


def _parsed(path: Path) -> Any:
    """Return the content of a JSON file; refuse one with too many bytes or items."""
    try:
        if not path.is_file():
            raise DeltaLoadError(f"{path} cannot be read: it is no file")
        if (size := path.stat().st_size) > LARGEST:
            raise DeltaLoadError(f"{path} has {size:,} bytes, more than {LARGEST:,}")
        content = path.read_bytes()
        if problem := _excess(content):
            raise DeltaLoadError(f"{path} {problem}")
        return json.loads(content.decode("utf-8"))
    except DeltaLoadError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise DeltaLoadError(f"{path} cannot be read as JSON: {error}") from None


def is_ours(folder: Path) -> bool:
    """True if the config in `folder` has our format; other files do not matter.

    Raises:
        DeltaLoadError: there is a config, and it cannot be read.
    """
    if not (folder / CONFIG).is_file():
        return False
    given = _parsed(folder / CONFIG)
    return isinstance(given, dict) and given.get("format") == FORMAT


def _excess(text: bytes) -> str | None:
    """Return which limit a JSON text exceeds, as the end of a sentence; None if it exceeds none."""
    if len(text) > LARGEST:
        return f"has {len(text):,} bytes, more than {LARGEST:,}"
    if (items := sum(text.count(sign) for sign in (b",", b"[", b"{"))) > MOST_ITEMS:
        return f"has {items:,} items, more than {MOST_ITEMS:,}"
    return None


def _header_excess(start: bytes) -> str | None:
    """Return how a safetensors header is too large, from the file's first 8 bytes; else None."""
    size = int.from_bytes(start[:8], "little")
    return f"has a header of {size:,} bytes, more than {LARGEST:,}" if size > LARGEST else None


def _check_items(path: Path, given: Any, longest: int) -> None:
    """Raise for a text, a number or a nesting that no configuration has."""
    depth, level = 0, [given]
    while level:
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += value
                below += value.values()
            elif isinstance(value, list):
                below += value
            elif problem := _problem(value, longest):
                raise DeltaLoadError(f"{path} holds {problem}")
        depth, level = depth + 1, below
        if level and depth > DEEPEST:
            raise DeltaLoadError(f"{path} holds lists or objects nested more than {DEEPEST} deep")


def _problem(value: Any, longest: int) -> str | None:
    """Return the problem of a text or a number in a JSON file; None if it has no problem."""
    if isinstance(value, str):
        size = len(value)
        return f"a text of {size:,} characters, more than {longest:,}" if size > longest else None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"the number {value}"
    fits = not isinstance(value, int) or -(2**63) <= value < 2**63
    return None if fits else "an integer of more than 64 bits"


def read_config(folder: Path) -> dict[str, Any]:
    """Return the JSON of a folder of our format.

    Raises:
        DeltaLoadError: there is no such file, or opendelta did not write it.
    """
    file = folder / CONFIG
    if not file.exists():
        what = f"{CONFIG} is missing" if folder.exists() else "there is no such folder"
        raise DeltaLoadError(
            f"no delta in {str(folder)!r}: {what}. Give the folder that "
            "save_finetuned or composition(model).save wrote, or 'user/name' for one on the hub"
        )
    given = read_json(file)
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise DeltaLoadError(
            f"{file} was not written by opendelta 1.0 or later. If it is a Trainer's "
            "checkpoint: resume from it, and save deltas with save_finetuned to load them elsewhere"
        )
    if given.get("schema_version") != SCHEMA:
        raise DeltaLoadError(
            f"{file} has schema {shown(given.get('schema_version'))}; this version of opendelta "
            f"reads {SCHEMA}: update opendelta"
        )
    return given


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
                file = stack.enter_context(open(path, "rb"))
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
    path = folder / name
    if path.exists() and not path.is_file():
        raise DeltaLoadError(f"{path} cannot be read: it is no file")
    check_link(path)
    return path


def open_safetensors(path: Path, file: BinaryIO) -> Any:
    """Open the safetensors file at `path`.

    Args:
        file: the same file, open as bytes, at its start.

    Raises:
        DeltaLoadError: it is no safetensors file, or its header is too large.
    """
    if problem := _header_excess(file.read(8)):
        raise DeltaLoadError(f"{path} is no safetensors file: it {problem}")
    try:
        return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise DeltaLoadError(f"{path} is damaged, or no safetensors file: {error}") from None


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


def check_link(path: Path) -> None:
    """Raise if a file is a link out of its folder.

    A link in the cache of the hub, from snapshots/ to blobs/, is allowed.
    """
    folder = path.parent.resolve()
    if not path.is_symlink() or path.resolve().parent == folder:
        return
    if path.resolve().parent != folder.parent.parent / "blobs":
        raise DeltaLoadError(f"{path} is a link out of its folder, to {path.resolve()}")
