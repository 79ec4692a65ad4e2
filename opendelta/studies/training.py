"""Train one composition on the one backbone, measure it, and leave the backbone as it was."""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._backbone.backbone import Backbone
from .._backbone.counting import statistics
from .._handles.composition import Composition
from .._modules.process import seed_all
from .._show.data import for_json
from .._verbs.pristine import assert_pristine, snapshot
from .._verbs.put_back import put_back
from ..errors import DeltaError, to_the_end
from ..recipes.optimizing import optimizer_groups
from .contenders import Contender, remove
from .tasks import Batch, Task

TEST_BATCH = 64
ALIKE = 8  # batches whose examples are sorted by length together
OWN_RATE = 1e-3  # of what trains beside the deltas, AdamW's default
POINTS = 200  # of a loss curve; longer ones are thinned


@dataclass(frozen=True)
class Settings:
    """How each composition is trained: by AdamW, a linear warm-up and a linear decay.

    Attributes:
        epochs: how often each example is learnt from.
        max_steps: the training ends after so many steps. None: after the epochs.
        batch_size: examples in a step.
        warmup: the share of the steps in which the learning rate rises.
        max_grad_norm: longer gradients are shortened to this norm.
        weight_decay: AdamW's.
    """

    epochs: int = 2
    max_steps: int | None = None
    batch_size: int = 32
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0

    def steps(self, examples: int) -> int:
        """Return the number of steps for so many examples."""
        steps = self.epochs * math.ceil(examples / self.batch_size)
        return min(steps, self.max_steps or steps)


@dataclass(frozen=True)
class Run:
    """The result of one training.

    Attributes:
        deltas: the name of the composition.
        seed: of the new tensors, the order of the examples and dropout.
        factor: what the learning rates of the methods were multiplied by.
        score: the mean of the task's measure over the held-out examples; nan if it diverged.
        losses: the losses of the training, at most 200 of them, evenly spread.
        parameters: number of parameters of the deltas.
        share: of the parameters that trained in all parameters.
        seconds: that the training took.
        memory: bytes that the training held beside the weights in its first step: what autograd
            kept for the backward, the gradients, and AdamW's two moments.
        size: bytes of the saved composition; 0 if the training diverged, as nothing is saved then.
        rates: {name of a delta: its highest learning rate}.
    """

    deltas: str
    seed: int
    factor: float
    score: float
    losses: list[float] = field(repr=False)
    parameters: int
    share: float
    seconds: float
    memory: int
    size: int
    rates: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON; numbers that are none are null."""
        return for_json(vars(self))

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Run:
        """Return what `to_dict` gave."""
        numbers = {"score": as_number(held["score"]), "losses": [*map(as_number, held["losses"])]}
        return cls(**{**held, **numbers})


def as_number(held: float | None) -> float:
    """Return a number that may be none in JSON: null is nan."""
    return math.nan if held is None else held


def learn(
    model: nn.Module,
    task: Task,
    contender: Contender,
    settings: Settings,
    seed: int,
    factor: float,
    rates: dict[str, float],
    folder: Path,
    on_step: Callable[[float], None],
) -> Run:
    """Attach, train, measure, save in `folder` and detach; the model is as before, bit for bit.

    Args:
        rates: {name of a delta, or of a method: its learning rate}; others have their method's.
        on_step: is called with the loss of each step.
    """
    with left_as_it_was(model), contextlib.ExitStack() as stack:
        seed_all(seed)
        made = contender.attach(model, task)
        next(iter(made)).freeze_module(exclude=["deltas"])
        stack.enter_context(_own_values_kept(model, made))
        groups = groups_of(made, rates, factor)
        first = {group["name"]: group["lr"] for group in groups}
        start = time.perf_counter()
        losses, memory = _train(model, task, groups, settings, seed, on_step)
        seconds = time.perf_counter() - start
        score = score_of(model, task) if math.isfinite(losses[-1]) else math.nan
        counts = statistics(model)
        shutil.rmtree(folder, ignore_errors=True)
        if math.isfinite(score):
            made.save(folder)
        return Run(
            contender.name,
            seed,
            factor,
            score,
            losses[:: math.ceil(len(losses) / POINTS)],
            counts.delta_parameters,
            counts.trainable_ratio,
            seconds,
            memory,
            sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            first,
        )


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Leave the model as it was, its buffers and gradients too, and the random numbers."""
    before, parameters = snapshot(model), list(model.parameters())
    flags, grads = [p.requires_grad for p in parameters], [p.grad for p in parameters]
    modes = {module: module.training for module in model.modules()}

    def leave() -> None:
        remove(model)
        for parameter, flag, grad in zip(parameters, flags, grads, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = grad
        for module, mode in modes.items():
            module.training = mode

    with put_back(Backbone.of(model)):
        try:
            for parameter in parameters:
                parameter.grad = None
            yield
        finally:
            to_the_end(leave)
    assert_pristine(model, like=before)


@contextlib.contextmanager
def _own_values_kept(model: nn.Module, made: Composition[Any]) -> Iterator[None]:
    """Put back the values of the model's own parameters that train, such as unfrozen modules."""
    deltas = {id(p) for delta in made for p in delta.parameters()}
    own = [p for p in model.parameters() if p.requires_grad and id(p) not in deltas]
    values = [p.detach().clone() for p in own]

    def restore() -> None:
        with torch.no_grad():
            for parameter, value in zip(own, values, strict=True):
                parameter.copy_(value)

    try:
        yield
    finally:
        to_the_end(restore)


def groups_of(
    made: Composition[Any], rates: dict[str, float], factor: float = 1.0
) -> list[dict[str, Any]]:
    """Return groups of parameters for an optimizer, each with its learning rate.

    Args:
        rates: {name of a delta, or of a method: its learning rate}; others have their method's.
        factor: all of them are multiplied by it.
    """
    own = {d.name: rates.get(d.name, rates.get(d.delta_type)) for d in made}
    given = {name: {"lr": rate} for name, rate in own.items() if rate is not None}
    groups = optimizer_groups(made.model, given)
    for group in groups:
        group["lr"] = group.get("lr", OWN_RATE) * factor
    return groups


def _train(
    model: nn.Module,
    task: Task,
    groups: list[dict[str, Any]],
    settings: Settings,
    seed: int,
    on_step: Callable[[float], None],
) -> tuple[list[float], int]:
    """Return the losses and the bytes held in the first step; a loss of nan or inf ends it."""
    highest = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    total = settings.steps(len(task.train))
    rise = max(1, round(settings.warmup * total))
    losses: list[float] = []
    memory = 0
    model.train()
    every = batches(model, task, settings.batch_size, seed)
    for step, batch in enumerate(itertools.islice(every, total)):
        share = min((step + 1) / rise, (total - step) / max(1, total - rise))
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * share
        if step:
            loss = task.loss(model(**batch), batch)
        else:
            loss, kept = _measured(model, task, batch)
            if not loss.requires_grad:
                raise DeltaError(
                    "the loss does not depend on the deltas: they are on modules that never run, "
                    "or Task(loss=...) reads no output of them"
                )
            memory = kept + 3 * sum(p.numel() * p.element_size() for p in parameters)
        losses.append(loss.item())
        on_step(losses[-1])
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return losses, memory


def _measured(model: nn.Module, task: Task, batch: Batch) -> tuple[Tensor, int]:
    """Return the loss, and the bytes that autograd keeps for its backward, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss(model(**batch), batch)
    return loss, sum(kept.values())


def batches(model: nn.Module, task: Task, size: int, seed: int) -> Iterator[Batch]:
    """Yield batches of the examples to learn from for ever, each epoch in another order.

    If the task tells the lengths, examples of like length are together, as far as `ALIKE` batches
    that chance has drawn hold them.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = [] if task.length is None else [*map(task.length, task.train)]

    def shuffled(count: int) -> list[int]:
        return torch.randperm(count, generator=generator).tolist()

    while True:
        order = shuffled(len(task.train))
        if lengths:
            parts = _cut(order, size * ALIKE)
            order = [i for part in parts for i in sorted(part, key=lengths.__getitem__)]
        every = _cut(order, size)
        for number in shuffled(len(every)) if lengths else range(len(every)):
            yield placed(task.collate([task.train[i] for i in every[number]]), model)


def _cut(order: list[int], size: int) -> list[list[int]]:
    return [order[at : at + size] for at in range(0, len(order), size)]


def placed(batch: Batch, model: nn.Module) -> Batch:
    """Return the batch with its tensors on the device of the model."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@torch.no_grad()
def score_of(model: nn.Module, task: Task) -> float:
    """Return the mean of the task's measure over the held-out examples, in evaluation mode."""
    model.eval()
    values = []
    for at in range(0, len(task.test), TEST_BATCH):
        batch = placed(task.collate(list(task.test[at : at + TEST_BATCH])), model)
        values.append(task.measure(model(**batch), batch).double().flatten().cpu())
    return torch.cat(values).mean().item()
