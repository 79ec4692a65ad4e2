"""Read checkpoints of OpenDelta 0.3: a folder of one delta, or a state dict of several deltas.

Both are pickles. Only tensors are unpickled.
"""

from .folder import bare_checkpoint, config_of, holds_options, options_in, recognises, translate
from .states import load_state_dict

__all__ = [
    "bare_checkpoint",
    "config_of",
    "holds_options",
    "load_state_dict",
    "options_in",
    "recognises",
    "translate",
]
