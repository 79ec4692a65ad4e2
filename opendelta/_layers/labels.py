"""Heads with another number of labels than the backbone, so that the model's loss fits them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import OptionError
from ..names import SLOT, ancestors
from .base import Acts, Passive
from .record import Record

# {class of transformers: the heads whose logits it averages}
AVERAGED = {
    "DeiTForImageClassificationWithTeacher": ("cls_classifier", "distillation_classifier"),
    "LevitForImageClassificationWithTeacher": ("classifier", "classifier_distill"),
    "SwiftFormerForImageClassification": ("head", "dist_head"),
}


def count_of(model: nn.Module) -> int | None:
    """Return the number of labels in a transformers model's config; None for other models."""
    count = getattr(model.__dict__.get("config"), "num_labels", None)
    return count if isinstance(count, int) else None


def head_of(module: nn.Module, labels: int | None) -> str | None:
    """Return the name inside `module` of its last linear layer with `labels` outputs, or None."""
    names = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and part.out_features == labels
    ]
    return names[-1] if names else None


def is_head(module: nn.Module, model: nn.Module) -> bool:
    """True if a copy of one of the model's modules holds its head."""
    return head_of(module, count_of(model)) is not None


def check(model: nn.Module, owned: Mapping[str, nn.Module], labels: int | None) -> int | None:
    """Return the number of labels of a delta's head; None if the delta owns no head.

    Args:
        owned: {full name: module} of the modules that the delta has a copy of.
        labels: the option `num_labels`.

    Raises:
        OptionError: `labels` is given, but no owned layer has one output per label of the backbone,
            or the backbone averages the logits of a head and of another one that is not owned.
    """
    before = count_of(model)
    if any(head_of(module, before) is not None for module in owned.values()):
        if labels not in (None, before):
            _check_averaged(model, owned, labels)
        return labels or before
    if labels is None:
        return None
    kind = type(model).__name__
    if before is None:
        raise OptionError(
            f"num_labels={labels}: {kind} has no config.num_labels that says how many outputs its "
            "classifier has, so none can be replaced: set model.config with num_labels, or make "
            "the model with the classifier that you want"
        )
    raise OptionError(
        f"num_labels={labels}: modules_to_save={list(owned) or None} holds no linear layer with "
        f"the {before} outputs that {kind} has labels, so there is none to replace: name the "
        "classifier in it"
    )


def _check_averaged(model: nn.Module, owned: Mapping[str, nn.Module], labels: int | None) -> None:
    kind = type(model).__name__
    heads = next((AVERAGED[b.__name__] for b in type(model).__mro__ if b.__name__ in AVERAGED), ())
    if left := [name for name in heads if not owned.keys() & {*ancestors(name)}]:
        raise OptionError(
            f"num_labels={labels}: {kind} averages the logits of {' and '.join(map(repr, heads))}, "
            f"and modules_to_save={list(owned)} leaves out {', '.join(map(repr, left))}: copy both"
        )


def resized(module: nn.Module, model: nn.Module, labels: int) -> nn.Module:
    """Return `module` with a new last layer for `labels` labels, or as it is if it has no head.

    Args:
        module: a copy of one of the backbone's modules.
        model: the backbone.
    """
    name = head_of(module, count_of(model))
    if name is None:
        return module
    old = module.get_submodule(name)
    assert isinstance(old, nn.Linear)
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = nn.Linear(old.in_features, labels, old.bias is not None, **like)
    if not old.weight.is_meta:
        config = model.__dict__["config"]
        nn.init.normal_(new.weight, std=getattr(config, "initializer_range", 0.02))
        if new.bias is not None:
            nn.init.zeros_(new.bias)
    new.train(old.training)
    if not name:
        return new
    around, _, last = name.rpartition(".")
    setattr(module.get_submodule(around), last, new)
    return module


class LabelsLayer(Passive):
    """A layer on the root: while it acts, the model and its config show `count` labels.

    So the model computes the right loss for the delta's head. The model itself is not changed.
    """

    shows_config = True

    def __init__(self, count: int, heads: Sequence[str]) -> None:
        super().__init__()
        self.count = self.labels = count
        self.heads = list(heads)  # the full names of the modules in whose place the delta's act
        self.view: Any = None

    def shows(self, module: nn.Module) -> bool:
        """True if the layer acts, and no later delta's copy is in the place of its head."""
        return self.record.active and all(
            _owner(module.get_submodule(name)) in (self.record, None) for name in self.heads
        )

    def shown_config(self, config: Any) -> Any:
        """Return a view of the model's config with the layer's labels."""
        if self.view is None or self.view.real is not config:
            self.view = _view_of(config, self.count)
        if not torch.compiler.is_compiling():
            self.view.follow()
        return self.view

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "view": None}  # a copy of the layer has another config


# ---------------------------------------------------------------------------------------- the view
_cache: Any = functools.cache  # Any: its annotation allows no class as argument
OWN = ("id2label", "label2id", "problem_type")  # the fields that differ between view and config


@_cache
def _view_class(base: Any) -> Any:
    """Return a class of views: a view shows a config of class `base`, live, with other labels."""

    def follow(self: Any) -> None:
        fresh = {key: value for key, value in self.real.__dict__.items() if key not in OWN}
        self.__dict__.update(fresh)

    def __setattr__(self: Any, key: str, value: Any) -> None:
        base.__setattr__(self, key, value)
        if key not in (*OWN, "num_labels"):
            setattr(self.real, key, value)

    body = {
        "__slots__": ("real",),
        "__setattr__": __setattr__,
        "__reduce_ex__": lambda self, protocol: (_plain_config, (base, dict(self.__dict__))),
        "__module__": base.__module__,
        "follow": follow,
    }
    return type(base.__name__, (base,), body)


def _view_of(config: Any, count: int) -> Any:
    """Return a view of `config` with `count` labels."""
    view: Any = object.__new__(_view_class(type(config)))
    object.__setattr__(view, "real", config)
    names = {number: f"LABEL_{number}" for number in range(count)}
    numbers = {name: number for number, name in names.items()}
    own = {"id2label": names, "label2id": numbers, "problem_type": None}
    object.__setattr__(view, "__dict__", {**config.__dict__, **own})
    return view


def _plain_config(base: Any, state: dict[str, Any]) -> Any:
    config = base.__new__(base)
    config.__dict__.update(state)
    return config


# ------------------------------------------------------------------- the labels that a model shows
def _acting(module: nn.Module) -> LabelsLayer | None:
    """Return the last LabelsLayer that `module` shows, or None."""
    acting = [e for e in _layers(module) if isinstance(e, LabelsLayer) and e.shows(module)]
    return acting[-1] if acting else None


def _owner(module: nn.Module) -> Record | None:
    """Return the last active delta whose copy acts in the place of `module`, or None."""
    records = [e.record for e in _layers(module) if e.acts is Acts.INSTEAD and e.record.active]
    return records[-1] if records else None


def _layers(module: nn.Module) -> list[Any]:
    stack = module.__dict__["_modules"].get(SLOT)
    return [] if stack is None else list(stack._modules.values())


def showing_count() -> property:
    """Return a property `num_labels` for transformers models: the labels of the active deltas."""

    def read(self: nn.Module) -> Any:
        if "num_labels" not in self.__dict__:
            raise AttributeError("num_labels")
        layer = _acting(self)
        return self.__dict__["num_labels"] if layer is None else layer.count

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__["num_labels"] = value

    return property(read, write)


def hand_on(model: nn.Module, plain: Any) -> None:
    """Give `plain`, a copy of `model` without deltas, the labels that `model` shows."""
    layer = _acting(model)
    if layer is not None:
        plain.config = copy.copy(layer.shown_config(model.__dict__["config"]))
        if "num_labels" in plain.__dict__:
            plain.num_labels = layer.count
