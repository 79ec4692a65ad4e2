"""Explain one module and its deltas: as a formula and step by step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .._backbone.backbone import Backbone
from .._backbone.patterns import select
from .._layers.base import Acts, DeltaLayer, X
from .._modules.kinds import kind_of
from .._sites.stack import Stack
from ..errors import AddressError, listed
from ..names import join, last, parent


@dataclass(frozen=True, repr=False)
class Explanation:
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
    sites = [name for name in names if name in backbone.stacks] or names
    if len(sites) > 1:
        raise AddressError(
            f"{module!r} selects {len(sites)} modules: {listed(sites, 4)}"
            f"; give the full name of one",
            pattern=module,
            nearest=sites,
        )
    return sites[0]


def _name_in_formula(where: str, module: nn.Module) -> str:
    """Return the last step of a full name; if it is a number, the last two steps."""
    around, step = last(parent(where)), last(where)
    return (join(around, step) if step.isdigit() else step) or type(module).__name__


def _step(stack: Stack, name: str, layer: DeltaLayer) -> str:
    """Return a line about one layer: its kind of action, parameters and state."""
    flags = [p.requires_grad for p in layer.parameters()]
    record = layer.record
    method = record.config.delta_type
    facts = [
        layer.acts.value + ("" if method == name else f"; {method}"),
        f"{sum(p.numel() for p in layer.parameters()):,} parameters",
        "active" if record.active else "disabled",
        *([f"scale {record.scale:g}"] if record.scale != 1 else []),
        *(["merged"] if stack.holds(name) else []),
        *(["trains" if any(flags) else "frozen"] if flags else []),
    ]
    return f"{name}: {', '.join(facts)}"


def _formula(inner: str, on_it: list[tuple[str, DeltaLayer]]) -> str:
    """Return the formula of a module called `inner` with its active layers around it."""
    acting = [(name, layer) for name, layer in on_it if layer.record.active]
    within = [f"[{name}]" for name, layer in reversed(acting) if layer.acts is Acts.WITHIN]

    formula = f"{inner}{''.join(within)}({X})"
    for name, layer in acting:
        formula = layer.formula(name, formula)
    return formula.replace(X, "x")


def _sizes(module: nn.Module) -> str:
    kind = kind_of(module)
    if kind is None or not kind.in_features:
        return ""
    return f" {kind.in_features} -> {kind.out_features}"
