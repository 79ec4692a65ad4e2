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
from .fingerprints import of_model
from .keeping import keep_settings
from .tasks import Task
from .training import groups_of, score_of

FACTS, SETTINGS = "training.json", "train_settings.json"
CHECKPOINTS = "checkpoint-*"


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

    Checkpoints lie in `out`; if there are some, the training goes on after the last whole one. The
    facts are written to `out/training.json`: the score, the settings, the time and the sizes.

    Args:
        deltas: a composition, such as "lora+adapter".
        rates: {name of a delta, or of a method: its learning rate}.
        arguments: more arguments of `TrainingArguments`.

    Raises:
        DeltaError: a delta cannot be made, the training diverged, or the checkpoints are of another
            model, task or composition, or of other rates, another seed or size of a batch.
    """
    from transformers import Trainer

    from ..integrations.trainer import DeltaCallback  # start-up: it imports Trainer

    kept: dict[str, Any] = {"model": of_model(model), "task": f"{task.name} {task.fingerprint()}"}
    torch.manual_seed(seed)
    (contender,) = contenders([deltas])
    made = contender.attach(model, task)
    next(iter(made)).freeze_module(exclude=["deltas"])
    groups = groups_of(made, rates)
    first = {group["name"]: group["lr"] for group in groups}
    kept |= {"deltas": contender.fingerprint, "rates": first, "seed": seed}
    kept["batch_size"] = arguments["per_device_train_batch_size"]
    last = _last_checkpoint(out, kept)
    trainer = Trainer(
        model,
        _arguments(out, task, seed=seed, **arguments),
        lambda rows: dict(task.collate(rows)),
        task.train,
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        callbacks=[DeltaCallback(show=False)],
    )
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # its log
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    facts = {
        **{"deltas": deltas, "names": composition(model).names, "rates": first, "seed": seed},
        **{"steps": trainer.state.global_step, "resumed_from": last and last.name},
        **{"seconds": round(time.perf_counter() - start, 1), **_found(model, task)},
    }
    (out / FACTS).write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    return facts


def _arguments(out: Path, task: Task, **given: Any) -> Any:
    """Return the arguments of a Trainer that reports to nobody."""
    from transformers import TrainingArguments

    if task.length is not None:
        given = {"train_sampling_strategy": "group_by_length", **given}
    made = TrainingArguments(str(out), report_to=[], **given)
    made.dataloader_pin_memory = made.device.type != "cpu"  # it would only warn there
    return made


def _last_checkpoint(out: Path, kept: dict[str, Any]) -> Path | None:
    """Return the last checkpoint that is whole, if its settings are these; they are written down.

    Trainer writes its state last.
    """
    whole = [each for each in out.glob(CHECKPOINTS) if (each / "trainer_state.json").is_file()]
    numbered = {int(each.name[11:]): each for each in whole if each.name[11:].isdecimal()}
    keep_settings(out / SETTINGS, kept, "checkpoints of a training", others=not numbered)
    return numbered[max(numbered)] if numbered else None


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
