"""The errors and warnings of opendelta, and helpers for their messages."""

from __future__ import annotations

import contextlib
import difflib
import functools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
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
    "SharedDeltaWarning",
    "SiteError",
    "TiedWeightWarning",
    "UncheckedWarning",
    "UnreachedWarning",
    "UnsavedWarning",
    "UntrainedWarning",
    "UnusedWarning",
]


class DeltaError(ValueError):
    """Base of all errors of opendelta. The model is as it was before the call.

    Cause:
        What was asked for is not possible, such as a name that two deltas would have, or merging
        while rows are routed. The kinds below say more.

    Cure:
        Do what the text says last. Catch `DeltaError` to catch every error of opendelta. It is a
        `ValueError`.

    Its text is one line of at most 2,000 characters, whatever a file or a name in it holds.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class AddressError(DeltaError):
    """A pattern or a name that selects no module.

    Cause:
        The model has no module of that name. Names are ends of full names in whole steps; after
        `[r]` stands a regular expression, and with `common_structure=True` a role.

    Cure:
        Take one of the names in `nearest`. `opendelta.tree(model)` prints all names, and
        `opendelta.roles(model)` all roles.

    Attributes:
        pattern: the pattern or name; None if several select nothing together.
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
        self, *message: object, pattern: str | None = None, nearest: Sequence[str] = ()
    ) -> None:
        super().__init__(*message)
        self.pattern, self.nearest = pattern, list(nearest)


class OptionError(DeltaError, TypeError):
    """An option that a method does not have, or a value that it does not take.

    Cause:
        The option is misspelt or another library's, or its value is outside of its limits, or does
        not fit the sizes of a module.

    Cure:
        The text names the nearest options, or the limit. The reference lists all options of each
        method. It is a `TypeError` too.
    """


class SiteError(DeltaError):
    """A module that cannot carry this delta layer.

    Cause:
        The method does not go on modules of this kind, the module's sizes cannot be found, or its
        code does with the weight what the layer cannot follow.

    Cure:
        Choose other modules by `modified_modules`, or leave this one out by `exclude_modules`. If
        sizes are unknown, pass `sample_inputs`.

    Attributes:
        where: the full name of the module; None if it is not known, as inside a forward.
    """

    def __init__(self, *message: object, where: str | None = None) -> None:
        super().__init__(*message)
        self.where = where


@dataclass(frozen=True, kw_only=True, eq=False)
class Mismatch(Mapping[str, Any]):
    """The tensors of a file that do not fit; false if all fit.

    It is a mapping too, of those attributes that are not empty.

    Attributes:
        missing: the tensors that the file lacks.
        unexpected: the tensors in the file that the deltas do not have.
        misshaped: {tensor: (its shape in the file, the shape it must have)}.
        other_kind: {tensor: its dtype in the file}, if the file has integers instead of floats, or
            floats instead of integers.
        not_finite: a tensor with NaN or infinite values.
        differing: {weight of the backbone: how it differs from the weight at the training}.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    other_kind: dict[str, str] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    differing: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        return (name for name, found in vars(self).items() if found)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, name: str) -> Any:
        if found := vars(self)[name]:
            return found
        raise KeyError(name)


class DeltaLoadError(DeltaError):
    """A checkpoint that does not fit or is damaged, or a folder that is no checkpoint.

    Cause:
        The backbone is another one or has other values, the file was changed, or the folder was
        written by a library that is not known.

    Cure:
        Load onto the backbone that the delta was trained on. `opendelta.load(folder, model,
        strict=False)` reports all that does not fit, and `check_backbone=False` accepts other
        values of the backbone.

    Attributes:
        details: the tensors that do not fit, sorted by their problem.
    """

    def __init__(self, *message: object, details: Mismatch | None = None, **fields: Any) -> None:
        super().__init__(*message)
        self.details = Mismatch(**fields) if details is None else details


class CompileLimitError(DeltaError, RuntimeError):
    """A compiled model met more sets of active deltas than torch.compile keeps graphs for.

    Cause:
        `torch.compile` compiles a graph for each set of deltas that acts, and keeps eight.

    Cure:
        Set the option of `torch._dynamo.config` that the text names to as many as there are sets.
        It is a `RuntimeError` too.
    """


class PristineError(DeltaError, AssertionError):
    """A trace of a delta is left on a backbone.

    Cause:
        `assert_pristine` found a module, a hook, a class or a value that is not as it was: a delta
        is attached still, or the backbone was trained.

    Cure:
        Detach every delta, with `unmerge()` before it where something is merged. It is an
        `AssertionError` too.
    """


class DeltaWarning(UserWarning):
    """Base of all warnings of opendelta.

    Cause:
        The program runs on, and may not do what was meant. The kinds below say more.

    Cure:
        Do what the text says last. `warnings.filterwarnings("error",
        category=opendelta.DeltaWarning)` makes errors of all of them.
    """


class UntrainedWarning(DeltaWarning):
    """A head that is frozen with the values of its start.

    Cause:
        A new head was made at random when the backbone was loaded, and `freeze_module` froze it. It
        is in no file, and each process makes another one.

    Cure:
        Train it with the deltas: name it in `freeze_module(exclude=["deltas", ...])`, or in
        `modules_to_save=[...]` when you make the delta.
    """


class UnreachedWarning(DeltaWarning):
    """An active delta layer that did not run in a whole forward of the backbone.

    On a head, also in a training loop that calls the model beneath it, and reads the head's weight.
    Layer drop leaves out blocks of a list at random. Of a layer in such a block it is told after
    six forwards that train, or after one in eval mode, unless the block ran without the layer.

    Cause:
        Code around the module reads its weight instead of calling it, the module was replaced after
        attaching, or this forward skipped it, as experts are skipped.

    Cure:
        Choose the module around it, or pass `reads=True`; after a replacement, detach and attach
        again. For skipped modules nothing is wrong.
    """


class LostGradientWarning(DeltaWarning):
    """Gradients that do not reach what trains.

    Cause:
        The kernel of a quantised module has no backward, as where activations are quantised too, so
        that deltas on earlier modules get no gradients. Or a loss of the weights that `watching`
        shows was asked for, and they have no graph, as after a forward in `torch.no_grad()`, or in
        activation checkpointing with `use_reentrant=True`.

    Cure:
        Quantise by a kind that quantises weights only, or put deltas only on modules after it. For
        blocks, checkpoint with `use_reentrant=False`.
    """


class UnsavedWarning(DeltaWarning):
    """Trained tensors that are not saved in a file, or not read from it.

    Cause:
        Parameters of the backbone train but belong to no delta, a frozen BatchNorm moves its
        statistics, another library's saving leaves deltas out, or a head in a folder has no place
        in this model.

    Cure:
        Call `freeze_module()`, name what belongs to a delta in `freeze_module(exclude=[...])` or
        `modules_to_save=[...]`, and save with `composition(model).save(folder)`.
    """


class UncheckedWarning(DeltaWarning):
    """Weights of a backbone that cannot be compared with the weights at the training of a delta.

    Cause:
        The weights are sharded, quantised or on the meta device, or the folder, as OpenDelta 0.3
        wrote it, holds no values to compare.

    Cure:
        Make sure yourself that it is the right backbone. Where its weights have values, `opendelta
        verify` compares them.
    """


class TiedWeightWarning(DeltaWarning):
    """A delta on one module whose weight other modules, or other code, use too.

    Cause:
        The weight is tied, as that of the embeddings and the head of a language model, or the code
        around reads it besides calling its module, as recommenders do with their table of items.
        The delta changes one use of it. Or a plain model has weights apart that its config, once
        loaded, says to tie, as T5's.

    Cure:
        If one use was meant, nothing is wrong. Else put a delta on each of the modules, or attach
        with reads=True. Such a plain model is not to be tied anew, by `tie_weights()` or
        `resize_token_embeddings()`.
    """


class SharedDeltaWarning(DeltaWarning):
    """Two blocks that act hold one delta, so its change is made twice.

    Cause:
        A delta is named in the `deltas` of two blocks, and both are active.

    Cure:
        Disable one of the blocks, or choose one by `composition(model).only(...)`.
    """


class UnusedWarning(DeltaWarning):
    """Something that was given and has no effect.

    Cause:
        A name that matches nothing, a key of a dict that is no option, or a `with` block that was
        made and never entered.

    Cure:
        Correct the name, of which the text says the nearest, or leave it out; write `with` before
        the call.
    """


@functools.cache
def library_folders() -> tuple[str, ...]:
    """Return the folders of libraries: code there stands between a user's line and its warning."""
    import sysconfig  # for the first warning alone

    names = ("stdlib", "platstdlib", "purelib", "platlib")
    return tuple({str(Path(__file__).parent)}.union(map(sysconfig.get_path, names)))


_keepers: ContextVar[tuple[tuple[type[DeltaWarning], list[str]], ...]] = ContextVar(
    "opendelta_kept_warnings", default=()
)


def warn(message: str, category: type[DeltaWarning], line: dict[str, Any] | None = None) -> None:
    """Warn, and point at the user's line that led here, however many calls lie between.

    Args:
        line: what `users_line` gave earlier. None: the line that runs now.
    """
    for kept, texts in reversed(_keepers.get()):
        if issubclass(category, kept):
            texts.append(printable(message))
            return
    line = users_line() if line is None else line
    warnings.warn_explicit(printable(message), category, **line)


@contextlib.contextmanager
def kept_warnings(category: type[DeltaWarning] = DeltaWarning) -> Iterator[list[str]]:
    """Show no warnings of `category` inside; yield the list that gets their texts.

    Only warnings of this thread and task: `warnings.catch_warnings` changes the filters of all.
    """
    texts: list[str] = []
    token = _keepers.set((*_keepers.get(), (category, texts)))
    try:
        yield texts
    finally:
        _keepers.reset(token)


def users_line() -> dict[str, Any]:
    """Find the innermost line outside of libraries, as `warnings.warn_explicit` takes it.

    Where no frame is a user's, as at a command line, the outermost one stands for it.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_library(frame):
        frame = frame.f_back
    return {
        "filename": frame.f_code.co_filename,
        "lineno": frame.f_lineno,
        "module": frame.f_globals.get("__name__", "__main__"),
        "registry": frame.f_globals.setdefault("__warningregistry__", {}),
    }


def _is_library(frame: FrameType) -> bool:
    """True if the code in a frame is this package's, Python's own or an installed one."""
    name = frame.f_code.co_filename
    return name.startswith((*library_folders(), "<frozen"))


def to_the_end(action: Callable[[], None]) -> None:
    """Call an action that may be called again; if it is stopped, as by Ctrl-C, call it once more.

    The action must leave what is done, and do the rest.
    """
    try:
        action()
    except DeltaError:
        raise  # it refuses, and would again
    except BaseException:
        action()
        raise


def nearest(word: str, known: Iterable[str], n: int = 3, like: float = 0.4) -> list[str]:
    """Return at most `n` names in `known` that look most like `word`, the best first.

    Args:
        like: how much they look like it at least, from 0 to 1.
    """
    lower = {name.lower(): name for name in sorted(set(known))}
    parts = [name for name in lower if word.lower() in name.split("_")]
    close = difflib.get_close_matches(word.lower(), lower, n=n, cutoff=like)
    return [lower[name] for name in dict.fromkeys([*parts, *close])][:n]


def printable(text: str, longest: int = 2_000) -> str:
    """Return a text as one line for a terminal: with signs that do not print escaped.

    Args:
        longest: largest number of characters; of a longer text the middle is left out.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]}...{text[-longest // 2 + 3 :]}"
    if text.isprintable():
        return text
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return line if len(line) <= longest else printable(line, longest)


def shown(value: Any, longest: int = 200) -> str:
    """Return the `repr` of a value, shortened for a message."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def reason(error: BaseException, longest: int = 500) -> str:
    """Return the text of a library's error as one line, and its class if the text may be bare.

    transformers asks to run the code of a folder, which opendelta never does.
    """
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it has code of its own, which is never run here; load it in Python"
    kind = "" if text and isinstance(error, ValueError | OSError) else type(error).__name__
    return printable(": ".join(filter(None, (kind, text))), longest)


def quoted(name: str) -> str:
    """Return the full name of a module for a message; "the root" for the empty name."""
    return repr(name) if name else "the root"


def listed(names: Iterable[str], most: int = 3) -> str:
    """Join the first names with commas, with "..." at the end if there are more."""
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")
