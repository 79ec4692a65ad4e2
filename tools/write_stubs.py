"""Write what editors and type checkers read: the signatures of methods and blocks, and all names.

The signatures, `__init__.pyi` of `opendelta/methods` and `opendelta/blocks`, are made from the
configs, so that an option is written once. The end of `opendelta/__init__.py` lists the names of
errors, blocks and methods:

    python tools/write_stubs.py
"""

import dataclasses
import inspect
import json
import textwrap
from pathlib import Path
from types import ModuleType

import opendelta
from opendelta import blocks, errors, methods

PACKAGE = Path(opendelta.__file__)
MARK = "# Written by tools/write_stubs.py: "
FILES = {Path(room.__file__ or "").with_suffix(".pyi"): room for room in (methods, blocks)}
HEAD = """\
# Written by tools/write_stubs.py: the signatures, made from the configs.
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..author import {base}
"""
# A config's own types are those after it has turned what it was given into one form.
GIVEN = {
    "list[str] | None": "str | Sequence[str] | None",
    "deltas": "Sequence[str | Delta] | None",
    "dtype": "str | torch.dtype | None",
}

SAMPLES = "Mapping[str, Any] | Sequence[Any] | torch.Tensor | None"  # of sample_inputs


def text(room: ModuleType) -> str:
    """The whole stub of the methods or the blocks."""
    models = [getattr(room, name) for name in room.__all__ if name.endswith("Model")]
    configs = sorted(
        f"from .{model.config_class.__module__.rpartition('.')[2]} import "
        f"{model.config_class.__name__} as {model.config_class.__name__}"
        for model in models
    )
    names = ["__all__ = [", *(f'    "{name}",' for name in room.__all__), "]"]
    head = HEAD.replace("{base}", ", ".join(sorted({"Delta", models[0].__base__.__name__})))
    return "\n".join([head + "\n".join(configs), "", *names, "", *map(_class, models)])


def package() -> str:
    """The whole `opendelta/__init__.py`, whose end names the errors, blocks and methods."""
    before, mark, rest = PACKAGE.read_text(encoding="utf-8").partition(MARK)
    names = ", ".join(f'"{name}"' for name in (*errors.__all__, *blocks.__all__, *methods.__all__))
    lines = textwrap.fill(names, 96, initial_indent="    ", subsequent_indent="    ")
    comment = rest.partition("\n")[0]
    return f"{before}{mark}{comment}\n__all__ += [\n{lines},\n]  # fmt: skip\n"


def _class(model: type[opendelta.Delta]) -> str:
    lines = [f"class {model.__name__}({model.__base__.__name__}):"]
    own = [name for name in vars(model) if name in vars(model).get("__annotations__", {})]
    lines += [f"    {name}: {vars(model)['__annotations__'][name]}" for name in own]
    lines += ["    def __init__(", "        self,", "        backbone_model: nn.Module,"]
    fields = {field.name: field for field in dataclasses.fields(model.config_class)}
    by_name = False
    for name, parameter in list(inspect.signature(model).parameters.items())[1:]:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not by_name:
            lines.append("        *,")
            by_name = True
        hint = _type(fields[name]) if name in fields else SAMPLES
        lines.append(f"        {name}: {hint} = {_code(parameter.default)},")
    lines += ["    ) -> None: ...", "    @property"]
    lines += [f"    def config(self) -> {model.config_class.__name__}: ...", ""]
    return "\n".join(lines)


def _code(value: object) -> str:
    """A constant as code, with the quotation marks of this project."""
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _type(field: dataclasses.Field) -> str:
    """The type of what an option may be given, as text."""
    choices = field.metadata.get("choices")
    if field.name in GIVEN or choices is None or any(isinstance(c, dict) for c in choices):
        return GIVEN.get(field.name) or GIVEN.get(str(field.type), str(field.type))
    return f"Literal[{', '.join(map(_code, choices))}]"


if __name__ == "__main__":
    for file, room in FILES.items():
        file.write_text(text(room), encoding="utf-8")
    PACKAGE.write_text(package(), encoding="utf-8")
