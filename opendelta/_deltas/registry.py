"""The registered methods, by their name in files."""

from __future__ import annotations

import dataclasses
import inspect

from .._layers.base import DeltaLayer
from ..errors import OptionError, nearest, shown
from .base import BaseDelta
from .options import COMMON, DeltaConfig

METHODS: dict[str, type[BaseDelta]] = {}
BLOCKS: dict[str, type[BaseDelta]] = {}  # those that combine other deltas
METHOD_OF_03 = {  # what a method of OpenDelta 0.3 wrote or called
    "update_module", "insert_sequential_module", "insert_parallel_module", "replace_module",
    "modify_module", "mark_as_delta", "add_all_delta_to_backbone", "_pseudo_data_to_instantiate",
}  # fmt: skip
OWN_METHOD = (
    "OpenDelta 0.3 wrote a method so; here a method is a config and a layer class, and the library "
    "inserts the layers: see docs/how-to/write_a_method.md"
)


def method(delta_type: str) -> type[BaseDelta]:
    """Return the class that is registered for `delta_type`.

    Raises:
        OptionError: no class is.
    """
    known = {**METHODS, **BLOCKS}
    if not isinstance(delta_type, str) or delta_type not in known:
        near = nearest(str(delta_type), known)
        hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(sorted(known))}"
        raise OptionError(
            f"no method {shown(delta_type)}; {hint}. A method from elsewhere is known once the "
            "module that defines it is imported"
        )
    return known[delta_type]


def register(cls: type[BaseDelta]) -> None:
    """Register a method under its `delta_type`.

    Raises:
        OptionError: an attribute is missing or wrong, or another method has this `delta_type`.
    """
    if old := METHOD_OF_03 & vars(cls).keys():
        raise OptionError(f"{cls.__name__}.{min(old)}: {OWN_METHOD}")
    needs = {"delta_type": str, "config_class": type, "layer_class": type}
    needs |= {"default_modified_modules": tuple, "default_learning_rate": float}
    for name, kind in needs.items():
        value = getattr(cls, name, None)
        if not isinstance(value, kind):
            raise OptionError(f"{cls.__name__}.{name} must be a {kind.__name__}, not {value!r}")
    if not issubclass(cls.config_class, DeltaConfig) or not issubclass(cls.layer_class, DeltaLayer):
        raise OptionError(
            f"{cls.__name__}: config_class must be a DeltaConfig, and layer_class a DeltaLayer"
        )
    cls.layer_class.check_written()
    _check_options(cls.config_class)
    other = {**METHODS, **BLOCKS}.get(cls.delta_type, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise OptionError(
            f"{cls.__name__}: delta_type {cls.delta_type!r} is that of "
            f"{other.__module__}.{other.__qualname__}; choose another"
        )
    if cls.config_class.delta_type not in ("", cls.delta_type) or cls.config_class is DeltaConfig:
        # the options of another method: this one needs a class of its own, which knows its type
        name = f"{cls.__name__}Config"
        cls.config_class = dataclasses.dataclass(type(name, (cls.config_class,), {}))
    cls.config_class.delta_type = cls.delta_type
    (BLOCKS if cls.layer_class.is_block else METHODS)[cls.delta_type] = cls


def _check_options(config_class: type[DeltaConfig]) -> None:
    """Raise if a config is no dataclass of its own, or an option hides a part of each config."""
    decorated = "__dataclass_fields__" in vars(config_class)
    if not decorated and inspect.get_annotations(config_class):
        raise OptionError(f"write @dataclass above {config_class.__name__}: it adds options")
    if hidden := (vars(DeltaConfig).keys() - {*COMMON}) & {*config_class.option_names()}:
        raise OptionError(
            f"{config_class.__name__}.{min(hidden)} hides an attribute of DeltaConfig: give the "
            "option another name"
        )
