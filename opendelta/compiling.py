"""torch.compile and switching: an error where torch would stop compiling new sets of deltas."""

from __future__ import annotations

import logging
import re

from .errors import CompileLimitError
from .record import SLOT

# What torch names as changed where deltas did: a stack, or the class of a module that became a
# site or ceased to be one.
CHANGED = re.compile(rf"_modules\['{SLOT}'\]|___check_type_id\(\S*_modules\['[^']*'\], \d+\)")


class LimitFilter(logging.Filter):
    """Sees torch's message that it compiles no more graphs, and raises if deltas are the reason."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let all other messages pass.

        Raises:
            CompileLimitError: what changed is which deltas a module has, or which of them act.
        """
        args = record.args
        at_limit = str(record.msg).startswith("torch._dynamo hit config.")
        if at_limit and isinstance(args, tuple) and CHANGED.search(str(args[3])):
            option, limit, function = args[:3]
            raise CompileLimitError(
                f"torch.compile keeps at most {limit} graphs of {function}, and this set of acting "
                f"deltas would need another. Set torch._dynamo.config.{option} to more, such as "
                f"{2 * int(str(limit))}: each set that you switch between takes one, and so does "
                "what else changes, such as a cache"
            )
        return True


_filter = LimitFilter()


def watch_limit() -> None:
    """Look out for torch's message from now on."""
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_filter)  # twice is once
