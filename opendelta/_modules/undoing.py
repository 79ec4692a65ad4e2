"""Remember how a model is, without a copy of its weights, so that a failed call can be undone."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import tensors, wrappers


class Remembered:
    """A model as it is now: its parts, tensors, attributes and configs, and the random state.

    Tensors keep their memory, which is not copied: values that are written into it stay.
    """

    def __init__(self, model: nn.Module) -> None:
        self.contents: list[tuple[Any, Any]] = []
        self.classes: list[tuple[nn.Module, type]] = []
        self.tensors: list[tuple[Tensor, Tensor, bool]] = []
        seen: set[int] = set()
        todo: list[Any] = [model]
        while todo:
            each = todo.pop()
            if id(each) in seen:
                continue
            seen.add(id(each))
            if isinstance(each, nn.Module):
                self.classes.append((each, type(each)))
                todo.append(vars(each))
            elif isinstance(each, dict):
                self.contents.append((each, dict(each)))
                todo += (vars(v) if _is_config(k, v) else v for k, v in each.items())
            elif isinstance(each, list | set):
                self.contents.append((each, [*each]))
                todo += each
            elif type(each) in (Tensor, nn.Parameter) and _has_memory(each):
                self.tensors.append((each, each.data, each.requires_grad))
        devices = {tensor.device for tensor, *_ in self.tensors if tensor.is_cuda}
        self.draws = torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}

    def put_back(self) -> None:
        """Make the model what it was."""
        for each, was in self.contents:
            if [*map(id, _flat(each))] != [*map(id, _flat(was))]:
                each.clear()
                each.extend(was) if isinstance(each, list) else each.update(was)
        for module, cls in self.classes:
            if type(module) is not cls:
                wrappers.set_class(module, cls)
        for tensor, data, trains in self.tensors:
            if tensor.shape != data.shape or tensor.data_ptr() != data.data_ptr():
                tensor.data = data
            if tensor.requires_grad != trains:
                tensor.requires_grad_(trains)
        torch.set_rng_state(self.draws[0])
        for device, state in self.draws[1].items():
            torch.cuda.set_rng_state(state, device)


def _is_config(key: Any, value: Any) -> bool:
    """True for a config of transformers, or one inside it, or somebody's own."""
    named = isinstance(key, str) and key.endswith("config")
    known = named or hasattr(type(value), "get_text_config")
    return known and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type)


def _has_memory(tensor: Tensor) -> bool:
    return tensors.is_dense(tensor) and not tensors.is_partitioned(tensor)


def _flat(contents: Any) -> Iterable[Any]:
    """Return the items of a list or a set, or the keys and the values of a dictionary."""
    pairs = isinstance(contents, dict)
    return itertools.chain.from_iterable(contents.items()) if pairs else contents
