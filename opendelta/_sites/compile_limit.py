"""Raise an error when torch.compile would stop compiling graphs for new sets of active deltas."""

from __future__ import annotations

import logging
import re

from ..errors import CompileLimitError
from ..names import SLOT

CLASS = re.compile(r"___check_type_id\(\S*_modules\['[^']*'\], (\d+)\)")
STACK = re.compile(rf"_modules('\])?\['{SLOT}'\]")
SITE_CLASSES: set[int] = set()  # ids of the classes of sites, and of their plain classes


class LimitFilter(logging.Filter):
    """Raises when torch logs that it compiles no more graphs, if deltas are the reason."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let all other messages pass.

        Raises:
            CompileLimitError: the graph does not fit because other deltas are attached or active.
        """
        args = record.args
        at_limit = str(record.msg).startswith("torch._dynamo hit config.")
        if at_limit and isinstance(args, tuple) and _is_ours(str(args[3])):
            option, limit, function = args[:3]
            raise CompileLimitError(
                f"torch.compile keeps at most {limit} graphs of {function}, and this set of acting "
                f"deltas would need another. Set torch._dynamo.config.{option} to more, such as "
                f"{2 * int(str(limit))}: each set that you switch between takes one, and so does "
                "what else changes, such as a cache"
            )
        return True


def _is_ours(changed: str) -> bool:
    """True if the change that torch names is a stack, or a module that became a site or plain."""
    found = CLASS.search(changed)
    if STACK.search(changed):
        return True
    return found is not None and int(found[1]) in SITE_CLASSES


_filter = LimitFilter()


def watch_limit() -> None:
    """Watch for torch's message from now on."""
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_filter)  # again: no effect
