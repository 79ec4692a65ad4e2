"""All deltas of a backbone: their order, which of them act, and what a module computes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar, cast

from torch import nn

from .._backbone.backbone import Backbone
from .._checkpoint import hub, saving
from .._deltas import state_dict
from .._deltas.order import attached_by_name, attached_once, handle_of
from .._show.explaining import Explanation, explain
from .._sites import runs
from .._verbs import merging
from .._verbs.copying import to_backbone
from .._verbs.merging import MergeReport
from ..errors import DeltaError
from .delta import Delta
from .with_block import with_block

Model = TypeVar("Model", bound=nn.Module)


class Composition(Generic[Model]):
    """The attached deltas of a backbone, disabled ones included, in the order in which they act.

    It is a view: it always shows the model as it is now.
    """

    model: Model

    def __init__(self, model: Model) -> None:
        if not isinstance(model, nn.Module):
            raise DeltaError(f"composition(model) takes a torch.nn.Module, not {model!r}")
        self.model = model

    @property
    def names(self) -> list[str]:
        """The names of the attached deltas, in order."""
        return [record.name for record in attached_once(self.model)]

    def __iter__(self) -> Iterator[Delta]:
        records, backbone = attached_once(self.model), Backbone.of(self.model)
        return iter([cast(Delta, handle_of(backbone, record)) for record in records])

    def __len__(self) -> int:
        return len(attached_once(self.model))

    def __contains__(self, name: object) -> bool:
        records = attached_once(self.model)
        return any(name.record is r if isinstance(name, Delta) else name == r.name for r in records)

    def __getitem__(self, name: str) -> Delta:
        (record,) = attached_by_name(self.model, [name], attached_once(self.model))
        return cast(Delta, handle_of(Backbone.of(self.model), record))

    def __repr__(self) -> str:
        return f"composition of {type(self.model).__name__}: {self.names}"

    def reorder(self, names: Iterable[str | Delta]) -> None:
        """Let the attached deltas act in this order.

        A detached delta that somebody holds keeps its distance to the start of the order.

        Args:
            names: all attached deltas, each once.

        Raises:
            DeltaError: a name is missing, unknown or given twice. Nothing is changed then.
        """
        records, backbone = attached_once(self.model), Backbone.of(self.model)
        if not isinstance(names, Iterable):
            raise DeltaError(f"reorder takes a list of all attached deltas, not {names!r}")
        wanted = attached_by_name(self.model, names, records)
        if len(set(map(id, wanted))) < len(wanted) or len(wanted) < len(records):
            raise DeltaError(
                f"reorder takes each attached delta once: {[record.name for record in records]}; "
                f"given: {[record.name for record in wanted]}"
            )
        for record in records if wanted != records else ():
            record.require_apart("cannot move deltas around")
        places = [record.rank for record in records]
        for place, record in zip(places, wanted, strict=True):
            record.rank = place
        for stack in backbone.stacks.values():
            stack.sort()

    @with_block
    def only(self, *names: str | Delta) -> Iterator[Composition[Model]]:
        """Let just these deltas act inside a `with` block; none of them: the plain backbone.

        With activation checkpointing call `backward()` inside, as it runs the model again.
        """
        known = state_dict.all_inside(self.model)
        records = attached_once(self.model) if known is None else known
        chosen = attached_by_name(self.model, names, records)
        before = [(record, record.active) for record in records]
        for record, active in before:
            if active != (record in chosen):
                record.require_apart("cannot switch")
        for record, _ in before:
            record.active = record in chosen
        try:
            yield self
        finally:
            for record, active in before:
                record.active = active or record.merged > 0  # merged inside, it acts

    @with_block
    def frozen(self) -> Iterator[Composition[Model]]:
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
        stacks = [s for s in Backbone.of(self.model).stacks.values() if s.kept_factors is None]
        kept = [runs.KeptFactors() for _ in stacks]
        for stack, each in zip(stacks, kept, strict=True):
            stack.__dict__["kept_factors"] = (
                each  # past nn.Module, which looks long at each attribute
            )
        try:
            yield self
        finally:
            for stack in stacks:
                stack.__dict__.pop("kept_factors", None)
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
            Backbone.of(self.model),
            attached_by_name(self.model, names, attached_once(self.model)) if names else None,
        )

    def unmerge(self) -> None:
        """Put the weights back, bit for bit, as they were before the first `merge`.

        Raises:
            DeltaError: a merged weight was changed since. Nothing is changed then.
        """
        merging.unmerge(Backbone.of(self.model))

    def to_backbone(self) -> Model:
        """A plain model of the same class whose weights hold all that acts on this one.

        It has no deltas, so that `save_pretrained` and `from_pretrained` treat it as any other. It
        shares the tensors that no delta changed with this model, which stays as it is; modules that
        acting deltas own stand in their places.

        Raises:
            SiteError: something that acts does not fold, or a weight is tied or sharded.
        """
        return to_backbone(self.model)

    def save(self, folder: str | os.PathLike) -> None:
        """Save all attached deltas as one: tensors, options, order, activity, what trains.

        `opendelta.load(folder, model)` brings them back bit for bit. The folder gets one JSON file
        and one safetensors file, and holds either its old or its new content at any moment.
        Backbone modules that train in place by name are saved too, as by `Delta.save_finetuned`.

        Raises:
            DeltaError: no delta is attached, or the folder holds something else.
        """
        saving.save(self._to_save(), folder)

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
        return hub.push(self._to_save(), repo_id, private, token)

    def explain(self, module: str) -> Explanation:
        """What a module with deltas computes, as a formula and step by step.

        Args:
            module: its full name, or a pattern that selects just one module with deltas.

        Raises:
            AddressError: nothing is called so, or several modules are.
        """
        return explain(Backbone.of(self.model), module)


def composition(model: Model) -> Composition[Model]:
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
