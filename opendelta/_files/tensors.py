"""Compare the tensors of a file with the tensors that they are for, and copy them if all fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._modules import tensors
from .._modules.tensors import is_finite
from ..errors import DeltaLoadError, Mismatch, listed


@dataclass(frozen=True)
class Stored:
    """A tensor in an open safetensors file: only `read` loads its values into memory."""

    file: Any
    key: str

    @property
    def shape(self) -> list[int]:
        return self.file.get_slice(self.key).get_shape()

    @property
    def dtype(self) -> str:
        return self.file.get_slice(self.key).get_dtype()

    def read(self) -> Tensor:
        return self.file.get_tensor(self.key)


def mismatch(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> Mismatch:
    """Return the differences between `given` tensors, in memory or in a file, and `own` tensors."""
    found = Mismatch(
        missing=[key for key in own if key not in given],
        unexpected=[key for key in given if key not in own],
    )
    for key, tensor in own.items():
        if key not in given:
            continue
        shape, dtype = list(given[key].shape), str(given[key].dtype)
        if shape != list(tensor.shape):
            found.misshaped[key] = (shape, list(tensor.shape))
        if _is_floating(dtype) != tensor.is_floating_point():
            found.other_kind[key] = dtype
    return found


def compare(own: Mapping[str, Tensor], given: Mapping[str, Any], source: str) -> None:
    """Raise unless `given` tensors, in memory or in a file, fit the `own` tensors.

    Args:
        source: where `given` comes from, for the message.

    Raises:
        DeltaLoadError: names, shapes or kinds of numbers differ.
    """
    if found := mismatch(own, given):
        raise DeltaLoadError(f"{source} does not fit: {_in_words(found)}", details=found)


def _in_words(found: Mismatch) -> str:
    """Return a text with the first few names, shapes and dtypes that do not fit."""
    shapes = [f"{k}: {given} instead of {own}" for k, (given, own) in found.misshaped.items()]
    integers = [f"{k}: {d}" for k, d in found.other_kind.items() if not _is_floating(d)]
    floating = [f"{k}: {d}" for k, d in found.other_kind.items() if _is_floating(d)]
    return "; ".join([
        *_some("missing", found.missing),
        *_some("unexpected", found.unexpected),
        *_some("of another shape", shapes),
        *_some("not floating", integers),
        *_some("floating instead of integers", floating),
    ])  # fmt: skip


def copy_into(own: Mapping[str, Tensor], given: Mapping[str, Any], source: str) -> None:
    """Copy `given` tensors into the `own` tensors of the same names.

    Raises:
        DeltaLoadError: they do not fit, or hold values that are not finite. Nothing is copied then.
    """
    compare(own, given, source)
    copy(own, dict(values(own, given, source)))


def copy(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copy tensors that are known to fit."""
    with torch.no_grad():
        for key, value in given.items():
            own[key].copy_(tensors.spread(value, like=own[key]))


def values(
    own: Mapping[str, Tensor],
    given: Mapping[str, Any],
    source: str,
    usual: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, values in the dtype of `own`) of `given` tensors that are known to fit.

    Args:
        usual: tensors that may hold values such as the -inf of a mask. A given tensor may hold the
            same value at the same place.

    Raises:
        DeltaLoadError: values are not finite, or cannot be read.
    """
    for key, tensor in own.items():
        yield key, value(key, tensor, given, source, usual)


def value(
    key: str,
    own: Tensor,
    given: Mapping[str, Any],
    source: str,
    usual: Mapping[str, Tensor] | None = None,
    dtype_of: Callable[[torch.dtype], torch.dtype] | None = None,
) -> Tensor:
    """Return the given values for `own`, the tensor called `key`; see `values`.

    Args:
        dtype_of: returns the dtype for floating values of a given dtype. None: that of `own`.
    """
    found = given[key]
    try:
        found = found if isinstance(found, Tensor) else found.read()
        floating = dtype_of if own.is_floating_point() else None
        found = found.to(own.dtype if floating is None else floating(found.dtype))
    except Exception as error:  # such as a dtype that torch does not have
        raise DeltaLoadError(f"{source}: {key} cannot be read: {error}") from None
    if not is_finite(found, (usual or {}).get(key)):
        raise DeltaLoadError(
            f"{source} does not fit: {key} holds values that are not finite in {found.dtype}: "
            "the training diverged, or the file is damaged",
            not_finite=[key],
        )
    return found


def _is_floating(dtype: str) -> bool:
    """True if a dtype is floating; it may be named as in torch or as in a safetensors header."""
    return "float" in dtype or dtype.startswith(("F", "BF"))


def _some(what: str, names: Iterable[str]) -> Sequence[str]:
    names = sorted(names)
    if not names:
        return []
    shortened = [name if len(name) <= 200 else f"{name[:200]}..." for name in names]
    return [f"{len(names)} {what}: {listed(shortened)}"]
