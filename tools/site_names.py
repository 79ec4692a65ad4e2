"""An extension of griffe, which reads the code for the site; it warns where no docstring is."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

import griffe

log = logging.getLogger("mkdocs.hooks.site")  # its warnings fail a strict build


class Names(griffe.Extension):
    """Give the classes of the stubs their docstrings; warn of public names without one."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Look at a package that has just been read."""
        for room in ("blocks", "methods"):
            for module in pkg[room].modules.values():
                for name, cls in module.classes.items():
                    stub = pkg[room].members.get(name)
                    if stub is not None and not stub.is_alias:
                        stub.docstring = cls.docstring
        for name in undocumented(pkg):
            log.warning("%s has no docstring", name)

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Make the examples of an object, which has just been read, a section of their own."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", obj.docstring.value, flags=re.M
            )


def undocumented(pkg: griffe.Module) -> Iterator[str]:
    """Find the public names, and their public methods, that have no docstring, nor inherit one."""
    for name in map(str, pkg.exports or ()):
        shown = pkg[name]
        if not shown.has_docstring:
            yield shown.path
        if shown.is_class:
            classes = [shown, *shown.mro()]
            for method in {m for cls in classes for m, f in cls.members.items() if f.is_function}:
                said = any(c.members[method].has_docstring for c in classes if method in c.members)
                if not method.startswith("_") and not said:
                    yield f"{shown.path}.{method}"
