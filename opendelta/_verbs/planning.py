"""Plan attaching: find the modules that deltas would go on, and their costs, in a dry run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from .._backbone.backbone import Backbone
from .._backbone.inputs import Samples
from .._backbone.roles import roles_of
from .._deltas.base import BaseDelta
from .._deltas.choosing import choose
from .._deltas.making import make
from .._deltas.options import DeltaConfig
from .._deltas.order import known_records
from .._deltas.placing import place
from .._deltas.registry import method
from .._deltas.uses import tied
from .._layers.base import DeltaLayer
from .._layers.costs import Flops
from .._modules import tensors
from .._modules.kinds import is_packed
from .._modules.tensors import is_sharded, size
from ..errors import DeltaError, OptionError, kept_warnings, shown
from ..names import ancestors
from .costs import memory_of
from .plan_report import Plan, PlannedDelta, PlannedModule


def plan(
    model: nn.Module,
    configs: DeltaConfig | Sequence[DeltaConfig],
    *,
    optimizer_states: int = 2,
    sample_inputs: Samples | None = None,
) -> Plan:
    """Plan to attach deltas with these configs; nothing is touched or allocated.

    Several deltas are planned as if attached one after another, on top of the deltas that `model`
    has. The model may be on the meta device.

    Args:
        model: the backbone.
        configs: such as `LoraConfig(lora_r=8)`, or a list of them.
        optimizer_states: values that the optimizer keeps for each parameter: 2 for Adam.
        sample_inputs: inputs of the model, to find sizes by; see `Delta`.

    Raises:
        DeltaError: the same error as attaching would raise.

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
    wanted = as_configs("plan", configs)
    if not wanted:
        raise OptionError("plan needs at least one config, such as LoraConfig(...)")
    planner = Planner(Backbone.of(model, sample_inputs), optimizer_states)
    for config in wanted:
        planner.add(config)
    return planner.plan()


def as_configs(verb: str, configs: Any) -> list[DeltaConfig]:
    """Return the configs in the argument of a verb as a list.

    Raises:
        OptionError: it holds anything else.
    """
    several = isinstance(configs, Iterable) and not isinstance(configs, str | Mapping)
    wanted = list(configs) if several else [configs]
    for config in wanted:
        if isinstance(config, type):
            made = config.config_class if issubclass(config, BaseDelta) else config
            name = made.__name__ if issubclass(made, DeltaConfig) else "LoraConfig"
            raise OptionError(f"{verb} takes configs such as {name}(...), not {config.__name__}")
        if not isinstance(config, DeltaConfig):
            raise OptionError(f"{verb} takes configs such as LoraConfig(...), not {shown(config)}")
    return wanted


class Planner:
    """Plan one delta after another: put layers without memory on stacks that no module carries.

    Attributes:
        backbone: the model; it shows the planned deltas as attached.
        optimizer_states: values that the optimizer keeps for each parameter.
        roles: {full name of a module: its role}.
        deltas: the planned deltas.
    """

    def __init__(self, backbone: Backbone, optimizer_states: int = 2) -> None:
        self.backbone, self.optimizer_states = backbone, optimizer_states
        self.roles = known_roles(backbone)
        self.deltas: list[PlannedDelta] = []
        self.flops: dict[Any, Flops | None] = {}

    def plan(self) -> Plan:
        """Return the plan of all deltas so far."""
        model = self.backbone.model
        return Plan(
            model=type(model).__name__,
            deltas=list(self.deltas),
            total_parameters=sum(map(size, model.parameters())),
            added_parameters=sum(delta.parameters for delta in self.deltas),
            trainable_parameters=self._trainable(),
        )

    def add(self, config: DeltaConfig) -> PlannedDelta:
        """Plan one delta on top of the deltas before it.

        Raises:
            DeltaError: the same error as attaching it would raise.
        """
        with kept_warnings() as caught:
            choice = choose(self.backbone, method(config.delta_type), dataclasses.replace(config))
            delta = make(self.backbone, choice, values="never")
            placed = place(self.backbone, delta)
        reads = {where: each.weight_is_read for where, each in placed.placings.items()}
        placed.pretend()
        layers = delta.layers.values()
        planned = PlannedDelta(
            name=delta.name,
            delta_type=delta.delta_type,
            options=delta.config.to_dict(),
            modules=list(self._carrying(delta, reads)),
            parameters=sum(p.numel() for p in delta.parameters()),
            memory=memory_of(layers, self.optimizer_states),
            positions=sum(layer.extra_positions for layer in layers),
            missed=self._missed(delta.modified_modules),
            warnings=caught,
        )
        self.deltas.append(planned)
        return planned

    def _trainable(self) -> int:
        """Return the number of parameters that train after `freeze_module()`.

        They are the deltas' own, and the backbone's that `unfrozen_modules` names.
        """
        records = known_records(self.backbone)
        frozen = {name for record in records for name in record.shared.frozen}
        kept = {name for record in records for name in record.config.unfrozen_modules or ()}
        trains = [p for p in self.backbone.delta_parameters().values() if p.requires_grad]
        for name, parameter in self.backbone.parameters().items():
            if kept & {"", *ancestors(name)} and (parameter.requires_grad or name in frozen):
                trains.append(parameter)
        return sum({id(p): size(p) for p in trains}.values())

    def _carrying(self, delta: BaseDelta, reads: dict[str, bool]) -> Iterator[PlannedModule]:
        others = tied(self.backbone, [w for w in delta.layers if w in delta.modified_modules])
        for where in self.backbone.modules:
            module, layer = self.backbone.modules[where], delta.layers.get(where)
            if layer is None or layer.watches:
                continue
            yield PlannedModule(
                name=where,
                type=type(module).__name__,
                role=self.roles.get(where),
                block=block_of(where),
                parameters=sum(p.numel() for p in layer.parameters()),
                flops=self._flops(layer, module),
                reads=reads[where],
                tied=others.get(where, []),
                quantised=_quantised(module),
            )

    def _flops(self, layer: DeltaLayer, module: nn.Module) -> Flops | None:
        """Return the operations that a layer adds to a forward; None: unknown.

        Layers that look the same are counted once.
        """
        shapes = [(n, t.shape) for n, t in (*layer.named_parameters(), *layer.named_buffers())]
        shared = layer.shared
        key = type(layer), layer.acts, tuple(shapes), id(shared), type(module), repr(module)
        if key not in self.flops:
            try:
                self.flops[key] = layer.flops(module)
            except Exception:  # a method's own forward may need inputs that are not known here
                self.flops[key] = None
        return self.flops[key]

    def _missed(self, hit: Sequence[str]) -> list[str]:
        """Return the modules that are like a module in `hit`, but not in `hit`."""
        modules = self.backbone.modules
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


def known_roles(backbone: Backbone) -> dict[str, str]:
    """Return {full name of a module: its role}; empty if the structure cannot be read."""
    try:
        return roles_of(backbone)
    except DeltaError:  # a structure that cannot be read has no roles
        return {}


def block_of(name: str) -> str | None:
    """Return the full name of the block around a module: its name up to the first number."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found[0] if found else None


def _kind_of_name(name: str) -> str:
    """Return the end of a name from the last step that is no number; later numbers become "#"."""
    steps = ["#" if step.isdigit() else step for step in name.split(".")]
    last = max((index for index, step in enumerate(steps) if step != "#"), default=0)
    return ".".join(steps[last:])


def _quantised(module: nn.Module) -> str | None:
    if is_packed(module):
        return type(module).__name__
    for parameter in module._parameters.values():
        if parameter is not None and not tensors.is_plain(parameter):
            return None if is_sharded(parameter) else type(parameter).__name__
    return None
