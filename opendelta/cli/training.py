"""The subcommand that trains: the demo."""

from __future__ import annotations

from typing import Annotated

import typer

ENOUGH = 0.9  # the demo's accuracy on its first task


def demo(
    train_size: Annotated[int, typer.Option(help="Questions to train on, 1 to 4,481.")] = 3600,
    epochs: Annotated[int, typer.Option(help="How often to train on each text.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Seed of split, new weights and order.")] = 0,
) -> None:
    """Teach a pretrained MiniLM two tasks with small deltas, save them, and switch between them.

    The demo takes under three minutes, and prints the test accuracies. It fails if the accuracy on
    questions is below 0.90. It leaves no files.

    Example: opendelta demo --seed 1
    """
    from ..demo import run  # start-up: it imports transformers, 3 s

    if run(train_size=train_size, epochs=epochs, seed=seed).questions < ENOUGH:
        raise typer.Exit(1)
