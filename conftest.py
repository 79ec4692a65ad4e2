"""For all tests, those of the docstrings too: what would take longer than they do is left out."""

import gc
import signal
from collections.abc import Iterator

import pytest
import torch

# A shell that runs the tests in the background lets them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)

# For each device that is not there, torch notes the stack of each seed, which takes longer than the
# rest of many tests.
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None


@pytest.fixture(scope="module", autouse=True)
def only_new_objects_are_collected() -> Iterator[None]:
    """Each full collection looks through all that torch and transformers hold, which takes long."""
    gc.freeze()
    yield
    gc.unfreeze()
