"""Open and read files that others may have made: never waiting, and never more than a limit."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DeltaError, DeltaLoadError, OptionError, shown

# A file beyond these limits is refused unread. 70 B models with many deltas need a tenth of them.
LARGEST = 16 * 2**20  # bytes of a JSON file, and of the header of a weights file
MOST_ITEMS = 500_000  # items in a JSON file
LONGEST, DEEPEST = 1_000, 32  # characters of a text in our JSON, and how deep lists are nested

FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def as_path(given: Any, argument: str, hint: str = "") -> Path:
    """Return an argument as a path.

    Args:
        argument: its name, for the message.
        hint: the end of the message.

    Raises:
        OptionError: it is no text and no `os.PathLike` of text, or it is empty.
    """
    text = os.fspath(given) if isinstance(given, str | os.PathLike) else given
    if not isinstance(text, str) or not text:
        raise OptionError(
            f"{argument}={shown(given)} must be a path, as a text or a pathlib.Path, not "
            f"{'empty' if text == '' else 'of type ' + type(given).__name__}{hint}"
        )
    return Path(text)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn errors of the file system inside into one that names `path`.

    Raises:
        DeltaLoadError: a name is too long, a link leads to itself, a folder may not be entered.
    """
    try:
        yield
    except DeltaError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise DeltaLoadError(f"{shown(str(path))} cannot be read: {shown(str(error))}") from None


@contextlib.contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes a reader inside raise into one error.

    Raises:
        DeltaLoadError: something was raised.
    """
    try:
        yield
    except DeltaLoadError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, DeltaError) else f"{type(error).__name__}: "
        raise DeltaLoadError(f"{path} is damaged, or no delta: {kind}{error}") from error


def open_file(path: Path) -> BinaryIO:
    """Open a file as bytes, without waiting for a pipe or a device.

    Raises:
        DeltaLoadError: it is a pipe, a device, a folder or a socket.
        OSError: there is no such file, or it may not be read.
    """
    refusal = DeltaLoadError(f"{path} cannot be read: it is no file")
    try:
        handle = os.open(path, FLAGS)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device that is not there
            raise refusal from None
        raise
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise refusal


def read_start(path: Path) -> bytes:
    """Return the first bytes of a file: all of a file that is not larger than the limit.

    Raises:
        DeltaLoadError: it is no file, or a link to one of the system that gives nothing.
    """
    with open_file(path) as file:
        content: bytes | None = file.read(LARGEST + 1)
    if content is None:  # it would have to be waited for, as for /proc/kmsg
        raise DeltaLoadError(f"{path} cannot be read: it is no file")
    return content


def read_json(path: Path, longest: int = LONGEST) -> Any:
    """Return the content of a JSON file; refuse one that is too large.

    Args:
        longest: largest number of characters in a text.

    Raises:
        DeltaLoadError: the file is no JSON, or larger than any configuration.
    """
    given = parsed(path)
    _check_items(path, given, longest)
    return given


def parsed(path: Path) -> Any:
    """Return the content of a JSON file; refuse one with too many bytes or items.

    Raises:
        DeltaLoadError: as for `read_json`.
    """
    try:
        content = read_start(path)
        if problem := excess(content):
            raise DeltaLoadError(f"{path} {problem}")
        return json.loads(content.decode("utf-8-sig"))
    except DeltaLoadError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise DeltaLoadError(f"{path} cannot be read as JSON: {error}") from None


def excess(text: bytes) -> str | None:
    """Return which limit a JSON text exceeds, as the end of a sentence; None if it exceeds none."""
    if len(text) > LARGEST:
        return f"has more than {LARGEST:,} bytes"
    if (items := sum(text.count(sign) for sign in (b",", b"[", b"{"))) > MOST_ITEMS:
        return f"has {items:,} items, more than {MOST_ITEMS:,}"
    return None


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


def check_link(path: Path) -> None:
    """Raise if a file is a link out of its folder.

    A link in the cache of the hub, from inside <repository>/snapshots/<commit>/ to
    <repository>/blobs/, is allowed.
    """
    folder, target = path.parent.resolve(), path.resolve().parent
    if not path.is_symlink() or target == folder:
        return
    snapshots = target.parent / "snapshots"
    if target.name != "blobs" or snapshots not in folder.parents:
        raise DeltaLoadError(f"{path} is a link out of its folder, to {path.resolve()}")
