"""The settings that what lies in a folder was trained with, in a file of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .._files.folder import writable
from .._files.reading import parsed
from ..errors import DeltaError


def keep_settings(file: Path, facts: dict[str, Any], what: str, others: bool = False) -> None:
    """Write the settings of a training, beside what it will leave.

    Args:
        what: what the folder holds, in words.
        others: the file may hold other settings, as nothing of them is used.

    Raises:
        DeltaError: the file holds other settings, or it cannot be read or written.
    """
    folder = file.parent
    if not others and file.exists():
        held = parsed(file)
        before = held if isinstance(held, dict) else {}
        other = [k for k in {**before, **facts} if before.get(k) != facts.get(k)]
        if other:
            raise DeltaError(
                f"{folder} holds {what} with other settings ("
                + ", ".join(f"{k}: {before.get(k)} there, {facts.get(k)} now" for k in other)
                + "): give another out= (--out), or delete it"
            )
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
