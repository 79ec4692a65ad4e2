"""Report the code-line budgets: lines that hold code, without docstrings, comments and blanks."""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

FILE_BUDGET, CORE_BUDGET = 300, 2500
NOT_CORE = {"methods", "structure", "interop", "cli", "__main__.py", "tree.py", "tables.py", "demo"}


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


def _lines(text: str) -> set[int]:
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
    return code


if __name__ == "__main__":
    package = Path(__file__).parent.parent / "opendelta"
    counts = {p.relative_to(package): code_lines(p) for p in sorted(package.rglob("*.py"))}
    for name, n in counts.items():
        if n > FILE_BUDGET:
            print(f"opendelta/{name}: {n} code lines, over the budget of {FILE_BUDGET}")
    core = sum(n for name, n in counts.items() if name.parts[0] not in NOT_CORE)
    print(f"core: {core} code lines, {'OVER' if core > CORE_BUDGET else 'of'} {CORE_BUDGET}")
