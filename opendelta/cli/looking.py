"""The subcommands that only look: tree, plan, explain, show, diff."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

import opendelta

from .._checkpoint import contents as reading
from .._deltas import requests
from .._show.data import for_json
from .._show.tables import WIDTH, cells, folded, plain_table, size
from ..errors import DeltaError, listed, printable
from . import models

SHOWN = 8  # names in a list; more are left out
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, config.json or hub name.")]
Checkpoint = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub name.")]
Class = Annotated[
    str | None,
    typer.Option("--class", metavar="NAME", help="Class of the model, such as BertForMaskedLM."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Types = Annotated[
    list[str] | None,
    typer.Option("--delta", "-d", metavar="TYPE", help="Method, such as lora; repeat it."),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME=VALUE", help="Option of the --delta before."),
]
Places = Annotated[
    list[str] | None,
    typer.Option(
        "--at", "-a", metavar="PLACES", help="Roles or names of modules, for the --delta before."
    ),
]


class Drawn(enum.StrEnum):
    """Forms of a picture."""

    svg = "svg"
    html = "html"


def console() -> Console:
    """Return standard output: as wide as the terminal, or as COLUMNS says, or else `WIDTH`."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if known else WIDTH, highlight=False)


def as_json(data: Any) -> None:
    """Print `data` as JSON; numbers that JSON does not have are null."""
    print(json.dumps(for_json(data), indent=2, allow_nan=False))


def say(*lines: str) -> None:
    """Print lines, whose signs that do not print are escaped."""
    print("\n".join(map(printable, lines)))


def tree(
    model: Model,
    class_name: Class = None,
    roles: Annotated[
        bool, typer.Option("--roles", help="List the roles instead, for --at of `plan`.")
    ] = False,
    deltas: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="Draw the deltas in it, too.")
    ] = None,
    to: Annotated[Drawn | None, typer.Option(help="Print the picture as SVG or HTML.")] = None,
    json: AsJson = False,
) -> None:
    """Draw the modules of MODEL; modules that are alike are drawn once. No weights are needed.

    Example: opendelta tree roberta-base

    Example: opendelta tree roberta-base --deltas my-composition --to svg > tree.svg

    Example: opendelta tree my-model/config.json --class BertForMaskedLM --roles
    """
    saved = saved_from(deltas) if deltas else ""
    built = models.without_weights(model, class_name, saved)
    if deltas:
        opendelta.load(deltas, built, check_backbone=False)
    if to and (roles or json):
        raise typer.BadParameter("--to draws the tree: leave out --roles and --json")
    if not roles:
        drawn = opendelta.tree(built)
        if to:
            typer.echo(opendelta.tree(built, to=to.value).encode())  # UTF-8 on any terminal
        else:
            as_json(drawn.to_dict()) if json else drawn.show()
        return
    found = opendelta.roles(built)
    if json:
        as_json(found)
        return
    table = plain_table(f"roles in {type(built).__name__}", "role", "where", "modules")
    for role in dict.fromkeys(found.values()):
        own = [name for name, has in found.items() if has == role]
        table.add_row(*cells(role, folded(own), str(len(own))))
    console().print(table)


def plan(
    model: Model,
    delta: Types = None,
    option: Options = None,
    at: Places = None,
    class_name: Class = None,
    json: AsJson = False,
) -> None:
    """Show which modules the deltas would go on, and what they would cost. No weights are needed.

    Several deltas are planned in order, as if attached one after another. TYPE may include options
    and places: TYPE:name=value,...@place,... . A place is a role such as attn.q, the end of a
    module name, or a regular expression after \\[r].

    Example: opendelta plan roberta-base --delta lora --option lora_r=8 --at attn.q

    Example: opendelta plan roberta-base --delta lora --delta adapter --at output

    Example: opendelta plan config.json --delta lora:lora_r=8,lora_alpha=32@attn.q,attn.v
    """
    wanted = requested(delta, option, at)
    if not wanted:
        raise typer.BadParameter("give at least one --delta, such as --delta lora")
    built = models.without_weights(model, class_name)
    planned = opendelta.plan(built, [requests.config_for(built, each) for each in wanted])
    as_json(planned.to_dict()) if json else console().print(planned)


def requested(delta: Types, option: Options, at: Places) -> list[requests.Request]:
    """Return the deltas in the arguments; raise for an --option or --at before the first."""
    if option or at:
        name, first = ("--option", option) if option else ("--at", at)
        raise typer.BadParameter(f"{name} {first[0]!r} must stand after a --delta")  # type: ignore
    return [requests.parse(text) for text in delta or ()]


def explain(
    path: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Folder or hub name.")],
    model: Model,
    module: Annotated[
        str | None, typer.Option(metavar="NAME", help="One module only, by its name's end.")
    ] = None,
    class_name: Class = None,
    json: AsJson = False,
) -> None:
    """Show the formula that each module of MODEL computes with the deltas of CHECKPOINT on it.

    Example: opendelta explain my-composition roberta-base

    Example: opendelta explain my-composition roberta-base --module layer.0.attention.self.query
    """
    built = models.without_weights(model, class_name, saved_from(path))
    composed = opendelta.load(path, built, check_backbone=False)
    if module is not None:
        one = composed.explain(module)
        if json:
            as_json([dataclasses.asdict(one)])
        else:
            print(one)
        return
    sites = dict.fromkeys(where for delta in composed for where in delta.layers)
    told = [composed.explain(where) for where in sites]
    if json:
        as_json([dataclasses.asdict(each) for each in told])
        return
    names = [delta.name + " (disabled)" * (not delta.active) for delta in composed]
    title = f"{', '.join(names)} on {type(built).__name__}"
    table = plain_table(title, "module", "computes")
    alike: dict[str, list[str]] = {}
    for each in told:
        alike.setdefault(each.formula, []).append(each.module)
    for formula, names in alike.items():
        table.add_row(*cells(folded(names), formula))
    console().print(table)


def saved_from(path: str) -> str:
    """Return the class of the model that a checkpoint was saved from; "" if unknown."""
    return reading.contents(path).backbone


def show(checkpoint: Checkpoint, json: AsJson = False) -> None:
    """Show the deltas, options and sizes in CHECKPOINT. No model is needed.

    Example: opendelta show my-composition
    """
    held = reading.contents(checkpoint)
    count = sum(math.prod(shape) for shape in held.shapes.values())
    if json:
        made_for = {"backbone": held.backbone, "model": held.model}
        facts = {"path": held.path, "format": held.format, **made_for}
        sizes = {"parameters": count, "tensors": held.shapes, "bytes": held.bytes}
        as_json({**facts, **sizes, "deltas": held.deltas})
        return
    table = plain_table(None, "delta", "type", "state", "parameters")
    for heading in ("where", "options"):
        table.add_column(heading, overflow="fold")
    for delta in held.deltas:
        places = [*folded(delta["modules"]), *(f"own {n}" for n in delta["modules_to_save"])]
        shown = [*places[:SHOWN], *["..."] * (len(places) > SHOWN)]
        options = [f"{name}={value!r}" for name, value in delta["options"].items()]
        row = (
            delta["name"],
            delta["delta_type"],
            ", ".join(reading.states(delta)),
            f"{delta['parameters']:,}",
            shown,
            options,
        )
        table.add_row(*cells(*row))
    out, backbone = console(), held.backbone or held.model or "an unnamed model"
    head = (
        f"{held.path}: {held.format}, saved from {backbone}; "
        f"{count:,} parameters in {len(held.shapes)} tensors, {size(held.bytes)}"
    )
    out.print(*cells(head))
    out.print(table)


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another checkpoint.")],
    json: AsJson = False,
) -> None:
    """Show how two checkpoints differ: deltas, options, tensors. Exit code 1 if they differ.

    Example: opendelta diff before-training after-training
    """
    one, other = (reading.contents(path, values=True) for path in (a, b))
    if one.format.split()[0] != other.format.split()[0]:
        raise DeltaError(
            f"{a} is of {one.format} and {b} of {other.format}: convert one of them first"
        )
    found = reading.compared(one, other)
    if json:
        as_json(found)
    else:
        lines = list(_differences(found, len(one.shapes)))
        say(*(lines or [f"the same: {len(one.shapes)} tensors, bit for bit"]))
    if any(found.values()):
        raise typer.Exit(1)


def _differences(found: dict[str, Any], count: int) -> Any:
    for letter in "ab":
        for name in found[f"only_in_{letter}"]:
            yield f"delta {name}: only in {letter.upper()}"
    if found["order"]:
        yield f"order: {' '.join(found['order'][0])} in A, {' '.join(found['order'][1])} in B"
    for name, changes in found["changed"].items():
        for what, (before, after) in changes.items():
            yield f"delta {name}: {what} is {before!r} in A, {after!r} in B"
    for letter in "ab":
        if names := found[f"tensors_only_in_{letter}"]:
            yield f"{len(names)} tensors only in {letter.upper()}: {_some(names)}"
    for name, (before, after) in found["shapes"].items():
        yield f"tensor {name}: {before} in A, {after} in B"
    if values := found["values"]:
        most = max(values, key=values.get)
        yield (
            f"{len(values)} of {count} tensors have other values: {_some(values)}; the most in "
            f"{most}, by {values[most]:.2g} of its norm"
        )


def _some(names: Any) -> str:
    return listed(folded(names), SHOWN)
