"""TRL: a reference model over the memory of the model that is trained.

Deltas need no `peft_config`: attach them, call `freeze_module()`, and give the trainer the model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import pkgutil
from collections.abc import Iterator
from typing import TypeVar
from unittest import mock

from torch import nn

from .._handles.composition import Composition
from .._handles.delta import Delta
from .._modules.tensors import lasting
from .._verbs.copying import shared_tensors

Model = TypeVar("Model", bound=nn.Module)


def reference(model: Model, *without: str | Delta) -> Model:
    """Return a frozen model over the tensors of `model`, without deltas that are to be trained.

    It computes what `model` would without these deltas, also while they are trained. It is for
    `DPOTrainer(model, ref_model=reference(model), ...)` and the like, and takes no memory for
    weights. Make it before the trainer, which changes the model's forward.

    Args:
        without: the deltas that it does not have, or their names. Without any: all deltas.

    Raises:
        DeltaError: a delta is not attached, or is merged.
    """
    composition = Composition(model)
    left_out = {composition[d.name if isinstance(d, Delta) else d].name for d in without}
    for delta in composition:
        delta.record.require_apart("cannot share the weights under")
    with lasting():
        twin = copy.deepcopy(model, shared_tensors(model.modules(), frozen=True))
    for delta in list(Composition(twin)):
        if not left_out or delta.name in left_out:
            delta.detach()
    return twin.eval()


@contextlib.contextmanager
def shared_reference(model: Model, *without: str | Delta) -> Iterator[Model]:
    """Let trainers of TRL that are made in the block take `reference(model)` as their reference.

    It is for trainers that load a reference model by themselves, such as `GRPOTrainer` with a beta
    above 0: `with shared_reference(model): trainer = GRPOTrainer(model, ...)`.

    Args:
        without: the deltas that the reference does not have, as for `reference`.
    """
    import trl.trainer

    twin = reference(model, *without)
    with contextlib.ExitStack() as stack:
        for found in pkgutil.iter_modules(trl.trainer.__path__):
            module = importlib.import_module(f"trl.trainer.{found.name}")
            if hasattr(module, LOADS):
                stack.enter_context(mock.patch.object(module, LOADS, return_value=twin))
        yield twin


LOADS = "create_model_from_path"  # by which TRL's trainers load a model
