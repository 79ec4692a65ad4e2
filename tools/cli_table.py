"""Write the tables of options into docs/reference/cli.md, from the command itself."""

from pathlib import Path
from typing import Any

import typer
from marked import replaced

from opendelta import cli

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"


def row(option: Any) -> str:
    """One line of a table."""
    argument = option.param_type_name == "argument"
    names = [option.metavar or option.name] if argument else option.opts + option.secondary_opts
    value = f" {option.metavar}" if option.metavar and not argument else ""
    words = ", ".join(f"`{name}{value}`" for name in names)
    default = f"`{option.default}`" if str(option.default) not in ("None", "False") else ""
    return f"| {words} | {default} | {' '.join((option.help or '').split())} |\n"


def tables() -> str:
    """A section for each command: what it does, its arguments and options."""
    text = ""
    for name, command in typer.main.get_command(cli.app()).commands.items():
        about, _, _ = (command.help or "").partition("\n\n")
        text += f"\n### opendelta {name}\n\n{' '.join(about.split())}\n\n"
        text += "| argument or option | default | what it says |\n|---|---|---|\n"
        text += "".join(row(option) for option in command.params if option.name != "help")
    return text + "\n"


def page(text: str) -> str:
    """The page with the tables as they should be."""
    return replaced(text, "options", tables())


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
