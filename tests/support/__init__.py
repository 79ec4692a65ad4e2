"""What several test files use: small networks, models, counters, and scripts that tests start.

Tests import it as `support`: pytest has `tests/` on its path.
"""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent  # of the repository
