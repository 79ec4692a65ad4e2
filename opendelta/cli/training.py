"""The subcommands that train: the demo, and one composition with Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import typer

from .._files.folder import check_folder
from .._files.reading import as_path
from .comparing import (
    MOST,
    BatchSize,
    Epochs,
    Label,
    MaxLength,
    ModelName,
    Rates,
    TaskName,
    Test,
    TestSize,
    Text,
    TrainSize,
    rates_of,
    texts_of,
)
from .looking import AsJson, as_json, say

ENOUGH = 0.9  # the demo's accuracy on its first task


def demo(
    train_size: Annotated[int, typer.Option(help="Questions to train on, 1 to 4,481.")] = 3600,
    epochs: Annotated[
        int, typer.Option(help="How often to train on each text.", min=1, max=MOST)
    ] = 2,
    seed: Annotated[
        int, typer.Option(help="Seed of split, new weights and order.", min=0, max=MOST)
    ] = 0,
) -> None:
    """Teach a MiniLM two tasks with small deltas, save, switch and combine them.

    The demo takes about four minutes, and prints the test accuracies. It fails if the accuracy on
    questions is below 0.90. It leaves no files.

    Example: opendelta demo --seed 1
    """
    from ..demo import run  # start-up: it imports transformers, 3 s

    if run(train_size=train_size, epochs=epochs, seed=seed).questions < ENOUGH:
        raise typer.Exit(1)


def train(
    delta: Annotated[str, typer.Option("--delta", "-d", metavar="DELTAS", help="A composition.")],
    out: Annotated[str, typer.Option(metavar="FOLDER", help="For deltas and checkpoints.")],
    task: TaskName = "trec",
    model: ModelName = "MiniLM",
    epochs: Epochs = 2,
    batch_size: BatchSize = 32,
    rate: Rates = None,
    seed: Annotated[int, typer.Option(help="Seed of new weights and order.", min=0, max=MOST)] = 0,
    save_steps: Annotated[
        int, typer.Option(help="Keep a checkpoint after so many steps.", min=1, max=MOST)
    ] = 500,
    test: Test = None,
    text: Text = "text",
    label: Label = "label",
    train_size: TrainSize = None,
    test_size: TestSize = None,
    max_length: MaxLength = 128,
    json: AsJson = False,
) -> None:
    """Train one composition of deltas at a task, with transformers' Trainer.

    DELTAS is as for `compare`. The deltas are saved in FOLDER/deltas, which `opendelta.load` reads,
    and the score, the settings and the time in FOLDER/training.json. If FOLDER has checkpoints, the
    training goes on after the last whole one; checkpoints of other settings are refused.

    Example: opendelta train --delta lora+adapter --out trec

    Example: opendelta train --task reviews.csv --model my-model --delta lora --out reviews
    """
    folder = as_path(out, "--out")
    check_folder(folder)
    chosen = rates_of(rate)
    from ..studies import door, models  # start-up: they import transformers, 3 s

    texts = texts_of(task, test, text, label, train_size, test_size, max_length)
    built, made = models.for_texts(model, texts)
    facts = door.train(
        built,
        made,
        delta,
        folder,
        rates=chosen,
        seed=seed,
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        save_steps=save_steps,
        warmup_steps=0.1,
        logging_steps=10,
    )
    as_json(facts) if json else say(*_told(facts, out))


def _told(facts: dict[str, Any], out: str) -> Iterator[str]:
    """Yield the lines to print after a training."""
    if facts["resumed_from"]:
        yield f"the training went on after {facts['resumed_from']} in {out}"
    baseline = facts["baseline"]
    yield (
        f"{facts['unit']} on {facts['test']:,} held-out examples of {facts['task']}: "
        f"{facts['score']:.3f}"
        + ("" if baseline is None else f"; always naming the largest class scores {baseline:.3f}")
    )
    yield f"{facts['parameters']:,} parameters of {', '.join(facts['names'])} are in {out}/deltas"
