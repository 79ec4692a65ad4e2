"""Arguments of the command line that name deltas: `--delta`, and `--option` and `--at` after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

FOLLOWERS = ("--option", "-o", "--at", "-a")


class DeltasInOrder(typer.core.TyperCommand):
    """A command whose `--option` and `--at` belong to the `--delta` before them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, gathered(args))


def gathered(args: Sequence[str]) -> list[str]:
    """Join each `--delta` with the `--option` and `--at` after it to one value of several lines."""
    out: list[str] = []
    last = None  # index in `out` of the value of the last --delta
    todo = list(args)
    while todo:
        word = todo.pop(0)
        name, equals, value = word.partition("=")
        if name not in ("--delta", "-d", *FOLLOWERS):
            out.append(word)
            continue
        if not equals:
            value = todo.pop(0) if todo else ""
        if name in FOLLOWERS and last is not None:
            out[last] += f"\n{'--option' if name in FOLLOWERS[:2] else '--at'}={value}"
        else:
            out += [name, value]
            last = len(out) - 1 if name in ("--delta", "-d") else last
    return out
