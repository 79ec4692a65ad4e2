"""Hooks of mkdocs: pages from the repository's root, and links that leave docs/."""

from __future__ import annotations

import logging
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
FROM_ROOT = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md")  # pages in project/
# Code in fences and backticks, which holds no links; or a link.
CODE_OR_LINK = re.compile(
    r"(?P<code>^ *```.*?^ *```$|`[^`\n]+`(?!\]))|\[(?P<text>[^\]]*)\]\((?P<to>[^)\s]+)\)",
    re.M | re.S,
)
log = logging.getLogger("mkdocs.hooks.site")  # its warnings fail a strict build


def on_files(files: Any, config: Any) -> Any:
    """Add pages from the root."""
    for name in FROM_ROOT:
        files.append(File.generated(config, f"project/{name}", abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead the links of a page that leave its folder to pages, or to the repository."""
    uri = page.file.src_uri
    source = posixpath.basename(uri) if uri.startswith("project/") else f"docs/{uri}"

    def link(found: re.Match[str]) -> str:
        to = found["to"]
        if found["code"] or re.match(r"\w+:|#", to):
            return found[0]
        path, mark, anchor = to.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if path in FROM_ROOT or path.startswith("docs/"):
            path = f"project/{path}" if path in FROM_ROOT else path.removeprefix("docs/")
            path = os.path.relpath(path, posixpath.dirname(uri) or ".")
            return f"[{found['text']}]({path}{mark}{anchor})"
        if not (ROOT / path).exists():
            log.warning("%s: no such file: %s", source, to)
        if not config.repo_url:
            return found["text"]
        return f"[{found['text']}]({config.repo_url.rstrip('/')}/blob/main/{path}{mark}{anchor})"

    return CODE_OR_LINK.sub(link, markdown)
