"""Train one composition with transformers' Trainer into a folder, and go on after a kill."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._backbone.counting import statistics
from .._handles.composition import composition
from ..errors import DeltaError
from .comparison import where
from .contenders import contenders
from .tasks import Task
from .training import groups_of, score_of

FACTS = "training.json"


def train(
    model: nn.Module,
    task: Task,
    deltas: str,
    out: Path,
    *,
    rates: dict[str, float],
    seed: int = 0,
    **arguments: Any,
) -> dict[str, Any]:
    """Attach deltas, train them with Trainer, save them in `out/deltas`, and return the facts.

    Checkpoints lie in `out`; if there are some, the training goes on after the last one. The facts
    are written to `out/training.json`: the score, the settings, the time and the sizes.

    Args:
        deltas: a composition, such as "lora+adapter".
        rates: {name of a delta, or of a method: its learning rate}.
        arguments: more arguments of `TrainingArguments`.

    Raises:
        DeltaError: a delta cannot be made, or the training diverged.
    """
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from ..integrations.trainer import DeltaCallback  # start-up: it imports Trainer

    torch.manual_seed(seed)
    (contender,) = contenders([deltas])
    made = contender.attach(model, task)
    next(iter(made)).freeze_module(exclude=["deltas"])
    groups = groups_of(made, rates)
    first = {group["name"]: group["lr"] for group in groups}
    if task.length is not None:
        arguments.setdefault("train_sampling_strategy", "group_by_length")
    trainer = Trainer(
        model,
        TrainingArguments(str(out), seed=seed, report_to=[], **arguments),
        lambda rows: dict(task.collate(rows)),
        task.train,
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        callbacks=[DeltaCallback(show=False)],
    )
    last = get_last_checkpoint(str(out)) if out.is_dir() else None
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # its log
        trainer.train(resume_from_checkpoint=last)
    facts = {
        **{"deltas": deltas, "names": composition(model).names, "rates": first, "seed": seed},
        **{"steps": trainer.state.global_step, "resumed_from": last and Path(last).name},
        **{"seconds": round(time.perf_counter() - start, 1), **_found(model, task)},
    }
    (out / FACTS).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    return facts


def _found(model: nn.Module, task: Task) -> dict[str, Any]:
    """Return the score on the held-out examples, and the sizes."""
    counts, score = statistics(model), score_of(model, task)
    if not math.isfinite(score):
        raise DeltaError(f"the training diverged: its {task.unit} is {score}; give lower rates")
    return {
        "task": task.name,
        "unit": task.unit,
        "score": score,
        "baseline": task.baseline,
        "train": len(task.train),
        "test": len(task.test),
        "parameters": counts.delta_parameters,
        "share": counts.trainable_ratio,
        "where": where(),
    }
