"""The bytes of a safetensors file, from its header on, for who writes and hashes them at once.

    8 bytes: the header's length | header: JSON of names, dtypes, shapes, places | all values

They are those that safetensors writes. It has them as a whole, or writes them itself: both take
longer than the hash.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import DeltaError

# safetensors' names of dtypes, in the order in which it writes them: the largest come first.
DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}
PIECE = 2**18  # values of a dtype that are copied at once


def header(tensors: Mapping[str, Tensor]) -> bytes:
    """The first bytes of a file of these tensors.

    Raises:
        DeltaError: a tensor is of a dtype that no such file has.
    """
    facts: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in _in_order(tensors):
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.itemsize
        shape, place = [*tensor.shape], [start, end]
        facts[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": place}
    text = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def pieces(tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """The values of detached tensors as they come after the header, copied piece by piece.

    A piece is flat, of one dtype, and holds many small tensors or a part of a large one.
    """
    for _, names in itertools.groupby(_in_order(tensors), lambda name: tensors[name].dtype):
        held: list[Tensor] = []
        size = 0
        for name in names:
            flat = tensors[name].cpu().reshape(-1)
            for part in flat.split(PIECE) if flat.numel() > PIECE else [flat]:
                held.append(part)
                size += part.numel()
                if size >= PIECE:
                    yield torch.cat(held)
                    held, size = [], 0
        if size:
            yield torch.cat(held)


def as_bytes(piece: Tensor) -> memoryview:
    """The values of a piece as a file has them: little-endian."""
    own = piece.view(torch.uint8)
    if sys.byteorder == "big":
        own = own.view(-1, piece.itemsize // (1 + piece.is_complex())).flip(1).flatten()
    return own.numpy().data


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names in the order in which safetensors writes them."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise DeltaError(f"{name} is {tensor.dtype}, which no safetensors file can hold")
    return sorted(tensors, key=lambda name: (ORDER[tensors[name].dtype], name))
