"""These tests drive large tools, which an environment of their own has: `make tools`."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("lightning") else ["test_*.py"]
