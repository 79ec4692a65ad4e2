"""Make tables to print: with rich, and as plain text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import printable
from ..names import unnumbered
from .tree import spell

if TYPE_CHECKING:  # rich is imported where something is drawn
    from rich.segment import Segment
    from rich.table import Table
    from rich.text import Text

WIDTH = 110  # columns of a text that is not printed on a terminal
SHOWN = 4  # names in a list; more are left out


def as_text(what: Any) -> str:
    """Return the text that rich prints on a terminal of `WIDTH` columns, without colours."""
    lines = ("".join(text for text, *_ in line).rstrip() for line in lines_of(what))
    return "\n".join(lines).rstrip("\n")


def lines_of(what: Any) -> list[list[Segment]]:
    """Return the lines that rich prints on a terminal of `WIDTH` columns, in pieces with styles."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=WIDTH)
    return console.render_lines(what, pad=False)


def folded(names: Iterable[str]) -> list[str]:
    """Join full names of modules that differ only in their first number: `layers.0-11.fc2`."""
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(unnumbered(name), []).append(name)
    shown = []
    for pattern, own in together.items():
        index = next((i for i, step in enumerate(pattern.split(".")) if step == "#"), None)
        numbers = [] if index is None else [name.split(".")[index] for name in own]
        shown.append(pattern.replace("#", spell(numbers), 1) or "(root)")
    return shown


def size(count: float) -> str:
    """Return a number of bytes as text, such as "1.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"


def cells(*texts: str | Sequence[str]) -> list[Text]:
    """Return cells of a table: of each text one line, and of a list of texts a line each.

    The texts stay as they are, but for signs that do not print.
    """
    from rich.text import Text

    lines = ([text] if isinstance(text, str) else text for text in texts)
    return [Text("\n".join(map(printable, each))) for each in lines]


def plain_table(title: str | None = None, *headings: str) -> Table:
    """Return an empty table whose only line is the one beneath its headings."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=cells(title)[0] if title else None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for heading in cells(*headings):
        table.add_column(heading)
    return table
