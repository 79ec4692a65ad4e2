"""Check what import-linter cannot: privacy, layers that answer for themselves, warnings, English.

Each rule is a function that yields (line, what is wrong) for one file.
"""

import ast
import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "opendelta"
BAD_SUMMARY = re.compile(r"What\b|Those\b|Whether [^.]*, or\b")
Found = Iterator[tuple[int, str]]


class Package:
    """All files of a package, parsed, with the private names and the layer classes in them."""

    def __init__(self, folder: Path) -> None:
        self.texts = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
        self.nodes = {path: nodes_of(text) for path, text in self.texts.items()}
        nodes = [(path, node) for path, own in self.nodes.items() for node in own]
        self.private: dict[str, set[Path]] = {}
        bases: dict[str, set[str]] = {}
        for path, node in nodes:
            for name in filter(is_private, defined(node)):
                self.private.setdefault(name, set()).add(path)
            if isinstance(node, ast.ClassDef):
                bases.setdefault(node.name, set()).update(map(last_name, node.bases))
        self.layers = {"DeltaLayer"}
        while more := {name for name, own in bases.items() if own & self.layers} - self.layers:
            self.layers |= more


@functools.cache
def nodes_of(text: str) -> list[ast.AST]:
    """The nodes of a file, the one of the whole file first."""
    return [*ast.walk(ast.parse(text))]


@functools.cache
def inside_functions(text: str) -> list[ast.AST]:
    """The nodes inside functions of a file."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    functions = [node for node in nodes_of(text) if isinstance(node, kinds)]
    return [*{part: None for function in functions for part in ast.walk(function)}]


def defined(node: ast.AST) -> list[str]:
    """List the names of functions, classes, constants and attributes that a node defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    parts = [part for target in targets for part in getattr(target, "elts", [target])]
    own = [p.attr for p in parts if isinstance(p, ast.Attribute) and last_name(p.value) == "self"]
    return own + [part.id for part in parts if isinstance(part, ast.Name)]


def is_own(node: ast.AST) -> bool:
    """True for an import of this package, relative or not."""
    if isinstance(node, ast.Import):
        return any(alias.name.partition(".")[0] == "opendelta" for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.level > 0 or (node.module or "").partition(".")[0] == "opendelta"
    return False


def is_private(name: str) -> bool:
    """True for `_name`, and not for `__name__`."""
    return name.startswith("_") and not name.startswith("__")


def last_name(node: ast.AST) -> str:
    """The last step of a dotted name."""
    return getattr(node, "attr", getattr(node, "id", ""))


def asks_class(call: ast.Call) -> bool:
    """True for `isinstance(thing, ...)` and `issubclass(type(thing), ...)`."""
    name = last_name(call.func)
    return name == "isinstance" or (name == "issubclass" and "type(" in ast.unparse(call.args[0]))


def private_names(package: Package, path: Path) -> Found:
    """Private names are for their own file: no import of one, no `thing._name` from elsewhere."""
    for node in package.nodes[path]:
        if isinstance(node, ast.ImportFrom) and is_own(node):
            for name in (alias.name for alias in node.names):
                if path not in package.private.get(name, {path}):
                    yield node.lineno, f"imports the private {name!r}: give it a public name"
        elif isinstance(node, ast.Attribute) and last_name(node.value) not in ("self", "cls"):
            name = node.attr
            if path not in package.private.get(name, {path}):
                yield node.lineno, f"reaches for the private {name!r} of another file"


def layer_tests(package: Package, path: Path) -> Found:
    """A layer answers for itself: outside their rooms nobody asks which class it is of."""
    if path.parent.name in ("_layers", "_sequences"):
        return
    nodes = package.nodes[path]
    imports = [alias for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names]
    names = {alias.asname or alias.name: alias.name for alias in imports}
    for node in nodes:
        parts: list[ast.AST] = []
        if isinstance(node, ast.Call) and asks_class(node):
            parts = node.args[1:]
        elif isinstance(node, ast.Compare) and "type(" in ast.unparse(node.left):
            parts = list(node.comparators)
        elif isinstance(node, ast.MatchClass):
            parts = [node.cls]
        found = {last_name(each) for part in parts for each in ast.walk(part)}
        if asked := {names.get(name, name) for name in found} & package.layers:
            yield node.lineno, f"isinstance of {', '.join(sorted(asked))}: ask the layer itself"


def stack_levels(package: Package, path: Path) -> Found:
    """Only `errors.warn` finds the line that a warning points at."""
    functions, lines = {"warn", "warn_explicit"}, set()
    for node in package.nodes[path]:
        names: set[str] = set()
        if isinstance(node, ast.Attribute) and last_name(node.value) == "warnings":
            names = {node.attr}
        elif isinstance(node, ast.ImportFrom) and node.module == "warnings":
            names = {alias.name for alias in node.names}
        if names & functions or (isinstance(node, ast.keyword) and node.arg == "stacklevel"):
            lines.add(getattr(node, "lineno", 1))
    yield from ((line, "stacklevel is counted by hand: use errors.warn") for line in sorted(lines))


def late_imports(package: Package, path: Path) -> Found:
    """An import of our own inside a function says which start-up time it saves."""
    lines = package.texts[path].splitlines()
    for node in inside_functions(package.texts[path]):
        if is_own(node) and not re.search(r"# start-up: \w", lines[node.lineno - 1]):
            yield node.lineno, "an import inside a function needs a reason: # start-up: ..."


def summaries(package: Package, path: Path) -> Found:
    """A docstring's summary names the thing: it does not begin with "What" or "Those"."""
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    for node in package.nodes[path]:
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text and BAD_SUMMARY.match(text):
            yield getattr(node, "lineno", 1), f"the summary names no thing: {text.splitlines()[0]}"


RULES: tuple[Callable[[Package, Path], Found], ...] = (
    private_names, layer_tests, stack_levels, late_imports, summaries,
)  # fmt: skip


def broken(folder: Path = PACKAGE) -> list[str]:
    """Each place that breaks a rule, as a line of text."""
    package = Package(folder)
    return [
        f"{path.relative_to(folder.parent)}:{line} {problem}"
        for path in sorted(package.nodes)
        for rule in RULES
        for line, problem in rule(package, path)
        if not (rule is stack_levels and path == folder / "errors.py")
    ]


if __name__ == "__main__":
    sys.exit("\n".join(broken()) or 0)
