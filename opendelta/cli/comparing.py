"""The subcommand that compares: compare."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any

import typer

from ..errors import DeltaError
from .looking import AsJson, as_json, console

TaskName = Annotated[
    str,
    typer.Option(
        "--task", help="trec, sms, tales, or a .csv, .tsv, .json or .jsonl file of texts."
    ),
]
ModelName = Annotated[
    str, typer.Option("--model", help="Folder or hub name of a model; MiniLM is the demo's.")
]
MOST = 2**31 - 1  # of what is counted
MOST_TRAININGS = 10_000
Epochs = Annotated[int, typer.Option(help="How often each text is learnt from.", min=1, max=MOST)]
Seeds = Annotated[
    int, typer.Option("--seeds", help="How often each is trained.", min=1, max=MOST_TRAININGS)
]
Sweep = Annotated[
    int, typer.Option("--sweep", help="Learning rates to try for each.", min=0, max=MOST_TRAININGS)
]
MaxSteps = Annotated[
    int | None,
    typer.Option("--max-steps", help="The most steps of a training.", min=1, max=MOST),
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Texts in a step.", min=1, max=MOST)]
Rates = Annotated[
    list[str] | None,
    typer.Option(
        "--rate", metavar="NAME=RATE", help="Learning rate of a delta or method; repeat it."
    ),
]
Test = Annotated[
    str | None,
    typer.Option("--test", metavar="FILE", help="Held-out texts; else a fifth of the texts."),
]
Text = Annotated[str, typer.Option("--text", help="Column of the texts.")]
Label = Annotated[
    str, typer.Option("--label", help="Column of the classes; '' to continue texts instead.")
]
TrainSize = Annotated[
    int | None, typer.Option("--train-size", help="The most texts to learn from.", min=1, max=MOST)
]
TestSize = Annotated[
    int | None, typer.Option("--test-size", help="Texts to hold out.", min=1, max=MOST)
]
MaxLength = Annotated[
    int, typer.Option("--max-length", help="The most tokens of a text.", min=1, max=MOST)
]


def compare(
    delta: Annotated[
        list[str],
        typer.Option("--delta", "-d", metavar="DELTAS", help="A composition; repeat it."),
    ],
    task: TaskName = "trec",
    model: ModelName = "MiniLM",
    out: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Write the report and the best here.")
    ] = None,
    seeds: Seeds = 1,
    epochs: Epochs = 2,
    max_steps: MaxSteps = None,
    batch_size: BatchSize = 32,
    rate: Rates = None,
    sweep: Sweep = 0,
    test: Test = None,
    text: Text = "text",
    label: Label = "label",
    train_size: TrainSize = None,
    test_size: TestSize = None,
    max_length: MaxLength = 128,
    json: AsJson = False,
) -> None:
    """Train compositions of deltas at a task, each on the same model, and compare them.

    DELTAS is a method with options and places, several of them joined by plus signs, or the folder
    of a saved composition: lora, lora:lora_r=16@attn.q, lora+adapter. A name in front, as in
    mix=lora+adapter, is what the table calls it. With --out, a comparison that
    was cut off goes on where it stopped.

    Example: opendelta compare --delta lora --delta adapter --delta lora+adapter --seeds 3

    Example: opendelta compare --task reviews.csv --label stars --model my-model --delta lora
    """
    from .. import studies  # start-up: it imports transformers with the first model

    chosen = rates_of(rate)
    report = studies.compare(
        model,
        texts_of(task, test, text, label, train_size, test_size, max_length),
        delta,
        seeds=seeds,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        rates=chosen,
        sweep=sweep,
        out=out,
    )
    as_json(report.to_dict()) if json else console().print(report)


def texts_of(task: str, test: str | None, text: str, label: str, *sizes: Any) -> Any:
    """Return the texts that the options name."""
    from ..studies import Texts  # start-up: it imports the demo

    return Texts(task, test, text, label or None, *sizes)


def rates_of(rate: Rates) -> dict[str, float]:
    """Return {name: learning rate} of the options --rate.

    Raises:
        DeltaError: one is written otherwise, or no training can have it.
    """
    return dict(map(_rate, rate or []))


def _rate(text: str) -> tuple[str, float]:
    from ..studies.comparing import HIGHEST  # start-up: the demo is beneath it

    name, _, value = text.partition("=")
    with contextlib.suppress(ValueError):
        if name and 0 < (rate := float(value)) <= HIGHEST:
            return name, rate
    raise DeltaError(
        f"--rate {text!r} must be NAME=RATE, such as lora=1e-3; a rate is above 0, up to {HIGHEST}"
    )
