"""A session of the picker that ends with its test."""

import contextlib

import pytest
from support.picking import Picking


@pytest.fixture
def picking(monkeypatch):
    """Start a call that opens the page; see `Picking`."""
    begun = []

    def start(call):
        begun.append(Picking(monkeypatch, call))
        return begun[-1]

    yield start
    for each in begun:
        if each.thread.is_alive():
            with contextlib.suppress(OSError, AssertionError):
                each.ask("cancel")
            each.thread.join(20)
            assert not each.thread.is_alive()
