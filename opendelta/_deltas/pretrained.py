"""`save_pretrained` of a backbone with deltas: the plain backbone, and the deltas beside it."""

from __future__ import annotations

import inspect
import json
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from .._backbone.backbone import Backbone
from .._layers.record import WHOLE, Shared
from .._layers.selection import OpenBlock
from .._modules.tensors import gathered, is_partitioned, is_sharded, shape
from ..errors import DeltaError, OptionError, listed
from ..names import unwrapped
from .state_dict import PLAIN, delta_keys, frames, frozen, saveable

METHOD = "save_pretrained"
DELTAS = "deltas"  # the folder of the deltas inside the folder of the backbone
# An empty file beside a model that was saved with its deltas. Saving any model there removes it, as
# transformers removes old shards of a model by their names.
WITH_DELTAS = "model-with-deltas-00001-of-00001.safetensors"
NO_BACKBONE = "the-backbone-is-not-in-this-checkpoint-of-its-deltas.safetensors"
# Functions that save the deltas of a backbone into a folder; they are told if some of the
# backbone's tensors that train are in no other file. The rooms above add one.
WRITERS: list[Callable[[nn.Module, Path, bool], None]] = []


class SavePretrained:
    """Stands for the method `save_pretrained` on a model that carries deltas.

    It writes the plain model, as the method does, and the deltas of the whole backbone into the
    folder `deltas` beside it. For a checkpoint of transformers' Trainer it writes what Trainer will
    load: the state dict with the deltas in it, which is small if `freeze_module` was told so.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module, shared: Shared) -> None:
        # Weak, since a circle would keep the memory of a model that its user deletes.
        self.model, self.backbone = weakref.ref(model), weakref.ref(backbone)
        self.shared = shared

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model(), "backbone": self.backbone(), "shared": self.shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        if name in ("__signature__", "__wrapped__", "__name__", "__qualname__"):
            return getattr(self._method, name)
        raise AttributeError(name)

    @property
    def _method(self) -> Callable[..., Any]:
        model = self.model()
        assert model is not None
        return getattr(type(model), METHOD).__get__(model)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Save the model and its deltas; the arguments are those of the method.

        Raises:
            DeltaError: a delta is merged. Nothing is written then.
            DeltaError: the weights are spread over processes, and no state dict holds them.
            DeltaError: the state dict lacks some tensors of deltas, and holds others.
            OptionError: `push_to_hub=True`, which would not send the deltas.
        """
        method, model, backbone = self._method, self.model(), self.backbone()
        if PLAIN.get():  # in the call for a model around this one
            return method(*args, **options)
        assert model is not None
        assert backbone is not None
        call = inspect.signature(method).bind(*args, **options)
        given = call.arguments
        folder = Path(os.fspath(next(iter(given.values()))))
        self._check(model, given)
        resumable = _is_checkpoint_of(model)
        small = resumable and self.shared.in_state_dict != WHOLE
        writes, state = given.get("is_main_process", True), given.get("state_dict")
        if state is not None and not resumable:
            _check_deltas(model, state)
            given["state_dict"] = _whole(model, state)
        if writes:
            with gathered(model, state):
                for write in WRITERS:
                    write(backbone, folder / DELTAS, small)
        with OpenBlock(backbones=[self.shared]):  # the model shows its own config
            result = self._save(model, call, resumable)
        if small:
            _refuse_as_model(folder / "config.json")
        elif writes:
            save_file({}, folder / WITH_DELTAS)
        return result

    def _save(self, model: nn.Module, call: inspect.BoundArguments, resumable: bool) -> Any:
        """Call the method for the plain model, or for a checkpoint to resume from."""
        if not resumable:
            with _plain():
                return self._method(*call.args, **call.kwargs)
        given, small = call.arguments, self.shared.in_state_dict != WHOLE
        state = model.state_dict() if given.get("state_dict") is None else given["state_dict"]
        left_out = set(frozen(model, state)) if small else set()
        given["state_dict"] = {key: state[key] for key in state if key not in left_out}
        given["save_original_format"] = False  # Trainer loads the names that the model has
        return self._method(*call.args, **call.kwargs)

    def _check(self, model: nn.Module, given: Mapping[str, Any]) -> None:
        """Raise if the folder would not hold a plain model and its deltas.

        Args:
            given: the arguments of the method by name.
        """
        for record in self.shared.records:
            record.require_apart(f"{METHOD} writes a plain model: cannot save")
        if given.get("push_to_hub"):
            raise OptionError(
                f"{METHOD}(push_to_hub=True) would send the plain {type(model).__name__} without "
                "its deltas: use model.push_to_hub(name), or send the folder afterwards by "
                "huggingface_hub.upload_folder"
            )
        if given.get("state_dict") is None and any(map(is_partitioned, model.parameters())):
            raise DeltaError(
                f"the weights of this {type(model).__name__} are spread over processes (ZeRO-3), "
                f"so that {METHOD} would write empty ones: call trainer.save_model(), or give it "
                "state_dict=accelerator.get_state_dict(engine). composition(model).save(folder) "
                "writes the deltas"
            )


def _refuse_as_model(config: Path) -> None:
    """Let `from_pretrained` look for a file of weights that is not there.

    It would initialise the backbone, which the checkpoint lacks, at random.
    """
    if config.is_file():
        facts = json.loads(config.read_text(encoding="utf-8"))
        facts["transformers_weights"] = NO_BACKBONE
        config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def _plain() -> Iterator[None]:
    token = PLAIN.set(True)
    try:
        yield
    finally:
        PLAIN.reset(token)


def _check_deltas(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise if a state dict holds tensors of deltas, but not all, or some of another shape."""
    own = {unwrapped(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    keys = delta_keys(model, own)
    if keys.isdisjoint(state):
        return
    lacking = [key for key in own if key in keys and key not in state]
    others = [
        key for key in own if key in keys & state.keys() and state[key].shape != shape(own[key])
    ]
    for what, found in (("lacks", lacking), ("has another shape of", others)):
        if found:
            raise DeltaError(
                f"the state dict given to {METHOD} {what} {len(found)} tensors of deltas: "
                f"{listed(found)}; give all that model.state_dict() holds, or none. Nothing was "
                "saved"
            )


def _whole(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict of the plain `model`: without deltas, and with what it lacks.

    Raises:
        DeltaError: it lacks weights of which this process has a part only.
    """
    deltas = delta_keys(model, state)
    given = {key: value for key, value in state.items() if key not in deltas}
    with _plain():
        own = model.state_dict()
    lacking = [key for key, tensor in own.items() if key not in given and is_sharded(tensor)]
    if lacking and not any(map(is_sharded, given.values())):
        raise DeltaError(
            f"{METHOD} writes a plain {type(model).__name__}, and the state dict lacks weights "
            f"that are spread over processes: {listed(lacking)}. freeze_module(set_state_dict=True)"
            " leaves them out; freeze_module() does not. composition(model).save(folder) writes "
            "the deltas"
        )
    return {**own, **given}


def _is_checkpoint_of(model: nn.Module) -> bool:
    """True while transformers' Trainer saves a checkpoint of `model`, from which it can resume."""
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return False
    trainers = (f.f_locals.get("self") for f in frames() if f.f_code.co_name == "_save_checkpoint")
    trained = (getattr(trainer, "model", None) for trainer in trainers)
    return any(model is getattr(each, "_orig_mod", each) for each in trained)


def watch_saving(backbone: Backbone, shared: Shared) -> None:
    """Let the models of the backbone that have a `save_pretrained` save their deltas too."""
    for model in saveable(backbone):
        if METHOD not in model.__dict__:
            model.__dict__[METHOD] = SavePretrained(model, backbone.model, shared)


def unwatch_saving(backbone: Backbone) -> None:
    """Give the models their own `save_pretrained` back."""
    for model in saveable(backbone):
        if isinstance(model.__dict__.get(METHOD), SavePretrained):
            del model.__dict__[METHOD]
