"""Check the code-line budgets: lines that hold code, without docstrings, comments and blanks.

A function, a method's file or a room that is too long fails; a long file is only reported. The
budgets of the rooms are in `rooms.json`: what each room had when it was last made smaller. A change
may lower a number there; to raise one, it has to say so in that file.
"""

import ast
import functools
import io
import json
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "opendelta"
ROOMS = Path(__file__).parent / "rooms.json"
FUNCTION_BUDGET, METHOD_BUDGET, FILE_BUDGET = 40, 60, 300


def code_lines(path: str | Path) -> int:
    """Count the code lines of the file."""
    return len(_lines(Path(path).read_text(encoding="utf-8")))


def functions(path: str | Path) -> list[tuple[str, int, int]]:
    """List (qualified name, line, code lines) of every function; a nested one counts in both."""
    text = Path(path).read_text(encoding="utf-8")
    lines = _lines(text)
    return [
        (name, first, len(lines.intersection(range(first, last + 1))))
        for name, first, last in _functions(ast.parse(text))
    ]


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, int, int]]:
    for child in ast.iter_child_nodes(node):
        name = getattr(child, "name", None)
        if name and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + name, child.lineno, child.end_lineno or child.lineno
        scope = name and isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _functions(child, f"{prefix}{name}." if scope else prefix)


@functools.cache
def _lines(text: str) -> frozenset[int]:
    """Find the numbers of the code lines; a string that is a statement of its own is no code."""
    docs: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            docs.update(range(value.lineno, (value.end_lineno or value.lineno) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        doc = token.type == tokenize.STRING and token.start[0] in docs
        if token.string.strip() and token.type != tokenize.COMMENT and not doc:
            code.update(range(token.start[0], token.end[0] + 1))
    return frozenset(code)


def broken() -> list[str]:
    """Each budget of a function or a method's file that is broken, as a line of text."""
    paths = sorted(PACKAGE.rglob("*.py"))
    counts = [
        (f"{path.relative_to(PACKAGE.parent)}:{line} {name}", count, FUNCTION_BUDGET)
        for path in paths
        for name, line, count in functions(path)
    ] + [
        (f"{path.relative_to(PACKAGE.parent)}", code_lines(path), METHOD_BUDGET)
        for path in paths
        if path.parent.name == "methods" and not path.name.startswith("_")
    ]
    rooms, budgets = room_lines(), json.loads(ROOMS.read_text(encoding="utf-8"))
    if strange := rooms.keys() ^ budgets.keys():
        return [f"{ROOMS.name} and opendelta/ have other rooms: {', '.join(sorted(strange))}"]
    counts += [(f"opendelta/{room}", count, budgets[room]) for room, count in rooms.items()]
    advice = ", or run `python tools/lint_budget.py --write` and say why"
    return [
        f"{what}: {count} code lines, over the budget of {budget}: write less"
        + (advice if what.partition("/")[2] in rooms else "")
        for what, count, budget in counts
        if count > budget
    ]


def room_lines() -> dict[str, int]:
    """{name of a room: its code lines}, "files" for those that lie flat in the package."""
    rooms: dict[str, int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0]
        room = "files" if first.endswith(".py") else first
        rooms[room] = rooms.get(room, 0) + code_lines(path)
    return dict(sorted(rooms.items()))


def reported() -> list[str]:
    """List each file that is longer than it should be, and the size of all."""
    counts = {p.relative_to(PACKAGE): code_lines(p) for p in sorted(PACKAGE.rglob("*.py"))}
    return [
        *(
            f"opendelta/{name}: {n} code lines, over the budget of {FILE_BUDGET}"
            for name, n in counts.items()
            if n > FILE_BUDGET
        ),
        f"opendelta: {sum(counts.values())} code lines",
    ]


if __name__ == "__main__":
    if "--write" in sys.argv:
        ROOMS.write_text(json.dumps(room_lines(), indent=2) + "\n", encoding="utf-8")
    print("\n".join(reported()))
    sys.exit("\n".join(broken()) or 0)
