"""All deltas of a backbone: their order, which of them act, and what a module computes."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, overload

from torch import nn

from . import freezing, merging, neighbours
from .addressing import attached, select, survey
from .blocks import block
from .delta import Delta
from .errors import AddressError, DeltaError, DeltaLoadError, nearest
from .layers import kind_of
from .merging import MergeReport
from .order import handle_of, known_records
from .record import Record


@dataclass(frozen=True, repr=False)
class Explanation:
    """What one module computes: `str()` gives the formula and the flow, step by step.

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


class Composition:
    """The attached deltas of a backbone, disabled ones included, in the order in which they act.

    It is a view: it always shows the model as it is now.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise DeltaError(f"composition(model) takes a torch.nn.Module, not {model!r}")
        self.model = model

    def _records(self) -> list[Record]:
        records = attached(self.model)
        names = [record.name for record in records]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise DeltaError(
                f"{type(self.model).__name__} carries several deltas called {twice}: they were "
                "attached through different modules of it; use composition() on those"
            )
        return records

    @property
    def names(self) -> list[str]:
        """The names of the attached deltas, in order."""
        return [record.name for record in self._records()]

    def __iter__(self) -> Iterator[Delta]:
        records, found = self._records(), survey(self.model)
        return iter([handle_of(found, record) for record in records])

    def __len__(self) -> int:
        return len(self._records())

    def __contains__(self, name: object) -> bool:
        records = self._records()
        return any(name.record is r if isinstance(name, Delta) else name == r.name for r in records)

    def __getitem__(self, name: str) -> Delta:
        (record,) = self._named([name], self._records())
        return handle_of(survey(self.model), record)

    def __repr__(self) -> str:
        return f"composition of {type(self.model).__name__}: {self.names}"

    def _named(self, names: Iterable[str | Delta], among: list[Record]) -> list[Record]:
        records = {record.name: record for record in among}
        chosen = []
        for given in [names] if isinstance(names, str) else names:
            if not isinstance(given, str | Delta):
                raise DeltaError(f"{given!r} must be a delta or the name of one, by itself")
            name = given.name if isinstance(given, Delta) else given
            if name not in records or (
                isinstance(given, Delta) and given.record is not records[name]
            ):
                raise DeltaError(self._not_attached(given, records))
            chosen.append(records[name])
        return chosen

    def _not_attached(self, given: str | Delta, attached: Collection[str]) -> str:
        """That no such delta is attached, and what to do."""
        name = given.name if isinstance(given, Delta) else given
        if isinstance(given, Delta) and name in attached:
            return (
                f"this {name!r} is a delta of another model, such as the one that this "
                f"{type(self.model).__name__} is a copy of: give its name, or the handle "
                f"composition(model)[{name!r}]"
            )
        text = f"no delta {name!r} is attached to {type(self.model).__name__}; "
        for record in known_records(survey(self.model)):
            own = not isinstance(given, Delta) or given.record is record
            if own and record.name == name and name not in attached:
                return f"{text}it is detached: call attach() of it first"
        near = nearest(name, attached)
        return f"{text}attached are {list(attached)}" + (f"; nearest: {near[0]!r}" if near else "")

    def reorder(self, names: Iterable[str | Delta]) -> None:
        """Let the attached deltas act in this order.

        A detached delta that somebody holds keeps its distance to the start of the order.

        Args:
            names: all attached deltas, each once.

        Raises:
            DeltaError: a name is missing, unknown or given twice. Nothing is changed then.
        """
        records, found = self._records(), survey(self.model)
        if not isinstance(names, Iterable):
            raise DeltaError(f"reorder takes a list of all attached deltas, not {names!r}")
        wanted = self._named(names, records)
        if len(set(map(id, wanted))) < len(wanted) or len(wanted) < len(records):
            raise DeltaError(
                f"reorder takes each attached delta once: {[record.name for record in records]}; "
                f"given: {[record.name for record in wanted]}"
            )
        for record in records if wanted != records else ():
            merging.check_apart(record, "cannot move deltas around")
        places = [record.place for record in records]
        for place, record in zip(places, wanted, strict=True):
            record.place = place
        for stack in found.stacks.values():
            stack.sort()

    @block
    def only(self, *names: str | Delta) -> Iterator[Composition]:
        """Let just these deltas act inside a `with` block; none of them: the plain backbone.

        With activation checkpointing call `backward()` inside, as it runs the model again.
        """
        known = freezing.all_inside(self.model)
        records = self._records() if known is None else known
        chosen = self._named(names, records)
        before = [(record, record.active) for record in records]
        for record, active in before:
            if active != (record in chosen):
                merging.check_apart(record, "cannot switch")
        for record, _ in before:
            record.active = record in chosen
        try:
            yield self
        finally:
            for record, active in before:
                record.active = active or record.merged > 0  # merged inside, it acts

    @block
    def frozen(self) -> Iterator[Composition]:
        """Serve faster inside a `with` block, in which no delta's values change.

        Neighbouring low-rank layers of a module keep their joined matrices from one forward to the
        next. Switching, scaling, reordering, attaching and detaching inside are safe.

        Raises:
            DeltaError: a forward inside would have to give the deltas gradients; or, at the end,
                their values changed inside, so that outputs were those of the old ones.

        Example:
            >>> import torch
            >>> import opendelta
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
            >>> delta = opendelta.LoraModel(model, modified_modules=["0"])
            >>> with torch.no_grad(), opendelta.composition(model).frozen():
            ...     out = model(torch.ones(1, 8))
        """
        stacks = [s for s in survey(self.model).stacks.values() if s.frozen is None]
        kept = [neighbours.Frozen() for _ in stacks]
        for stack, each in zip(stacks, kept, strict=True):
            stack.__dict__["frozen"] = each  # past nn.Module, which looks long at each attribute
        try:
            yield self
        finally:
            for stack in stacks:
                stack.__dict__.pop("frozen", None)
        if any(each.changed() for each in kept):
            raise DeltaError(
                f"values of deltas of {type(self.model).__name__} changed inside frozen(), where "
                "outputs were those of the old ones; change them outside of it"
            )

    def merge(self, *names: str | Delta) -> MergeReport:
        """Fold deltas into the weights of their modules, where they act at no cost.

        A layer folds only if all beneath it on its module do. Without names the longest run that
        folds is taken on each module, and the rest acts on top of it as before. Merged deltas stay
        attached, and are taken out again by `unmerge`; until then they cannot be switched,
        detached or moved, and training them changes nothing. The old weights are kept meanwhile,
        in as much memory as the new ones take.

        Args:
            names: the deltas to merge whole. None: what folds of all of them.

        Returns:
            What was merged and what was left, and the errors of requantised weights.

        Raises:
            SiteError: a delta does not fold, or stands on one that does not or is not merged; a
                weight is tied, sharded or without values; a result is not finite. Nothing is
                changed then.
        """
        return merging.merge(
            survey(self.model), self._named(names, self._records()) if names else None
        )

    def unmerge(self) -> None:
        """Put the weights back, bit for bit, as they were before the first `merge`.

        Raises:
            DeltaError: a merged weight was changed since. Nothing is changed then.
        """
        merging.unmerge(survey(self.model))

    def to_backbone(self) -> nn.Module:
        """A plain model of the same class whose weights hold all that acts on this one.

        It has no deltas, so that `save_pretrained` and `from_pretrained` treat it as any other. It
        shares the tensors that no delta changed with this model, which stays as it is; modules that
        acting deltas own stand in their places.

        Raises:
            SiteError: something that acts does not fold, or a weight is tied or sharded.
        """
        from .copies import to_backbone

        return to_backbone(self.model)

    def save(self, folder: str | os.PathLike) -> None:
        """Save all attached deltas as one: tensors, options, order, activity, what trains.

        `opendelta.load(folder, model)` brings them back bit for bit. The folder gets one JSON file
        and one safetensors file, and holds either its old or its new content at any moment.
        Backbone modules that train in place by name are saved too, as by `Delta.save_finetuned`.

        Raises:
            DeltaError: no delta is attached, or the folder holds something else.
        """
        from . import checkpoint

        checkpoint.save(self._to_save(), folder)

    def _to_save(self) -> list[Delta]:
        deltas = list(self)
        if not deltas:
            raise DeltaError(
                f"no delta is attached to {type(self.model).__name__}: nothing to save"
            )
        return deltas

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, token: str | None = None
    ) -> str:
        """Save all attached deltas into a repository on the Hugging Face hub; its address.

        Args:
            repo_id: "user/name", or "name" for one of one's own; it is made if need be.
            private: whether a new repository is private.
            token: of the user. None: the one that was logged in with.

        Raises:
            DeltaError: no delta is attached, or values are not finite.
            huggingface_hub.errors.HfHubHTTPError: the hub refuses, or is out of reach.
        """
        from . import hub

        return hub.push(self._to_save(), repo_id, private, token)

    def explain(self, module: str) -> Explanation:
        """What a module with deltas computes, as a formula and step by step.

        Args:
            module: its full name, or a pattern that selects just one module with deltas.

        Raises:
            AddressError: nothing is called so, or several modules are.
        """
        found = survey(self.model)
        names = [module] if module in found.modules else select(found.modules, [module], self.model)
        sites = [name for name in names if name in found.stacks] or names
        if len(sites) > 1:
            raise AddressError(
                f"{module!r} selects {len(sites)} modules: {', '.join(sites[:4])}"
                f"{', ...' * (len(sites) > 4)}; give the full name of one"
            )
        where = sites[0]
        target = found.modules[where]
        *_, parent, inner = ["", "", *where.split(".")]
        inner = f"{parent}.{inner}" if parent and inner.isdigit() else inner
        inner = inner or type(target).__name__
        steps = [f"{inner}: {type(target).__name__}{_sizes(target)}"]
        flows: list[tuple[str, str]] = []
        stack = found.stacks.get(where)
        for name, layer in stack.in_order() if stack is not None else ():
            flags = [p.requires_grad for p in layer.parameters()]
            method = layer.record.config.delta_type
            facts = [
                FLOWS[layer.flow] + ("" if method == name else f"; {method}"),
                f"{sum(p.numel() for p in layer.parameters()):,} parameters",
                "active" if layer.record.active else "disabled",
                *([f"scale {layer.record.scale:g}"] if layer.record.scale != 1 else []),
                *(["merged"] if stack is not None and stack.holds(name) else []),
                *(["trains" if any(flags) else "frozen"] if flags else []),
            ]
            steps.append(f"{name}: {', '.join(facts)}")
            if layer.record.active and layer.flow != "none":
                scaled = layer.record.scale != 1 and layer.flow == "beside"
                flows.append((f"{layer.record.scale:g} {name}" if scaled else name, layer.flow))
        return Explanation(where, f"y = {_formula(inner, flows, 'x')}", steps)


FLOWS = {
    "after": "acts on the output",
    "before": "acts on the input",
    "beside": "adds to the output",
    "instead": "takes the module's place",
    "within": "acts inside",
    "none": "serves the delta's other modules",
}


def _formula(inner: str, flows: list[tuple[str, str]], x: str) -> str:
    if not flows:
        return f"{inner}({x})"
    *beneath, (name, flow) = flows
    if flow == "instead":
        return f"{name}({x})"
    if flow == "before":
        return _formula(inner, beneath, f"{name}({x})")
    if flow == "within":
        return _formula(f"{inner}[{name}]", beneath, x)
    below = _formula(inner, beneath, x)
    return f"{below} + {name}({x})" if flow == "beside" else f"{name}({below})"


def _sizes(module: nn.Module) -> str:
    kind = kind_of(module)
    if kind is None or not kind.in_features:
        return ""
    return f" {kind.in_features} -> {kind.out_features}"


def composition(model: nn.Module) -> Composition:
    """The deltas of `model`: `.names`, `[name]`, `.reorder`, `.only`, `.explain`.

    Example:
        >>> from torch import nn
        >>> import opendelta
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> lora = opendelta.LoraModel(model, modified_modules=["0"])
        >>> adapter = opendelta.AdapterModel(model, modified_modules=["0"], name="style")
        >>> c = opendelta.composition(model)
        >>> c.names
        ['lora', 'style']
        >>> c.explain("0").formula
        'y = style(0(x) + lora(x))'
        >>> c.reorder(["style", "lora"])
        >>> c.explain("0").formula
        'y = style(0(x)) + lora(x)'
    """
    return Composition(model)


@dataclass(frozen=True)
class LoadReport:
    """What `load(..., strict=False)` did; true if the deltas are on the model.

    Attributes:
        names: the deltas that were put on the model.
        problem: why none was, in words, or None.
        saved_from: the class of the model that the deltas were on; None where nobody says.
        other_config: {setting of that model's config: (its value there, its value here)}.
        missing: the tensors that the file lacks.
        unexpected: the tensors in the file that the deltas do not have.
        misshaped: {tensor: (its shape in the file, the shape it must have)}.
        other_kind: {tensor: its dtype in the file} of floats for integers, or integers for floats.
        not_finite: a tensor with NaN or infinite values.
        differing: {weight of the backbone: how it differs from what the deltas were trained on}.
    """

    names: list[str]
    problem: str | None = None
    saved_from: str | None = None
    other_config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    other_kind: dict[str, str] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    differing: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.problem is None

    def __str__(self) -> str:
        source = f", saved from a {self.saved_from}" if self.saved_from else ""
        if self:
            other = [f"{k}={was!r} (here {now!r})" for k, (was, now) in self.other_config.items()]
            there = f" with {', '.join(other)}" if other else ""
            return f"loaded {', '.join(self.names)}{source}{there}"
        return f"nothing was loaded: {self.problem}"


@overload
def load(
    folder: str | os.PathLike,
    model: nn.Module,
    *,
    check_backbone: bool = True,
    local_files_only: bool = False,
    strict: Literal[True] = True,
) -> Composition: ...


@overload
def load(
    folder: str | os.PathLike,
    model: nn.Module,
    *,
    check_backbone: bool = True,
    local_files_only: bool = False,
    strict: Literal[False],
) -> LoadReport: ...


def load(
    folder: str | os.PathLike,
    model: nn.Module,
    *,
    check_backbone: bool = True,
    local_files_only: bool = False,
    strict: bool = True,
) -> Composition | LoadReport:
    """Put the deltas that `composition(...).save` or `save_finetuned` wrote on `model`.

    They come after those that are there, in their own order, with the switches that they had; one
    whose name is taken gets the next free one. Everything is compared before the model is touched.
    Folders of OpenDelta 0.3, PEFT and adapters are read too.

    Args:
        folder: the folder, or "user/name" on the hub.
        check_backbone: raise if the weights that the deltas stand on are not those that they were
            trained on, as far as a few values of each tell.
        local_files_only: take what was downloaded from the hub before.
        strict: False: return a report instead of raising.

    Raises:
        DeltaLoadError: the folder is damaged, or does not fit `model`. Nothing is loaded then.
    """
    from . import checkpoint, hub

    try:
        path = hub.folder_of(folder, local_files_only)
        loaded, source = checkpoint.load(path, model, check_backbone=check_backbone)
    except DeltaLoadError as error:
        if strict:
            raise
        return LoadReport([], str(error), **error.details)
    names = [delta.name for delta in loaded]
    if strict:
        return Composition(model)
    other = source.other_config(model)
    return LoadReport(names, saved_from=source.saved_from, other_config=other)
