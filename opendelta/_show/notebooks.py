"""Turn what people are shown into HTML for notebooks, on light and dark pages alike."""

from __future__ import annotations

from typing import Any

from .tables import lines_of
from .tree import FONT, escaped

COLOURS = {"magenta": "#a851b8", "green": "#2d8545"}  # each can be read on white and on black
PRE = (
    '<pre style="color: inherit; background: none; font-family: {font}; line-height: 1.3; '
    'white-space: {space}; overflow-x: auto">{lines}</pre>'
)


class InNotebooks:
    """A thing that a notebook shows as people read it: its tables, or else its text."""

    def _repr_html_(self) -> str:
        return as_html(self)


def as_html(what: Any) -> str:
    """Return the text of `what` as HTML; the bold and coloured parts too, if rich draws it."""
    font = escaped(FONT)
    if not hasattr(what, "__rich_console__"):
        return PRE.format(font=font, space="pre-wrap", lines=escaped(str(what)))
    lines = ("".join(_span(text, style) for text, style, _ in line) for line in lines_of(what))
    return PRE.format(font=font, space="pre", lines="\n".join(map(str.rstrip, lines)))


def _span(text: str, style: Any) -> str:
    colour = COLOURS.get(style.color.name) if style and style.color else None
    css = ["font-weight: bold"] * bool(style and style.bold)
    css += [f"color: {colour}"] if colour else []
    return f'<span style="{"; ".join(css)}">{escaped(text)}</span>' if css else escaped(text)
