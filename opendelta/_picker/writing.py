"""Write picked modules as one would write them: ends of names, roles, `[r]` and full names.

And write the deltas as Python and as words of the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from .._backbone import roles
from .._backbone.backbone import Backbone
from .._deltas.base import BaseDelta
from .._deltas.choosing import choose
from .._deltas.options import DeltaConfig, changed_options
from .._deltas.registry import method
from ..errors import AddressError, DeltaError
from ..names import NUMBER, tails, unnumbered

WIDTH = 88  # of a line of Python; a longer one is broken
MANY = 8  # patterns; more are not looked up as roles


class Writer:
    """Writes modules of one backbone.

    Args:
        known: {full name of a module: its role}.
    """

    def __init__(self, backbone: Backbone, known: dict[str, str]) -> None:
        self.backbone, self.known = backbone, known
        self.ends: dict[str, list[str]] = {}
        for name in backbone.modules:
            for end in tails(name):
                self.ends.setdefault(end, []).append(name)

    def config(self, config: DeltaConfig, places: Sequence[str]) -> DeltaConfig:
        """Return `config` with these modules, written in the shortest of the ways that work.

        Args:
            places: full names of modules, as `Delta.modified_modules` has them.
        """
        found = method(config.delta_type)
        paired = found.layer_for(config).paired
        if not paired:
            wanted = {*places}
            places = [name for name in self.backbone.modules if name in wanted]
        for given in self._ways(places, paired):
            written = dataclasses.replace(config, **given)
            try:
                chosen = choose(self.backbone, found, written).config.modified_modules or []
            except DeltaError:
                continue
            if _as_set(chosen, paired) == _as_set(places, paired):
                return written
        return dataclasses.replace(config, modified_modules=list(places))

    def _ways(self, places: Sequence[str], paired: bool) -> Iterator[dict[str, Any]]:
        """Yield options that may select the places, the best first."""
        yield {}  # the method's default places
        ends = self._pairs(places) if paired else self._names(places)
        named = [self.known.get(name) for name in places]
        by_role = list(dict.fromkeys(named)) if not paired else []
        if by_role and None not in by_role and len(by_role) < len(ends):
            yield {"modified_modules": by_role, "common_structure": True}
        yield {"modified_modules": ends}
        yield {
            "modified_modules": [f"[r]^{re.escape(name)}" if name else "root" for name in places]
        }

    def _names(self, places: Sequence[str]) -> list[str]:
        """Return ends of names and regular expressions that select the places and no more."""
        modules = self.backbone.modules
        chosen = {id(modules[name]) for name in places}
        allowed = {name for name, module in modules.items() if id(module) in chosen}
        todo = dict.fromkeys(places)
        ends: list[str] = []
        while todo:
            name = next(iter(todo))
            end = next(e for e in _ends(name) if e == name or {*self.ends[e]} <= allowed)
            ends.append(end or "root")
            for other in {name, *self.ends[end]}:
                todo.pop(other, None)
        return _joined(ends)

    def _pairs(self, places: Sequence[str]) -> list[str]:
        """Return the same for pairs of a start and an end, for alike pairs together."""
        alike: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for pair in zip(places[::2], places[1::2], strict=True):
            alike.setdefault((unnumbered(pair[0]), unnumbered(pair[1])), []).append(pair)
        written: list[str] = []
        for pairs in alike.values():
            for own in zip(*pairs, strict=True):
                short = (
                    ends
                    for ends in zip(*map(_ends, own), strict=True)
                    if {name for end in ends for name in self.ends[end]} == {*own}
                )
                (pattern,) = _joined(list(dict.fromkeys(next(short, own))))
                written.append(pattern or "root")
        return written


def _ends(name: str) -> Iterator[str]:
    """Yield the ends of a full name, the shortest first, that start with no number; then it all."""
    whole, *rest = tails(name)
    yield from (end for end in reversed(rest) if not end.partition(".")[0].isdecimal())
    yield whole


def _as_set(places: Sequence[str], paired: bool) -> set[Any]:
    return {*zip(places[::2], places[1::2], strict=True)} if paired else {*places}


def _joined(ends: Sequence[str]) -> list[str]:
    """Join ends that differ in their first number to one regular expression."""
    alike: dict[str, list[str]] = {}
    for end in ends:
        alike.setdefault(unnumbered(end), []).append(end)
    joined = []
    for own in alike.values():
        found = NUMBER.search(own[0])
        if len(own) < 2 or found is None:
            joined += own
            continue
        before, after = own[0][: found.start()], own[0][found.end() :]
        numbers = [end[len(before) : len(end) - len(after)] for end in own]
        joined.append(f"[r]{re.escape(before)}{_numbers(numbers)}{re.escape(after)}")
    return joined


def _numbers(numbers: Collection[str]) -> str:
    """Return a regular expression for these numbers, such as `(?:[0-9]|1[0-5])`."""
    units: dict[str, list[int]] = {}
    for number in numbers:
        units.setdefault(number[:-1], []).append(int(number[-1]))
    tens: dict[str, list[str]] = {}
    for before, own in units.items():
        tens.setdefault(_digits(own), []).append(before)
    parts = []
    for digits, starts in tens.items():
        single = [int(start) for start in starts if len(start) == 1]
        if single:
            parts.append(f"{_digits(single)}{'?' * ('' in starts)}{digits}")
        parts += [f"{s}{digits}" for s in starts if len(s) > 1 or not (s or single)]
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def _digits(digits: Any) -> str:
    """Return a regular expression for some digits, such as `[0-35]`."""
    runs: list[list[int]] = []
    for digit in sorted(digits):
        if runs and digit == runs[-1][-1] + 1:
            runs[-1].append(digit)
        else:
            runs.append([digit])
    text = "".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else "".join(map(str, r)) for r in runs)
    return text if len(text) == 1 else f"[{text}]"


def python(configs: Sequence[DeltaConfig], sampled: bool = False) -> str:
    """Return the lines of Python that attach deltas with these configs to `model`.

    Args:
        sampled: sizes are found by `sample_inputs`.
    """
    if not configs:
        return ""
    classes = [method(config.delta_type) for config in configs]
    lines = []
    for module in sorted({_home(cls) for cls in classes}):
        names = sorted({cls.__name__ for cls in classes if _home(cls) == module})
        lines.append(f"from {module} import {', '.join(names)}")
    lines.append("")
    for cls, config in zip(classes, configs, strict=True):
        changed = changed_options(config, **config.class_defaults)
        given = ["model", *(f"{name}={_code(value)}" for name, value in changed.items())]
        given += ["sample_inputs=sample_inputs"] * sampled
        one = f"{cls.__name__}({', '.join(given)})"
        broken = [f"{cls.__name__}(", *(f"    {each}," for each in given), ")"]
        lines += [one] if len(one) <= WIDTH else broken
    return "\n".join(lines)


def _home(cls: type[BaseDelta]) -> str:
    """Return the module from which users import a method."""
    package = cls.__module__.partition(".")[0]
    return package if package == "opendelta" else cls.__module__


def _code(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_code, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_code(k)}: {_code(v)}' for k, v in value.items())}}}"
    if not isinstance(value, str):
        return repr(value)
    raw = "\\" in value and value.isprintable() and '"' not in value and value[-1] != "\\"
    return f'r"{value}"' if raw else json.dumps(value, ensure_ascii=False)


def words(backbone: Backbone, model: Sequence[str], configs: Sequence[DeltaConfig]) -> str:
    """Return the words of the command that plans deltas with these configs.

    Args:
        model: the words for MODEL and its class.
    """
    if not configs:
        return ""
    line = ["opendelta", "plan", *model]
    for config in configs:
        line += ["--delta", config.delta_type]
        given = changed_options(config)
        places = given.pop("modified_modules", [])
        by_role = given.pop("common_structure", False)
        if places and (by_role or _stand_alone(backbone, places)):
            line += ["--at", ",".join(places)]
        elif places:
            given = {"modified_modules": places, **given}
        for name, value in given.items():
            line += ["--option", f"{name}={_word(value)}"]
    return shlex.join(line)


def _stand_alone(backbone: Backbone, patterns: Sequence[str]) -> bool:
    """True if `--at` takes each pattern as it is: none is a role, and none has a comma."""
    if len(patterns) > MANY or any("," in pattern for pattern in patterns):
        return False
    for pattern in patterns:
        with contextlib.suppress(AddressError):
            roles.with_roles(backbone, [pattern])
            return False
    return not {*patterns} & {*roles.ROLES}


def _word(value: Any) -> str:
    """Return a value as `--option` reads it: JSON, or text that is no JSON."""
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        json.loads(value)
    except ValueError:
        if value.isprintable() and value not in ("True", "False", "None"):
            return value
    return json.dumps(value)
