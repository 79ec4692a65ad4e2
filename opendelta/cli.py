"""The command `opendelta`: each subcommand is a function here that calls the library."""

from __future__ import annotations

import sys
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:  # an optional extra; `main` says so
    typer = None  # type: ignore[assignment]

from . import __version__
from .errors import DeltaError

ENOUGH = 0.9  # the demo's accuracy on its first task


def demo(
    train_size: Annotated[int, typer.Option(help="Questions to train on, 1 to 4,481.")] = 3600,
    epochs: Annotated[int, typer.Option(help="How often to train on each.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Of split, new weights and order.")] = 0,
) -> None:
    """Teach a pretrained MiniLM two tasks with small deltas, save them, and switch between them.

    Takes about two minutes. Ends with the test accuracies, and fails if that on questions is below
    0.90. It leaves no files.

    Example: opendelta demo --seed 1
    """
    from .demo import run

    if run(train_size=train_size, epochs=epochs, seed=seed).questions < ENOUGH:
        raise typer.Exit(1)


COMMANDS = [demo]


def about(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Compose small trainable changes on any PyTorch model without touching its code.

    Example: opendelta demo
    """
    if version:
        print(f"opendelta {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the subcommand that was asked for; an error of opendelta is one line and exit code 1."""
    if typer is None:
        sys.exit("the command opendelta needs typer; install with: pip install 'opendelta[cli]'")
    app = typer.Typer(no_args_is_help=True, invoke_without_command=True, add_completion=False)
    app.callback()(about)
    for command in COMMANDS:
        app.command()(command)
    try:
        app()
    except DeltaError as error:
        sys.exit(f"opendelta: {error}")
