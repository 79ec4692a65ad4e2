"""Find the weights that code of somebody's own reads: of a model's classes and what it holds."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from .._modules.holding import beside_tables, is_foreign, walk
from .._modules.writing import words_of
from .._sites.swap import plain_class
from ..errors import library_folders
from ..names import last, parent
from .backbone import Backbone
from .branches import LIBRARIES
from .codes import RAW, chains_in, reads_unnamed

OTHERS = {*LIBRARIES, "builtins", "bitsandbytes", "torchao", "accelerate", "hqq", "optimum"}
# What runs without being named.
ENTRIES = {"forward", "__call__", "__getattr__", "__getattribute__", "__get__"}
KEYS = ("weight", "bias")
METHODS = (MethodType, classmethod, staticmethod)


@dataclass(frozen=True)
class OwnCode:
    """The code of somebody's own that a forward may reach, and what it reads.

    Attributes:
        named: (name of a child, "weight" or "bias", code, offset in it) of what it reads by name.
        paths: names of children in texts such as "child.weight".
        unnamed: it reads a weight of something that it is given.
        raw: it asks for all parameters, or for their tables.
    """

    named: tuple[tuple[str, str, CodeType, int], ...]
    paths: frozenset[str]
    unnamed: bool
    raw: bool

    @property
    def reads(self) -> bool:
        """It may read a weight of some module."""
        return bool(self.named or self.paths or self.unnamed or self.raw)

    def may_read(self, where: str) -> bool:
        """True if it reads the weight or bias of `where` by name, or of what it is given."""
        return self.unnamed or self.names(where)

    def names(self, where: str) -> bool:
        """True if it reads the weight or bias of a child with the last name of `where`."""
        name = last(where)
        return name in self.paths or any(name == each for each, *_ in self.named)


def own_code(backbone: Backbone) -> OwnCode:
    """Look at all code of somebody's own that the forwards of a model may reach by its names."""
    found = _Reached()
    for cls in {plain_class(module) or type(module) for module in backbone.modules.values()}:
        found.add_class(cls)
    found.add_held(beside_tables(backbone.modules.values()))
    codes = list(found.codes())
    words = set[str]().union(found.texts, *map(words_of, codes))
    return OwnCode(
        tuple((n, k, code, at) for code in codes for n, k, at in chains_in(code) if k in KEYS),
        frozenset(last(parent(word)) for word in words if last(word) in KEYS and "." in word),
        any(map(reads_unnamed, codes)),
        bool(words & RAW),
    )


class _Reached:
    """The functions that a forward may reach: those that run unnamed, and whose names it has."""

    def __init__(self) -> None:
        self.texts, self.named = set[str](), set[str]()
        self._todo: list[FunctionType] = []
        self._waiting: dict[str, list[FunctionType]] = {}
        self._seen = set[Any]()

    def add_class(self, cls: type) -> None:
        if cls in self._seen:
            return
        self._seen.add(cls)
        taken: dict[str, None] = {}
        beneath = _calls_super(cls)
        for base in cls.__mro__:
            for name, value in [] if is_of_library(base) else vars(base).items():
                if beneath or name not in taken:
                    self._add_value(name, value)
            taken |= dict.fromkeys(vars(base))

    def _add_value(self, name: str, value: Any) -> None:
        value = value.__func__ if isinstance(value, METHODS) else value
        functions = [f for f in map(_function_of, walk([value])) if f is not None]
        if name in ENTRIES or name in self.named or _function_of(value) is None:
            self._todo += functions
        else:
            self._waiting.setdefault(name, []).extend(functions)
        if not name.startswith("__"):
            self.add_held(each for each in walk([value]) if _function_of(each) is None)

    def add_held(self, values: Iterable[Any]) -> None:
        for value in walk(values):
            if isinstance(value, operator.attrgetter):
                self.texts.update(value.__reduce__()[1])
            elif (function := _function_of(value)) is not None:
                self._todo.append(function)
            elif isinstance(value, type):
                self.add_class(value)
            elif is_foreign(value) and not isinstance(value, nn.Module | nn.Parameter | ModuleType):
                self.add_class(type(value))

    def codes(self) -> Iterator[CodeType]:
        """Yield the code of each function that is reached, and of functions inside."""
        while self._todo:
            function = self._todo.pop()
            if function in self._seen or is_of_library(function):
                continue
            self._seen.add(function)
            yield from _with_inner(function.__code__)
            words = words_of(function.__code__)
            for word in words - self.named:
                self._todo += self._waiting.pop(word, ())
            self.named |= words
            self.add_held(_named_by(function, words))


def _named_by(function: FunctionType, words: set[str]) -> Iterator[Any]:
    """Yield the functions and classes that a function names, of its package or not installed."""
    around = [function.__globals__.get(word) for word in function.__code__.co_names]
    files = [value for value in around if isinstance(value, ModuleType)]
    for value in around + [vars(file).get(word) for file in files for word in words]:
        if isinstance(value, FunctionType | type) and not is_of_library(value):
            file = getattr(sys.modules.get(value.__module__), "__file__", None) or ""
            if _package(value) == _package(function) or not file.startswith(library_folders()):
                yield value


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _with_inner(const)


def _function_of(value: Any) -> FunctionType | None:
    """Return the function in a method, a property or a decorator of Python's, or None."""
    for _ in range(9):
        if isinstance(value, property):
            value = value.fget
        elif isinstance(value, functools.cached_property | functools.partialmethod):
            value = value.func
        elif isinstance(value, METHODS):
            value = value.__func__
        if inspect.isfunction(value):
            return inspect.unwrap(value)
    return None


def _calls_super(cls: type) -> bool:
    """True if methods that others override may run, too."""
    values = [
        v
        for b in cls.__mro__
        if not is_of_library(b)
        for k, v in vars(b).items()
        if k != "__init__"
    ]
    functions = [f for f in map(_function_of, values) if f is not None]
    return any("super" in words_of(function.__code__) for function in functions)


def _package(value: Any) -> str:
    return (value.__module__ or "builtins").partition(".")[0]


def is_of_library(value: Any) -> bool:
    """True if a class or function is of Python, torch or a library whose code is taken as known."""
    return _package(value) in OTHERS
