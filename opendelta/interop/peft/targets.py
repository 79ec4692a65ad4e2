"""Compare the modules that an adapter's tensors name with those that its JSON selects."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ...errors import listed
from ...names import ancestors
from .._draft import CONFIG
from .._files import repeats_too_much
from .methods import matcher
from .terms import WEIGHTS, Adapter

LAYER = r".*?\.[^.]*\.(?P<index>\d+)\."  # the first step that is a number is the layer
LAYERS = r"(?:^|.*?\.){}\.(?P<index>\d+)\."
Test = Callable[[str], bool]


def check_selection(adapter: Adapter) -> None:
    """Raise if PEFT would put the adapter on other modules than those that it has tensors for.

    Raises:
        DeltaLoadError: a field has another form than PEFT gives it, or tensors are missing, or
            there are tensors that PEFT would leave out.
    """
    config, names = adapter.config, adapter.backbone.modules
    targets = config.get("target_modules")
    if targets is not None and not isinstance(targets, str) and not _are_names(targets):
        raise adapter.refusal("target_modules", "it must be a list of names, or a pattern")
    selects, excluded, in_layer = _selects(adapter), _excluded(adapter), _in_layer(adapter)

    def chosen(name: str) -> bool:
        full = isinstance(targets, list) and name in targets
        return selects(name) and not excluded(name) and (full or in_layer(name))

    if targets is None and adapter.name != "soft_prompt":
        why = "PEFT would choose modules by the class of the model; name them, as PEFT writes them"
        raise adapter.refusal("target_modules", why)
    if targets is None:
        return
    if extra := [name for name in adapter.sites if not chosen(name)]:
        raise adapter.error(
            f"{WEIGHTS} has tensors for {len(extra)} modules that {CONFIG} does not select by "
            f"target_modules and the like, so PEFT would leave them out: {listed(extra)}",
            unexpected=[adapter.key(name, key) for name in extra for key in adapter.sites[name]],
        )
    seen = {id(names[name]) for name in adapter.sites}
    pattern = isinstance(targets, str)  # it may select modules that PEFT cannot change
    missing = [n for n in names if not pattern and chosen(n) and id(names[n]) not in seen]
    if missing:
        raise adapter.error(
            f"{WEIGHTS} has no tensors for {len(missing)} modules that target_modules selects: "
            f"{listed(missing)}"
        )


def check_owned(adapter: Adapter) -> None:
    """Raise if a module that modules_to_save selects has no tensors in the file."""
    ends, modules = tuple(adapter.config.get("modules_to_save") or ()), adapter.backbone.modules
    owned = {*(adapter.options["modules_to_save"] or ())}
    for name, module in modules.items():
        if ends and name.endswith(ends) and not owned & {*ancestors(name)} and module.state_dict():
            raise adapter.error(
                f"{WEIGHTS} has no tensors for {name!r}, which modules_to_save selects"
            )


def _are_names(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(name, str) and name for name in given)


def _ends(name: str, ends: list[str]) -> bool:
    """True if a name, or its last steps, are in `ends`."""
    return name in ends or name.endswith(tuple(f".{end}" for end in ends))


def _selects(adapter: Adapter) -> Test:
    """Return whether target_modules selects a module."""
    targets: Any = adapter.config.get("target_modules")
    if isinstance(targets, list):
        return lambda name: _ends(name, targets)
    if targets is None or targets.lower() == "all-linear" or repeats_too_much(targets):
        return lambda _: True
    test = matcher(adapter, "target_modules", targets)
    return lambda name: bool(test.fullmatch(name))


def _excluded(adapter: Adapter) -> Test:
    """Return whether exclude_modules or modules_to_save keep a module from the adapter."""
    given: Any = adapter.config.get("exclude_modules") or []
    own = adapter.config.get("modules_to_save") or []
    if not isinstance(given, str) and not _are_names(given):
        raise adapter.refusal("exclude_modules", "it must be a list of names, or a pattern")
    if isinstance(given, str) and not repeats_too_much(given):
        test = matcher(adapter, "exclude_modules", given)
        given = [name for name in adapter.backbone.modules if test.fullmatch(name)]
    ends = given if isinstance(given, list) else []
    return lambda name: _ends(name, ends) or any(f".{m}." in f".{name}." for m in own)


def _in_layer(adapter: Adapter) -> Test:
    """Return whether a module is in one of layers_to_transform."""
    given, patterns = (adapter.config.get(n) for n in ("layers_to_transform", "layers_pattern"))
    numbers = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(number) is int for number in numbers):
        raise adapter.refusal("layers_to_transform", "it must be a list of numbers of layers")
    forms = [patterns] if isinstance(patterns, str) and patterns else patterns or []
    if not isinstance(forms, list) or (forms and not numbers):
        raise adapter.refusal("layers_pattern", "it must be names, beside layers_to_transform")
    if not numbers:
        return lambda _: True
    tests = [matcher(adapter, "layers_pattern", form, LAYERS) for form in forms]

    def inside(name: str) -> bool:
        found = next(
            filter(None, (test.match(name) for test in tests or [re.compile(LAYER)])), None
        )
        return found is not None and int(found["index"]) in numbers

    return inside
