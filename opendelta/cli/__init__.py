"""The command `opendelta`: its subcommands, and how it prints errors and warnings.

Only `__main__` may import it.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated, Any

from .. import __version__
from ..errors import DeltaError, DeltaWarning, printable, reason

try:
    import typer
except ModuleNotFoundError:  # an optional extra; `main` says so
    typer = None  # type: ignore[assignment]
# exit codes: a command found a problem; it could not run; nobody reads what it prints
WRONG, BAD_INPUT, UNREAD = 1, 2, 141


def about(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Compose small trainable changes on any PyTorch model without touching its code.

    MODEL is a folder, a config.json or a name on the Hugging Face hub. CHECKPOINT is a folder or a
    name on the hub, written by opendelta, PEFT, adapters or OpenDelta 0.3. Exit codes: 0 all is
    well, 1 the command found a problem, 2 the command could not run.

    Example: opendelta demo

    Example: opendelta plan roberta-base --delta lora --option lora_r=8
    """
    if version:
        print(f"opendelta {__version__}")
        raise typer.Exit


def app() -> Any:
    """Return the command with all its subcommands."""
    from . import (  # start-up: typer may be missing; see `main`
        changing,
        comparing,
        looking,
        picking,
        reporting,
    )
    from .requests import DeltasInOrder  # start-up: likewise
    from .training import demo, train  # start-up: likewise

    command = typer.Typer(
        no_args_is_help=True, invoke_without_command=True, pretty_exceptions_enable=False
    )
    command.callback(help=_help(about))(about)

    def add(function: Any, cls: Any = None) -> None:
        command.command(cls=cls, help=_help(function))(function)

    add(looking.tree)
    add(looking.plan, DeltasInOrder)
    add(picking.pick, DeltasInOrder)
    others: list[Any] = [looking.explain, looking.show, looking.diff, reporting.report]
    others += [changing.merge, changing.convert, changing.verify]
    for function in (*others, comparing.compare, train, demo):
        add(function)
    return command


def _help(function: Any) -> str:
    """Return a docstring with each paragraph as one line, which fits any width of terminal."""
    return "\n\n".join(" ".join(each.split()) for each in (function.__doc__ or "").split("\n\n"))


def main() -> None:
    """Run the subcommand in sys.argv; print an error as one line and exit with code 2."""
    if typer is None:
        sys.exit("the command opendelta needs typer; install with: pip install 'opendelta[cli]'")
    warnings.showwarning = _note
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it sets its level when it is imported
    for noisy in ("torchao", "torch.utils._pytree", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        if sys.stdout is None:
            raise DeltaError("standard output is closed, so there is nowhere to print")
        code = _run()
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left to print goes nowhere
        sys.exit(UNREAD)
    except Exception as error:
        print(printable(f"opendelta: {_told(error)}"), file=sys.stderr)
        sys.exit(BAD_INPUT)


def _run() -> int:
    """Run the subcommand in sys.argv, and return its exit code."""
    try:
        return app()(standalone_mode=False) or 0
    except SystemExit as stop:  # typer ends so where nobody reads
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        raise


def _told(error: Exception) -> str:
    """Return an error in words: ours, typer's of a wrong usage, or what a file makes raise."""
    if isinstance(error, DeltaError):
        return str(error)
    words: Any = getattr(error, "format_message", None)  # typer's errors have it, as click's do
    if words is None:
        return reason(error)
    said = " ".join(words().split()).removesuffix(".") or "give a command"
    context: Any = getattr(error, "ctx", None)
    return f"{said}; '{context.command_path if context else 'opendelta'} --help' says more"


def _note(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Print a warning as one line, without the line of code that raised it."""
    name = "" if issubclass(category, DeltaWarning) else f"{category.__name__}: "
    print(printable(f"opendelta: note: {name}{message}"), file=sys.stderr)
