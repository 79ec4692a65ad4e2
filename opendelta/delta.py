"""A delta: one method on one backbone. Attach, detach, freeze, save, show."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar, cast

from torch import Tensor, nn

from . import compiling, freezing, inspection, merging, planning, sharding, site, targets
from .addressing import Survey, as_list, survey
from .bases import DeltaLayer
from .blocks import block
from .errors import DeltaError, OptionError, SiteError, shown
from .options import DeltaConfig, as_scaling
from .order import HANDLES, check_place, check_root, free_name, known_records, neighbour, renumber
from .record import SLOT, Record, Shared
from .registry import register

AnyDelta = TypeVar("AnyDelta", bound="Delta")


class Delta:
    """Base of all methods: `LoraModel(model)` puts one on `model` and is the handle to it.

    A method sets the four class attributes; everything else is here. The arguments of the class are
    the backbone and the fields of its config.

    Attributes:
        delta_type: the method's name in files.
        config_class: its options.
        layer_class: its layer.
        default_modified_modules: the roles that get a layer by default.
        backbone_model: the model it was made for.
        layers: {full name of the site: layer}, attached or not.
        record: name, place, activity and resolved options, shared with the layers.
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

    def __init_subclass__(cls) -> None:
        register(cls)
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        fields = {field.name: field for field in dataclasses.fields(cls.config_class)}
        cls.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("backbone_model", kind, annotation=nn.Module)]
            + [
                inspect.Parameter(n, kind, default=fields[n].default, annotation=fields[n].type)
                for n in cls.config_class.option_names()
            ]
        )

    def __init__(self, backbone_model: nn.Module, *args: Any, **options: Any) -> None:
        names = self.config_class.option_names()
        if len(args) > len(names):
            raise OptionError(f"{type(self).__name__} takes at most {len(names)} options")
        if args and isinstance(args[0], DeltaConfig):
            raise OptionError(f"to use a config: {type(self).__name__}.from_config(config, model)")
        given = dict(zip(names, args, strict=False))
        if twice := given.keys() & options.keys():
            raise OptionError(
                f"{type(self).__name__}: {sorted(twice)} given twice, by position and by name; "
                f"after backbone_model come {', '.join(names[:4])}, ..."
            )
        config = self.config_class.from_dict({**given, **options})
        if not isinstance(backbone_model, nn.Module):
            raise OptionError(f"backbone_model must be a torch.nn.Module, not {backbone_model!r}")
        found = survey(backbone_model)
        with planning.uncollected():
            self._prepare(found, config)
            self._enter(found=found)

    @classmethod
    def from_config(
        cls: type[AnyDelta], config: DeltaConfig, backbone_model: nn.Module, **options: Any
    ) -> AnyDelta:
        """Put a new delta with these options, changed by `options`, on `backbone_model`."""
        if not isinstance(config, cls.config_class):
            raise OptionError(f"{cls.__name__} takes a {cls.config_class.__name__}, not {config!r}")
        return cls(backbone_model, **{**vars(config), **options})

    @classmethod
    def from_finetuned(
        cls: type[AnyDelta],
        finetuned_delta_path: str | os.PathLike,
        backbone_model: nn.Module,
        name: str | None = None,
        local_files_only: bool = False,
        check_hash: bool = True,
        check_backbone: bool = True,
    ) -> AnyDelta:
        """Put a delta that `save_finetuned` wrote on `backbone_model`.

        Args:
            finetuned_delta_path: the folder, or "user/name" on the hub.
            name: the delta's name here. None: its own, or the next free one.
            local_files_only: take what was downloaded before.
            check_backbone: raise if the weights that the delta stands on are not those that it was
                trained on, as far as a few values tell.
            check_hash: OpenDelta 0.3's name for that.

        Raises:
            DeltaLoadError: the folder holds another method, is damaged, or does not fit.
        """
        from . import checkpoint, hub

        path = hub.folder_of(finetuned_delta_path, local_files_only)
        loaded, _ = checkpoint.load(path, backbone_model, name, cls, check_hash and check_backbone)
        return cast(AnyDelta, loaded[0])

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
        found = survey(self.backbone_model)
        return any(layer.record is self.record for _, _, layer in found.layers())

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
            merging.check_apart(self.record, "cannot scale")
        self.record.set_scale(scale)

    # ------------------------------------------------------- attaching, detaching
    def _prepare(self, found: Survey, config: DeltaConfig, values: planning.Values = "new") -> None:
        """Everything but changing the model: name, modules, sizes, layers.

        Args:
            values: where those of the layers come from; if "saved", the config holds full names, on
                which no pattern is run.
        """
        model = found.root
        check_root(found)
        known = known_records(found)
        taken = [record.name for record in known]
        name = free_name(config.delta_type, taken) if config.name is None else config.name
        site.check_name(name)
        if name in taken:
            raise SiteError(
                f"{type(model).__name__} has a delta {name!r} already, attached, or detached and "
                "still in a variable, so that it may come back; pass another name=, such as "
                f"{free_name(name, taken)!r}"
            )
        layer_class, shared = self.layer_for(config), self.shared_for(config)
        if values == "saved":
            config = targets.take_literally(found, config)
        else:
            config = targets.resolve(found, config, self.default_modified_modules, layer_class)
        self.layers = planning.make_layers(found, config, layer_class, shared, values)
        place = known[-1].place + 1 if known else 0
        with_all = known[0].shared if known else Shared()
        self.record = Record(name, config, place, with_all, tuple(self.layers))
        self.backbone_model = model
        for layer in self.layers.values():
            layer.record = self.record

    def _enter(
        self,
        before: Record | None = None,
        after: Record | None = None,
        found: Survey | None = None,
    ) -> None:
        """Plan, then commit: put all layers on the backbone, at the delta's place in the order.

        Args:
            found: the backbone as it is.
        """
        found = survey(self.backbone_model) if found is None else found
        merging.check_unrouted(found, f"cannot attach {self.name!r}")
        plan = planning.places(found, self.name, self.config, self.layers)
        known = check_place(found, self, before, after)
        done: list[nn.Module] = []
        try:
            for where, (reads, ranks) in plan.items():
                module, layer = found.modules[where], self.layers[where]
                if ranks is None or ranks.group is None:
                    planning.fit(layer, module, *planning.placement(found, where, self.config))
                if ranks is not None:
                    sharding.shard(layer, ranks)
                found.stacks[where] = site.add(module, self.name, layer, reads)
                done.append(module)
        except BaseException:
            for module in done:
                site.remove(module, self.name)
            raise
        if known and self.record.shared is not known[0].shared:
            known[0].shared.frozen |= self.record.shared.frozen
            known[0].shared.excluded |= self.record.shared.excluded
            self.record.shared = known[0].shared
        renumber(known, self.record, before, after)
        for stack in found.stacks.values():
            stack.sort()
        self.record.shared.records.append(self.record)
        compiling.watch_limit()
        inspection.watch_forward(found)
        freezing.watch_state(found, self.record.shared)
        HANDLES.add(self)

    def attach(
        self, *, before: Delta | str | None = None, after: Delta | str | None = None
    ) -> None:
        """Put the delta back at its place in the order, or next to another delta.

        Its tensors follow the modules to their device, dtype and training flag. If it is attached
        already, only its place changes.

        Args:
            before: the delta, or its name, that is to act right after this one.
            after: the delta, or its name, that is to act right before this one.

        Raises:
            SiteError: a module cannot take the layer back, or deltas are attached through another
                one around or inside this backbone. Nothing is attached then.
            DeltaError: both neighbours are given, or one is not on this backbone; or the delta
                would act beneath a merged one.
        """
        if before is not None and after is not None:
            raise DeltaError("attach(before=..., after=...): give one neighbour, not both")
        found = survey(self.backbone_model)
        known = known_records(found)
        neighbours = [neighbour(known, self, other) for other in (before, after)]
        if not self.attached:
            check_root(found)
            self._enter(neighbours[0], neighbours[1], found)
        elif any(neighbours):
            for record in known:
                merging.check_apart(record, "cannot move deltas around")
            renumber([r for r in known if r is not self.record], self.record, *neighbours)
            for stack in found.stacks.values():
                stack.sort()

    def detach(self) -> None:
        """Take the delta off, whatever came before or after it; its tensors stay with this handle.

        The last one to leave restores the flags that `freeze_module` changed and takes the
        state-dict filter along.
        """
        merging.check_apart(self.record, "cannot detach")
        found = survey(self.backbone_model)
        for where, name, layer in list(found.layers()):
            if layer.record is self.record:
                site.remove(found.modules[where], name)
        shared = self.record.shared
        shared.records = [record for record in shared.records if record is not self.record]
        if not any(len(stack) for stack in found.stacks.values()):
            freezing.unwatch_state(found)
            inspection.unwatch_forward(found)
            freezing.restore(found, shared)
            shared.only_trainable = False

    # ---------------------------------------------------------- the switches
    def enable(self) -> None:
        """Let the delta act. Whether it is attached, and whether it trains, stays as it is."""
        self._switch(True)

    def disable(self) -> None:
        """Let the backbone compute as if the delta were not there."""
        self._switch(False)

    def _switch(self, active: bool) -> None:
        if active != self.record.active:
            merging.check_apart(self.record, "cannot switch")
        self.record.active = active

    @block
    def disabled(self) -> Iterator[None]:
        """Disable the delta inside a `with` block."""
        before = self.record.active
        self._switch(False)
        try:
            yield
        finally:
            self._switch(before)

    def requires_grad_(self: AnyDelta, requires_grad: bool = True) -> AnyDelta:
        """Let the delta train, or freeze it; others are not touched."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def train(self: AnyDelta, mode: bool = True) -> AnyDelta:
        """Put the delta's layers into training mode, as dropout needs it."""
        for layer in self.layers.values():
            layer.train(mode)
        return self

    def eval(self: AnyDelta) -> AnyDelta:
        """Put the delta's layers into evaluation mode."""
        return self.train(False)

    def freeze_module(
        self,
        module: nn.Module | None = None,
        exclude: Sequence[str] | str | None = ("deltas",),
        set_state_dict: bool = True,
    ) -> None:
        """Freeze the backbone, or one module of it, except what `exclude` names.

        A later call decides anew: what an earlier one froze and this one excludes trains again.

        Args:
            module: a module of the backbone. None: all of it.
            exclude: names by the addressing rules, of parameters, modules or deltas; `"deltas"` is
                all deltas. What they name is left as it is.
            set_state_dict: let `state_dict()` of the backbone hold only what trains, until the last
                delta is detached. False: let it hold everything.

        Raises:
            AddressError: a name selects nothing. Nothing is frozen then.
        """
        found = survey(self.backbone_model)
        shared = self.record.shared
        unfrozen = {n for r in known_records(found) for n in r.config.unfrozen_modules or ()}
        freezing.freeze(found, shared, module, as_list(exclude), unfrozen)
        shared.only_trainable = set_state_dict

    # --------------------------------------------------------------- tensors
    def _prefix(self, where: str, name: str | None = None) -> str:
        return (f"{where}." if where else "") + f"{SLOT}.{name or self.name}."

    def named_parameters(self, named: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """(full name, parameter) of the delta, the same whether it is attached or not.

        Args:
            named: give the full names that they would have if the delta were called so.
        """
        for where, layer in self.layers.items():
            prefix = self._prefix(where, named)
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
            layer.state_dict(destination=state, prefix=self._prefix(where, named))
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy tensors by full name into the delta.

        Raises:
            DeltaLoadError: a tensor is missing, unexpected or misshaped. Nothing is copied then.
        """
        from . import comparing

        merging.check_apart(self.record, "cannot load")
        comparing.copy_into(self.state_dict(), state, f"state_dict of {self.name!r}")

    # ------------------------------------------------------- showing, saving
    def log(
        self,
        delta_ratio: bool = True,
        trainable_ratio: bool = True,
        visualization: bool = True,
        cuda_memory: bool = True,
    ) -> None:
        """Print the backbone's tree with its deltas, and the share of what trains.

        Args:
            delta_ratio: print the delta parameters' share of all parameters.
            trainable_ratio: print the trainable parameters' share.
            visualization: print the tree.
            cuda_memory: print the memory in use, where there is CUDA.
        """
        from .tree import log

        log(self.backbone_model, delta_ratio, trainable_ratio, visualization, cuda_memory)

    def save_finetuned(
        self, save_directory: str | os.PathLike = "./output", push_to_hub: bool | str = False
    ) -> None:
        """Save the delta, the modules it owns, and the backbone parameters left trainable by name.

        These are the parameters of `unfrozen_modules`, and those that `freeze_module(exclude=...)`
        named. The folder gets one JSON file and one safetensors file, and holds either its old or
        its new content at any moment.

        Args:
            save_directory: the folder; it is made if need be.
            push_to_hub: save it on the hub too, in the repository "user/name"; True: in one of
                one's own that is called as the folder is. See the method `push_to_hub`.
        """
        from . import checkpoint

        checkpoint.save([self], save_directory)
        if push_to_hub:
            name = os.path.basename(os.path.realpath(save_directory))
            self.push_to_hub(name if push_to_hub is True else push_to_hub)

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, token: str | None = None
    ) -> str:
        """Save the delta into a repository on the Hugging Face hub; the address of its page.

        Args:
            repo_id: "user/name", or "name" for one of one's own; it is made if need be.
            private: whether a new repository is private.
            token: of the user. None: the one that was logged in with.

        Raises:
            DeltaError: values are not finite.
            huggingface_hub.errors.HfHubHTTPError: the hub refuses, or is out of reach.
        """
        from . import hub

        return hub.push([self], repo_id, private, token)
