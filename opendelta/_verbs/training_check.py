"""Check that a model will train: one forward and backward that find common mistakes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .._backbone import engines, shapes, sharding
from .._backbone.apart import apart
from .._backbone.backbone import Backbone, check_inputs
from .._backbone.heads import advice, untrained
from .._backbone.inputs import Samples, of_samples
from .._backbone.shapes import PROBING
from .._deltas import buffers
from .._deltas.first_forward import not_called, unreached_in
from .._layers.seen import Seen, together
from .._layers.selection import OpenBlock
from .._modules.kept import putting_back
from .._modules.process import eager
from .._modules.tensors import lasting, size
from .._show.notebooks import InNotebooks
from ..errors import DeltaError, listed
from ..names import ancestors
from . import gradients, settings
from .optimized import at_rest_in, held_by
from .put_back import put_back
from .reruns import until_all_ran

SHOWN = 4  # names in a list; more are left out


@dataclass(frozen=True)
class CheckReport(InNotebooks):
    """The findings of `check`: true if all is well; `str()` says what to do.

    Attributes:
        model: the class of the backbone.
        unreached: active delta layers that did not run.
        not_called: those of `unreached` where the same layer of an alike module in a list ran, such
            as experts that no token chose.
        unchosen: deltas in blocks that no token of the batch chose, on no module.
        no_gradient: trainable parameters that got no gradient in a backward.
        not_finite: the losses of the batch that are no finite numbers, such as "loss = nan".
        not_optimized: trainable parameters that the optimizer does not hold.
        optimized_twice: parameters that the optimizer holds more than once.
        strangers: number of tensors in the optimizer that are no parameters of the model.
        at_rest: trainable parameters in groups of the optimizer whose learning rate is 0, and
            that no scheduler changes.
        scaled_to_0: active deltas that train, and whose `scale`, or a factor that an option such as
            `lora_alpha` gives, is 0: by name, or by layer if it is so on some modules alone.
        unsynchronised: trainable parameters that DistributedDataParallel or another
            wrapper around the model found frozen, or did not find, so that ranks diverge.
        untrained: heads that are frozen with the values of their start.
        frozen: the active deltas, if none of them trains.
        no_dropout: delta layers with dropout, of which none drops, as they are in eval mode.
        narrow: trainable 16-bit tensors of deltas whose option `dtype` does not ask for 16 bits.
        moving: frozen modules in training mode whose tensors move, such as BatchNorm's statistics,
            though no file of a delta holds them.
        mixed_modes: {full name: "train" or "eval"} of modules in train mode inside a module in eval
            mode, and of delta layers in another mode than the module that they are on.
        trainable_parameters: number of values that train.
        total_parameters: number of all values.
        all_train: no parameter of the backbone is frozen. This may be intended.
        not_checked: the checks that could not be made, each with the reason.
    """

    model: str
    unreached: list[str]
    not_called: list[str] = field(default_factory=list)
    unchosen: list[str] = field(default_factory=list)
    no_gradient: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)
    not_optimized: list[str] = field(default_factory=list)
    optimized_twice: list[str] = field(default_factory=list)
    strangers: int = 0
    at_rest: list[str] = field(default_factory=list)
    scaled_to_0: list[str] = field(default_factory=list)
    unsynchronised: list[str] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    no_dropout: list[str] = field(default_factory=list)
    narrow: list[str] = field(default_factory=list)
    moving: list[str] = field(default_factory=list)
    mixed_modes: dict[str, str] = field(default_factory=dict)
    trainable_parameters: int = 0
    total_parameters: int = 0
    all_train: bool = False
    not_checked: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """True if no check found a problem; see `not_checked` for checks that were not made."""
        return not self.problems

    @property
    def problems(self) -> list[str]:
        """Return the problems: what is wrong, where, and what to do."""
        inside = [f"{name} in {mode} mode" for name, mode in self.mixed_modes.items()]
        found = [
            (_outside(self.unreached, self.not_called), "delta layers did not run", "if the module "
             "around one reads its weight instead of calling it, choose that, or pass reads=True"),
            (self.not_called, "delta layers did not run, but alike ones did", "check with a larger "
             "batch if this one chose other experts; leave out of the delta what none will call"),
            (self.unchosen, "deltas are in a block whose tokens all chose others", "if other "
             "batches do so too, train with balance_loss(), or with noise= or a larger top_k="),
            (_outside(self.no_gradient, self.not_called), "trainable parameters got no gradient",
             "what holds them is disabled, merged, unreached or behind a detach; use or freeze it"),
            (self.not_finite, "losses are no finite numbers", "look at the batch (are all labels "
             "-100?) and at values too large for 16 bits"),
            (self.not_optimized, "trainable parameters are not in the optimizer", "make it after "
             "attaching, from [p for p in model.parameters() if p.requires_grad]"),
            (self.optimized_twice, "parameters are in the optimizer more than once", "each step "
             "would change them twice; give each to one group of one optimizer"),
            (self.at_rest, "trainable parameters have a learning rate of 0", "give their group "
             "of the optimizer another lr"),
            (self.scaled_to_0, "deltas train with a scale of 0", "set delta.scale, attach with "
             "another lora_alpha, alpha or scaling, or freeze them"),
            (self.unsynchronised, "trainable parameters are not synchronised by what is around the "
             "model", "each rank would have others; let them train before the model is wrapped"),
            (self.untrained, "modules are frozen and were never trained", advice(self.untrained)),
            (self.frozen, "deltas are all frozen", 'put "deltas" into freeze_module(exclude=[...])'
             ", or call requires_grad_() of a delta"),
            (self.no_dropout, "delta layers with dropout are in eval mode", "call model.train()"),
            (self.narrow, "trainable delta tensors have 16 bits, which lose small steps", "call "
             "delta.to('float32'), then make the optimizer; model.to(...) casts deltas along, and "
             "a file may hold 16 bits. If 16 bits are meant, call delta.to('backbone')"),
            (self.moving, "frozen modules change tensors in train(), as BatchNorm does its "
             "statistics and a momentum encoder its weights, which no file of a delta holds",
             "name the modules in modules_to_save=[...], so that the delta has its own, or keep "
             "them in eval()"),
            (inside, "modules are in another mode than what is around them", "call model.train() "
             "or model.eval() after attaching, and delta.train() for a delta alone"),
        ]  # fmt: skip
        return [
            f"{len(n)} {what}: {listed(n, SHOWN)}. To do: {todo}" for n, what, todo in found if n
        ] + self._others()

    def _others(self) -> list[str]:
        told = []
        if self.strangers:
            told.append(
                f"the optimizer holds {self.strangers} tensors that are no parameters of the "
                "model: they were replaced since, or belong to another. To do: make it anew"
            )
        if not self.trainable_parameters and not self.frozen:
            told.append(
                "nothing trains: no delta that trains acts in this block. To do: choose one in "
                "only(...), or train outside of it"
            )
        return told

    def to_dict(self) -> dict[str, Any]:
        """Return all data of the report for JSON."""
        return {**dataclasses.asdict(self), "problems": self.problems}

    def __str__(self) -> str:
        share = self.trainable_parameters / max(1, self.total_parameters)
        count = len(self.problems)
        head = f"{count} problem{'s' * (count != 1)}" if count else "all is well"
        return "\n".join([
            f"check of {self.model}: {head}; {self.trainable_parameters:,} of "
            f"{self.total_parameters:,} parameters train ({share:.4%})",
            *(f"- {problem}" for problem in self.problems),
            *(["- nothing of the backbone is frozen: freeze_module() of a delta leaves just the "
               "deltas to train"] if self.all_train else []),
            *(f"- not checked: {what}" for what in self.not_checked),
        ])  # fmt: skip


@lasting(exact=False)
def check(
    model: nn.Module,
    batch: Samples | None = None,
    optimizer: Any = None,
    *,
    sample_inputs: Samples | None = None,
) -> CheckReport:
    """Run `model` forward and backward once, and report the mistakes that would spoil training.

    Inside a block such as `only("a")` the deltas that do not act are left out: others train them.
    A compiled model runs eagerly. One that leaves out layers at random, by layer drop, runs a few
    times more. Gradients, buffers such as BatchNorm's statistics, random number generators, modes
    and parts of modules are afterwards as they were, and so is what the forward and hooks keep
    beside them, unless another thread may run forwards. With a batch, what the forward itself
    writes into parameters stays, as a momentum encoder's values do.

    Args:
        batch: the arguments of the forward: by keyword in a mapping, by position in a sequence, or
            one tensor. If the output has a loss, its gradients are taken, else the gradients of the
            sum of the outputs. None: run on shapes alone, without arithmetic.
        optimizer: one optimizer, or several in a list, that should hold all trainable parameters.
        sample_inputs: the arguments for a run on shapes, in the form of `batch`. None: they are
            found by themselves.

    Raises:
        DeltaError: `model` carries no delta, or `optimizer` is no optimizer.
        OptionError: `batch` or `sample_inputs` are no arguments.
        SiteError: a lazy module has not run, or FSDP2 will refuse the model: a group trains
            parameters of two dtypes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import opendelta
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> opendelta.LoraModel(model, modified_modules=["0"], name="late").freeze_module()
        >>> report = opendelta.check(model, torch.randn(3, 8), optimizer)
        >>> bool(report), report.not_optimized
        (False, ['0.deltas.late.lora_A', '0.deltas.late.lora_B'])
    """
    plain = _inner(model)
    backbone = _settled(plain, sample_inputs)
    trainable = _trainable(backbone, plain)
    held = None if optimizer is None else held_by(optimizer)
    at_rest = at_rest_in(optimizer)
    changed, seen, losses = set[str](), Seen(), list[str]()
    (missed, passed), without, skipped = _run(backbone, batch, trainable, changed, seen, losses)
    names = {id(p): name for name, p in plain.named_parameters()}
    return CheckReport(
        model=type(plain).__name__,
        unreached=missed,
        not_called=passed,
        unchosen=_unchosen(seen),
        no_gradient=without,
        not_finite=losses,
        not_optimized=[n for n, p in trainable.items() if held is not None and id(p) not in held],
        optimized_twice=[names[i] for i, n in (held or {}).items() if n > 1 and i in names],
        strangers=len((held or {}).keys() - names.keys()),
        at_rest=[n for n, p in trainable.items() if id(p) in at_rest],
        scaled_to_0=settings.scaled_to_0(backbone),
        unsynchronised=engines.unsynchronised(backbone),
        untrained=untrained(backbone),
        frozen=settings.all_frozen(backbone),
        no_dropout=settings.without_dropout(backbone),
        narrow=settings.narrow(backbone),
        moving=_moving(backbone, changed),
        mixed_modes=settings.mixed_modes(backbone),
        trainable_parameters=sum(size(p) for p in trainable.values()),
        total_parameters=sum(size(p) for p in plain.parameters()),
        all_train=all(p.requires_grad for p in backbone.parameters().values()),
        not_checked=skipped,
    )


def _settled(plain: nn.Module, sample_inputs: Samples | None) -> Backbone:
    backbone = Backbone.of(plain, sample_inputs)
    if not backbone.records():
        raise DeltaError(f"{type(plain).__name__} carries no delta, so there is nothing to check")
    sharding.settle(backbone)  # a gathered tensor has the dtype in which the model computes
    sharding.check_uniform(backbone)
    buffers.require_values(backbone)
    shapes.require_sizes(backbone)
    return backbone


def _trainable(backbone: Backbone, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what trains, without the deltas that an open block keeps from acting."""
    resting = {
        id(p)
        for *_, layer in backbone.delta_layers()
        if layer.record.enabled and not layer.record.active
        for p in layer.parameters()
    }
    named = model.named_parameters()
    return {name: p for name, p in named if p.requires_grad and id(p) not in resting}


def _inner(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DDP or DataParallel.

    Their own forward prepares a training step, so it is not called here.
    """
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


# ------------------------------------------------------------------------------- forward, backward
def _run(
    backbone: Backbone,
    batch: Samples | None,
    trainable: dict[str, nn.Parameter],
    changed: set[str],
    seen: Seen,
    losses: list[str],
) -> tuple[tuple[list[str], list[str]], list[str], list[str]]:
    """Return what `_silent` does, parameters without gradient, and checks left out.

    Args:
        changed: gets the names of the modules whose tensors the forward changed.
        seen: gets the weights of blocks.
        losses: gets the losses that are no numbers.
    """
    watched = OpenBlock(watchers={record.shared: seen for record in backbone.records()})
    check_inputs("batch", batch)
    why = gradients.no_backward(backbone)
    results: list[Any] = []

    def look(output: Any, backbone: Backbone = backbone) -> None:
        results[:] = [_silent(backbone)]
        own = dict(backbone.model.named_parameters())
        now = {name: own.get(name, parameter) for name, parameter in trainable.items()}
        results.append(([], f"gradients: {why}") if why else gradients.missing(output, now))

    token = PROBING.set(True)  # no warning by the first forward: the report has the same facts
    try:
        if batch is None:
            with apart(backbone) as twin:
                shapes.dry_run(twin, functools.partial(look, backbone=twin))
        else:
            for stack in backbone.stacks.values():
                stack.ran.clear()
            before = buffers.copies(backbone)
            seen.begin()
            kept = putting_back(backbone.model.modules())
            with put_back(backbone), kept, torch.set_grad_enabled(why is None), eager(), watched:
                args, kwargs = of_samples(batch)
                run = functools.partial(backbone.model, *args, **kwargs)
                look(output := run())
                losses += gradients.not_finite(output)
                changed |= buffers.changed(backbone, before)
                results[:] = _settle(backbone, run, look, results)
    finally:
        PROBING.reset(token)
    missed, (without, problem) = results
    return missed, without, [problem] if problem else []


def _settle(
    backbone: Backbone, run: Callable[[], Any], look: Callable[[Any], None], results: list[Any]
) -> list[Any]:
    """Return what `look` puts into `results`, after further runs if layer drop may be at work."""
    _, (without, problem) = results

    def trained() -> list[str]:
        look(run())
        return results[1][0]

    without = until_all_ran(backbone, run, without, trained)
    return [_silent(backbone), (without, problem)]


def _silent(backbone: Backbone) -> tuple[list[str], list[str]]:
    """Return the layers that did not run, and those of them where alike layers ran."""
    return unreached_in(backbone), not_called(backbone)


def _outside(names: list[str], layers: list[str]) -> list[str]:
    """Return the names of layers and parameters that are none of `layers`, nor inside one."""
    around = {*layers}
    return [name for name in names if around.isdisjoint(ancestors(name))]


def _unchosen(seen: Seen) -> list[str]:
    """Return the deltas that act in blocks, and to which no token gave a weight."""
    used: dict[tuple[str, str], bool] = {}
    for (stack, block), runs in seen.runs.items():
        weights, logits, *_ = together(runs)
        if logits is None:
            continue
        for number, name in enumerate(stack[block].record.config.children):
            if (logits[..., number] > -torch.inf).any():
                chosen = bool(weights[..., number].any())
                used[block, name] = used.get((block, name), False) or chosen
    return [f"{name} in {block}" for (block, name), chosen in used.items() if not chosen]


def _moving(backbone: Backbone, changed: set[str]) -> list[str]:
    """Return the frozen modules in train() whose tensors a forward changes."""
    names = buffers.moving(backbone, changed)
    return [name or "the root" for name in names if backbone.modules[name].training]
