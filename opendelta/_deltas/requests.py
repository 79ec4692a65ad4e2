"""Read deltas from texts such as `lora:lora_r=8@attn.q` into configs."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from torch import nn

from .._backbone import roles
from .._backbone.backbone import Backbone
from ..errors import AddressError, DeltaError
from .options import DeltaConfig
from .registry import method

SPEC = re.compile(r"(?P<type>[\w-]+)(?::(?P<options>[^@]*))?(?:@(?P<places>.*))?")
WORDS = {"True": True, "False": False, "None": None}


@dataclasses.dataclass(frozen=True)
class Request:
    """One delta that is asked for.

    Attributes:
        delta_type: its method.
        options: {name: value}.
        places: roles and patterns; if empty, the method's default places.
    """

    delta_type: str
    options: dict[str, Any]
    places: list[str]


def parse(text: str) -> Request:
    """Parse a text such as `lora:lora_r=8,lora_alpha=32@attn.q,attn.v`.

    More lines, `--option=NAME=VALUE` or `--at=PLACES`, add options and places.

    Raises:
        DeltaError: it has another form, or there is no such method or option.
    """
    spec, *more = text.split("\n")
    found = SPEC.fullmatch(spec)
    if found is None:
        raise DeltaError(
            f"{spec!r} must be TYPE, or TYPE:name=value,...@place,... such as "
            "lora:lora_r=8@attn.q,attn.v"
        )
    options = [] if found["options"] is None else split(found["options"])
    places = [] if found["places"] is None else split(found["places"])
    for line in more:
        name, _, value = line.partition("=")
        if name == "--option":
            options.append(value)
        else:
            places += split(value)
    if "" in places:
        raise DeltaError(
            "'' names no place: give roles or names of modules, such as lora@attn.q,attn.v; "
            "the model itself is 'root'"
        )
    pairs = list(map(_option, options))
    given = dict(pairs)
    if len(given) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DeltaError(f"option {twice}=... is given {names.count(twice)} times: give it once")
    method(found["type"]).config_class.check_names(given)
    return Request(found["type"], given, places)


def split(text: str) -> list[str]:
    """Split `text` at the commas that stand in no bracket."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise DeltaError(f"option {text!r} must be name=value, such as lora_r=8")
    if value in WORDS:
        return name, WORDS[value]
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
    except RecursionError:
        raise DeltaError(f"option {name}=... has too many brackets inside each other") from None


def config_for(model: nn.Module, request: Request) -> DeltaConfig:
    """Return the config for a request; each place is a role in `model`, or else a pattern.

    Raises:
        DeltaError: an option is unknown or wrong, or a place selects nothing.
    """
    config_class = method(request.delta_type).config_class
    given = dict(request.options)
    if request.places:
        if "modified_modules" in given:
            raise DeltaError("give the places after @ (--at), or as modified_modules, not both")
        paired = method(request.delta_type).layer_class.paired
        names, by_role = _places(model, request.places, paired)
        given |= {"modified_modules": names, "common_structure": by_role or None}
    return config_class.from_options(given)


def _places(model: nn.Module, places: list[str], paired: bool) -> tuple[list[str], bool]:
    """Return the places, and True if all of them are roles.

    If some places are roles and some are patterns, the roles are replaced by full names.
    """
    backbone = Backbone.of(model)
    by_role: dict[str, list[str]] = {}
    for place in places:
        try:
            by_role[place] = roles.with_roles(backbone, [place])
        except AddressError:
            if place in roles.ROLES:
                raise
    if len(by_role) == len(set(places)) or not by_role:
        return places, bool(by_role)
    if paired:
        others = [place for place in places if place not in by_role]
        raise DeltaError(f"{list(by_role)} are roles and {others} are not; pairs need one")
    return [name for place in places for name in by_role.get(place, [place])], False
