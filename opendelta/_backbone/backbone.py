"""`Backbone`: a model with sites, as one walk over its modules finds it."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .._layers.base import Acts, DeltaLayer
from .._layers.record import Record
from .._layers.site import Heads, Widths
from .._modules.calls import has_forward
from .._modules.devices import device_and_dtype, is_meta
from .._sites.stack import Stack
from ..errors import DeltaError, OptionError
from ..names import SLOT, ancestors, dotted, join, parent

_given: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()  # {model: the last samples}


def check_inputs(option: str, given: Any) -> None:
    """Raise unless `given` can be the arguments of a model's forward, or is None.

    Args:
        option: the user's name for it.
    """
    by_name = isinstance(given, Mapping) and all(isinstance(key, str) for key in given)
    by_place = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    if given is not None and not (by_name or by_place or isinstance(given, Tensor)):
        raise OptionError(
            f"{option}={reprlib.repr(given)} must be the arguments of the model's forward: a "
            "mapping {argument: tensor, ...}, a sequence (tensor, ...) or one tensor"
        )


@dataclass
class Backbone:
    """A model with sites, as one walk over its modules finds it; each verb makes one.

    Attributes:
        model: the user's model.
        modules: {full name: module} without the deltas; a module that is registered twice has two
            entries.
        stacks: {full name of the site: its stack}; each stack has one entry.
        samples: the user's inputs for a run on shapes: a mapping, a sequence or a tensor; or None.
        before: inputs that the user gave for the model earlier, after `recall`; they are tried
            first where there are no `samples`.
        read: {facts of a module: {child whose weight a run of it reads: it is called too}}, as far
            as somebody asked.
        widths: {full name of a module: its widths}, as far as runs on shapes have found them.
        heads: {full name of a module: its attention heads}, likewise.
        roles: {full name of a module: (its role, the reason)}; None: not looked for yet.
    """

    model: nn.Module
    modules: dict[str, nn.Module] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)
    samples: Any = None
    before: Any = None
    read: dict[tuple, dict[str, bool]] = field(default_factory=dict)
    widths: dict[str, Widths] = field(default_factory=dict)
    heads: dict[str, Heads] = field(default_factory=dict)
    roles: dict[str, tuple[str, str]] | None = None
    _computing: dict[str, tuple[torch.device, torch.dtype]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, samples: Any = None) -> Backbone:
        """Walk over the modules of `model` once.

        Raises:
            OptionError: `model` is no module, or `samples` are no inputs.
        """
        if not isinstance(model, nn.Module):
            raise OptionError(f"model must be a torch.nn.Module, not {reprlib.repr(model)}")
        check_inputs("sample_inputs", samples)
        backbone = cls(model, samples=samples)
        if samples is not None:
            _given[model] = samples
        seen: set[int] = set()
        todo: list[tuple[str, nn.Module]] = [("", model)]
        while todo:
            name, module = todo.pop()
            backbone.modules[name] = module
            start = dotted(name)
            for key, child in reversed(module._modules.items()):
                if isinstance(child, Stack):
                    if id(child) not in seen:
                        seen.add(id(child))
                        backbone.stacks[name] = child
                elif child is not None:
                    todo.append((f"{start}{key}", child))
        return backbone

    def recall(self) -> None:
        """Let a run on shapes try the inputs first that the user gave last, as when attaching."""
        self.before = _given.get(self.model)

    def bare(self) -> Backbone:
        """Return the same backbone without planned deltas; the two share all that runs find."""
        stacks = Backbone.of(self.model).stacks
        return replace(self, stacks=stacks)

    # ------------------------------------------------------------------------------- its modules
    @cached_property
    def is_meta(self) -> bool:
        """True if every tensor of the model is on the meta device and no hook will load it."""
        return is_meta(self.model)

    def chain(self, where: str) -> Iterator[nn.Module]:
        """Yield the module `where`, then its ancestors up to the model."""
        yield self.modules[where]
        while where:
            where = parent(where)
            yield self.modules[where]

    def innermost_around(self, names: Sequence[str]) -> str:
        """Return the full name of the innermost module with a forward that contains all `names`."""
        others = [{*ancestors(name)} for name in names[1:]]
        return next(
            (
                name
                for name in ancestors(names[0])
                if has_forward(self.modules[name]) and all(name in other for other in others)
            ),
            "",
        )

    def device_and_dtype_of(self, where: str) -> tuple[torch.device, torch.dtype]:
        """Return the device and dtype in which the module `where` computes."""
        if where not in self._computing:
            self._computing[where] = device_and_dtype(self.chain(where), self.is_meta)
        return self._computing[where]

    # ------------------------------------------------------------------------------- its deltas
    def delta_layers(self) -> Iterator[tuple[str, str, DeltaLayer]]:
        """Yield (name of the site, name of the delta, layer) of each delta layer."""
        for where, stack in self.stacks.items():
            for name, layer in stack.in_order():
                yield where, name, layer

    def records(self) -> list[Record]:
        """Return the records of the attached deltas, in their total order."""
        return _records_of(self.stacks.values())

    def sites(self) -> dict[Record, list[str]]:
        """Return {attached delta: the full names of its layers' sites}, in total order."""
        found: dict[Record, list[str]] = {record: [] for record in self.records()}
        for where, stack in self.stacks.items():
            for layer in stack.values():
                found[layer.record].append(where)
        return found

    def replaced(self) -> set[str]:
        """Return the full names of the sites in whose place an active delta's own copy acts."""
        layers = [(where, layer) for where, _, layer in self.delta_layers()]
        return {where for where, ly in layers if ly.acts is Acts.INSTEAD and ly.record.active}

    # ------------------------------------------------------------------------------- its tensors
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the model's parameters by full name, without deltas; a tied one has each name."""
        return {
            join(name, key): parameter
            for name, module in self.modules.items()
            for key, parameter in module._parameters.items()
            if parameter is not None
        }

    def users(self) -> dict[int, list[str]]:
        """Return {id of a parameter: the full names of the modules that have it}."""
        users: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            for parameter in module._parameters.values():
                if parameter is not None:
                    users.setdefault(id(parameter), []).append(name)
        return users

    def tensors(self) -> dict[str, Tensor]:
        """Return the model's parameters and persistent buffers by full name, without deltas."""
        buffers = {
            join(name, key): buffer
            for name, module in self.modules.items()
            for key, buffer in module._buffers.items()
            if buffer is not None and key not in module._non_persistent_buffers_set
        }
        return {**self.parameters(), **buffers}

    def delta_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all attached deltas by full name."""
        prefixes = {where: dotted(join(where, SLOT)) for where in self.stacks}
        return {
            f"{prefixes[where]}{name}": parameter
            for where, stack in self.stacks.items()
            for name, parameter in stack.named_parameters()
        }

    # ------------------------------------------------------------------------------- its guards
    def require_unrouted(self, verb: str) -> None:
        """Raise inside `route()`, where the rows of a batch take different deltas.

        Raises:
            DeltaError: the model is inside `route()`.
        """
        if any(stack.routed is not None for stack in self.stacks.values()):
            raise DeltaError(
                f"{verb} inside opendelta.route(), where rows take different deltas: do so before "
                "or after its block"
            )

    def require_above_merged(self, layers: Mapping[str, DeltaLayer], order: list[Record]) -> None:
        """Raise if new layers would act beneath layers that are merged into the weights.

        For layers that act BESIDE this is allowed: a sum has no order.

        Args:
            layers: the new layers by full name of their site.
            order: all deltas in the order in which they will act.

        Raises:
            DeltaError: a new layer would act beneath a merged one.
        """
        for where, layer in layers.items():
            stack = self.stacks.get(where)
            for name in (
                stack.merged() if stack is not None and layer.acts is not Acts.SERVES else ()
            ):
                over: Any = stack[name]  # type: ignore[index]
                ranks = order.index(layer.record), order.index(over.record)
                if layer.record.name in over.record.config.children:
                    over.record.require_apart(f"cannot put {layer.record.name!r} into")
                if name in layer.record.config.children:
                    over.record.require_apart(f"cannot let {layer.record.name!r} combine")
                if layer.acts is Acts.INSTEAD or (
                    ranks[0] < ranks[1] and {layer.acts, over.acts} != {Acts.BESIDE}
                ):
                    over.record.require_apart(f"cannot put {layer.record.name!r} beneath")


def attached_records(model: nn.Module) -> list[Record]:
    """Return the attached deltas of `model` in total order; it is faster than `Backbone`."""
    stacks: list[Stack] = []
    level: list[nn.Module] = [model]
    while level:
        below = [child for module in level for child in module._modules.values()]
        level = []
        for child in below:
            if isinstance(child, Stack):
                stacks.append(child)
            elif child is not None:
                level.append(child)
    return _records_of(stacks)


def _records_of(stacks: Iterable[Stack]) -> list[Record]:
    alike: dict[tuple, Stack] = {}  # one stack for each set of deltas: there may be thousands
    for stack in stacks:
        for first in stack.values():
            alike.setdefault((first.record.shared, *stack._modules), stack)
            break
    found = {layer.record for stack in alike.values() for layer in stack.values()}
    return sorted(found, key=lambda record: record.rank)
