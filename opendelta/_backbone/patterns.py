"""Select modules by names and patterns, with an error for a pattern that selects none.

A pattern is the last steps of a module's full name, such as "fc2", "attention.output", or the full
name. Or it is `[r]` and a regular expression that matches such last steps whole, as in OpenDelta
0.3. Modules inside a delta are never selected."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from ..errors import AddressError, nearest
from ..names import ancestors, last, tails
from .backbone import Backbone


def compile_pattern(pattern: str) -> Callable[[str], bool]:
    """Return a function that is true for the full names that `pattern` selects.

    Raises:
        AddressError: the pattern is not a string, or not a regular expression.
    """
    if not isinstance(pattern, str):
        raise AddressError(f"a pattern must be a string, not {pattern!r}")
    if not pattern.startswith("[r]"):
        end = f".{pattern}"
        return lambda name: name == pattern or (pattern != "" and name.endswith(end))
    try:
        regex = re.compile(pattern[3:])
    except re.error as error:
        raise AddressError(f"{pattern!r} is no regular expression: {error}") from None

    def matches(name: str) -> bool:
        starts = [0, *(m.end() for m in re.finditer(r"\.", name))]
        return any(regex.fullmatch(name, start) for start in starts)

    return matches


def as_list(patterns: str | Sequence[str] | None) -> list[str]:
    """Return one pattern, several patterns, or None, as a list."""
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def repeated(modules: Mapping[str, nn.Module], most: int = 3) -> str:
    """Return the repeated blocks of a model for a message: "encoder.layer.0-11 (BertLayer)"."""
    stacks: dict[tuple[str, type], list[int]] = {}
    for name, module in modules.items():
        holder, _, key = name.rpartition(".")
        if key.isdigit() and any(True for _ in module.children()):
            alike = re.sub(r"(?<![^.])\d+(?![^.])", "*", holder)
            stacks.setdefault((alike, type(module)), []).append(int(key))
    stacks = {stack: numbers for stack, numbers in stacks.items() if len(numbers) > 1}
    return ", ".join(
        f"{f'{holder}.' if holder else ''}{min(numbers)}-{max(numbers)} ({cls.__name__})"
        for (holder, cls), numbers in list(stacks.items())[:most]
    )


def no_match(
    pattern: str, names: Iterable[str], where: object, what: str = "module"
) -> AddressError:
    """Return the error for a pattern that selects nothing, with the nearest names that exist."""
    parts = 1 if pattern.startswith("[r]") else pattern.count(".") + 1
    ends = Counter(".".join(name.split(".")[-parts:]) for name in names if name)
    near = nearest(pattern.removeprefix("[r]"), (end for end in ends if not end.isdigit()))
    found = "nearest:"
    if not near and isinstance(where, nn.Module):
        found, ends = "none is near; there are", _matrices(where)
        near = [end for end, _ in ends.most_common(2)]
    hints = ", ".join(f"{end!r} ({ends[end]} {what}{'s' * (ends[end] > 1)})" for end in near)
    blocks = repeated(dict(where.named_modules())) if isinstance(where, nn.Module) else ""
    is_plain = re.fullmatch(r"[\w.-]*|\[r\].*", pattern)
    return AddressError(
        f"no {what} matches {pattern!r} in {type(where).__name__}; "
        + (f"{found} {hints}" if near else "opendelta.tree(model) prints all names")
        + (f"; its repeated blocks: {blocks}" if blocks else "")
        + ("" if is_plain else f"; a regular expression is written '[r]{pattern}'"),
        pattern=pattern,
        nearest=near,
    )


def _matrices(model: nn.Module) -> Counter[str]:
    """Count the modules with a weight matrix by the last step of their names, except numbers."""
    ends = (
        last(name)
        for name, module in model.named_modules()
        if isinstance(weight := module._parameters.get("weight"), Tensor) and weight.ndim == 2
    )
    return Counter(end for end in ends if end and not end.isdigit())


def select(
    names: Iterable[str],
    patterns: Sequence[str],
    where: object,
    inside: bool = False,
    what: str = "module",
) -> list[str]:
    """Return the names that any of `patterns` selects, in the order of `names`.

    Args:
        inside: a pattern that selects a module also selects all modules inside it.

    Raises:
        AddressError: a pattern selects none of the names.
    """
    if not patterns:
        return []
    names = list(names)
    tests = {pattern: compile_pattern(pattern) for pattern in patterns}
    plain = {pattern for pattern in patterns if not pattern.startswith("[r]")}
    regular = [(pattern, test) for pattern, test in tests.items() if pattern not in plain]
    used: set[str] = set()
    chosen = []
    for name in names:
        around = list(ancestors(name)) if inside else [name]
        hits = plain & {tail for each in around for tail in tails(each)}
        hits |= {pattern for pattern, test in regular if any(test(a) for a in around)}
        used |= hits
        if hits:
            chosen.append(name)
    for pattern in patterns:
        if pattern not in used:
            raise no_match(pattern, names, where, what)
    return chosen


def select_modules(backbone: Backbone, patterns: Sequence[str]) -> list[str]:
    """Return the full names of the modules that any of `patterns` selects.

    `""` is the backbone itself. `"root"` is the backbone too, unless a module has this name.

    Raises:
        AddressError: a pattern selects nothing.
    """
    own = {""} if any(last(n) == "root" for n in backbone.modules) else {"", "root"}
    root = [""] if own & set(patterns) else []
    return root + select(backbone.modules, [p for p in patterns if p not in own], backbone.model)


def leave_out(backbone: Backbone, names: Sequence[str], excluded: Sequence[str]) -> list[str]:
    """Return `names` without the modules that `excluded` selects, and the modules inside them.

    A module with several names is returned once.

    Raises:
        AddressError: an exclusion selects nothing, or nothing is left.
    """
    out = set(select(backbone.modules, excluded, backbone.model, inside=True))
    once: dict[int, str] = {}
    for name in names:
        if name not in out:
            once.setdefault(id(backbone.modules[name]), name)
    if not once:
        raise AddressError(
            f"exclude_modules={list(excluded)} leaves none of the {len(names)} modules that "
            f"modified_modules selects in {type(backbone.model).__name__}: "
            f"{', '.join(names[:3])}, ..."
        )
    return list(once.values())


def literal(
    known: Iterable[str], names: Sequence[str], where: object, what: str = "module"
) -> None:
    """Raise unless all `names` are in `known`; no name is taken as a pattern.

    Raises:
        AddressError: a name is not in `known`.
    """
    known = set(known)
    for name in names:
        if name not in known:
            raise no_match(name, known, where, what)
