"""`Draft`: a delta of another library on its way to ours."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._backbone.backbone import Backbone
from .._modules.tensors import full
from ..errors import DeltaLoadError, shown
from ..names import SLOT, join

CONFIG = "adapter_config.json"  # in folders of PEFT, and of the adapters library


@dataclass
class Draft:
    """One delta of another library, half read.

    Attributes:
        folder: the folder of that library.
        config: its JSON.
        backbone: the backbone that the delta will be on.
        name: the name of the delta to be.
        options: the delta's options so far.
        sites: {full name of a module: {our tensor: values}}.
        others: tensors by the full names that they have in our files.
        file: the name of the JSON's file.
    """

    folder: Path
    config: dict[str, Any]
    backbone: Backbone
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    file: str = CONFIG

    def key(self, where: str, tensor: str) -> str:
        """Return the full name in our files of a tensor on the module `where`."""
        return join(where, SLOT, self.name, tensor)

    def error(self, what: str, **details: Any) -> DeltaLoadError:
        """Return an error that names this folder; `details` are fields of `Mismatch`."""
        return DeltaLoadError(f"{self.folder}: {what}", **details)

    def refusal(self, option: str, why: str) -> DeltaLoadError:
        """Return the error for an option of the JSON."""
        given = f"{option}={shown(self.config.get(option))}"
        return DeltaLoadError(f"{self.folder / self.file}: {given} cannot be loaded: {why}")

    def sort(self) -> None:
        """Put the modules into the order that they have in the backbone."""
        self.sites = {
            name: self.sites[name] for name in self.backbone.modules if name in self.sites
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by the full names that they have in our files."""
        return {**named(self.sites, self.name), **self.others}


def named(sites: dict[str, dict[str, Tensor]], name: str) -> dict[str, Tensor]:
    """Return the tensors of the delta `name` by full name, from {module: {our tensor: values}}."""
    return {join(w, SLOT, name, t): value for w, own in sites.items() for t, value in own.items()}


def fact(method: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return one delta in the JSON that a folder of ours would have."""
    common = {"delta_type": method, "name": name, "active": True, "frozen": []}
    return {**common, "options": options}


def has_values(own: Tensor, given: Tensor) -> bool:
    """True if a tensor of the backbone has the shape and the values of a saved tensor.

    One of the two may have been rounded to the dtype of the other.
    """
    if own.is_meta or own.shape != given.shape:
        return False
    here = full(own).detach().cpu()
    return torch.equal(here.to(given.dtype), given) or torch.equal(here, given.to(here.dtype))


def keys_and_values(
    weights: Iterable[Tensor], biases: Iterable[Tensor], names: list[str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (module, its tensors) of parts of a network's last layer that makes all prefixes.

    Args:
        weights, biases: the parts, for the keys and then the values of each module.
        names: the modules.
    """
    ends = [(where, end) for where in names for end in ("key", "value")]
    for (where, end), weight, bias in zip(ends, weights, biases, strict=True):
        yield where, {f"{end}.weight": weight, f"{end}.bias": bias}
