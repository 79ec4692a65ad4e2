"""Let torch's activation checkpointing run a forward again with the notes of the first run.

The second run happens in the backward: outside of the modules around it, maybe after a block, in
another block, or in another thread. torch has no hook for both of its implementations: their
constructors are wrapped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint

Again = Callable[..., Any]


@functools.cache
def keep(noted: Callable[[Again], Again]) -> None:
    """From now on, let torch run again what `noted` returns.

    Args:
        noted: takes, in the first run, the function that torch will run again, and returns one that
            runs it with the notes of this moment.
    """
    frame, function = checkpoint._CheckpointFrame, checkpoint.CheckpointFunction
    frame.__init__ = _keeping(frame.__init__, noted)  # type: ignore[method-assign]
    function.forward = staticmethod(_keeping(function.forward, noted))  # type: ignore[method-assign]


def _keeping(method: Callable[..., Any], noted: Callable[[Again], Again]) -> Callable[..., Any]:
    """Return `method`, whose second argument is the function that torch runs again."""

    @functools.wraps(method)
    def kept(own: Any, again: Again, *args: Any, **kwargs: Any) -> Any:
        return method(own, noted(again), *args, **kwargs)

    return kept
