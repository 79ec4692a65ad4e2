"""`opendelta.utils.name_based_addressing` of OpenDelta 0.3: tests of dotted names."""

import re
from collections.abc import Sequence

__all__ = [
    "endswith_in", "endswith_in_normal", "endswith_in_regex", "is_child_key", "substring_in",
    "substring_in_normal", "substring_in_regex", "superstring_in",
]  # fmt: skip


def _steps(name: str) -> tuple[str, ...]:
    return tuple(name.split("."))


def superstring_in(str_a: str, list_b: Sequence[str]) -> bool:
    """True if a text in `list_b` contains `str_a`."""
    return any(str_a in text for text in list_b)


def is_child_key(str_a: str, list_b: Sequence[str]) -> bool:
    """True if `str_a` is a name in `list_b`, or the name of something inside it."""
    return any(str_a == name or str_a.startswith(f"{name}.") for name in list_b)


def endswith_in(str_a: str, list_b: Sequence[str | re.Pattern[str]]) -> bool:
    """True if the last steps of the name `str_a` are in `list_b`, or match a pattern there."""
    steps = _steps(str_a)
    ends = [".".join(steps[start:]) for start in range(len(steps))]
    return any(_is(end, wanted) for end in ends for wanted in list_b)


def substring_in(str_a: str, list_b: Sequence[str | re.Pattern[str]]) -> bool:
    """True if any steps in a row of the name `str_a` are in `list_b`, or match a pattern there."""
    steps = _steps(str_a)
    parts = [
        ".".join(steps[start:end])
        for start in range(len(steps))
        for end in range(start + 1, len(steps) + 1)
    ]
    return any(_is(part, wanted) for part in parts for wanted in list_b)


def _is(text: str, wanted: str | re.Pattern[str]) -> bool:
    return text == wanted if isinstance(wanted, str) else wanted.fullmatch(text) is not None


endswith_in_normal = endswith_in_regex = endswith_in
substring_in_normal = substring_in_regex = substring_in
