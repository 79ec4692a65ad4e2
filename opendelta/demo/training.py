"""Train with transformers' Trainer and a progress bar, and test."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from .data import Texts


def train(
    model: nn.Module,
    data: Texts,
    epochs: int,
    rate: float,
    seed: int,
    folder: Path,
    console: Console,
    **others: Any,
) -> None:
    """Train the trainable parameters with transformers' Trainer, and test after each epoch.

    Args:
        others: more arguments of `TrainingArguments`.
    """
    from transformers import PrinterCallback, Trainer, TrainingArguments

    options: dict[str, Any] = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": 32,
        "per_device_eval_batch_size": 64,
        "learning_rate": rate,
        "warmup_steps": 0.1,  # a share of all steps
        "seed": seed,
        "eval_strategy": "epoch",
        "logging_first_step": True,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
    }
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **{**options, **others}),
        data.collate,
        data.train,
        data.test,
        compute_metrics=lambda found: {"accuracy": accuracy(*map(torch.tensor, found))},
        callbacks=[progress(console)],
    )
    trainer.remove_callback(PrinterCallback)  # it prints dicts
    trainer.train()


def progress(console: Console) -> Any:
    """Return a callback of Trainer: a bar with the current loss, and a line after each epoch."""
    from transformers import TrainerCallback

    columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")]
    bar = Progress("training", *columns, TimeElapsedColumn(), console=console)

    class Show(TrainerCallback):
        loss = ""

        def on_train_begin(self, args, state, control, **kwargs):
            self.task = bar.add_task("", total=state.max_steps)
            bar.start()

        def on_step_end(self, args, state, control, **kwargs):
            bar.update(self.task, completed=state.global_step)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                self.loss = f"loss {logs['loss']:.3f}"
                bar.update(self.task, description=self.loss)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            right = metrics["eval_accuracy"]
            console.print(f"epoch {state.epoch:.0f}: {self.loss}, test accuracy {right:.3f}")

        def on_train_end(self, args, state, control, **kwargs):
            bar.stop()

    return Show()


@torch.no_grad()
def predict(model: nn.Module, data: Texts) -> Tensor:
    """Return the logits of all test texts."""
    model.eval()
    batches = [data.test[i : i + 64] for i in range(0, len(data.test), 64)]
    return torch.cat([model(**data.collate(batch)).logits for batch in batches])


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of the texts whose largest logit is at the right label."""
    return (logits.argmax(-1) == labels).float().mean().item()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside a `with` block, let libraries log errors only, and transformers draw no bars."""
    from transformers.utils import logging as bars

    disabled, drawn = logging.root.manager.disable, bars.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    bars.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(disabled)
        if drawn:
            bars.enable_progress_bar()
