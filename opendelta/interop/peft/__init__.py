"""PEFT's checkpoints: read as deltas, and written from them, without PEFT itself."""

from .reading import recognises, translate
from .writing import save

__all__ = ["recognises", "save", "translate"]
