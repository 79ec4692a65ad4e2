"""What can go wrong: errors and warnings, and the nearest name for a message."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

__all__ = [
    "AddressError",
    "CompileLimitError",
    "DeltaError",
    "DeltaLoadError",
    "DeltaWarning",
    "LostGradientWarning",
    "OptionError",
    "PristineError",
    "SiteError",
    "TiedWeightWarning",
    "UncheckedWarning",
    "UnreachedWarning",
    "UnsavedWarning",
    "UnusedWarning",
]


class DeltaError(ValueError):
    """Base of all errors of opendelta. The model is as it was before the call."""


class AddressError(DeltaError):
    """A pattern or a name that selects no module.

    Attributes:
        pattern: the pattern or name; None where several are to blame.
        nearest: the names that look most like it, the best first.

    Example:
        >>> from torch import nn
        >>> import opendelta
        >>> model = nn.TransformerEncoderLayer(8, 2, 16)
        >>> try:
        ...     opendelta.LoraModel(model, modified_modules=["linear3"])
        ... except opendelta.AddressError as error:
        ...     print(error.pattern, error.nearest)
        linear3 ['linear2', 'linear1']
    """

    def __init__(
        self, message: str, pattern: str | None = None, nearest: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.pattern, self.nearest = pattern, list(nearest)


class OptionError(DeltaError, TypeError):
    """An option that a method does not have, or a value it does not take."""


class SiteError(DeltaError):
    """A module that cannot carry this delta layer.

    Attributes:
        where: the full name of the module; None where it is not known, as inside a forward.
    """

    def __init__(self, message: str, where: str | None = None) -> None:
        super().__init__(message)
        self.where = where


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Where the tensors of a file do not fit; false if all do.

    Attributes:
        missing: the tensors that the file lacks.
        unexpected: the tensors in the file that the deltas do not have.
        misshaped: {tensor: (its shape in the file, the shape it must have)}.
        other_kind: {tensor: its dtype in the file} of floats for integers, or integers for floats.
        not_finite: a tensor with NaN or infinite values.
        differing: {weight of the backbone: how it differs from what the deltas were trained on}.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    other_kind: dict[str, str] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    differing: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(vars(self).values())


class DeltaLoadError(DeltaError):
    """A checkpoint that does not fit, is damaged, or is not one.

    Attributes:
        details: the tensors that do not fit, by what is wrong with them.
    """

    def __init__(self, message: str, details: Mismatch | None = None) -> None:
        super().__init__(message)
        self.details = Mismatch() if details is None else details


class CompileLimitError(DeltaError, RuntimeError):
    """A compiled model met more sets of acting deltas than torch.compile keeps graphs for."""


class PristineError(DeltaError, AssertionError):
    """Something of a delta is left on a backbone."""


class DeltaWarning(UserWarning):
    """Base of all warnings of opendelta."""


class UnreachedWarning(DeltaWarning):
    """An active delta layer that did not run in a whole forward of the backbone."""


class LostGradientWarning(DeltaWarning):
    """A quantised module that passes no gradient on to what comes before it."""


class UnsavedWarning(DeltaWarning):
    """Trained tensors that a file does not hold, or that its reader will drop."""


class UncheckedWarning(DeltaWarning):
    """Weights of a backbone that cannot be compared with those that a delta was trained on."""


class TiedWeightWarning(DeltaWarning):
    """A delta on one use of a weight that other modules use too."""


class UnusedWarning(DeltaWarning):
    """A `with` block that nobody entered, so that it did nothing."""


# Frames of these packages stand between a user's line and the warning that it causes.
PASSED_ON = ("opendelta", "torch", "transformers", "accelerate", "contextlib", "functools")


def warn(message: str, category: type[DeltaWarning]) -> None:
    """Warn, and point at the user's line that led here, however many calls lie between.

    Where no frame is a user's, as at a command line, the outermost one stands for it.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _root(frame) in PASSED_ON:
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__", "__main__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _root(frame: FrameType) -> str:
    """The top-level package whose code runs in a frame."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def nearest(word: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The up to `n` names in `known` that look most like `word`, the best first."""
    lower = {name.lower(): name for name in sorted(set(known))}
    parts = [name for name in lower if word.lower() in name.split("_")]
    close = difflib.get_close_matches(word.lower(), lower, n=n, cutoff=0.4)
    return [lower[name] for name in dict.fromkeys([*parts, *close])][:n]


def shown(value: Any, longest: int = 200) -> str:
    """`repr` of what somebody gave, shortened for a message."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def quoted(name: str) -> str:
    """The full name of a module for a message; the root's is empty."""
    return repr(name) if name else "the root"


def listed(names: Iterable[str], most: int = 3) -> str:
    """The first names, separated by commas, and "..." if there are more."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
