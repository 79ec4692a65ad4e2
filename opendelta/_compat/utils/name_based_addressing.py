"""`opendelta.utils.name_based_addressing` of OpenDelta 0.3: tests of dotted names."""

import re
from collections.abc import Sequence

from opendelta._backbone.patterns import compile_pattern
from opendelta.names import ancestors

__all__ = [
    "endswith_in", "endswith_in_normal", "endswith_in_regex", "is_child_key", "substring_in",
    "substring_in_normal", "substring_in_regex", "superstring_in",
]  # fmt: skip


def superstring_in(str_a: str, list_b: Sequence[str]) -> bool:
    """True if a text in `list_b` contains `str_a`."""
    return any(str_a in text for text in list_b)


def is_child_key(str_a: str, list_b: Sequence[str]) -> bool:
    """True if `str_a` is a name in `list_b`, or the name of something inside it."""
    return not {*ancestors(str_a)}.isdisjoint(list_b)


def endswith_in(str_a: str, list_b: Sequence[str | re.Pattern[str]]) -> bool:
    """True if the last steps of the name `str_a` are in `list_b`, or match a pattern there.

    A pattern is `[r]` and a regular expression, or a compiled one.
    """
    texts = (wanted if isinstance(wanted, str) else f"[r]{wanted.pattern}" for wanted in list_b)
    return any(compile_pattern(text)(str_a) for text in texts)


def endswith_in_regex(str_a: str, list_b: Sequence[str]) -> bool:
    """True if the last steps of the name `str_a` match a regular expression in `list_b`."""
    return endswith_in(str_a, [f"[r]{text}" for text in list_b])


def substring_in(str_a: str, list_b: Sequence[str | re.Pattern[str]]) -> bool:
    """True if any steps in a row of the name `str_a` are in `list_b`, or match a pattern there."""
    return any(endswith_in(start, list_b) for start in ancestors(str_a))


def substring_in_regex(str_a: str, list_b: Sequence[str]) -> bool:
    """True if any steps in a row of the name `str_a` match a regular expression in `list_b`."""
    return substring_in(str_a, [f"[r]{text}" for text in list_b])


endswith_in_normal, substring_in_normal = endswith_in, substring_in
