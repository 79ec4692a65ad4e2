"""The options of a method: one dataclass gives the signature, the saved JSON and the checks."""

from __future__ import annotations

import dataclasses
import functools
import json
import numbers
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .._files import folder as files
from .._layers.dtypes import BACKBONE
from ..errors import OptionError, UnusedWarning, listed, nearest, shown, warn
from . import former

Config = TypeVar("Config", bound="DeltaConfig")
# Each delta takes these by position too, after the method's own options.
POSITIONAL = (
    "modified_modules", "exclude_modules", "unfrozen_modules", "common_structure",
    "interactive_modify",
)  # fmt: skip
DTYPES = ("float32", "bfloat16", "float16", "float64", BACKBONE)
ABOUT = {  # keys of a config that OpenDelta 0.3 saved: where it came from
    "backbone_class", "backbone_checkpoint_name", "backbone_hash", "opendelta_version",
    "transformers_version",
}  # fmt: skip
LARGEST = 1e6  # of scalings: with a larger one, half precision overflows and float32 is noise
RANKS = ("lora_r", "r", "low_rank_rank", "low_rank_dimension")
WIDTHS = ("bottleneck_dim", "reduction_factor")
ELSEWHERE = {  # {option of PEFT or adapters: options here that may replace it}, for messages
    "target_modules": ("modified_modules",),
    "layers_to_transform": ("modified_modules", "exclude_modules"),
    "layers": ("modified_modules", "exclude_modules"),
    "leave_out": ("exclude_modules",),
    "feedforward_modules": ("modified_modules",),
    "r": RANKS,
    "rank": RANKS,
    "lora_r": RANKS,
    "lora_rank": RANKS,
    "alpha": ("lora_alpha",),
    "lora_alpha": ("alpha",),
    "dropout": ("lora_dropout", "vera_dropout"),
    "init_lora_weights": ("init",),
    "bottleneck_size": WIDTHS,
    "reduction_factor": WIDTHS,
    "num_virtual_tokens": ("soft_token_num", "prefix_token_num"),
    "prefix_length": ("prefix_token_num",),
    "prompt_length": ("soft_token_num",),
    "adapter_name": ("name",),
    "use_gating": ("gate",),
}


def option(
    default: Any,
    *,
    minimum: float | None = None,
    below: float | None = None,
    multiple_of: int | None = None,
    choices: Collection[Any] | None = None,
    modules: Sequence[str] | None = None,
) -> Any:
    """Make a field of a config: its default, and the limits of its value.

    Args:
        minimum: the smallest value allowed.
        below: values must be smaller than this.
        multiple_of: values must be multiples of this.
        choices: the only values allowed.
        modules: the value selects some of the modified modules by patterns, or gives them values,
            {pattern: value}. The method gets full names in the place of patterns. If the value is
            None, these roles are selected.
    """
    limits: dict[str, Any] = {"minimum": minimum, "below": below, "multiple_of": multiple_of}
    limits |= {"choices": choices, "modules": modules}
    metadata = {name: limit for name, limit in limits.items() if limit is not None}
    return dataclasses.field(default=default, metadata=metadata)


class Fixed:
    """Can be fixed: then its attributes cannot be set any more; a copy of it by `replace` can."""

    __slots__ = ("is_fixed",)

    def fixed(self: Any) -> Any:
        """Return this object, fixed."""
        object.__setattr__(self, "is_fixed", True)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "is_fixed", False):
            raise OptionError(
                f"{type(self).__name__}.{name} of an attached delta cannot be set to "
                f"{shown(value)}: its tensors are made as the options say, and are saved with "
                f"them. Attach another delta, from dataclasses.replace(delta.config, {name}=...); "
                "delta.scale and delta.to(dtype) change this one"
            )
        super().__setattr__(name, value)


@dataclass
class DeltaConfig(Fixed):
    """The options of each delta. A method adds its own options in a subclass.

    Options after `_: KW_ONLY` are given by name only. `positional` is for methods that take
    `modified_modules` and the like in another order in OpenDelta 0.3, `positional_first` for those
    that take them first, and then all options, and `class_defaults` for options whose default there
    is another in the delta's class.

    Attributes:
        modified_modules: the modules that get a layer: ends of names, or `[r]` and a regular
            expression. None: the method's default places. An empty list: none, for a delta of
            copies alone (`modules_to_save`).
        exclude_modules: modules that get no layer, and neither do the modules inside them.
        unfrozen_modules: backbone modules or parameters that `freeze_module` leaves trainable and
            that are saved with the delta.
        common_structure: True: `modified_modules` are roles such as "attn.q", as the defaults are;
            see `opendelta.roles`. {pattern: role}: the same, and the matching modules have these
            roles, as with `override` of `opendelta.roles`.
        interactive_modify: open a local page on which you pick the modules and the options; the
            options here are its start, and `modified_modules` is refused. A number: the port of
            the page. See `opendelta.pick`.
        modules_to_save: modules that the delta owns a copy of. The copy takes the module's place
            while the delta is attached and active; it is trained and saved with the delta.
        num_labels: number of labels of the head in modules_to_save. If the backbone has another
            number, the head's last layer is new, and the model's own loss fits the head while the
            delta acts.
        name: unique on the backbone, 1 to 64 of [A-Za-z0-9_-]. None: the type, then type_1, ...
        dtype: dtype of the delta's tensors, such as "bfloat16"; "backbone": the dtype in which the
            module computes. None: float32, also on a 16-bit backbone; float64 on a float64 one.
        reads: other code, such as the parent or a loss, reads `.weight` of these modules and of
            those in modules_to_save instead of calling them, so the weight must show the change.
            What is read of a copied module is the copy's: all parameters, and the modules inside.
            Beside a copy, layers that no weight can show act in calls alone; without one they are
            refused. For MultiheadAttention this is known.
        gate: multiply the delta's change by a learned gate, as UniPELT does (arXiv:2110.07577); the
            gate starts at 1/2.
    """

    delta_type: ClassVar[str] = ""
    reader: ClassVar[Callable[..., DeltaConfig]]  # AutoDeltaConfig.from_finetuned, from the top
    backbone_class = backbone_checkpoint_name = backbone_hash = None  # as in 0.3, if not set
    class_defaults: ClassVar[Mapping[str, Any]] = {}
    positional: ClassVar[tuple[str, ...]] = POSITIONAL
    positional_first: ClassVar[bool] = False

    _: KW_ONLY
    modified_modules: list[str] | None = None
    exclude_modules: list[str] | None = None
    unfrozen_modules: list[str] | None = None
    common_structure: bool | dict[str, str | None] | None = None
    interactive_modify: bool | int = option(False, minimum=0, below=2**16)
    modules_to_save: list[str] | None = None
    num_labels: int | None = option(None, minimum=1)
    name: str | None = None
    dtype: str | None = option(None, choices=(None, *DTYPES))
    reads: bool = False
    gate: bool = False

    def __post_init__(self) -> None:
        hints = hints_of(type(self))  # type: ignore[arg-type]  # any class can be hashed
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            plain = _plain([value] if isinstance(value, str) else value)
            if not _fits(value, hints[field.name]) and _fits(plain, hints[field.name]):
                value = plain
            if field.name == "dtype":
                value = None if value is None else str(value).removeprefix("torch.")
            setattr(self, field.name, value)
            self._check(field, value, hints[field.name])

    def _check(self, field: dataclasses.Field, value: Any, hint: Any) -> None:
        where = f"{type(self).__name__}: {field.name}={shown(value)}"
        if not _fits(value, hint):
            raise OptionError(f"{where} must be {_spell(hint)}, not {type(value).__name__}")
        limits = field.metadata
        if "choices" in limits and value not in limits["choices"]:
            raise OptionError(f"{where} must be one of {list(limits['choices'])}")
        for number in value.values() if isinstance(value, dict) else [value]:
            if "minimum" in limits and number is not None and not number >= limits["minimum"]:
                raise OptionError(f"{where} must be at least {limits['minimum']}")
            if "below" in limits and number is not None and not number < limits["below"]:
                raise OptionError(f"{where} must be below {limits['below']}")
            if "multiple_of" in limits and number is not None and number % limits["multiple_of"]:
                raise OptionError(f"{where} must be a multiple of {limits['multiple_of']}")
            if "float" in str(hint) and isinstance(number, int | float):
                as_scaling(where, number)

    @property
    def children(self) -> Sequence[str]:
        """Return the names of the deltas that a block combines; other deltas have none."""
        return ()

    @classmethod
    def option_names(cls) -> list[str]:
        """Return the names of all options: the method's own, then the options of each delta."""
        every = [field.name for field in dataclasses.fields(cls)]
        return [*(name for name in every if name not in COMMON), *COMMON]

    @classmethod
    def positional_names(cls, given: Sequence[Any] = ()) -> list[str]:
        """Return the options that a delta's class takes by position, in OpenDelta 0.3's order.

        Args:
            given: the values by position, for a method whose order depends on them.
        """
        fields = dataclasses.fields(cls)
        own = [f for f in fields if f.name not in COMMON]
        if cls.positional_first:
            return [*cls.positional, *(f.name for f in own)]
        return [*(f.name for f in own if not f.kw_only), *cls.positional]

    @classmethod
    def check_names(cls, given: typing.Iterable[str]) -> None:
        """Raise for the first of `given` that is no option; the message has the nearest options."""
        names = cls.option_names()
        for name in given:
            if name not in names:
                near = cls.nearest_to(name)
                raise OptionError(
                    f"{cls.delta_type!r} has no option {shown(name)}; "
                    + (f"nearest: {', '.join(near)}" if near else f"it has {', '.join(names)}")
                )

    @classmethod
    def nearest_to(cls, name: Any, like: float = 0.4) -> list[str]:
        """Return at most three options that a name which is no option may mean."""
        names = cls.option_names()
        ours = [other for other in ELSEWHERE.get(name, ()) if other in names]
        return list(dict.fromkeys([*ours, *nearest(str(name), names, like=like)]))[:3]

    @classmethod
    def from_options(cls: type[Config], options: Mapping[str, Any]) -> Config:
        """Make a config from the options that the delta's class is given, by name.

        Raises:
            OptionError: an option is unknown or wrong.
        """
        given = {**cls.class_defaults, **former.replaced(cls.delta_type, options)}
        cls.check_names(given)
        return cls(**given)

    @classmethod
    def from_dict(cls: type[Config], options: Mapping[str, Any], **changes: Any) -> Config:
        """Make a config from a dict of options that may hold other keys too, as in OpenDelta 0.3.

        A `"delta_type"` among them must be this method's.

        Args:
            options: the options by name; `dataclasses.asdict(arguments)`, for example.
            changes: options by name that replace those in `options`.

        Warns:
            UnusedWarning: keys of `options` are no options of the method; they are ignored.

        Raises:
            OptionError: a value is wrong, or one of `changes` is unknown.

        Example:
            >>> from opendelta import LoraConfig
            >>> LoraConfig.from_dict({"lora_r": 4}, lora_alpha=8).lora_alpha
            8
        """
        found = options.get("delta_type", cls.delta_type)
        if found != cls.delta_type:
            raise OptionError(f"{cls.__name__} is for {cls.delta_type!r}, not {shown(found)}")
        names = {*cls.option_names(), *former.of(cls.delta_type)}
        others = [name for name in options if name not in {*names, *ABOUT, "delta_type"}]
        if others:
            near = {name: cls.nearest_to(name, like=0.8) for name in others}
            warn(
                f"{cls.__name__} ignores {listed(others, most=len(others))}: no options of "
                f"{cls.delta_type!r}"
                + "".join(f"; {n!r} is near {', '.join(near[n])}" for n in others if near[n]),
                UnusedWarning,
            )
        if ABOUT & options.keys():  # there null is the default
            options = {name: value for name, value in options.items() if value is not None}
        defaults = {f.name: f.default for f in dataclasses.fields(cls)}
        given = {name: value for name, value in options.items() if name in names}
        return cls.from_options({**defaults, **given, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return `delta_type` and all options by name, for JSON."""
        return {"delta_type": self.delta_type, **dataclasses.asdict(self)}

    def to_json_string(self, use_diff: bool = False) -> str:
        """Return `to_dict` as JSON.

        Args:
            use_diff: only `delta_type` and the options that differ from the method's defaults.
        """
        given = self.to_dict()
        if use_diff:
            changed = changed_options(self)
            given = {key: given[key] for key in given if key == "delta_type" or key in changed}
        return json.dumps(given, indent=2) + "\n"

    def update(self, options: Mapping[str, Any]) -> None:
        """Set options by name: all of them, or none if one is unknown or wrong.

        Raises:
            OptionError: an option is unknown or wrong.
        """
        for name, value in vars(self.from_options({**vars(self), **options})).items():
            setattr(self, name, value)

    def save_finetuned(self, save_directory: str | os.PathLike) -> None:
        """Save the options, without any weights, as config.json in a folder.

        Raises:
            DeltaError: the folder holds a saved delta, or a config that is not opendelta's.
        """
        files.write_options(Path(save_directory), self.to_dict())

    @classmethod
    def from_finetuned(
        cls: type[Config], finetuned_delta_path: str | os.PathLike, **options: Any
    ) -> Config:
        """Read the options of a saved delta, or those that `save_finetuned` of a config wrote.

        Args:
            finetuned_delta_path: the folder, or "user/name" on the hub.
            options: as for `AutoDeltaConfig.from_finetuned`.

        Raises:
            DeltaLoadError: the folder is damaged, or holds several deltas.
            OptionError: it holds the options of another method.
        """
        found = cls.reader(finetuned_delta_path, **options)
        if not isinstance(found, cls):
            raise OptionError(f"{cls.__name__} is for {cls.delta_type!r}, not {found.delta_type!r}")
        return found


def changed_options(config: DeltaConfig, **defaults: Any) -> dict[str, Any]:
    """Return the options of a config that differ from its defaults.

    Args:
        defaults: those that are others where the options go, such as `class_defaults`.
    """
    default = vars(type(config)(**defaults))
    return {name: value for name, value in vars(config).items() if value != default[name]}


COMMON = [field.name for field in dataclasses.fields(DeltaConfig)]


def as_scaling(what: str, number: Any) -> float:
    """Return a number, Python's or numpy's, as a float; raise if it is no usable scaling.

    Args:
        what: the option and its value, for the message.

    Raises:
        OptionError: it is no number, or its magnitude is above `LARGEST`.
    """
    real = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not real or not abs(number) <= LARGEST:
        raise OptionError(f"{what} must be a number between {-LARGEST:g} and {LARGEST:g}")
    return float(number)


def _plain(value: Any) -> Any:
    """Return numpy's and torch's numbers as Python's, and several values as a list."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


@functools.cache
def hints_of(config_class: type) -> dict[str, Any]:
    """Return {option: its type} of a class of configs."""
    return typing.get_type_hints(config_class)


def _fits(value: Any, hint: Any) -> bool:
    """True if `value` has the annotated type; an int is a float, a bool is no int."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items()
        )
    if hint is Any:
        return True
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
