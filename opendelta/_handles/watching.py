"""See in a `with` block how blocks weighed their deltas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._backbone.backbone import Backbone
from .._backbone.patterns import only_one, select
from .._deltas.base import BaseDelta
from .._deltas.order import attached_by_name, attached_once
from .._layers.seen import Edge, Runs, Seen, Weighing, together
from .._layers.selection import OpenBlock
from ..errors import DeltaError, LostGradientWarning, OptionError, listed, warn
from .delta import Delta
from .with_block import with_block


class OnModules(dict[str, Tensor]):
    """Tensors by the full names of modules; an end of just one of these names finds it too."""

    def __init__(self, model: nn.Module, found: Mapping[str, Tensor]) -> None:
        super().__init__(found)
        self.model = model

    def __missing__(self, end: str) -> Tensor:
        return self[only_one(end, select(self, [end], self.model))]

    def __reduce__(self) -> tuple:  # a copy is a plain dict, without the model
        return dict, (dict(self),)


class Watched(Mapping[str, dict[str, Tensor]]):
    """The weights that blocks gave in the last forward, with their graph.

    `watched["moe"]["layer.0.query"]` is a tensor [..., n]: the weight of each of the n deltas at
    each position of that module's input, or [n] if they are the same everywhere; [batch, 1, n] if
    they are the same at all positions of a row. A delta that did not act has the weight 0. A module
    that ran several times has [runs, ...], or [all positions, n] if its inputs had other shapes. A
    block is given by its name or handle, a module by its full name or an end of it.
    """

    def __init__(self, model: nn.Module, seen: Seen) -> None:
        self.model, self._seen = model, seen

    def _weighings(self, backbone: Backbone | None = None) -> dict[str, dict[str, Runs]]:
        found: dict[str, dict[str, Runs]] = {}
        for where, stack in (backbone or Backbone.of(self.model)).stacks.items():
            for layer in stack.values():
                key = stack, layer.record.name
                if key in self._seen.runs:
                    found.setdefault(layer.record.name, {})[where] = self._seen.runs[key]
        return found

    def __getitem__(self, block: str | Delta) -> dict[str, Tensor]:
        return self._whole(self._of(block), "weights")

    def __iter__(self) -> Iterator[str]:
        return iter(self._weighings())

    def __contains__(self, block: object) -> bool:
        return _name(block) in self._weighings()

    def __len__(self) -> int:
        return len(self._weighings())

    def __repr__(self) -> str:
        shapes = {b: {w: list(t.shape) for w, t in self[b].items()} for b in self}
        return f"watched blocks of {type(self.model).__name__}: {shapes}"

    def _whole(self, found: Mapping[str, Runs], field: str) -> OnModules:
        values = {where: getattr(together(runs), field) for where, runs in found.items()}
        return OnModules(self.model, values)

    def _of(self, block: str | Delta) -> dict[str, Runs]:
        backbone = Backbone.of(self.model)
        (record,) = attached_by_name(self.model, [block], backbone.records())
        found, name = self._weighings(backbone), record.name
        if name not in found:
            why = "run the model inside the `with` block, with the block acting"
            if name in self._seen.acted:
                why = "it acted, but the rule is no weighted sum, and no self.weigh(...) shows some"
            raise DeltaError(
                f"watching() has seen no weights of a block {name!r}, but of {sorted(found)}: {why}"
            )
        return found[name]

    def counted(
        self, block: str | Delta, mask: Tensor | None = None, for_loss: bool = False
    ) -> dict[str, Any]:
        """Return {module: `Weighing`}, with [positions, n] for the positions that count.

        Rows of `route` that do not take the block do not count.

        Args:
            mask: [batch, length]: 0 or False for padding, which does not count.
            for_loss: only weights that are a softmax, and that should have a graph.

        Warns:
            LostGradientWarning: gradients are on and the block trains, but they have none.

        Raises:
            DeltaError: the block has not run, or no weights are a softmax.
            OptionError: the mask is for other positions.
        """
        found = self._softmaxes(block) if for_loss else self._of(block)
        bare = [w for w, runs in found.items() if not all(r.weights.requires_grad for r in runs)]
        if for_loss and bare and torch.is_grad_enabled():
            self._warn_without_graph(_name(block), bare)
        return {where: _counted(where, runs, mask) for where, runs in found.items()}

    def _warn_without_graph(self, name: str, bare: Sequence[str]) -> None:
        """Warn if a block trains on some of these modules, where its weights have no graph."""
        stacks = Backbone.of(self.model).stacks
        layers = {where: stacks[where][name] for where in bare}
        trains = [
            where
            for where, layer in layers.items()
            if layer.training and any(p.requires_grad for p in layer.parameters())
        ]
        if trains:
            warn(
                f"the weights of {name!r} have no graph on {listed(trains)}, so a loss of them "
                "trains nothing: run the forward with gradients, and activation checkpointing with "
                'gradient_checkpointing_kwargs={"use_reentrant": False}',
                LostGradientWarning,
            )

    def logits(self, block: str | Delta) -> dict[str, Tensor]:
        """Return {module: logits [..., n]} of a block whose weights are their softmax.

        They are those of all deltas, before `top_k` leaves some out; -inf for a delta that does not
        act, and in rows of `route` that do not take it.

        Raises:
            DeltaError: the block has no logits, or has not run.
        """
        return self._whole(self._softmaxes(block), "logits")

    def chosen(self, block: str | Delta) -> dict[str, Tensor]:
        """Return {module: booleans [..., n]} of a block whose weights are a softmax.

        True are the `top_k` deltas that a position chose, or the most probable one if it takes all.

        Raises:
            DeltaError: the weights are no softmax, or the block has not run.
        """
        return self._whole(self._softmaxes(block), "chosen")

    def _softmaxes(self, block: str | Delta) -> dict[str, Runs]:
        found = {w: runs for w, runs in self._of(block).items() if runs[0].logits is not None}
        if not found:
            raise DeltaError(
                f"the weights of {_name(block)!r} are no softmax, so they have no logits"
            )
        return found

    def names(self, block: str | Delta) -> list[str]:
        """Return the names of the deltas that a block combines, in the order of its weights."""
        (record,) = attached_by_name(self.model, [block], attached_once(self.model))
        return list(record.config.children)


def _name(block: Any) -> Any:
    return block.name if isinstance(block, BaseDelta) else block


def _counted(where: str, runs: Runs, mask: Tensor | None) -> Weighing:
    """Return the parts [positions, n] of what a block weighed on a module that count."""
    masks = [None] * len(runs) if mask is None else _masks(where, runs, mask)
    counted = together([_that_count(run, own) for run, own in zip(runs, masks, strict=True)])
    fields: list[Any] = [None if each is None else each.flatten(0, -2) for each in counted]
    return Weighing(*fields)


def _that_count(run: Weighing, mask: Tensor | None) -> Weighing:
    counts = run.taken.squeeze(-1)
    counts = counts if mask is None else counts & mask.to(counts)
    fields: list[Any] = [
        None if each is None else each.expand(*counts.shape, -1)[counts] for each in run
    ]
    return Weighing(*fields)


def _masks(where: str, runs: Runs, mask: Tensor) -> Sequence[Tensor]:
    """Return the part of `mask` for each run: all of it, or where a row runs in pieces, a piece.

    Raises:
        OptionError: it is for other positions.
    """
    given = [run.taken.shape[:-1] for run in runs]
    alike = (), (*mask.shape[:1], *[1] * (mask.ndim - 1))  # everywhere, or in all of a row
    if all(own in (mask.shape, *alike) for own in given):
        return [mask] * len(runs)
    sizes = [own[1] for own in given if len(own) == 2 and own[0] == mask.size(0)]
    if mask.ndim == 2 and len(sizes) == len(runs) and sum(sizes) == mask.size(1):
        return mask.split(sizes, 1)
    shapes = ", ".join(dict.fromkeys(str(list(own)) for own in given))
    raise OptionError(f"mask {list(mask.shape)} must be for the positions of {where!r}, {shapes}")


@with_block
def watching(model: nn.Module) -> Iterator[Watched]:
    """See inside a `with` block how the blocks of `model` weigh their deltas in each forward.

    Each forward of `model` replaces what the one before showed; where a part of the model is called
    by itself, each run of a module does. A forward that activation checkpointing runs
    again shows nothing; with `use_reentrant=True` torch runs the first one without a graph, and so
    the weights have none: `balance_loss` and `z_loss` warn of it. Like that of `only`, the `with`
    block belongs to the thread and task that enters it. Code of torch.compile is refused.

    Example:
        >>> import torch
        >>> import opendelta
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> for name in ("a", "b"):
        ...     _ = opendelta.LoraModel(model, modified_modules=["0"], name=name)
        >>> moe = opendelta.GateModel(model, deltas=["a", "b"], name="moe")
        >>> with opendelta.watching(model) as seen:
        ...     out = model(torch.ones(3, 8))
        >>> seen["moe"]["0"].shape
        torch.Size([3, 2])
    """
    seen = Seen()
    records = attached_once(model)
    if not records:
        raise DeltaError(f"no delta is attached to {type(model).__name__}: nothing to watch")
    hooks = [
        model.register_forward_pre_hook(Edge(records[0], seen)),
        model.register_forward_hook(Edge(records[0], seen, begins=False), always_call=True),
    ]
    try:
        with OpenBlock(watchers={record.shared: seen for record in records}):
            yield Watched(model, seen)
    finally:
        for hook in hooks:
            hook.remove()
