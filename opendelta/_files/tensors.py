"""Tensors of a file against those that they are for: compared first, copied second."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._modules import tensors
from .._modules.tensors import is_finite
from ..errors import DeltaLoadError


@dataclass(frozen=True)
class Stored:
    """A tensor in an open safetensors file: its shape and dtype, and itself when it is read."""

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


@dataclass
class Mismatch:
    """What of given tensors does not fit; false if all do.

    Attributes:
        missing: names that are not given.
        unexpected: names of which there are none here.
        misshaped: {name: (shape given, shape here)}.
        other_kind: {name: dtype given} where that is floating and the one here is not, or reversed.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshaped: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    other_kind: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def __str__(self) -> str:
        shapes = [f"{k}: {given} instead of {own}" for k, (given, own) in self.misshaped.items()]
        integers = [f"{k}: {d}" for k, d in self.other_kind.items() if not _is_floating(d)]
        floating = [f"{k}: {d}" for k, d in self.other_kind.items() if _is_floating(d)]
        return "; ".join([
            *_some("missing", self.missing),
            *_some("unexpected", self.unexpected),
            *_some("of another shape", shapes),
            *_some("not floating", integers),
            *_some("floating instead of integers", floating),
        ])  # fmt: skip


def mismatch(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> Mismatch:
    """What of `given` tensors, in memory or in a file, does not fit `own` ones."""
    found = Mismatch(
        [key for key in own if key not in given], [key for key in given if key not in own]
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
    """Raise unless `given` tensors, in memory or in a file, fit `own` ones.

    Args:
        source: where `given` comes from, for the message.

    Raises:
        DeltaLoadError: names, shapes or kinds of numbers differ.
    """
    if found := mismatch(own, given):
        raise DeltaLoadError(f"{source} does not fit: {found}", **dataclasses.asdict(found))


def copy_into(own: Mapping[str, Tensor], given: Mapping[str, Any], source: str) -> None:
    """Copy `given` tensors into `own` ones of the same names.

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
    """(name, values in the dtype of `own`) of `given` tensors that are known to fit.

    Args:
        usual: tensors that may hold what is not finite, such as the -inf of a mask, where these do.

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
) -> Tensor:
    """The values that are given for `own`, the tensor called `key`; see `values`."""
    found = given[key]
    try:
        found = found if isinstance(found, Tensor) else found.read()
    except Exception as error:  # such as a dtype that torch does not have
        raise DeltaLoadError(f"{source}: {key} cannot be read: {error}") from None
    found = found.to(own.dtype)
    if not is_finite(found, (usual or {}).get(key)):
        raise DeltaLoadError(
            f"{source} does not fit: {key} holds values that are not finite in {found.dtype}: "
            "the training diverged, or the file is damaged",
            not_finite=[key],
        )
    return found


def _is_floating(dtype: str) -> bool:
    """Whether a dtype of torch, or of a safetensors header, is floating."""
    return "float" in dtype or dtype.startswith(("F", "BF"))


def _some(what: str, names: Iterable[str]) -> Sequence[str]:
    names = sorted(names)
    if not names:
        return []
    shortened = [name if len(name) <= 200 else f"{name[:200]}..." for name in names[:3]]
    return [f"{len(names)} {what}: {', '.join(shortened)}" + ", ..." * (len(names) > 3)]
