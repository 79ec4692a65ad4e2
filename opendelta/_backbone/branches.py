"""Note which code of somebody's own runs, so that a branch that did not run is known."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

LIBRARIES = {"torch", "torchvision", "timm", "transformers", "opendelta"}


class Branches:
    """A block that notes each operation of code that is no library's.

    A debugger or a coverage tool sees nothing of what runs inside.
    """

    def __init__(self) -> None:
        self.ran: set[tuple[CodeType, int]] = set()

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self._call)

    def __exit__(self, *_: Any) -> None:
        sys.settrace(self.before)

    def _call(self, frame: FrameType, _event: str, _given: Any) -> Any:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package in LIBRARIES:
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame: FrameType, event: str, _given: Any) -> Any:
        if event == "opcode":
            self.ran.add((frame.f_code, frame.f_lasti))
        return self._step

    def settle(self, code: CodeType, offset: int) -> bool:
        """True if the operation ran, or if a flag of its object keeps it from running."""
        return (code, offset) in self.ran or _is_behind_flag(code, offset)


@functools.cache
def _is_behind_flag(code: CodeType, offset: int) -> bool:
    """True if an operation is in an `if` that asks for attributes of the object alone."""
    position = list(code.co_positions())[offset // 2]
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return False
    indent = len(lines[0]) - len(lines[0].lstrip())
    wanted = (position[0] - first + 1, position[2] - indent) if None not in position else None  # type: ignore[operator]
    return any(_asks_object(test, code.co_varnames) for test in _tests_around(tree, wanted))


def _tests_around(tree: ast.AST, wanted: tuple[int, int] | None) -> Iterator[ast.expr]:
    """Yield the tests of the branches around the attribute at a line and column."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp):
            branches = [node.body, node.orelse]
            parts = [p for b in branches for p in (b if isinstance(b, list) else [b])]
            places = {
                (n.lineno, n.col_offset)
                for part in parts
                for n in ast.walk(part)
                if isinstance(n, ast.Attribute)
            }
            if wanted in places:
                yield node.test


def _asks_object(test: ast.expr, local: tuple[str, ...]) -> bool:
    names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
    return not names & {*local[1:]}
