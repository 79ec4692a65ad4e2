"""TRL: a reference model over the memory of the model that is trained.

Deltas need no `peft_config`: attach them, call `freeze_module()`, and give the trainer the model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import pkgutil
import types
from collections.abc import Iterator
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import nn
from transformers import Trainer

from .._deltas.state_dict import frames
from .._handles.composition import Composition
from .._handles.delta import Delta
from .._modules.copies import computed_in
from .._modules.tensors import lasting
from .._verbs.copying import shared_tensors
from ..errors import DeltaError

Model = TypeVar("Model", bound=nn.Module)


def reference(model: Model, *without: str | Delta) -> Model:
    """Return a frozen model over the tensors of `model`, without deltas that are to be trained.

    It computes what `model` would without these deltas, also while they are trained. It is for
    `DPOTrainer(model, ref_model=reference(model), ...)` and the like, and takes no memory for
    weights. Make it before the trainer, which changes the model's forward. What is written into its
    tensors is written into the model's, so `sync_ref_model=True` is refused when it runs first.

    Args:
        without: the deltas that it does not have, or their names. Without any: all deltas.

    Raises:
        DeltaError: a delta is not attached, or is merged.
    """
    composition = Composition(model)
    left_out = {composition[delta].name for delta in without}
    for delta in composition:
        delta.record.require_apart("cannot share the weights under")
    with lasting():
        twin = copy.deepcopy(
            model, {**shared_tensors(model.modules(), frozen=True), **computed_in(model)}
        )
    for delta in list(Composition(twin)):
        if not left_out or delta.name in left_out:
            delta.detach()
    twin.register_forward_pre_hook(_check_unsynced)
    twin.__dict__["parameters"] = types.MethodType(_checked_parameters, twin)
    return twin.eval()


def _checked_parameters(twin: nn.Module, *args: Any, **kwargs: Any) -> Iterator[nn.Parameter]:
    _check_unsynced()
    return type(twin).parameters(twin, *args, **kwargs)


def _check_unsynced(*_: Any) -> None:
    """Raise if a trainer that calls this, or its callback, writes into its reference model.

    Raises:
        DeltaError: it would write into the model that is trained, which has the same tensors.
    """
    for frame in () if torch.compiler.is_compiling() else frames():
        caller = frame.f_locals.get("self")
        trains = isinstance(caller, Trainer) and getattr(caller.args, "sync_ref_model", False)
        if trains or SYNCS in frame.f_code.co_name:
            raise DeltaError(
                "sync_ref_model=True writes into the reference model, which lies over the weights "
                "of the model that is trained: they would change. Use sync_ref_model=False"
            )


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
SYNCS = "sync_target_model"  # by which TRL's callback writes into the reference model
