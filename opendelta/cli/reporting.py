"""The subcommand that writes a page about a composition: report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import models
from .looking import AsJson, Checkpoint, Class, as_json, saved_from, say


def report(
    checkpoint: Checkpoint,
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Folder, config.json or hub name.")
    ] = None,
    html: Annotated[Path, typer.Option("--html", metavar="FILE", help="The page to write.")] = Path(
        "report.html"
    ),
    class_name: Class = None,
    json: AsJson = False,
) -> None:
    """Write all that is known of CHECKPOINT into one HTML page, which loads nothing from elsewhere.

    The page has the deltas in their order, options, sizes, the norm of each layer and facts of the
    training. With MODEL it also has the tree, the formulas, the sizes of the changes beside those
    of the weights, and whether the deltas were trained on it; a config.json gives the first two.

    Example: opendelta report my-composition

    Example: opendelta report my-composition roberta-base --html my-composition.html
    """
    from .. import studies  # start-up: the demo is beneath it

    built = None
    if model is not None:
        make = models.without_weights if models.is_config(model) else models.with_weights
        built = make(model, class_name, saved_from(checkpoint))
    found = studies.report(checkpoint, built)
    if json:
        as_json(found.to_dict())
        return
    found.save(html)
    say(f"{html}: a report on {checkpoint}")
