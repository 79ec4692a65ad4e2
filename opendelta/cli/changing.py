"""The subcommands that load deltas on real weights: merge, convert, verify."""

from __future__ import annotations

import contextlib
import enum
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import opendelta

from .._checkpoint import contents as reading
from .._checkpoint import hub
from .._files.folder import check_folder, writable
from ..errors import DeltaError, DeltaLoadError, UncheckedWarning, kept_warnings
from ..interop.peft import writing
from . import models
from .looking import AsJson, Checkpoint, Class, Model, as_json, saved_from, say


class Format(enum.StrEnum):
    """The formats that `convert` can write."""

    opendelta = "opendelta"
    peft = "peft"


def merge(
    checkpoint: Checkpoint,
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the merged model.")],
    class_name: Class = None,
    check_backbone: Annotated[
        bool, typer.Option(help="Refuse weights that the deltas were not trained on.")
    ] = True,
    json: AsJson = False,
) -> None:
    """Fold the deltas of CHECKPOINT into the weights of MODEL, and save the plain model in OUT.

    `from_pretrained(OUT)` reads it without opendelta. The tokenizer is not copied.

    Example: opendelta merge my-lora roberta-base merged
    """
    _check_new(out)
    built = models.with_weights(model, class_name, saved_from(checkpoint))
    composed = opendelta.load(checkpoint, built, check_backbone=check_backbone)
    names = [delta.name for delta in composed if delta.active]
    plain: Any = composed.to_backbone()
    with _all_or_nothing(out) as folder:
        plain.save_pretrained(folder)
    if json:
        as_json({"out": str(out), "model": type(plain).__name__, "merged": names})
    else:
        merged = ", ".join(names) or "nothing, as no delta is active,"
        say(f"merged {merged} into a {type(plain).__name__}: {out}")


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Folder or hub name.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the new checkpoint.")],
    to: Annotated[Format, typer.Option(help="Format to write.")],
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Model of the deltas, if IN names none.")
    ] = None,
    class_name: Class = None,
    json: AsJson = False,
) -> None:
    """Write the checkpoint IN as a checkpoint of PEFT or of opendelta.

    IN may be a checkpoint of opendelta, PEFT, adapters or OpenDelta 0.3. Of several deltas each
    becomes a PEFT adapter of its own, in a folder inside OUT.

    Example: opendelta convert peft-lora out --to opendelta --model roberta-base

    Example: opendelta convert my-composition out --to peft --model roberta-base
    """
    held = reading.contents(source)
    given = model or held.model
    if not given:
        raise DeltaError(f"{source} does not name its model: give --model")
    _check_new(out)
    built = models.with_weights(given, class_name, held.backbone).requires_grad_(False)
    composed = opendelta.load(source, built)
    several = to is Format.peft and len(composed) > 1
    with _all_or_nothing(out) as folder:
        if to is Format.opendelta:
            composed.save(folder)
        else:
            for delta in composed:
                writing.save(delta, folder / delta.name if several else folder)
    written = [str(out / name) for name in composed.names] if several else [str(out)]
    if json:
        as_json({"from": held.format, "to": to.value, "deltas": composed.names, "written": written})
    else:
        say(f"{held.format} -> {to.value}: {', '.join(composed.names)} in {', '.join(written)}")


def _check_new(out: Path) -> None:
    check_folder(out)
    if out.exists() and any(out.iterdir()):
        raise DeltaError(f"{out} exists and is not empty; give a new folder")


@contextlib.contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    """Yield a folder to write into; rename it to `out` if no error is raised."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(writable(out))
        out.parent.mkdir(parents=True, exist_ok=True)
        around = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
        folder = Path(stack.enter_context(around)) / "new"
        yield folder
        if out.exists():
            out.rmdir()
        folder.rename(out)


def verify(
    checkpoint: Checkpoint,
    model: Model,
    class_name: Class = None,
    json: AsJson = False,
) -> None:
    """Check that CHECKPOINT is whole, and fits MODEL and its weights. Exit code 1 if not.

    If MODEL is a config.json, or CHECKPOINT has no values of its weights, only the names and shapes
    are compared, and the output says so.

    Example: opendelta verify my-composition roberta-base
    """
    folder = hub.folder_of(checkpoint)
    if not folder.exists():
        raise DeltaError(f"no such folder: {checkpoint}")
    build = models.without_weights if models.is_config(model) else models.with_weights
    try:
        built = build(model, class_name, saved_from(checkpoint))
        with kept_warnings(UncheckedWarning):  # `_compared` says it
            report = opendelta.load(checkpoint, built, strict=False)
    except DeltaLoadError as error:
        report = opendelta.LoadReport([], str(error))
    if json:
        found = {"fits": bool(report), "problem": report.problem, "deltas": report.names}
        compared = bool(report.same) and not report.unread
        as_json({**found, "weights_compared": compared, "unread": report.unread})
    elif report:
        fits = f"{checkpoint} fits {model}: {', '.join(report.names)}"
        say(f"{fits}; {_compared(report)}")
    else:
        say(f"{checkpoint} does not fit {model}: {report.problem}")
    if not report:
        raise typer.Exit(1)


def _compared(report: opendelta.LoadReport) -> str:
    """Return what a load compared of the weights under the deltas, in words."""
    same, unread = len(report.same), len(report.unread)
    if not same:
        return "only names and shapes were compared, and no values of the weights under them"
    which = f"{same} of {same + unread} weights" if unread else "the weights"
    rest = "; of the others only names and shapes were compared" * bool(unread)
    return f"{which} under them are, by a few values of each, those of the training{rest}"
