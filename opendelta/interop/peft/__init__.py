"""Read PEFT's checkpoints as deltas, and write deltas as PEFT's checkpoints, without PEFT."""

from .reading import recognises, translate
from .writing import save

__all__ = ["recognises", "save", "translate"]
