"""Explain one module and its deltas: as a formula and step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from .._backbone.backbone import Backbone
from .._backbone.patterns import only_one, select
from .._layers.base import WITHIN, Acts, DeltaLayer, X
from .._layers.bound import arranged
from .._layers.record import Record
from .._modules.kinds import kind_of
from .._sites.stack import Stack
from ..names import join, last, parent
from .notebooks import InNotebooks
from .tables import cells, folded, plain_table

if TYPE_CHECKING:  # rich is imported where something is drawn
    from rich.table import Table


@dataclass(frozen=True, repr=False)
class Explanation(InNotebooks):
    """The computation of one module; `str()` gives the formula and the steps.

    Attributes:
        module: full name of the module.
        formula: such as `y = adapter(fc2(x) + lora(x))`.
        steps: the module and its deltas from the inside out, one line each.
    """

    module: str
    formula: str
    steps: list[str]

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        arrows = ["x", *(f"  -> {step}" for step in self.steps), "y"]
        return "\n".join([f"{self.module or 'the root'}:  {self.formula}", *arrows])


def explain(backbone: Backbone, module: str) -> Explanation:
    """Explain the module that a full name or a pattern selects; see `Composition.explain`."""
    where = _one(backbone, module)
    target, stack = backbone.modules[where], backbone.stacks.get(where)
    on_it = stack.in_order() if stack is not None else []
    inner = _name_in_formula(where, target)
    steps = [f"{inner}: {type(target).__name__}{_sizes(target)}"]
    steps += [_step(stack, name, layer) for name, layer in on_it if stack is not None]
    return Explanation(where, f"y = {_formula(inner, on_it)}", steps)


def _one(backbone: Backbone, module: str) -> str:
    """Return the full name of the only module with deltas that `module` selects.

    If it selects one module, and this has no deltas, that is the module.
    """
    names = [module]
    if module not in backbone.modules:
        names = select(backbone.modules, [module], backbone.model)
    return only_one(module, [name for name in names if name in backbone.stacks] or names)


def _name_in_formula(where: str, module: nn.Module) -> str:
    """Return the last step of a full name; if it is a number, the last two steps."""
    around, step = last(parent(where)), last(where)
    return (join(around, step) if step.isdigit() else step) or type(module).__name__


def _step(stack: Stack, name: str, layer: DeltaLayer) -> str:
    """Return a line about one layer: its kind of action, parameters and state."""
    record = layer.record
    method = record.config.delta_type
    children = record.config.children
    acts = f"combines {', '.join(children)}" if children else layer.acts.value
    facts = [
        acts + ("" if method == name else f"; {method}"),
        f"{sum(p.numel() for p in layer.parameters()):,} parameters",
        *_state(record, stack.holds(name), list(layer.parameters())),
    ]
    return f"{name}: {', '.join(facts)}"


def _state(record: Record, merged: bool, parameters: list[nn.Parameter]) -> list[str]:
    """Return the state of a delta in words, such as "active", "scale 0.5", "frozen"."""
    trains = any(p.requires_grad for p in parameters)
    return [
        "active" if record.active else "disabled",
        *([f"scale {record.scale:g}"] if record.scale != 1 else []),
        *(["merged"] if merged else []),
        *(["trains" if trains else "frozen"] if parameters else []),
    ]


def deltas_table(backbone: Backbone) -> Table:
    """Return a table of the attached deltas in their order: where they are, and their state."""
    table = plain_table(f"deltas of {type(backbone.model).__name__}", "delta", "method", "where")
    table.columns[0].style = "magenta"
    table.add_column("parameters", justify="right")
    table.add_column("state")
    layers: dict[Record, list[tuple[str, DeltaLayer]]] = {r: [] for r in backbone.records()}
    for where, _, layer in backbone.delta_layers():
        layers[layer.record].append((where, layer))
    for record, own in layers.items():
        tensors = list({id(p): p for _, ly in own for p in ly.parameters()}.values())
        places = folded(where for where, layer in own if layer.computes)
        count, state = sum(p.numel() for p in tensors), _state(record, bool(record.merged), tensors)
        method = record.config.delta_type
        table.add_row(*cells(record.name, method, places, f"{count:,}", ", ".join(state)))
    return table


def _formula(inner: str, on_it: list[tuple[str, DeltaLayer]]) -> str:
    """Return the formula of a module called `inner` with its active layers around it."""
    acting = arranged([layer for _, layer in on_it if layer.record.active])
    inside = [ly for ly in acting if ly.acts is Acts.WITHIN and not ly.is_block]
    within = [f"[{layer.record.name}]" for layer in reversed(inside)]

    formula = f"{inner}{''.join(within)}{WITHIN}({X})"
    for layer in acting:
        formula = layer.formula(layer.record.name, formula)
    return formula.replace(WITHIN, "").replace(X, "x")


def _sizes(module: nn.Module) -> str:
    kind = kind_of(module)
    if kind is None or not kind.in_features:
        return ""
    return f" {kind.in_features} -> {kind.out_features}"
