"""A dry run of attaching: which modules deltas would be on, and what they would cost."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from torch import nn

from . import freezing, planning, quantised
from .addressing import Survey, ancestors, survey
from .bases import DeltaLayer
from .costs import Flops, Memory, flops_of, memory_of
from .delta import Delta
from .errors import DeltaError, OptionError, shown
from .layers import is_sharded
from .options import DeltaConfig
from .order import known_records
from .prompting import PromptLayer
from .registry import method
from .structure import roles


@dataclass(frozen=True)
class PlannedModule:
    """One module that would carry a layer.

    Attributes:
        name: its full name.
        type: its class.
        role: what it does in its block, such as "attn.q"; None: not known.
        block: the full name of the block that it is in; None: in none.
        parameters: those of its layer.
        flops: what its layer adds to a forward; None: not known.
        reads: whether the module around it reads its weight, so that only what folds acts.
        tied: other modules that use a weight of it too, and that would not change with it.
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
    """One delta as it would be.

    Attributes:
        name: the name that it would have.
        delta_type: its method.
        options: its options, with full names of modules.
        modules: those that would carry a layer, in the order of the model.
        parameters: how many it would add.
        memory: bytes for training it, without activations.
        positions: what it adds to every sequence: the length of a soft prompt.
        missed: full names of modules like those that it changes, by role, or by class and name,
            that it would not change.
        warnings: those that attaching would give.
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
class Plan:
    """What attaching deltas would do; `str()` gives a table, `to_dict()` what JSON can hold.

    Attributes:
        model: the class of the backbone.
        deltas: in the order of attaching.
        total_parameters: those of the model as it is now, a tied one once.
        added_parameters: those of all deltas in the plan.
        trainable_parameters: those that would train once `freeze_module()` has been called.
    """

    model: str
    deltas: list[PlannedDelta]
    total_parameters: int
    added_parameters: int
    trainable_parameters: int

    @property
    def trainable_share(self) -> float:
        """What would train, as a share of all parameters, the added ones included."""
        return self.trainable_parameters / max(1, self.total_parameters + self.added_parameters)

    @property
    def memory(self) -> Memory:
        """Bytes for training all deltas, without activations."""
        parts = [dataclasses.astuple(delta.memory) for delta in self.deltas]
        return Memory(*map(sum, zip(*parts, strict=True)))

    @property
    def flops(self) -> Flops | None:
        """What all deltas add to a forward, for a token that passes all modules; None: not known.

        See `opendelta.costs.Flops` for what is counted.
        """
        each = [module.flops for delta in self.deltas for module in delta.modules]
        known = [flops for flops in each if flops is not None]
        if len(known) < len(each):
            return None
        return Flops(sum(f.per_token for f in known), sum(f.per_forward for f in known))

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        flops = self.flops
        return {
            **dataclasses.asdict(self),
            "trainable_share": self.trainable_share,
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total},
            "flops": None if flops is None else dataclasses.asdict(flops),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from .tables import plan_table

        yield from plan_table(self)

    def __str__(self) -> str:
        from .tables import as_text

        return as_text(self)

    __repr__ = __str__


def plan(
    model: nn.Module,
    configs: DeltaConfig | Sequence[DeltaConfig],
    *,
    optimizer_states: int = 2,
) -> Plan:
    """What attaching deltas with these configs would do; nothing is touched or allocated.

    Several are planned as if attached one after another, on top of the deltas that `model` has. The
    model may be on the meta device.

    Args:
        model: the backbone.
        configs: such as `LoraConfig(lora_r=8)`, or a list of them.
        optimizer_states: values that the optimizer keeps for each parameter: 2 for Adam.

    Raises:
        DeltaError: whatever attaching would raise.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import opendelta
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
        >>> plan = opendelta.plan(model, opendelta.LoraConfig(lora_r=4, modified_modules=["0"]))
        >>> plan.added_parameters, plan.memory.total, plan.flops.per_token
        (4096, 65536, 8192)
        >>> [module.name for module in plan.deltas[0].modules]
        ['0']
    """
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    wanted = _checked(configs)
    found = survey(model)
    planner = Planner(found, optimizer_states)
    deltas = [planner.add(config) for config in wanted]
    return Plan(
        model=type(model).__name__,
        deltas=deltas,
        total_parameters=sum(p.numel() for p in model.parameters()),
        added_parameters=sum(delta.parameters for delta in deltas),
        trainable_parameters=planner.trainable(),
    )


def _checked(configs: Any) -> list[DeltaConfig]:
    """The configs in what `plan` was given."""
    several = isinstance(configs, Iterable) and not isinstance(configs, str)
    wanted = list(configs) if several else [configs]
    for config in wanted:
        if isinstance(config, type):
            made = config.config_class if issubclass(config, Delta) else config
            name = made.__name__ if issubclass(made, DeltaConfig) else "LoraConfig"
            raise OptionError(f"plan takes configs such as {name}(...), not {config.__name__}")
        if not isinstance(config, DeltaConfig):
            raise OptionError(f"plan takes configs such as LoraConfig(...), not {shown(config)}")
    if not wanted:
        raise OptionError("plan needs at least one config, such as LoraConfig(...)")
    return wanted


class Planner:
    """Puts layers without memory on stacks that no module carries, one delta after another."""

    def __init__(self, found: Survey, optimizer_states: int) -> None:
        self.found, self.optimizer_states = found, optimizer_states
        self.planned: dict[str, planning.PlannedStack] = {}
        self.roles = _roles(found.root)
        self.flops: dict[Any, Flops | None] = {}

    def add(self, config: DeltaConfig) -> PlannedDelta:
        """Plan one delta on top of those before.

        Raises:
            DeltaError: whatever attaching it would raise.
        """
        cls = method(config.delta_type)
        delta: Delta = cls.__new__(cls)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            delta._prepare(self.found, dataclasses.replace(config), "never")
            sites = planning.places(
                self.found, delta.name, delta.config, delta.layers, self.planned
            )
        for where, (reads, _) in sites.items():
            before = self.found.stacks.get(where)
            stack = planning.PlannedStack(before, delta.name, delta.layers[where], reads)
            self.planned[where] = self.found.stacks[where] = stack
        layers = delta.layers.values()
        return PlannedDelta(
            name=delta.name,
            delta_type=delta.delta_type,
            options=delta.config.to_dict(),
            modules=list(self._modules(delta, {w: reads for w, (reads, _) in sites.items()})),
            parameters=sum(p.numel() for p in delta.parameters()),
            memory=memory_of(layers, self.optimizer_states),
            positions=sum(each.length for each in layers if isinstance(each, PromptLayer)),
            missed=self._missed(delta.modified_modules),
            warnings=[str(warning.message) for warning in caught],
        )

    def trainable(self) -> int:
        """The parameters that train after `freeze_module()`: of all deltas, and by their names."""
        records = known_records(self.found)
        frozen = {name for record in records for name in record.shared.frozen}
        kept = {name for record in records for name in record.config.unfrozen_modules or ()}
        trains = [p for p in freezing.delta_parameters(self.found).values() if p.requires_grad]
        for name, parameter in freezing.backbone_parameters(self.found).items():
            if kept & {"", *ancestors(name)} and (parameter.requires_grad or name in frozen):
                trains.append(parameter)
        return sum({id(p): p.numel() for p in trains}.values())

    def _modules(self, delta: Delta, reads: dict[str, bool]) -> Iterator[PlannedModule]:
        tied = planning.tied(self.found, [w for w in delta.layers if w in delta.modified_modules])
        for where in self.found.modules:
            if where not in delta.layers:
                continue
            module, layer = self.found.modules[where], delta.layers[where]
            yield PlannedModule(
                name=where,
                type=type(module).__name__,
                role=self.roles.get(where),
                block=block_of(where),
                parameters=sum(p.numel() for p in layer.parameters()),
                flops=self._flops(layer, module),
                reads=reads[where],
                tied=tied.get(where, []),
                quantised=_quantised(module),
            )

    def _flops(self, layer: DeltaLayer, module: nn.Module) -> Flops | None:
        """As `flops_of`, once for all layers that look the same."""
        shapes = [(n, t.shape) for n, t in (*layer.named_parameters(), *layer.named_buffers())]
        shared = layer.shared
        key = type(layer), layer.flow, tuple(shapes), id(shared), type(module), repr(module)
        if key not in self.flops:
            self.flops[key] = flops_of(layer, module)
        return self.flops[key]

    def _missed(self, hit: Sequence[str]) -> list[str]:
        """The modules that are like one of those that are `hit`, and are not hit."""
        modules = self.found.modules
        looks = {(self.roles.get(n), type(modules[n]), _kind_of_name(n)) for n in hit}
        roles_hit = {role for role, _, _ in looks if role is not None}
        same = {(kind, name) for role, kind, name in looks if role is None and name}
        seen = {id(modules[n]) for n in hit}
        return [
            name
            for name, module in modules.items()
            if id(module) not in seen
            and (
                self.roles.get(name) in roles_hit
                or (name not in self.roles and (type(module), _kind_of_name(name)) in same)
            )
        ]


def _roles(model: nn.Module) -> dict[str, str]:
    try:
        return roles(model)
    except DeltaError:  # a structure that cannot be read has no roles
        return {}


def block_of(name: str) -> str | None:
    """The full name of the block that a module is in: up to the first number in its name."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found[0] if found else None


def _kind_of_name(name: str) -> str:
    """The last step of a name that is no number, and the numbers behind it without their values."""
    steps = ["#" if step.isdigit() else step for step in name.split(".")]
    last = max((place for place, step in enumerate(steps) if step != "#"), default=0)
    return ".".join(steps[last:])


def _quantised(module: nn.Module) -> str | None:
    for parameter in module._parameters.values():
        if parameter is not None and not quantised.is_plain(parameter):
            return None if is_sharded(parameter) else type(parameter).__name__
    return None
