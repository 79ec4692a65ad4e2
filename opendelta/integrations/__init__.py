"""Connect deltas to tools that train: transformers' Trainer and TRL.

Each module is found on demand, by its name, such as `opendelta.integrations.trl`, since it may
import the tool. The room imports `_handles` and what is below; no room imports it.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name in ("trainer", "trl"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
