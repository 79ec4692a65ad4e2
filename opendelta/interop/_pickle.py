"""Read a state dict that `torch.save` wrote, without unpickling it.

A pickle is a program. Here a small machine runs it that knows just the steps, the names and the
sizes of a state dict: no file makes it call anything, or take more memory than the file has bytes.
"""

from __future__ import annotations

import math
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._files.reading import LARGEST

DICT, TENSOR, PARAMETER = (
    "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
)  # fmt: skip
DTYPES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16,
        "BFloat16": torch.bfloat16, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
        "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    }.items()
}  # fmt: skip
VALUES = {"BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"}  # a step that holds its value
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict,
}  # fmt: skip
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
MOST_ARGUMENTS = 10  # of a call
MOST_SIZES = 100  # of a tensor's axes and strides
MOST_STEPS = 200_000  # about 25 for each tensor


class StateDict:
    """The program of one file, and what it has made so far.

    Attributes:
        archive: the file.
        most: bytes that a tensor may have, as many as the file.
        stack: the values that the next steps take.
        marks: for each open mark the length of the stack at it.
        memo: the values that later steps name by number.
        storages: {name: a tensor of one axis} of those that were read.
        negated: bytes of the tensors that were made of others by their sign.
    """

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self.archive, self.most = archive, size
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Tensor] = {}
        self.negated = 0
        (program,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        self.folder = program.removesuffix("data.pkl")

    def run(self) -> Any:
        """Return what the program makes.

        Raises:
            ValueError: a step that no state dict needs. A damaged program may raise anything else.
        """
        order = self.folder + "byteorder"
        if order in self.archive.namelist() and self._bytes(order, 6) != b"little":
            raise ValueError("its numbers are not little-endian")
        program = bytes(self._bytes(f"{self.folder}data.pkl", LARGEST))
        for number, (code, value, _) in enumerate(pickletools.genops(program)):
            if number > MOST_STEPS:
                raise ValueError(f"it has more than {MOST_STEPS:,} steps")
            self._step(code.name, value)
        (made,) = self.stack
        return made

    def _step(self, code: str, value: Any) -> None:
        stack = self.stack
        if code in VALUES:
            stack.append(value)
        elif code in CONSTANTS:
            stack.append(CONSTANTS[code]())
        elif code in TUPLES:
            stack.append(tuple(self._taken(len(stack) - TUPLES[code])))
        elif code == "TUPLE":
            stack.append(tuple(self._taken(self.marks.pop())))
        elif code == "MARK":
            self.marks.append(len(stack))
        elif code in ("BINPUT", "LONG_BINPUT"):
            self.memo[value] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[value])
        elif code in ("SETITEM", "SETITEMS"):
            items = self._taken(len(stack) - 2 if code == "SETITEM" else self.marks.pop())
            stack[-1].update(zip(_texts(items[::2]), items[1::2], strict=True))
        elif code == "GLOBAL" and (value in DTYPES or value in (DICT, TENSOR, PARAMETER)):
            stack.append(Name(value))
        elif code == "BINPERSID":
            stack.append(self._storage(*stack.pop()))
        elif code == "REDUCE":
            arguments = stack.pop()
            if not isinstance(arguments, tuple) or len(arguments) > MOST_ARGUMENTS:
                raise ValueError("it calls something with other arguments than a state dict's")
            stack.append(self._call(stack.pop().name, *arguments))
        elif code == "BUILD":  # the versions of modules, which change nothing
            stack.pop()
        elif code not in ("PROTO", "STOP"):
            raise ValueError(f"it holds {code} {value if code == 'GLOBAL' else ''}".rstrip())

    def _taken(self, start: int) -> list[Any]:
        """Take the values from `start` on off the stack."""
        if start < 0:
            raise ValueError("it takes a value that it has not made")
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _call(self, name: str, *arguments: Any) -> Any:
        if name == DICT and not arguments:
            return {}
        if name == TENSOR:
            tensor = self._tensor(*arguments[:4])
            flags = arguments[6] if len(arguments) > 6 else None
            if flags and flags != {"neg": True}:  # what else it holds may take forever to spell
                raise ValueError("a tensor in it is stored in another way than by its values")
            return self._negative(tensor) if flags else tensor
        if name == PARAMETER and isinstance(arguments[0], Tensor):
            return arguments[0]
        raise ValueError(f"it calls {name} with other arguments than a state dict's")

    def _negative(self, tensor: Tensor) -> Tensor:
        self.negated += tensor.nbytes
        if self.negated > self.most:
            raise ValueError("its tensors claim more values than the file holds")
        return -tensor

    def _tensor(self, storage: Tensor, start: int, shape: Any, strides: Any) -> Tensor:
        few = len(shape) + len(strides) <= MOST_SIZES
        sizes = (start, *shape, *strides) if few else ()
        if not few or not all(type(size) is int and 0 <= size < 2**63 for size in sizes):
            raise ValueError("a shape of it is no list of sizes")
        if math.prod(shape) * storage.itemsize > self.most:
            raise ValueError("a tensor in it claims more values than the file holds")
        return storage.as_strided(shape, strides, start)  # torch checks that it ends in `storage`

    def _storage(self, kind: str, dtype: Name, key: str, _: Any, count: int) -> Tensor:
        """Return the numbers that a part of the file holds."""
        if kind != "storage" or type(count) is not int or count < 0 or not isinstance(key, str):
            raise ValueError("it names something else than numbers")
        if key not in self.storages:
            kept = DTYPES[dtype.name]
            content = self._bytes(f"{self.folder}data/{key}", count * kept.itemsize)
            read = torch.frombuffer(content, dtype=kept) if content else torch.empty(0, dtype=kept)
            self.storages[key] = read
        storage = self.storages[key]
        if (storage.dtype, len(storage)) != (DTYPES[dtype.name], count):
            raise ValueError(f"the numbers {key!r} are not of the size or kind that it says")
        return storage

    def _bytes(self, name: str, most: int) -> bytearray:
        """Return a part of the file; it may have at most so many bytes."""
        part = self.archive.getinfo(name)
        if part.file_size > most or part.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name!r} in it is compressed, or has {part.file_size:,} bytes")
        return bytearray(self.archive.read(part))


class Name:
    """The name of a function or a type, which is never looked up."""

    def __init__(self, name: str) -> None:
        self.name = name


def _texts(keys: list[Any]) -> list[str]:
    """Return keys of a dict; raise unless they are texts: others may take forever to compare."""
    if not all(isinstance(key, str) for key in keys):
        raise ValueError("a key in it is no text")
    return keys
