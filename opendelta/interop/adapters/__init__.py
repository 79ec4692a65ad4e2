"""Read checkpoints of the adapters library (AdapterHub) as deltas, without that library."""

from .reading import recognises, translate

__all__ = ["recognises", "translate"]
