"""The data of one delta: its name, options, layers and tensors. `Delta` adds the verbs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .._backbone.backbone import attached_records
from .._layers.base import DeltaLayer
from .._layers.record import Record
from .._modules.tensors import is_partitioned, size
from .._sites.stack import check_name
from ..errors import DeltaError, OptionError, shown
from ..names import SLOT, dotted, join
from .options import DeltaConfig, as_scaling


class BaseDelta:
    """One delta, a method on one backbone: the data that all verbs work on.

    Attributes:
        delta_type: the method's name in files.
        config_class: the class of its options.
        layer_class: the class of its layers.
        default_modified_modules: the roles that get a layer by default.
        default_learning_rate: what `optimizer_groups` trains it at. Of a method that sets none,
            and was not measured, it is 1e-3.
        backbone_model: the model that it was made for.
        layers: {full name of the site: layer}, attached or not.
        record: name, rank, activity and resolved options, shared with the layers.
    """

    delta_type: ClassVar[str]
    config_class: ClassVar[type[DeltaConfig]]
    layer_class: ClassVar[type[DeltaLayer]]
    default_modified_modules: ClassVar[Sequence[str]]
    default_learning_rate: ClassVar[float] = 1e-3

    backbone_model: nn.Module
    layers: dict[str, DeltaLayer]
    record: Record

    @classmethod
    def layer_for(cls, config: Any) -> type[DeltaLayer]:
        """Return the class of layers for these options: `layer_class`, or a variant of it."""
        return cls.layer_class

    @classmethod
    def shared_for(cls, config: Any) -> Callable[..., nn.Module] | None:
        """Return a function that makes the module that all layers share, or None.

        The function takes the layers' sites and the config. A layer finds the module in
        `self.shared`.
        """
        return None

    def __repr__(self) -> str:
        if not hasattr(self, "record"):
            return f"{type(self).__name__}(refused)"
        count = sum(size(p) for p in self.parameters())
        modules = sum(not layer.watches for layer in self.layers.values())
        trains = any(p.requires_grad for p in self.parameters())
        state = ["attached" if self.attached else "detached"]
        state += ["active" if self.active else "disabled", "trainable" if trains else "frozen"]
        return (
            f"{type(self).__name__}({self.name!r} on {type(self.backbone_model).__name__}: "
            f"{modules} modules, {count:,} parameters, {', '.join(state)})"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        HANDLES.add(self)

    # ---------------------------------------------------------------- its facts
    @property
    def name(self) -> str:
        """Return the name: unique on the backbone, and the key of the layer on each site."""
        return self.record.name

    @property
    def config(self) -> DeltaConfig:
        """Return the options, with full names of modules in the place of patterns."""
        return self.record.config

    @property
    def modified_modules(self) -> list[str]:
        """Return the full names of the modules that the delta changes."""
        return list(self.config.modified_modules or ())

    @property
    def unfrozen_modules(self) -> list[str]:
        """Return "deltas" and the backbone modules that train and are saved with the delta.

        It is what `freeze_module(exclude=...)` takes.
        """
        return [SLOT, *(self.config.unfrozen_modules or ())]

    @property
    def attached(self) -> bool:
        """True if the delta's layers are on the backbone."""
        return self.record in attached_records(self.backbone_model)

    @property
    def active(self) -> bool:
        """True if the delta's layers act while they are attached; see `enable` and `disable`."""
        return self.record.active

    @property
    def scale(self) -> float:
        """Return or set the factor of the delta's change of an output; it is 1 at first.

        It multiplies the method's own scaling, such as alpha / r, and is saved with the delta. To
        set it takes the same short time on a large model, and `torch.compile` compiles nothing
        again. Modules that the delta owns (`modules_to_save`) are not scaled.

        Raises:
            OptionError: the value is no number of at most 1e6 in magnitude, or the method does not
                add to an output.
            DeltaError: the delta is merged.
        """
        return self.record.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        what = f"{self.name!r}.scale={shown(scale)}"
        scale = as_scaling(what, scale)
        layer_class = self.layer_for(self.config)
        if not layer_class.scales and scale != 1:
            raise OptionError(
                f"{what}: a {layer_class.__name__} does not just add to an output, so there is no "
                "one thing to multiply; LoRA without use_dora, adapters and others that add have "
                "it. To its author: heed strength() in forward and fold, and set scales = True"
            )
        if scale != self.record.scale:
            self.record.require_apart("cannot scale")
        self.record.set_scale(scale)

    # --------------------------------------------------------------- tensors
    def prefix(self, where: str, named: str | None = None) -> str:
        """Return the start of the full names of the tensors of the layer on the module `where`.

        Args:
            named: the delta's name in the full names. None: its own name.
        """
        if named is not None:
            check_name(named)
        return dotted(join(where, SLOT, named or self.name))

    def named_parameters(self, named: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (full name, parameter) of the delta; the same for an attached and a detached delta.

        Args:
            named: the delta's name in the full names. None: its own name.
        """
        for where, layer in self.layers.items():
            prefix = self.prefix(where, named)
            # Most layers have no modules inside; then this is faster than torch's search.
            own = layer.named_parameters() if layer._modules else layer._parameters.items()
            yield from ((prefix + name, p) for name, p in own if p is not None)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the delta's parameters."""
        for layer in self.layers.values():
            own = layer.parameters() if layer._modules else layer._parameters.values()
            yield from (parameter for parameter in own if parameter is not None)

    def state_dict(self, named: str | None = None) -> dict[str, Tensor]:
        """Return the delta's tensors by full name; the same for an attached and a detached delta.

        Args:
            named: the delta's name in the full names. None: its own name.
        """
        return {name: tensor.detach() for name, tensor in tensors_of(self, named).items()}


class Handles:
    """The deltas that are still in a variable; other threads may add deltas during `iter()`.

    A detached delta that is in a variable keeps its name and its place in the order. This set holds
    weak references: it keeps no delta alive. It has no lock, which Ctrl-C might leave locked: both
    methods change or read one dict in one step.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakValueDictionary[int, BaseDelta] = weakref.WeakValueDictionary()

    def add(self, handle: BaseDelta) -> None:
        """Add a delta."""
        self._known[id(handle)] = handle

    def __iter__(self) -> Iterator[BaseDelta]:
        known = [reference() for reference in self._known.valuerefs()]
        return iter([handle for handle in known if handle is not None])


HANDLES = Handles()


def tensors_of(delta: BaseDelta, named: str | None = None) -> dict[str, Tensor]:
    """Return a delta's tensors themselves, by the names that `state_dict` gives them.

    Raises:
        DeltaError: something else is among them, as other code has quantised a copy.
    """
    state: dict[str, Tensor] = {}
    for where, layer in delta.layers.items():
        prefix = delta.prefix(where, named)
        layer.state_dict(destination=state, prefix=prefix, keep_vars=True)
    other = next((name for name, each in state.items() if not isinstance(each, Tensor)), None)
    if other is not None:
        raise DeltaError(
            f"{other!r} of {delta.name!r} is no tensor but a {type(state[other]).__name__}, as in "
            "a module that was quantised: save the delta of the model before"
        )
    return state


def require_whole(delta: BaseDelta, verb: str) -> None:
    """Raise if DeepSpeed has spread the delta's tensors over the processes.

    Args:
        verb: the start of the message, such as "cannot load values into".
    """
    if any(map(is_partitioned, delta.parameters())):
        raise DeltaError(
            f"{verb} {delta.name!r}: its tensors are spread over processes (ZeRO-3); do it before "
            "deepspeed.initialize, or load DeepSpeed's own checkpoint"
        )
