"""Make data for JSON."""

from __future__ import annotations

import math
from typing import Any


def for_json(data: Any) -> Any:
    """Return data with None for each number that JSON does not have: nan, inf and -inf.

    Example:
        >>> for_json({"scores": (0.5, float("nan"))})
        {'scores': [0.5, None]}
    """
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, dict):
        return {key: for_json(value) for key, value in data.items()}
    return list(map(for_json, data)) if isinstance(data, list | tuple) else data
