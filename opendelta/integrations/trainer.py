"""transformers' Trainer: keep deltas with each checkpoint, log their norms, show the tree."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from .._backbone.counting import statistics
from .._deltas.pretrained import DELTAS
from .._handles.composition import Composition
from .._handles.delta import Delta
from .._modules.tensors import full, is_sharded
from .._show.tree import tree


class DeltaCallback(TrainerCallback):
    """Saves the deltas at each checkpoint and at the end, logs their norms, shows the tree once.

    Give it to `Trainer(callbacks=[DeltaCallback()])`, and to trainers made of it, such as TRL's; or
    call `DeltaCallback().add_to(trainer)`, so that reporters (Weights & Biases, TensorBoard, the
    printed log) get the norms too, and not only `trainer.state.log_history`.

    It writes the folders `checkpoint-N/deltas` and `<output_dir>/deltas`, which `opendelta.load`
    reads, and logs, for each delta that is attached, the norm of all its parameters as
    `deltas/<name>/norm`; and the share of all parameters that train as `deltas/trainable`.

    Args:
        save: save the deltas.
        norms: log the norms and the share.
        show: print the tree at the start of the training.
    """

    def __init__(self, save: bool = True, norms: bool = True, show: bool = True) -> None:
        self.save, self.norms, self.show = save, norms, show
        self.share: float | None = None

    def add_to(self, trainer: Trainer) -> DeltaCallback:
        """Put the callback before all others of a trainer, and return it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model = given["model"]
        counts = statistics(model)
        self.share = counts.trainable_ratio
        if self.show and state.is_world_process_zero:
            print(tree(model))

    def on_log(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if not self.norms:
            return
        found = {f"deltas/{delta.name}/norm": norm(delta) for delta in Composition(given["model"])}
        if self.share is not None:
            found["deltas/trainable"] = self.share
        given["logs"].update(found)
        if state.log_history:
            state.log_history[-1].update(found)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._keep(given["model"], args, state, f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._keep(given["model"], args, state, "")

    def _keep(self, model: nn.Module, args: Any, state: Any, inside: str) -> None:
        together = any(map(is_sharded, model.parameters()))  # each process holds a part of them
        if self.save and len(Composition(model)) and (state.is_world_process_zero or together):
            Composition(model).save(Path(os.fspath(args.output_dir), inside, DELTAS))


@torch.no_grad()
def norm(delta: Delta) -> float:
    """Return the Euclidean norm of all parameters of a delta, as one vector."""
    squares = [full(p).detach().double().square().sum().item() for p in delta.parameters()]
    return sum(squares) ** 0.5
