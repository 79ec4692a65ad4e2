"""Read folders of other libraries (PEFT, adapters, OpenDelta 0.3), and write folders for PEFT.

A reader is a module with two functions. `recognises(folder)` is true for a folder of its library.
`translate(folder, model)` returns the content that `opendelta.load` would find in a folder of ours:
the JSON, and the tensors by full name.

The room imports `_deltas` and `_files`; the rooms from `_checkpoint` on may import it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from .._files import folder as files
from .._files.reading import readable

READERS = ("peft", "legacy", "adapters")


def __getattr__(name: str) -> Any:
    if name in READERS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def reader_of(folder: Path) -> Any:
    """Return the reader for the library that wrote `folder`; None if it is ours or unknown.

    Raises:
        DeltaLoadError: a config in the folder is damaged, or cannot be read.
    """
    with readable(folder):
        if files.is_ours(folder):
            return None
        readers = (import_module(f"{__name__}.{name}") for name in READERS)
        return next((reader for reader in readers if reader.recognises(folder)), None)
