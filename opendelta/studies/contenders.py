"""Compositions to compare, each made anew on the one backbone for each training."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .._deltas import requests
from .._deltas.options import DeltaConfig
from .._deltas.registry import BLOCKS, METHODS
from .._handles.auto import AutoDeltaModel
from .._handles.composition import Composition, composition
from .._handles.delta import Delta
from .._handles.load import load
from ..errors import DeltaError, shown
from .fingerprints import of_part, short
from .tasks import Task

NAMED = re.compile(r"([\w.-]+)=(.+)", re.DOTALL)  # no delta's type has an equals sign behind it
Deltas = Iterable["str | DeltaConfig"] | Mapping[str, Any]


@dataclass(frozen=True)
class Contender:
    """One composition.

    Attributes:
        name: what the table calls it.
        parts: its deltas in order: requests and configs; folders are loaded, and functions of the
            model put on it what they like.
    """

    name: str
    parts: tuple[Any, ...]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Return a hash of its name and of what it puts on the model."""
        return short(repr((self.name, list(map(of_part, self.parts)))))

    @property
    def slug(self) -> str:
        """Return its name as that of a folder, which no other one has."""
        name = re.sub(r"[^\w.+-]+", "_", self.name).strip("_.")[:60]
        return f"{name}-{self.fingerprint[:6]}"

    def attach(self, model: nn.Module, task: Task) -> Composition[nn.Module]:
        """Put its deltas on the model; the first that may owns a head for the task's classes.

        Raises:
            DeltaError: a delta cannot be made, or none of them can own the head.
        """
        owned: dict[str, Any] = {}
        if task.labels is not None:
            owned = {"modules_to_save": list(task.head) or head_of(model)}
            if hasattr(getattr(model, "config", None), "num_labels"):
                owned["num_labels"] = task.labels
        for part in self.parts:
            if callable(part):
                part(model)
            elif isinstance(part, Path):
                load(part, model)
            else:
                config = requests.config_for(model, part) if _asked(part) else part
                if owned and not type(config).__name__.startswith("SoftPrompt"):
                    config, owned = dataclasses.replace(config, **owned), {}
                AutoDeltaModel.from_config(config, model)
        made = composition(model)
        if not len(made):
            raise DeltaError(f"{self.name!r} puts no delta on the model")
        if lost := [delta.name for delta in made if not _trains(delta)]:
            raise DeltaError(
                f"{self.name!r}: {', '.join(lost)} cannot be trained: it must be enabled, not "
                "merged, and its parameters must require gradients"
            )
        if owned and not any(delta.config.modules_to_save for delta in made):
            raise DeltaError(
                f"{self.name!r} has no head for the {task.labels} classes of {task.name!r}: make "
                f"one of its deltas with modules_to_save={owned['modules_to_save']}"
            )
        return made


def _trains(delta: Delta) -> bool:
    able = delta.active and not delta.record.merged
    return able and any(p.requires_grad for p in delta.parameters())


def _asked(part: Any) -> bool:
    return isinstance(part, requests.Request)


def contenders(given: Deltas) -> list[Contender]:
    """Return what is to be compared, from texts, configs, or {name: text, config or function}.

    Raises:
        DeltaError: a text is no composition, two have one name, or there is none.
    """
    if isinstance(given, str):
        given = [given]
    named = given.items() if isinstance(given, Mapping) else ((None, each) for each in given)
    found: dict[str, Contender] = {}
    for name, what in named:
        parts: tuple[Any, ...]
        if isinstance(what, str):
            name, text = (name, what) if name else _named(what)
            parts = tuple(map(_part, divided(text)))
        elif isinstance(what, DeltaConfig):
            name, parts = name or what.name or what.delta_type, (what,)
        elif isinstance(what, os.PathLike):
            name, parts = name or str(what), (_folder(Path(what)),)
        elif callable(what) and name:
            parts = (what,)
        else:
            raise DeltaError(
                f"deltas: {shown(what)} must be a text such as 'lora' or 'lora+adapter', a config "
                "or a folder; a function needs a name: {'mine': function}"
            )
        if name in found:
            raise DeltaError(
                f"deltas: {name!r} is given twice; name them: 'a=...', or {{'a': ...}}"
            )
        found[name] = Contender(name, parts)
    if not found:
        raise DeltaError("deltas: give at least one, such as 'lora'")
    return list(found.values())


def _named(text: str) -> tuple[str, str]:
    """Return the name and the rest of "mix=lora+adapter"; a folder may have such a name too."""
    found = NAMED.fullmatch(text)
    if found is None or Path(divided(text)[0]).is_dir():
        return text, text
    return found[1], found[2]


def divided(text: str) -> list[str]:
    """Split "lora+adapter" before each method or folder; other plus signs belong to options."""
    names = "|".join(map(re.escape, sorted({**METHODS, **BLOCKS}, key=len, reverse=True)))
    parts = re.split(rf"\+(?=(?:{names})(?:[:@+]|$))", text)
    out: list[str] = []
    for part in parts:
        first, plus, rest = part.partition("+")
        while plus and Path(first).is_dir():
            out.append(first)
            first, plus, rest = rest.partition("+")
        out.append(first + plus + rest)
    return out


def _part(text: str) -> requests.Request | Path:
    if Path(text).is_dir():
        return _folder(Path(text))
    return requests.parse(text)


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise DeltaError(f"deltas: there is no folder {str(path)!r}")
    return path


def head_of(model: nn.Module) -> list[str]:
    """Return the modules beside the base model of a transformers model that hold linear layers.

    Raises:
        DeltaError: it has no base model, or nothing beside it.
    """
    base = getattr(model, "base_model", None)
    found = [
        name
        for name, child in model.named_children()
        if child is not base and any(isinstance(each, nn.Linear) for each in child.modules())
    ]
    if base is None or base is model or not found:
        raise DeltaError(
            f"the head of this {type(model).__name__} is not known: name its modules by "
            "Task(head=[...])"
        )
    return found


def remove(model: nn.Module) -> None:
    """Detach all deltas and forget them, so that the next ones may have their names."""
    composition(model).unmerge()
    for delta in list(composition(model)):
        delta.detach()
    gc.collect()
