"""What one delta is: its name, options, layers and tensors. The verbs are a floor above."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .._backbone.backbone import Backbone
from .._layers.base import DeltaLayer
from .._layers.record import Record
from ..errors import OptionError, shown
from ..names import SLOT, inside, join
from .options import DeltaConfig, as_scaling


class BaseDelta:
    """One method on one backbone, without verbs: the data that they all work on.

    Attributes:
        delta_type: the method's name in files.
        config_class: its options.
        layer_class: its layer.
        default_modified_modules: the roles that get a layer by default.
        backbone_model: the model it was made for.
        layers: {full name of the site: layer}, attached or not.
        record: name, rank, activity and resolved options, shared with the layers.
    """

    delta_type: ClassVar[str]
    config_class: ClassVar[type[DeltaConfig]]
    layer_class: ClassVar[type[DeltaLayer]]
    default_modified_modules: ClassVar[Sequence[str]]

    backbone_model: nn.Module
    layers: dict[str, DeltaLayer]
    record: Record

    @classmethod
    def layer_for(cls, config: Any) -> type[DeltaLayer]:
        """The layer that these options ask for: `layer_class`, or a variant of it."""
        return cls.layer_class

    @classmethod
    def shared_for(cls, config: Any) -> Callable[..., nn.Module] | None:
        """What makes the tensors that all layers share, from their sites and the config, or None.

        A layer finds them in `self.shared`.
        """
        return None

    def __repr__(self) -> str:
        if not hasattr(self, "record"):
            return f"{type(self).__name__}(refused)"
        count = sum(p.numel() for p in self.parameters())
        trains = any(p.requires_grad for p in self.parameters())
        state = ["attached" if self.attached else "detached"]
        state += ["active" if self.active else "disabled", "trainable" if trains else "frozen"]
        return (
            f"{type(self).__name__}({self.name!r} on {type(self.backbone_model).__name__}: "
            f"{len(self.layers)} modules, {count:,} parameters, {', '.join(state)})"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        HANDLES.add(self)

    # ---------------------------------------------------------------- what it is
    @property
    def name(self) -> str:
        """Unique on the backbone, and the key of its layer on every site."""
        return self.record.name

    @property
    def config(self) -> DeltaConfig:
        """The options, with patterns resolved to the full names of modules."""
        return self.record.config

    @property
    def modified_modules(self) -> list[str]:
        """The full names of the modules that it changes."""
        return list(self.config.modified_modules or ())

    @property
    def unfrozen_modules(self) -> list[str]:
        """The backbone modules that stay trainable and are saved with the delta."""
        return list(self.config.unfrozen_modules or ())

    @property
    def attached(self) -> bool:
        """Whether its layers are on the backbone."""
        backbone = Backbone.of(self.backbone_model)
        return any(layer.record is self.record for _, _, layer in backbone.delta_layers())

    @property
    def active(self) -> bool:
        """Whether its layers act where they are attached; see `enable` and `disable`."""
        return self.record.active

    @property
    def scale(self) -> float:
        """What multiplies the change that the delta makes to an output: 1, until it is set.

        It comes on top of the method's own scaling, such as alpha / r, and is saved with the delta.
        Setting it takes as long for a large model as for a small one, and compiles nothing anew
        under `torch.compile`. Modules that the delta owns (`modules_to_save`) are not scaled.

        Raises:
            OptionError: it is set to something else than a finite number of at most 1e6, or for a
                method that does not add to an output.
            DeltaError: it is set while the delta is merged.
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
                "one thing to multiply; LoRA without use_dora, adapters and others that add have it"
            )
        if scale != self.record.scale:
            self.record.require_apart("cannot scale")
        self.record.set_scale(scale)

    # --------------------------------------------------------------- tensors
    def prefix(self, where: str, named: str | None = None) -> str:
        """The start of the full names of the tensors of its layer on the module called `where`.

        Args:
            named: the delta's name in them. None: its own.
        """
        return inside(join(where, SLOT, named or self.name))

    def named_parameters(self, named: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """(full name, parameter) of the delta, the same whether it is attached or not.

        Args:
            named: give the full names that they would have if the delta were called so.
        """
        for where, layer in self.layers.items():
            prefix = self.prefix(where, named)
            # most layers have nothing inside, where torch would look for it all the same
            own = layer.named_parameters() if layer._modules else layer._parameters.items()
            yield from ((prefix + name, p) for name, p in own if p is not None)

    def parameters(self) -> Iterator[nn.Parameter]:
        """The delta's parameters."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self, named: str | None = None) -> dict[str, Tensor]:
        """The delta's tensors by full name, the same whether it is attached or not.

        Args:
            named: the full names that they would have if the delta were called so.
        """
        state: dict[str, Tensor] = {}
        for where, layer in self.layers.items():
            layer.state_dict(destination=state, prefix=self.prefix(where, named))
        return state


class Handles:
    """The deltas that somebody holds, as `iter()` finds them while other threads add theirs.

    Who holds a detached delta keeps its name and its place in the order; this set keeps nothing
    alive.
    """

    def __init__(self) -> None:
        self._known: weakref.WeakSet[BaseDelta] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, handle: BaseDelta) -> None:
        """Know one more."""
        with self._lock:
            self._known.add(handle)

    def __iter__(self) -> Iterator[BaseDelta]:
        with self._lock:
            return iter(list(self._known))


HANDLES = Handles()
