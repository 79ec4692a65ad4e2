"""Plans as they are printed: rich tables, and the same as plain text."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .costs import Flops
from .plans import Plan, PlannedDelta, PlannedModule
from .tree import spell

WIDTH = 110  # columns of what is not printed on a terminal
SHOWN = 4  # of several names


def as_text(what: Any) -> str:
    """What rich would print on a terminal of `WIDTH` columns, without colours."""
    console = Console(file=io.StringIO(), width=WIDTH)
    with console.capture() as capture:
        console.print(what)
    return "\n".join(line.rstrip() for line in capture.get().rstrip("\n").split("\n"))


def folded(names: Iterable[str]) -> list[str]:
    """Full names of modules, those that differ in one number only as one: `layers.0-11.fc2`."""
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "#", name, count=1), []).append(name)
    shown = []
    for pattern, own in together.items():
        place = next((i for i, step in enumerate(pattern.split(".")) if step == "#"), None)
        numbers = [] if place is None else [name.split(".")[place] for name in own]
        shown.append(pattern.replace("#", spell(numbers), 1) or "(root)")
    return shown


def size(count: float) -> str:
    """So many bytes, in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"


def plain_table(title: str | None = None, *headings: str) -> Table:
    """An empty table with a line beneath its headings and no other."""
    return Table(
        *headings,
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )


def plan_table(plan: Plan) -> Iterator[RenderableType]:
    """A table of the modules of each delta, and what all of it costs."""
    table = plain_table(f"plan for {plan.model}")
    table.add_column("delta", style="magenta", no_wrap=True)
    table.add_column("role", style="green", no_wrap=True)
    table.add_column("where", overflow="fold")
    for heading in ("modules", "parameters", "FLOPs/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for delta in plan.deltas:
        title = delta.name + f"\n({delta.delta_type})" * (delta.name != delta.delta_type)
        for row in _rows(delta):
            table.add_row(title, *row)
            title = ""
    yield table
    yield ""
    yield from map(_line, _costs(plan))
    for delta in plan.deltas:
        yield from map(_line, _remarks(delta))


def _line(text: str) -> Text:
    what, _, rest = text.partition(":")
    return Text.assemble((what, "bold"), f":{rest}")


def _rows(delta: PlannedDelta) -> Iterator[tuple[str, ...]]:
    groups: dict[Any, list[PlannedModule]] = {}
    for module in delta.modules:
        look = re.sub(r"(?<![^.])\d+(?![^.])", "#", module.name, count=1)
        groups.setdefault((module.role, look, module.parameters, module.flops), []).append(module)
    for (role, _, parameters, flops), own in groups.items():
        flops_each = "?" if flops is None else f"{flops.per_token * len(own):,}"
        names = folded(module.name for module in own)
        yield role or "", *names, f"{len(own)}", f"{parameters * len(own):,}", flops_each


def _costs(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    yield (
        f"parameters: {plan.added_parameters:,} more than {plan.total_parameters:,}; after "
        f"freeze_module() {plan.trainable_parameters:,} train, {plan.trainable_share:.4%}"
    )
    yield (
        f"memory: {size(memory.total)} more to train: parameters {size(memory.parameters)}, "
        f"gradients {size(memory.gradients)}, optimizer {size(memory.optimizer)}, plus "
        "activations"
    )
    yield f"FLOPs: {_flops(plan.flops)}"
    for delta in plan.deltas:
        if delta.positions:
            yield f"positions: {delta.name} makes every sequence {delta.positions} longer"


def _flops(flops: Flops | None) -> str:
    if flops is None:
        return "not known for every layer"
    once = f", and {flops.per_forward:,} once a forward" if flops.per_forward else ""
    return (
        f"{flops.per_token:,} more for a token that passes all of them{once} (forward, matrix "
        "products only, 2 a multiply-add)"
    )


def _remarks(delta: PlannedDelta) -> Iterator[str]:
    modules = delta.modules
    if delta.missed:
        yield f"{delta.name} leaves out: {len(delta.missed)} alike, {_some(delta.missed)}"
    if read := [module.name for module in modules if module.reads]:
        yield f"{delta.name} is read: the module around reads the weight of {_some(read)}"
    for module in [module for module in modules if module.tied][:SHOWN]:
        yield f"{delta.name} is tied: {module.name} shares a weight with {_some(module.tied)}"
    kinds: dict[str, list[str]] = {}
    for module in modules:
        if module.quantised is not None:
            kinds.setdefault(module.quantised, []).append(module.name)
    for kind, names in kinds.items():
        yield f"{delta.name} is quantised: {kind} in {_some(names)}"
    for warning in delta.warnings:
        yield f"{delta.name} warns: {warning}"


def _some(names: Iterable[str]) -> str:
    shown = folded(names)
    return ", ".join(shown[:SHOWN]) + (", ..." if len(shown) > SHOWN else "")
