"""Write the table in tests/README.md: the test files that cover each public name and option.

A test file says what it is about, as a whole or test by test:

    pytestmark = pytest.mark.covers("Composition.merge", "Composition.unmerge")

    @pytest.mark.covers("LoraConfig.use_dora")
    def test_...

"*Model" and "*Config" stand for those of all methods, for tests that go over all of them.

    python tools/tests_table.py
"""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from marked import replaced

import opendelta

TESTS = Path(__file__).parent.parent / "tests"
PAGE = TESTS / "README.md"


def public_names() -> dict[str, list[str]]:
    """{heading: public names, members as `Delta.attach`, options as `LoraConfig.lora_r`}."""
    common = [*opendelta.DeltaConfig.option_names(), "deltas"]
    own = {
        room: _with_options(room.__all__, common) for room in (opendelta.methods, opendelta.blocks)
    }
    others = {*opendelta.errors.__all__, *opendelta.methods.__all__, *opendelta.blocks.__all__}
    return {
        "Functions and classes": [name for name in opendelta.__all__ if name not in others],
        "Members of `Delta`": members(opendelta.Delta),
        "Members of `Composition`": members(opendelta.Composition),
        "Options of every delta": [f"DeltaConfig.{name}" for name in common[:-1]],
        "Methods and their own options": own[opendelta.methods],
        "Blocks and their own options": own[opendelta.blocks],
        "Errors and warnings": list(opendelta.errors.__all__),
    }


def _with_options(names: list[str], common: list[str]) -> list[str]:
    """The names, and the options of each Config among them that are not in `common`."""
    found: list[str] = []
    for name in names:
        found.append(name)
        if name.endswith("Config"):
            fields = dataclasses.fields(getattr(opendelta, name))
            found += [f"{name}.{field.name}" for field in fields if field.name not in common]
    return found


def members(cls: type) -> list[str]:
    """The public methods and properties of a class, with those of its bases in opendelta."""
    bases = [base for base in cls.__mro__ if base.__module__.startswith("opendelta.")]
    names = [name for base in bases for name in vars(base) if not name.startswith("_")]
    return [f"{cls.__name__}.{name}" for name in dict.fromkeys(names)]


def markers() -> dict[str, list[str]]:
    """{a name in a marker `covers`: the files that have it, relative to the tests}."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for name in dict.fromkeys(named(ast.parse(path.read_text(encoding="utf-8")))):
            found.setdefault(name, []).append(path.relative_to(TESTS).as_posix())
    return found


def named(tree: ast.AST) -> Iterator[str]:
    """The names in all `pytest.mark.covers(...)` of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.covers":
            for name in map(ast.literal_eval, node.args):
                every = opendelta.methods.__all__ if name.startswith("*") else [name]
                yield from (one for one in every if one.endswith(name.lstrip("*")))


def uncovered() -> list[str]:
    """The public names that no test covers."""
    marked = markers()
    return [n for names in public_names().values() for n in names if n not in marked]


def unknown() -> dict[str, list[str]]:
    """{a name in a marker that is none of opendelta's: the files that have it}."""
    public = {name for names in public_names().values() for name in names}
    return {name: files for name, files in markers().items() if name not in public}


def tables() -> str:
    """A table for each heading."""
    files = markers()
    text = ""
    for heading, names in public_names().items():
        text += f"\n### {heading}\n\n| name | tests |\n| --- | --- |\n"
        for name in names:
            text += f"| `{name}` | {', '.join(f'[{f}]({f})' for f in files.get(name, []))} |\n"
    return text + "\n"


def page(text: str) -> str:
    """The page with the tables as they should be."""
    return replaced(text, "table", tables())


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
