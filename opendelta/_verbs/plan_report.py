"""The report of a dry run: its data, and its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._layers.costs import Flops
from .._show.notebooks import InNotebooks
from .._show.tables import SHOWN, as_text, cells, folded, plain_table, size
from ..errors import listed, printable
from ..names import unnumbered
from .costs import Memory

if TYPE_CHECKING:  # rich is imported where something is drawn
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text


@dataclass(frozen=True)
class PlannedModule:
    """One module that would carry a layer.

    Attributes:
        name: its full name.
        type: its class.
        role: its role in its block, such as "attn.q"; None: not known.
        block: the full name of the block that it is in; None: in none.
        parameters: number of parameters of its layer.
        flops: operations that its layer adds to a forward; None: not known.
        reads: true if the module around reads its weight. Then only layers that fold act.
        tied: other modules that share a weight with it; the delta would not change them.
        quantised: the kind of its weights, if they are quantised.
    """

    name: str
    type: str
    role: str | None
    block: str | None
    parameters: int
    flops: Flops | None
    reads: bool = False
    tied: list[str] = dataclasses.field(default_factory=list)
    quantised: str | None = None


@dataclass(frozen=True)
class PlannedDelta:
    """One delta of a plan.

    Attributes:
        name: the name that it would have.
        delta_type: its method.
        options: its options, with full names of modules.
        modules: the modules that would carry a layer, in the order of the model.
        parameters: number of parameters that it would add.
        memory: bytes for training it, without activations.
        positions: number of positions that it adds to each sequence: the length of a soft prompt.
        missed: full names of modules that it would not change, though they are like a module that
            it changes: by role, or by class and name.
        warnings: the warnings that attaching it would give.
    """

    name: str
    delta_type: str
    options: dict[str, Any]
    modules: list[PlannedModule]
    parameters: int
    memory: Memory
    positions: int
    missed: list[str]
    warnings: list[str]


@dataclass(frozen=True)
class Plan(InNotebooks):
    """The plan of attaching deltas; `str()` gives a table, `to_dict()` data for JSON.

    Attributes:
        model: the class of the backbone.
        deltas: the deltas in the order of attaching.
        total_parameters: number of parameters of the model as it is now; a tied one counts once.
        added_parameters: number of parameters of all deltas in the plan.
        trainable_parameters: number of parameters that would train after `freeze_module()`.
    """

    model: str
    deltas: list[PlannedDelta]
    total_parameters: int
    added_parameters: int
    trainable_parameters: int

    @property
    def trainable_share(self) -> float:
        """Return the share of all parameters, with the added ones, that would train."""
        return self.trainable_parameters / max(1, self.total_parameters + self.added_parameters)

    @property
    def memory(self) -> Memory:
        """Return the bytes for training all deltas, without activations."""
        parts = [dataclasses.astuple(delta.memory) for delta in self.deltas]
        return Memory(*map(sum, zip((0, 0, 0), *parts, strict=True)))

    @property
    def flops(self) -> Flops | None:
        """Return the operations that all deltas add to a forward; None: not known.

        The count is for a token that passes all modules. Only matrix products count, with 2
        operations per multiply-add.
        """
        each = [module.flops for delta in self.deltas for module in delta.modules]
        known = [flops for flops in each if flops is not None]
        if len(known) < len(each):
            return None
        return Flops(sum(f.per_token for f in known), sum(f.per_forward for f in known))

    def to_dict(self) -> dict[str, Any]:
        """Return all data of the plan for JSON."""
        flops = self.flops
        return {
            **dataclasses.asdict(self),
            "trainable_share": self.trainable_share,
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "flops": None if flops is None else dataclasses.asdict(flops),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from plan_table(self)

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__


def plan_table(plan: Plan) -> Iterator[RenderableType]:
    """Yield a table of the modules of each delta, and lines with the costs and remarks."""
    table = plain_table(f"plan for {plan.model}")
    table.add_column("delta", style="magenta", no_wrap=True)
    table.add_column("role", style="green", no_wrap=True)
    table.add_column("where", overflow="fold")
    for heading in ("modules", "parameters", "FLOPs/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for delta in plan.deltas:
        title = [delta.name, *[f"({delta.delta_type})"] * (delta.name != delta.delta_type)]
        for row in _rows(delta):
            table.add_row(*cells(title, *row))
            title = []
    yield table
    yield ""
    yield from map(_line, costs(plan))
    for delta in plan.deltas:
        yield from map(_line, remarks(delta))


def _line(text: str) -> Text:
    what, _, rest = text.partition(":")
    from rich.text import Text

    return Text.assemble((printable(what), "bold"), printable(f":{rest}"))


def _rows(delta: PlannedDelta) -> Iterator[tuple[str, ...]]:
    groups: dict[Any, list[PlannedModule]] = {}
    for module in delta.modules:
        look = unnumbered(module.name)
        groups.setdefault((module.role, look, module.parameters, module.flops), []).append(module)
    for (role, _, parameters, flops), own in groups.items():
        flops_each = "?" if flops is None else f"{flops.per_token * len(own):,}"
        names = folded(module.name for module in own)
        yield role or "", *names, f"{len(own)}", f"{parameters * len(own):,}", flops_each


def costs(plan: Plan) -> Iterator[str]:
    """Yield the costs of a plan, a line each: "parameters: ...", "memory: ...", "FLOPs: ..."."""
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


def remarks(delta: PlannedDelta) -> Iterator[str]:
    """Yield what is unusual about a delta, a line each, such as "lora is tied: ..."."""
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
    return listed(folded(names), SHOWN)
