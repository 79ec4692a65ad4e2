"""The command `opendelta`, and Python, as processes of their own."""

import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).with_name("opendelta")


def run(*arguments, **options):
    """The finished process of the command `opendelta`."""
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True, **options)


def python(script):
    """The finished process of a Python that runs `script`."""
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
