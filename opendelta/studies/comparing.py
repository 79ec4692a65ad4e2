"""Compare compositions at a task, each trained several times on one backbone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .._files.folder import check_folder
from .._handles.composition import composition
from ..errors import DeltaError, shown
from . import models
from .comparison import Comparison
from .contenders import Contender, Deltas, contenders, remove
from .fingerprints import of_model
from .keeping import keep_settings
from .progress import Progress
from .sweeping import best_factor
from .tasks import Task, Texts
from .training import Run, Settings, learn, left_as_it_was

HIGHEST = 100  # no learning rate is higher
SETTINGS, RUNS, SAVED = "settings.json", "runs.jsonl", "saved"


def compare(
    model: nn.Module | str | os.PathLike,
    task: Any,
    deltas: Deltas,
    *,
    seeds: int | Iterable[int] = 1,
    epochs: int = 2,
    max_steps: int | None = None,
    batch_size: int = 32,
    rates: Mapping[str, float] | None = None,
    sweep: int = 0,
    out: str | os.PathLike | None = None,
    progress: bool = True,
) -> Comparison:
    """Train each composition on one backbone in memory, and say how good and how large each is.

    Each training attaches the deltas, trains them alone with AdamW at the learning rates of their
    methods (a linear warm-up over a tenth of the steps, then a linear decay), measures, saves and
    detaches. The model is then as it was, bit for bit: its dropout, dtype and device are yours. The
    same seed gives the same numbers on the same machine. Scores of one seed differ by chance: take
    three seeds or more, and compare two compositions seed by seed.

    Args:
        model: a model, or the folder or name of one of transformers. "MiniLM" is the demo's.
        task: `Texts` or a `Task`; or what `Texts` takes: "trec" (questions, 6 classes), "sms"
            (messages, 2 classes), a .csv, .tsv, .json or .jsonl file, a dataset of the library
            `datasets`, or a list of dicts.
        deltas: compositions: texts such as "lora", "lora:lora_r=16@attn.q", "lora+adapter" or the
            folder of a saved one, which is then trained on, with a short name in front if you like,
            "mix=lora+adapter"; configs; or {name: any of these, or a
            function that puts deltas on the model}. The first delta owns the task's head.
        seeds: how often each is trained (with the seeds 0, 1, ...), or the seeds.
        epochs: how often each example is learnt from.
        max_steps: the most steps of a training. None: as many as the epochs need.
        batch_size: examples in a step.
        rates: {name of a delta, or of a method: its learning rate} instead of the method's own.
        sweep: so many learning rates are tried for each composition, from a tenth to ten times the
            rates above, with the first seed, on a tenth of the examples to learn from, which are
            left out for that; the best one is taken. By Optuna if it is installed.
        out: a folder for the report, the plots and the best composition. A comparison that was cut
            off goes on where it stopped. None: nothing is kept.
        progress: show a table of the scores so far and a bar.

    Raises:
        DeltaError: a model, a task or a composition cannot be had, or `out` holds a comparison with
            other settings. All compositions are tried on the model before the first training.
            Functions, and methods that are not the library's, are told apart by their code, by
            what it names in its own package, and by the plain data in both.

    Example:
        >>> import opendelta, transformers
        >>> config = transformers.BertConfig(
        ...     vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...     intermediate_size=8, num_labels=2,
        ... )
        >>> model = transformers.BertForSequenceClassification(config)
        >>> rows = [{"input_ids": [i % 9, 1], "labels": i % 2} for i in range(20)]
        >>> def collate(rows):
        ...     return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        >>> def right(output, batch):
        ...     return (output.logits.argmax(-1) == batch["labels"]).float()
        >>> task = opendelta.Task("odd", rows[:16], rows[16:], collate, right, labels=2)
        >>> import torch
        >>> report = opendelta.compare(model, task, ["lora", "adapter"], progress=False)
        >>> [(row.deltas, row.parameters) for row in report.rows]
        [('lora', 274), ('adapter', 850)]
    """
    every = contenders(deltas)
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    rates, settings = dict(rates or {}), Settings(epochs, max_steps, batch_size)
    _check(chosen, settings, sweep, rates)
    if out is not None:
        check_folder(Path(out))
    model, task = _both(model, task)
    _try(model, task, every)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch if out is None else out)
        done = Done(folder, _facts(model, task, settings, rates, sweep))
        with Progress(task, every, len(every) * (len(chosen) + sweep), progress) as drawn:
            trainer = Trainer(model, task, settings, rates, done, drawn)
            factors = {each.name: trainer.factor(each, chosen[0], sweep) for each in every}
            runs = [trainer.run(c, seed, factors[c.name]) for seed in chosen for c in every]
        report = Comparison.of(task, done.facts, factors, runs)
        if out is not None:
            report.save(folder)
            _keep_best(report, every, folder)
    return report


def _both(model: Any, task: Any) -> tuple[nn.Module, Task]:
    """Return the model and the task, where they are given by name or as texts."""
    if not isinstance(task, Task):
        model, task = models.for_texts(model, task if isinstance(task, Texts) else Texts(task))
    elif not isinstance(model, nn.Module):
        model = models.by_name(model, task.labels)
    if len(composition(model)):
        raise DeltaError(
            f"the model carries {', '.join(composition(model).names)}: detach them, or make them "
            "part of it by composition(model).to_backbone()"
        )
    return model, task


def _check(seeds: list[int], settings: Settings, sweep: int, rates: Mapping[str, float]) -> None:
    """Raise for numbers that no training can have."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise DeltaError(f"seeds={seeds} must be at least one, each once")
    for name in ("epochs", "max_steps", "batch_size"):
        value = getattr(settings, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise DeltaError(f"{name}={shown(value)} must be a whole number from 1")
    if not isinstance(sweep, int) or sweep < 0:
        raise DeltaError(f"sweep={shown(sweep)} must be a whole number from 0")
    for name, rate in rates.items():
        if not isinstance(rate, int | float) or not 0 < rate <= HIGHEST:
            raise DeltaError(f"rates: {name!r} has {shown(rate)}, not a number up to {HIGHEST}")


def _try(model: nn.Module, task: Task, every: list[Contender]) -> None:
    """Attach and detach each composition, so that one that cannot be made ends it at once."""
    with left_as_it_was(model):
        for contender in every:
            contender.attach(model, task)
            remove(model)


def _facts(
    model: nn.Module, task: Task, settings: Settings, rates: dict[str, float], sweep: int
) -> dict[str, Any]:
    """Return all that the numbers depend on."""
    return {
        "model": of_model(model),
        "task": f"{task.name} {task.fingerprint()}",
        "train": len(task.train),
        "test": len(task.test),
        **dataclasses.asdict(settings),
        "rates": rates,
        "sweep": sweep,
    }


class Done:
    """The trainings that are done, in memory and as lines of a file."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.file, self.facts = folder, folder / RUNS, facts
        keep_settings(folder / SETTINGS, facts, "a comparison")
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a line that was cut off
            self.file.write_text(whole, encoding="utf-8")
        held = map(json.loads, whole.splitlines())
        self.found = {tuple(each["key"]): Run.from_dict(each["run"]) for each in held}

    def add(self, key: tuple[Any, ...], run: Run) -> None:
        """Write a training down."""
        self.found[key] = run
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "run": run.to_dict()}) + "\n")


@dataclasses.dataclass
class Trainer:
    """Trains what is not yet done."""

    model: nn.Module
    task: Task
    settings: Settings
    rates: dict[str, float]
    done: Done
    progress: Progress

    def run(self, contender: Contender, seed: int, factor: float, trial: Task | None = None) -> Run:
        """Return a training's result.

        Args:
            trial: the task of a sweep's trial. None: the task itself.
        """
        task, is_trial = trial or self.task, trial is not None
        what = f"{contender.name}, seed {seed}" + f", rates x {factor:g}" * is_trial
        key = (contender.fingerprint, seed, factor, is_trial)
        found = self.done.found.get(key)
        if found is None:
            self.progress.begin(what, self.settings.steps(len(task.train)))
            folder = saved_in(self.done.folder, contender, seed)
            how = (self.settings, seed, factor, self.rates, folder, self.progress.step)
            found = learn(self.model, task, contender, *how)
            self.done.add(key, found)
        self.progress.end(what, found, is_trial)
        return found

    def factor(self, contender: Contender, seed: int, trials: int) -> float:
        """Return what the learning rates of a composition are multiplied by."""

        def score(factor: float, task: Task) -> float:
            return self.run(contender, seed, factor, task).score

        return best_factor(self.task, trials, score)


def saved_in(folder: Path, contender: Contender, seed: int) -> Path:
    """Return the folder of a trained composition."""
    return folder / SAVED / contender.slug / f"seed-{seed}"


def _keep_best(report: Comparison, every: list[Contender], folder: Path) -> None:
    """Copy the best seed of the best composition to `best`, unless all diverged."""
    best = report.best_run
    contender = next(c for c in every if c.name == best.deltas)
    shutil.rmtree(folder / "best", ignore_errors=True)
    if (saved := saved_in(folder, contender, best.seed)).exists():
        shutil.copytree(saved, folder / "best")
