"""Choose the arguments that a run of a block on stand-ins gets."""

from __future__ import annotations

import inspect
import re

OPTIONAL = re.compile(r"past|cache|state_dict|mask|output_|return_|use_|labels|_state$|params|bias")
FED = re.compile(r"hidden|embed|state|query|key|value|memory|rotary|rope|freq|cos|sin|position|seq")


def likely(parameter: inspect.Parameter, first: bool) -> bool:
    """True for an argument that a block usually gets: hidden states, positions; no cache, mask."""
    name, needed = parameter.name, parameter.default is parameter.empty
    if OPTIONAL.search(name):
        return first
    return needed or first or (parameter.default is None and FED.search(name) is not None)


def needed(parameter: inspect.Parameter, first: bool) -> bool:
    return first or parameter.default is parameter.empty


def every_one(parameter: inspect.Parameter, first: bool) -> bool:
    return first or not isinstance(parameter.default, bool | str)
