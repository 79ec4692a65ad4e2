"""Errors for names of OpenDelta 0.3 that have no counterpart."""

from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

# {names that many modules of OpenDelta 0.3 had, as they imported them: where they are here}
EVERYWHERE = {
    "BaseDeltaConfig": "opendelta",
    "CommonStructureMap": "opendelta",
    "DeltaBase": "opendelta",
    "endswith_in": "opendelta.utils.name_based_addressing",
    "get_device": "opendelta.utils.cuda",
    "get_dtype": "opendelta.utils.cuda",
    "inspect_module_statistics": "opendelta.utils.inspect",
}
GONE_EVERYWHERE = {"Activations": "activations are transformers' ACT2FN"}


def refusal(name: str, instead: str) -> ImportError:
    """Return the error for a module or name of OpenDelta 0.3, with what replaces it."""
    return ImportError(f"{name} of OpenDelta 0.3 is gone: {instead}", name=name)


def refuses(module: str, names: Mapping[str, str] = MappingProxyType({})) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module that lacks some names, and has those of `EVERYWHERE`.

    Args:
        module: the module's name.
        names: {name: what to use in its place}.
    """
    gone = {**GONE_EVERYWHERE, **names}

    def __getattr__(name: str) -> Any:
        if name in EVERYWHERE:
            return getattr(import_module(EVERYWHERE[name]), name)
        if name in gone:
            raise refusal(f"{module}.{name}", gone[name])
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__
