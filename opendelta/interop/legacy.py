"""OpenDelta 0.3's checkpoints."""

from __future__ import annotations

from pathlib import Path


def recognises(folder: Path) -> bool:
    """Whether OpenDelta 0.3 wrote `folder`."""
    return False
