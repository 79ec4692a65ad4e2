"""Fingerprints of what a comparison trains: models, tasks and compositions."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

from torch import Tensor, nn

from .._deltas.options import DeltaConfig
from .._deltas.registry import method
from .._deltas.requests import Request
from .._verbs.pristine import snapshot

PLAIN = str | int | float | bool | None
LIBRARY = __name__.partition(".")[0]
NO_CODE = ("__doc__", "__firstlineno__", "__module__")  # of a class; the rest makes it what it is


def short(text: str) -> str:
    """Return a hash of a text as 16 letters."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def of_model(model: nn.Module) -> str:
    """Return the class of a model and a hash of its tensors, modules and their plain settings."""
    facts = snapshot(model)
    values = [(name, sorted(facts[name]["values"].items())) for name in sorted(facts)]
    plain = [
        (name, sorted((k, repr(v)) for k, v in module.__dict__.items() if _is_setting(k, v)))
        for name, module in model.named_modules()
    ]
    return f"{type(model).__name__} {short(repr((values, plain, str(model))))}"


def _is_setting(name: str, value: Any) -> bool:
    return isinstance(value, PLAIN | tuple) and not name.startswith("_") and name != "training"


def of_examples(*parts: Any) -> str:
    """Return a hash of examples; of those that are no plain data only the number counts."""
    bits = hashlib.blake2b(digest_size=8)
    for examples in parts:
        bits.update(f"{len(examples)};".encode())
        for example in examples:
            bits.update(_spelled(example).encode())
    return bits.hexdigest()


def _spelled(example: Any) -> str:
    """Return plain data as text that is the same in each process; "" for other things."""
    if isinstance(example, Tensor):
        return str(example.tolist())
    if isinstance(example, Mapping):
        return str({key: _spelled(value) for key, value in example.items()})
    if isinstance(example, list | tuple):
        return str([_spelled(value) for value in example])
    return repr(example) if isinstance(example, PLAIN) else ""


def of_function(function: Any) -> str:
    """Return a hash of code, its defaults, what it closes over and what it names.

    The code is a function's or a class's; of other objects, their class's. Functions and classes
    that it names or derives from are followed within its own package; of others, and of what is
    installed, the name counts.
    """
    package = _package(function)
    reader, texts = _Reader("" if package == LIBRARY else package, [function]), []
    while reader.todo:
        texts.append(reader.text(reader.todo.pop()))
    return short("|".join(texts))


def _package(what: Any) -> str:
    """Return the name of the package that defines a function, a class or an object's class."""
    while isinstance(what, functools.partial):
        what = what.func
    return str(getattr(what, "__module__", "")).partition(".")[0]


def _is_installed(package: str) -> bool:
    file = getattr(sys.modules.get(package), "__file__", None) or ""
    installed = {"site-packages", "dist-packages"} & {*Path(file).parts}
    return package in ("", *sys.stdlib_module_names) or bool(installed)


@dataclass
class _Reader:
    """Spells code out.

    Attributes:
        package: classes that are defined in it are read, and what its functions name.
        todo: what is still to be read; a list, as calls may be nested without a limit.
        seen: the ids of what was read.
    """

    package: str
    todo: list[Any]
    seen: set[int] = field(default_factory=set)

    def text(self, what: Any) -> str:
        """Return what an object is, and add what it names to `todo`."""
        if isinstance(what, PLAIN | bytes):
            return repr(what)
        what = getattr(what, "__func__", what)
        if id(what) in self.seen:
            return ""
        self.seen.add(id(what))
        if isinstance(what, functools.partial):
            return self.texts(what.func, what.args, what.keywords)
        if isinstance(what, property):
            return self.texts(what.fget, what.fset)
        if isinstance(what, CodeType):
            return f"{what.co_code.hex()}{what.co_names}{self.texts(*what.co_consts)}"
        if isinstance(code := getattr(what, "__code__", None), CodeType):
            cells = [cell.cell_contents for cell in what.__closure__ or ()]
            self.todo += self.named(what)
            return self.texts(code, what.__defaults__, what.__kwdefaults__, *cells)
        if isinstance(what, Mapping):
            return str([(self.text(k), self.text(v)) for k, v in what.items()])
        if isinstance(what, list | tuple):
            return str(list(map(self.text, what)))
        if isinstance(what, frozenset):
            return str(sorted(map(self.text, what)))
        if isinstance(what, type):
            return what.__qualname__ + self.held(what)
        self.todo.append(type(what))
        return type(what).__qualname__

    def texts(self, *parts: Any) -> str:
        """Return what several objects are."""
        return "|".join(map(self.text, parts))

    def held(self, cls: type) -> str:
        """Return what a class and its bases of the package hold: their methods and attributes."""
        own = [base for base in cls.__mro__ if self.package and _package(base) == self.package]
        held = [(k, v) for base in own for k, v in vars(base).items() if k not in NO_CODE]
        return "|".join(f"{name}={self.text(value)}" for name, value in held)

    def named(self, function: Any) -> list[Any]:
        """Return the globals that a function names, of plain data or of the package."""
        if _is_installed(self.package):
            return []
        names = sorted(_names(function.__code__) & function.__globals__.keys())
        values = [function.__globals__[name] for name in names]
        groups = list | tuple | frozenset | Mapping
        return [
            value
            for value in values
            if isinstance(value, PLAIN | bytes | groups) or _package(value) == self.package
        ]


def _names(code: CodeType) -> set[str]:
    inner = [_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return {*code.co_names}.union(*inner)


def of_part(part: Any) -> str:
    """Return what a part of a composition is: a text, options, a folder's content, or code."""
    if isinstance(part, Path):
        files = sorted(file for file in part.rglob("*") if file.is_file())
        return "".join(f"{file.name}{short(file.read_bytes().hex())}" for file in files)
    if isinstance(part, DeltaConfig):
        options = sorted(part.to_dict().items(), key=str)
        return f"{type(part).__qualname__}{options}{_of_method(part.delta_type)}"
    if isinstance(part, Request):
        return f"{part!r}{_of_method(part.delta_type)}"
    return of_function(part) if callable(part) else repr(part)


def _of_method(delta_type: str) -> str:
    """Return a hash of the code of a method that is not the library's; else ""."""
    made = method(delta_type)
    if _package(made) == LIBRARY:
        return ""
    return "".join(map(of_function, (made, made.config_class, made.layer_class)))
