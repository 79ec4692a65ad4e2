"""All deltas of a backbone: order, switch, merge, save and explain them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from .._backbone.backbone import Backbone
from .._checkpoint import hub, saving
from .._deltas import state_dict
from .._deltas.blocks import with_children
from .._deltas.order import attached_by_name, attached_once, handle_of, handles_of, rerank
from .._layers import runs
from .._layers.selection import OpenBlock
from .._modules.process import one_at_a_time
from .._show.explaining import Explanation, deltas_table, explain
from .._show.notebooks import InNotebooks
from .._verbs import merging
from .._verbs.copying import to_backbone
from .._verbs.merging import MergeReport
from ..errors import DeltaError, OptionError, shown
from .delta import Delta
from .with_block import with_block

if TYPE_CHECKING:  # rich is imported where something is drawn
    from rich.console import Console, ConsoleOptions, RenderResult

Model = TypeVar("Model", bound=nn.Module)


class Composition(InNotebooks, Generic[Model]):
    """The attached deltas of a backbone, in the order in which they act; disabled ones too.

    It is a view: it always shows the model as it is now.
    """

    model: Model

    def __init__(self, model: Model) -> None:
        if not isinstance(model, nn.Module):
            raise DeltaError(f"composition(model) takes a torch.nn.Module, not {model!r}")
        self.model = model

    @property
    def names(self) -> list[str]:
        """Return the names of the attached deltas, in order."""
        return [record.name for record in attached_once(self.model)]

    def __iter__(self) -> Iterator[Delta]:
        records, backbone = attached_once(self.model), Backbone.of(self.model)
        return iter(cast(list[Delta], handles_of(backbone, records)))

    def __len__(self) -> int:
        return len(attached_once(self.model))

    def __contains__(self, name: object) -> bool:
        records = attached_once(self.model)
        return any(name.record is r if isinstance(name, Delta) else name == r.name for r in records)

    def __getitem__(self, name: str | Delta) -> Delta:
        (record,) = attached_by_name(self.model, [name], attached_once(self.model))
        return cast(Delta, handle_of(Backbone.of(self.model), record))

    def __repr__(self) -> str:
        return f"composition of {type(self.model).__name__}: {self.names}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield deltas_table(Backbone.of(self.model))

    @one_at_a_time
    def reorder(self, names: Iterable[str | Delta]) -> None:
        """Let the attached deltas act in this order.

        A detached delta that is still in a variable keeps its distance to the start of the order.

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
        rerank(backbone, dict(zip(wanted, [record.rank for record in records], strict=True)))

    @with_block
    def only(self, *names: str | Delta) -> Iterator[Composition[Model]]:
        """Let only these deltas act inside a `with` block; without names, the plain backbone.

        A block (`FuseModel` and others) that is named without any delta in it brings all of them.

        The block belongs to the thread and task that enters it; others see nothing of it. A thread
        that is started inside has the block with a copy of the context:
        `Thread(target=contextvars.copy_context().run, args=(model.generate, ids))`. Activation
        checkpointing runs the model again as in the forward, wherever `backward()` is called. A
        copy that is made inside (deepcopy, pickle, a saved folder) keeps the block's choice.
        """
        known = state_dict.all_inside(self.model)
        records = attached_once(self.model) if known is None else known
        chosen = with_children(attached_by_name(self.model, names, records), records)
        switches = {record: record in chosen for record in records}
        for record, active in switches.items():
            if record.merged and active != record.active:
                record.require_apart("cannot switch")
        backbones = {record.shared for record in records}
        with OpenBlock(switches, backbones=backbones):
            yield self

    def switches(self) -> dict[str, Tensor]:
        """Return the order, `active` and `scale` of the deltas, which no `state_dict()` holds.

        Save them beside a checkpoint of the model, or hand them to its average (EMA), and give them
        to `load_switches` there.

        Returns:
            {"<name>.active": a bool, "<name>.scale": a float64, "<name>.position": an int64}, each
            a tensor without dimensions; a delta at position 0 acts first.
        """
        found: dict[str, Tensor] = {}
        for position, delta in enumerate(self):
            found[f"{delta.name}.position"] = torch.tensor(position)
            found[f"{delta.name}.active"] = torch.tensor(delta.active)
            found[f"{delta.name}.scale"] = torch.tensor(delta.scale, dtype=torch.float64)
        return found

    def load_switches(self, switches: Mapping[str, Tensor]) -> None:
        """Set the order, `active` and `scale` of the deltas to those that `switches()` returned.

        Raises:
            DeltaError: they are those of other deltas, or a delta that is merged would change.
                Nothing is changed then.
            OptionError: they are no tensors by key, a scale is none for its delta, or the positions
                are no order. Nothing is changed then.
        """
        if not isinstance(switches, Mapping):
            raise OptionError(f"switches={shown(switches)} must be what switches() returned")
        before = self.switches()
        if before.keys() != switches.keys():
            raise DeltaError(
                f"load_switches takes what switches() returned for deltas of the same names: "
                f"missing are {sorted(before.keys() - switches.keys())}, unexpected are "
                f"{sorted(switches.keys() - before.keys())}"
            )
        try:
            self._set(switches)
        except BaseException:
            self._set(before)
            raise

    def _set(self, switches: Mapping[str, Tensor]) -> None:
        places = {name: _number(f"{name}.position", switches) for name in self.names}
        if sorted(places.values()) != [*range(len(places))]:
            raise OptionError(
                f"the positions {places} are no order: they must be 0 to {len(places) - 1}, each "
                "once"
            )
        self.reorder([name for _, name in sorted((place, name) for name, place in places.items())])
        for delta in self:
            delta.scale = _number(f"{delta.name}.scale", switches)
            active = _number(f"{delta.name}.active", switches)
            if active not in (0, 1):
                raise OptionError(
                    f"{delta.name}.active is {active:g} and must be 0 or 1: a switch has no average"
                )
            delta.record.switch(bool(active))

    @with_block
    def frozen(self) -> Iterator[Composition[Model]]:
        """Make inference faster inside a `with` block in which no delta's values change.

        Consecutive low-rank layers of a module keep their joined matrices from one forward to the
        next. Inside, it is safe to switch, scale, reorder, attach and detach. The block belongs to
        the thread and task that enters it.

        Raises:
            DeltaError: a forward inside would have to compute gradients for deltas. Or, at the end
                of the block: values changed inside, and outputs used the old values.

        Example:
            >>> import torch
            >>> import opendelta
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
            >>> delta = opendelta.LoraModel(model, modified_modules=["0"])
            >>> with torch.no_grad(), opendelta.composition(model).frozen():
            ...     out = model(torch.ones(1, 8))
        """
        backbone = Backbone.of(self.model)
        kept = {
            stack: runs.KeptFactors(backbone.device_and_dtype_of(where)[1])
            for where, stack in backbone.stacks.items()
        }
        with OpenBlock(factors=kept):
            yield self
        if any(each.changed() for each in kept.values()):
            raise DeltaError(
                f"values of deltas of {type(self.model).__name__} changed inside frozen(), where "
                "outputs were those of the old ones; change them outside of it"
            )

    def merge(self, *names: str | Delta) -> MergeReport:
        """Fold deltas into the weights of their modules; merged deltas act at no cost.

        A layer folds only if all layers beneath it on its module fold. Without names, each module
        merges as many layers as fold, from the innermost on; the others act on top as before.

        Merged deltas stay attached, and `unmerge` takes them out again. Until then they cannot be
        switched, detached or moved, and training them changes nothing. The old weights are kept
        until then; they take as much memory as the new weights.

        Args:
            names: the deltas to merge whole. None: merge all layers that fold.

        Returns:
            A report of the merged deltas, the other ones, and the errors of requantised weights.

        Raises:
            SiteError: a delta does not fold, or a layer beneath it does not fold or is not merged;
                a weight is tied, sharded or without values; a result is not finite. Nothing is
                changed then.
        """
        return merging.merge(
            Backbone.of(self.model),
            attached_by_name(self.model, names, attached_once(self.model)) if names else None,
        )

    def unmerge(self) -> None:
        """Put back the weights from before the first `merge`, bit for bit.

        Raises:
            DeltaError: a merged weight was changed since the merge. Nothing is changed then.
        """
        merging.unmerge(Backbone.of(self.model))

    def to_backbone(self) -> Model:
        """Return a plain model of the same class, with all active deltas in its weights.

        It has no deltas, so `save_pretrained` and `from_pretrained` treat it as any other model. It
        shares the tensors that no delta changed with this model. This model stays as it is. A
        module that an active delta owns takes its place in the plain model.

        Raises:
            SiteError: an active layer does not fold, or a weight is tied or sharded.
        """
        return to_backbone(self.model)

    def save(self, folder: str | os.PathLike) -> None:
        """Save all attached deltas into one folder: tensors, options, order and switches.

        `opendelta.load(folder, model)` brings them back bit for bit. The folder gets one JSON file
        and one safetensors file, and holds either its old or its new content at any moment.
        Backbone parameters that were left trainable by name are saved too, as by
        `Delta.save_finetuned`.

        Raises:
            DeltaError: no delta is attached, or the folder holds other files.
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
        """Save all attached deltas into a repository on the Hugging Face hub; return its address.

        Args:
            repo_id: "user/name", or "name" for the user's own repository; it is made if need be.
            private: make a new repository private.
            token: the user's token. None: the token of the user who is logged in.

        Raises:
            DeltaError: no delta is attached, or values are not finite.
            huggingface_hub.errors.HfHubHTTPError: the hub refuses, or is out of reach.
        """
        return hub.push(self._to_save(), repo_id, private, token)

    def explain(self, module: str) -> Explanation:
        """Explain the computation of a module with deltas, as a formula and step by step.

        Args:
            module: its full name, or a pattern that selects just one module with deltas.

        Raises:
            AddressError: the name or pattern selects no module, or several modules.
        """
        return explain(Backbone.of(self.model), module)


def composition(model: Model) -> Composition[Model]:
    """Return the deltas of `model`, with `.names`, `[name]`, `.reorder`, `.only`, `.explain`.

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


def _number(key: str, switches: Mapping[str, Any]) -> float:
    """Return the number in a tensor of `switches()`."""
    value = switches[key]
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if not isinstance(value, int | float):
        raise OptionError(f"{key} must be one real number with a value, not {shown(value)}")
    return float(value)
