"""Put back the values that a forward changes: buffers, and states of random number generators."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .._backbone.backbone import Backbone
from .._modules.process import kept_random

PACKED = 2**20  # a larger buffer of whole numbers holds packed weights: no forward changes them


@contextlib.contextmanager
def put_back(backbone: Backbone) -> Iterator[None]:
    """Put back the buffers and random number generators that the block changes."""
    tables = [(m._buffers, k, b) for m in backbone.model.modules() for k, b in m._buffers.items()]
    copies = {
        id(b): (b, b.detach().clone())
        for _, _, b in tables
        if b is not None and (b.is_floating_point() or b.numel() <= PACKED) and not b.is_meta
    }
    with kept_random():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, copy in copies.values():
                    if not torch.equal(buffer, copy):
                        buffer.copy_(copy)
            for table, key, before in tables:
                if table.get(key) is not before:
                    table[key] = before
