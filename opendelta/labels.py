"""Heads with another number of labels than the backbone's, and the loss that goes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .bases import DeltaLayer
from .errors import OptionError
from .record import SLOT


def count_of(model: nn.Module) -> int | None:
    """The number of labels that a transformers model is made for; None for other models."""
    count = getattr(model.__dict__.get("config"), "num_labels", None)
    return count if isinstance(count, int) else None


def head_of(module: nn.Module, labels: int | None) -> str | None:
    """The name, inside `module`, of the last linear layer that gives so many outputs."""
    names = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and part.out_features == labels
    ]
    return names[-1] if names else None


def check(model: nn.Module, owned: Mapping[str, nn.Module], labels: int | None) -> int | None:
    """The number of labels that a delta's head is for; None if it owns none.

    Args:
        owned: the modules of which it has a copy, by full name.
        labels: as many as it was asked for.

    Raises:
        OptionError: it owns no layer with as many outputs as the backbone has labels.
    """
    before = count_of(model)
    if any(head_of(module, before) is not None for module in owned.values()):
        return labels or before
    if labels is None:
        return None
    raise OptionError(
        f"num_labels={labels}: modules_to_save={list(owned) or None} holds no linear layer with "
        f"the {before or 'unknown'} outputs that {type(model).__name__} has labels, so there "
        "is none to replace: name the classifier in it"
    )


def resized(module: nn.Module, model: nn.Module, labels: int) -> nn.Module:
    """`module`, a copy of a backbone's, with a new last layer for so many labels, if it has one."""
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


class LabelsLayer(DeltaLayer):
    """On the root: while it acts, the model and its config say that there are `count` labels.

    So the model's own loss is that of the head that acts. Nothing of the model is written to.
    """

    flow = "none"

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.count, self.problem_type = count, None
        self.base = type(model.__dict__["config"])
        self._make_view()

    def _make_view(self) -> None:
        names = {number: f"LABEL_{number}" for number in range(self.count)}
        numbers = {name: number for number, name in names.items()}

        def remember(_: Any, value: Any) -> None:
            self.problem_type = value

        def plain(view: Any, _protocol: Any) -> tuple:
            own = {"id2label": names, "label2id": numbers, "problem_type": self.problem_type}
            return _plain_config, (self.base, {**view.__dict__, **own})

        shown = {
            "num_labels": property(lambda _: self.count),
            "id2label": property(lambda _: names),
            "label2id": property(lambda _: numbers),
            "problem_type": property(lambda _: self.problem_type, remember),
            "__reduce_ex__": plain,
            "__module__": self.base.__module__,
        }
        self.view_class = type(self.base.__name__, (self.base,), shown)

    def view(self, config: Any) -> Any:
        """The same config, live, but for its labels."""
        view: Any = object.__new__(self.view_class)
        object.__setattr__(view, "__dict__", config.__dict__)
        return view

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "view_class"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._make_view()

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)


def _acting(module: nn.Module) -> LabelsLayer | None:
    """The last layer on `module` that says how many labels there are."""
    stack = module._modules.get(SLOT)
    layers: list[Any] = [] if stack is None else list(stack._modules.values())
    acting = [each for each in layers if isinstance(each, LabelsLayer) and each.record.active]
    return acting[-1] if acting else None


def shown_config(module: nn.Module) -> Any:
    """The config of a model as it is with the labels that act."""
    layer = _acting(module)
    return module.__dict__["config"] if layer is None else layer.view(module.__dict__["config"])


def showing_count() -> property:
    """The attribute `num_labels` of a transformers model, as it is with the labels that act."""

    def read(self: nn.Module) -> Any:
        layer = _acting(self)
        if layer is not None:
            return layer.count
        if "num_labels" not in self.__dict__:
            raise AttributeError("num_labels")
        return self.__dict__["num_labels"]

    def write(self: nn.Module, value: Any) -> None:
        self.__dict__["num_labels"] = value

    return property(read, write)


def _plain_config(base: Any, state: dict[str, Any]) -> Any:
    config = base.__new__(base)
    config.__dict__.update(state)
    return config
