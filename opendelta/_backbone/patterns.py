"""Select modules by names and patterns, with an error for a pattern that selects none.

A pattern is the last steps of a module's full name, such as "fc2", "attention.output", or the full
name. Or it is `[r]` and a regular expression that matches such last steps whole, as in OpenDelta
0.3. Modules inside a delta are never selected, and those inside torch's `parametrizations`, which
compute a weight, only by a pattern with that word."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor, nn

from ..errors import AddressError, UnusedWarning, listed, nearest, warn
from ..names import COMPUTING, ancestors, computes_weight, last, tails
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
        raise AddressError(
            f"{pattern!r} is no regular expression: {error}", pattern=pattern
        ) from None

    def matches(name: str) -> bool:
        starts = [0, *(m.end() for m in re.finditer(r"\.", name))]
        return any(regex.fullmatch(name, start) for start in starts)

    return matches


def as_list(patterns: str | Sequence[str] | None) -> list[str]:
    """Return one pattern, several patterns, or None, as a list; raise if it is something else."""
    if not isinstance(patterns, str | Iterable | None):
        raise AddressError(f"names must be a text or a list of texts, not {patterns!r}")
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def repeated(modules: Mapping[str, nn.Module], most: int = 3) -> str:
    """Return the repeated blocks of a model for a message: "encoder.layer.0-11 (BertLayer)"."""
    lists: dict[tuple[str, type], list[int]] = {}
    for name, module in modules.items():
        holder, _, key = name.rpartition(".")
        if key.isdigit() and any(True for _ in module.children()):
            alike = re.sub(r"(?<![^.])\d+(?![^.])", "*", holder)
            lists.setdefault((alike, type(module)), []).append(int(key))
    lists = {alike: numbers for alike, numbers in lists.items() if len(numbers) > 1}
    return ", ".join(
        f"{f'{holder}.' if holder else ''}{min(numbers)}-{max(numbers)} ({cls.__name__})"
        for (holder, cls), numbers in list(lists.items())[:most]
    )


def no_match(
    pattern: str, names: Iterable[str], where: object, what: str = "module"
) -> AddressError:
    """Return the error for a pattern that selects nothing, with the nearest names that exist."""
    parts = 1 if pattern.startswith("[r]") else pattern.count(".") + 1
    ends = Counter(".".join(name.split(".")[-parts:]) for name in names if name)
    near = nearest(pattern.removeprefix("[r]"), (end for end in ends if not end.isdigit()))
    found, known = "nearest:", Backbone.of(where).modules if isinstance(where, nn.Module) else {}
    if not near and known:
        found, ends = "none is near; there are", _matrices(known)
        near = [end for end, _ in ends.most_common(2)]
    hints = ", ".join(f"{end!r} ({ends[end]} {what}{'s' * (ends[end] > 1)})" for end in near)
    blocks = repeated(known)
    is_plain = re.fullmatch(r"[\w.-]*|\[r\].*", pattern)
    return AddressError(
        f"no {what} matches {pattern!r} in {type(where).__name__}; "
        + (f"{found} {hints}" if near else "opendelta.tree(model) prints all names")
        + (f"; its repeated blocks: {blocks}" if blocks else "")
        + ("" if is_plain else f"; a regular expression is written '[r]{pattern}'"),
        pattern=pattern,
        nearest=near,
    )


def _matrices(modules: Mapping[str, nn.Module]) -> Counter[str]:
    """Count the modules with a weight matrix by the last step of their names, except numbers."""
    ends = (
        last(name)
        for name, module in modules.items()
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
    names = list(names)
    chosen, unused = _hits(names, patterns, inside, what)
    for pattern in unused:
        raise no_match(pattern, names, where, what)
    return chosen


def select_known(
    option: str,
    names: Iterable[str],
    patterns: Sequence[str],
    where: object,
    inside: bool = False,
    what: str = "module",
) -> list[str]:
    """Return the names that any of `patterns` selects, as `select` does.

    Args:
        option: the option that has these patterns, for the warning.

    Warns:
        UnusedWarning: a pattern selects none of the names.
    """
    names = list(names)
    chosen, unused = _hits(names, patterns, inside, what)
    for pattern in unused:
        warn_unused(option, no_match(pattern, names, where, what))
    return chosen


def warn_unused(option: str, error: AddressError) -> None:
    """Warn that a pattern of an option selects nothing, where others need not."""
    warn(f"{option}: {error}; {error.pattern!r} has no effect", UnusedWarning)


def _hits(
    names: Sequence[str], patterns: Sequence[str], inside: bool, what: str
) -> tuple[list[str], list[str]]:
    """Return the names that any of `patterns` selects, and the patterns that select none."""
    tests = {pattern: compile_pattern(pattern) for pattern in patterns}
    plain = {pattern for pattern in patterns if not pattern.startswith("[r]")}
    regular = [(pattern, test) for pattern, test in tests.items() if pattern not in plain]
    deep = {pattern for pattern in patterns if COMPUTING in pattern or what == "name"}

    def hits_of(name: str) -> set[str]:
        hits = plain & {*tails(name)}
        if regular:
            hits |= {pattern for pattern, test in regular if test(name)}
        return hits & deep if hits and computes_weight(name) else hits

    used: set[str] = set()
    chosen = []
    for name in names if tests else ():
        around = ancestors(name) if inside else [name]
        if hits := set().union(*map(hits_of, around)):
            used |= hits
            chosen.append(name)
    return chosen, [pattern for pattern in patterns if pattern not in used]


def select_modules(backbone: Backbone, patterns: Sequence[str]) -> list[str]:
    """Return the full names of the modules that any of `patterns` selects.

    `""` is the backbone itself. `"root"` is the backbone too, unless a module has this name.

    Raises:
        AddressError: a pattern selects nothing.
    """
    own = {""} if any(last(n) == "root" for n in backbone.modules) else {"", "root"}
    root = [""] if own & set(patterns) else []
    return root + select(backbone.modules, [p for p in patterns if p not in own], backbone.model)


def excluded_by(backbone: Backbone, patterns: Sequence[str]) -> set[str]:
    """Return the modules that `exclude_modules` selects, and the modules inside them.

    Warns:
        UnusedWarning: a pattern selects nothing.
    """
    known = backbone.modules
    return {*select_known("exclude_modules", known, patterns, backbone.model, inside=True)}


def leave_out(backbone: Backbone, names: Sequence[str], excluded: Sequence[str]) -> list[str]:
    """Return `names` without the modules that `excluded` selects, and the modules inside them.

    A module with several names is returned once.

    Raises:
        AddressError: nothing is left.
    """
    out = excluded_by(backbone, excluded)
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


def only_one(pattern: str, names: Sequence[str]) -> str:
    """Return the name that `pattern` selects; raise if it selects several.

    Raises:
        AddressError: it selects several.
    """
    if len(names) > 1:
        raise AddressError(
            f"{pattern!r} selects {len(names)} modules: {listed(names, 4)}"
            "; give the full name of one",
            pattern=pattern,
            nearest=names,
        )
    return names[0]


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
            raise _of_a_part(name, known, where, what) or no_match(name, known, where, what)


def _of_a_part(name: str, known: set[str], where: object, what: str) -> AddressError | None:
    """Return the error for a name in a part of the model, or in a model that this is a part of."""
    inner = sorted(full.removesuffix(f".{name}") for full in known if full.endswith(f".{name}"))
    rests = {each: name[len(each) + 1 :] for each in ancestors(name)}
    outer = [each for each, rest in rests.items() if rest and rest in known]
    kind = type(where).__name__
    if inner:
        told = f"its part {inner[0]!r} has one: use model.{inner[0]} instead of the model"
    elif outer:
        told = f"without {outer[0]!r} it has: use a model whose {outer[0]!r} is such a {kind}"
    else:
        return None
    return AddressError(f"no {what} is named {name!r} in {kind}, but {told}", pattern=name)
