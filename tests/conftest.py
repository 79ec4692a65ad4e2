"""A garbage collector that looks only at what the tests of one file make."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def only_new_objects_are_collected() -> Iterator[None]:
    """Each full collection looks through all that torch and transformers hold, which takes long."""
    gc.freeze()
    yield
    gc.unfreeze()
