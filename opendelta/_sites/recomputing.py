"""Let torch's activation checkpointing run a forward again with the selection of the first run.

The second run happens in the backward, which may come after a block, inside another block, or in
another thread. torch has no hook for both of its implementations: their constructors are wrapped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint

from .._layers.selection import CURRENT, within


@functools.cache
def keep_selection() -> None:
    """Wrap the functions that torch runs again from now on."""
    frame, function = checkpoint._CheckpointFrame, checkpoint.CheckpointFunction
    frame.__init__ = _keeping(frame.__init__)  # type: ignore[method-assign]
    function.forward = staticmethod(_keeping(function.forward))  # type: ignore[method-assign]


def _keeping(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return `method`, whose second argument is the function that torch runs again."""

    @functools.wraps(method)
    def kept(own: Any, again: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return method(own, within(CURRENT.get().blocks, again), *args, **kwargs)

    return kept
