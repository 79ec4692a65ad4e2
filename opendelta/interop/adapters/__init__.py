"""The adapters library's checkpoints (AdapterHub), read as deltas, without that library."""

from .reading import recognises, translate

__all__ = ["recognises", "translate"]
