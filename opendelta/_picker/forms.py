"""The methods and their options as forms to fill in: meanings, types, limits and defaults."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from typing import Any

from .._deltas.base import BaseDelta
from .._deltas.options import COMMON, DeltaConfig, hints_of
from .._deltas.registry import METHODS
from .._modules.kinds import KINDS

BY_TREE = ("modified_modules", "exclude_modules", "common_structure", "interactive_modify")
MEANING = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n(?:     +.*)?$)*)", re.M)
ENTRIES = {bool: "flag", int: "whole", float: "number", str: "text"}


def forms() -> list[dict[str, Any]]:
    """Return the form of each method, in the order of their names."""
    return [form(METHODS[delta_type]) for delta_type in sorted(METHODS)]


def form(method: type[BaseDelta]) -> dict[str, Any]:
    """Return the form of one method."""
    config_class, layer_class = method.config_class, method.layer_class
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    meanings = _meanings(config_class)
    names = [name for name in config_class.option_names() if name not in BY_TREE]
    return {
        "type": method.delta_type,
        "class": method.__name__,
        "about": inspect.cleandoc(method.__doc__ or "").partition("\n")[0],
        "takes": [KINDS[kind] for kind in layer_class.kinds],
        "paired": layer_class.paired,
        "options": [_entry(config_class, fields[n], meanings.get(n, "")) for n in names],
    }


def _entry(
    config_class: type[DeltaConfig], field: dataclasses.Field, meaning: str
) -> dict[str, Any]:
    """Return an option: the kind of its input, and all that the input shows."""
    hint = hints_of(config_class)[field.name]  # type: ignore[arg-type]
    parts = [part for part in typing.get_args(hint) or (hint,) if part is not type(None)]
    kind, choices = "json", list(field.metadata.get("choices", ()))
    if parts == [bool] and hint is not bool:
        choices = [None, True, False]
    if choices:
        kind = "choice"
    elif typing.get_origin(hint) is not list and len(parts) == 1:
        kind = "lines" if parts[0] == list[str] else ENTRIES.get(parts[0], "json")
    limits = {name: field.metadata.get(name) for name in ("minimum", "below", "multiple_of")}
    return {
        "name": field.name,
        "meaning": meaning,
        "kind": kind,
        "default": field.default,
        "choices": choices,
        "own": field.name not in COMMON,
        **limits,
    }


def _meanings(config_class: type) -> dict[str, str]:
    """Return {option: its meaning} from the part "Attributes" of the docstrings."""
    found: dict[str, str] = {}
    for cls in reversed(config_class.__mro__):
        _, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
        for names, text in MEANING.findall(attributes):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found
