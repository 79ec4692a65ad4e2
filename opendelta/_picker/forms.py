"""The methods and their options as forms to fill in, and the configs of what is filled in."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from .._deltas.base import BaseDelta
from .._deltas.options import COMMON, DeltaConfig, hints_of
from .._deltas.registry import METHODS
from .._modules.kinds import KINDS
from ..errors import OptionError, shown

BY_TREE = ("modified_modules", "exclude_modules", "common_structure", "interactive_modify")
MEANING = re.compile(r"^    (\w+(?:, \w+)*): (.*(?:\n(?:     +.*)?$)*)", re.M)
ENTRIES = {bool: "flag", int: "whole", float: "number", str: "text"}
TYPED = ("whole", "number", "json")  # values that are text on the page, as the user typed them


def forms() -> list[dict[str, Any]]:
    """Return the form of each method, in the order of their names."""
    return [form(METHODS[delta_type]) for delta_type in sorted(METHODS)]


def form(method: type[BaseDelta]) -> dict[str, Any]:
    """Return the form of one method."""
    config_class, layer_class = method.config_class, method.layer_class
    meanings = _meanings(config_class)
    return {
        "type": method.delta_type,
        "class": method.__name__,
        "about": inspect.cleandoc(method.__doc__ or "").partition("\n")[0],
        "takes": [KINDS[kind] for kind in layer_class.kinds],
        "paired": layer_class.paired,
        "options": [
            {
                "name": field.name,
                "meaning": meanings.get(field.name, ""),
                "kind": kind,
                "default": _for_page(kind, field.default),
                "choices": choices,
                "own": field.name not in COMMON,
                **{at: field.metadata.get(at) for at in ("minimum", "below", "multiple_of")},
            }
            for field, kind, choices in _entries(config_class)
        ],
    }


def filled(config: DeltaConfig) -> dict[str, Any]:
    """Return the options of a config as they stand in its form."""
    return {
        field.name: _for_page(kind, getattr(config, field.name))
        for field, kind, _ in _entries(type(config))
    }


def config_of(config_class: type[DeltaConfig], options: Mapping[str, Any]) -> DeltaConfig:
    """Return the config of a form that is filled in; an option that is left out has its default.

    Raises:
        OptionError: a text cannot be read, or an option is unknown or wrong.
    """
    config_class.check_names(options)
    kinds = {field.name: kind for field, kind, _ in _entries(config_class)}
    given = {}
    for name, value in options.items():
        where = f"{config_class.__name__}: {name}={shown(value)}"
        if name not in kinds:
            raise OptionError(f"{where}: the form has no such option")
        given[name] = _read(where, kinds[name], value)
    return config_class(**given)


def _entries(config_class: type[DeltaConfig]) -> Iterator[tuple[dataclasses.Field, str, list[Any]]]:
    """Yield each option of a form with the kind of its input, and the choices there are."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    hints = hints_of(config_class)  # type: ignore[arg-type]
    for name in config_class.option_names():
        if name in BY_TREE:
            continue
        hint, kind = hints[name], "json"
        parts = [part for part in typing.get_args(hint) or (hint,) if part is not type(None)]
        choices = list(fields[name].metadata.get("choices", ()))
        if parts == [bool] and hint is not bool:
            choices = [None, True, False]
        if choices:
            kind = "choice"
        elif typing.get_origin(hint) is not list and len(parts) == 1:
            kind = "lines" if parts[0] == list[str] else ENTRIES.get(parts[0], "json")
        yield fields[name], kind, choices


def _for_page(kind: str, value: Any) -> Any:
    """Return a value for the page: what is typed there as text, which keeps long numbers exact."""
    return json.dumps(value) if kind in TYPED and value is not None else value


def _read(where: str, kind: str, value: Any) -> Any:
    """Return the value that stands in an input; `where` names it in an error."""
    if kind not in TYPED or not isinstance(value, str):
        return value
    if kind == "json":
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{where} is no JSON: {error}") from None
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(value)
    raise OptionError(f"{where} is no number")


def _meanings(config_class: type) -> dict[str, str]:
    """Return {option: its meaning} from the part "Attributes" of the docstrings."""
    found: dict[str, str] = {}
    for cls in reversed(config_class.__mro__):
        _, _, attributes = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
        for names, text in MEANING.findall(attributes):
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found
