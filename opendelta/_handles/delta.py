"""`Delta`, the user's handle of one delta: attach, detach, switch, freeze, save, show."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from inspect import Parameter, Signature
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .._backbone import engines, sharding
from .._backbone.backbone import Backbone
from .._backbone.heads import warn_of_untrained
from .._backbone.inputs import Samples
from .._backbone.patterns import as_list
from .._checkpoint import hub, loading, saving
from .._deltas import former
from .._deltas.base import require_whole
from .._deltas.buffers import warn_of_moving
from .._deltas.choosing import choose
from .._deltas.committing import commit, take_off
from .._deltas.converting import carry, convert, is_dtype
from .._deltas.freezing import freeze
from .._deltas.making import make, uncollected
from .._deltas.options import DeltaConfig
from .._deltas.order import attached_by_name, check_root, known_records, move, neighbour
from .._deltas.placing import place
from .._deltas.registry import register
from .._deltas.taking import check_sizes
from .._files.tensors import copy_into
from .._layers.record import PICKLED, TRAINED, WHOLE
from .._layers.selection import OpenBlock
from .._modules.process import one_at_a_time
from .._show.tree import log
from ..errors import DeltaError, DeltaLoadError, OptionError, to_the_end
from ..names import SLOT, join
from .as_module import AsModule
from .with_block import with_block

AnyDelta = TypeVar("AnyDelta", bound="Delta")
BY_POSITION, BY_NAME = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY


class Delta(AsModule):
    """The base class of all methods: `LoraModel(model)` puts a delta on `model`, and is its handle.

    A method sets the first four class attributes, and the fifth once its learning rate is measured;
    all other code is here. The arguments of the class are the backbone, the fields of its config,
    and `sample_inputs`: the arguments of the backbone's forward, by keyword in a mapping, by
    position in a sequence, or one tensor. By a run on them, on shapes alone, sizes are found that
    the classes of modules do not tell. None: such inputs are found by themselves.

    Attributes:
        delta_type: the method's name in files.
        config_class: the class of its options.
        layer_class: the class of its layers.
        default_modified_modules: the roles that get a layer by default.
        default_learning_rate: what `optimizer_groups` trains it at; 1e-3 if the method sets none.
        backbone_model: the model that it was made for.
        layers: {full name of the site: layer}, attached or not.
        record: name, rank, activity and resolved options, shared with the layers.
    """

    def __init_subclass__(cls, abstract: bool = False) -> None:
        if abstract:
            return
        register(cls)
        fields = {field.name: field for field in dataclasses.fields(cls.config_class)}
        defaults = {name: field.default for name, field in fields.items()}
        defaults |= cls.config_class.class_defaults
        first, names = cls.config_class.positional_names(), cls.config_class.option_names()
        parameters = [Parameter("backbone_model", BY_POSITION, annotation=nn.Module)]
        for name in dict.fromkeys((*first, *names)):
            kind, hint = BY_POSITION if name in first else BY_NAME, fields[name].type
            parameters.append(Parameter(name, kind, default=defaults[name], annotation=hint))
        parameters.append(Parameter("sample_inputs", BY_NAME, default=None, annotation=Samples))
        cls.__signature__ = Signature(parameters)  # type: ignore[attr-defined]

    def __init__(
        self,
        backbone_model: nn.Module,
        *args: Any,
        sample_inputs: Samples | None = None,
        **options: Any,
    ) -> None:
        names = former.by_position(self.config_class.positional_names(args), args)
        if len(args) > len(names):
            raise OptionError(
                f"{type(self).__name__} takes at most {len(names)} options by position; give "
                "others by name"
            )
        if args and isinstance(args[0], DeltaConfig):
            raise OptionError(f"to use a config: {type(self).__name__}.from_config(config, model)")
        given = dict(zip(names, args, strict=False))
        if twice := given.keys() & options.keys():
            raise OptionError(
                f"{type(self).__name__}: {sorted(twice)} given twice, by position and by name; "
                f"after backbone_model come {', '.join(names[:4])}, ..."
            )
        config = self.config_class.from_options({**given, **options})
        if not isinstance(backbone_model, nn.Module):
            raise OptionError(f"backbone_model must be a torch.nn.Module, not {backbone_model!r}")

        @one_at_a_time
        def attach(config: DeltaConfig) -> None:
            backbone = Backbone.of(backbone_model, sample_inputs)
            with uncollected():
                make(backbone, choose(backbone, type(self), config), into=self)
                commit(place(backbone, self))

        if config.interactive_modify:
            from .._picker.session import pick_one  # start-up: it imports http.server

            pick_one(backbone_model, config, attach, sample_inputs)
        else:
            attach(config)

    @classmethod
    def from_config(
        cls: type[AnyDelta],
        config: DeltaConfig | Mapping[str, Any],
        backbone_model: nn.Module,
        check_hash: bool = True,
        **options: Any,
    ) -> AnyDelta:
        """Put a new delta with these options, changed by `options`, on `backbone_model`.

        Args:
            config: a config of the method, or a dict, which `config_class.from_dict` reads.
            check_hash: ignored; OpenDelta 0.3 had it. A new delta has nothing to compare.
            options: options by name, and `sample_inputs`.
        """
        if isinstance(config, Mapping):
            config = cls.config_class.from_dict(config)
        if not isinstance(config, cls.config_class):
            raise OptionError(f"{cls.__name__} takes a {cls.config_class.__name__}, not {config!r}")
        return cls(backbone_model, **{**vars(config), **options})

    @classmethod
    def from_finetuned(
        cls: type[AnyDelta],
        finetuned_delta_path: str | os.PathLike,
        backbone_model: nn.Module,
        delta_config: DeltaConfig | None = None,
        cache_dir: str | os.PathLike | None = None,
        state_dict: None = None,
        *,
        name: str | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        check_hash: bool = True,
        check_backbone: bool = True,
        sample_inputs: Samples | None = None,
        **former_options: Any,
    ) -> AnyDelta:
        """Put a delta that `save_finetuned` wrote on `backbone_model`.

        Args:
            finetuned_delta_path: the folder, or "user/name" on the hub.
            delta_config: the options that the delta must have been saved with. None: any.
            cache_dir: a folder that may hold the folder, and gets downloads. None: that of
                huggingface_hub.
            state_dict: None, as OpenDelta 0.3 had it; see `load_state_dict`.
            name: the delta's new name. None: its saved name, or the next free one.
            local_files_only: use only files that were downloaded before.
            force_download: download again what was downloaded before.
            check_backbone: raise if the weights under the delta differ from the weights that it was
                trained on. A few values are compared.
            check_hash: OpenDelta 0.3's name for `check_backbone`; both must be true for the check.
            sample_inputs: inputs of the backbone, to find sizes by; see `Delta`.
            former_options: arguments of OpenDelta 0.3.

        Raises:
            DeltaLoadError: the folder holds another method or other options, is damaged, or does
                not fit.
            OptionError: an argument is unknown, or is not available.
        """
        former.check_loading({"state_dict": state_dict, **former_options})
        path = hub.folder_of(
            finetuned_delta_path,
            local_files_only,
            "finetuned_delta_path",
            cache_dir=cache_dir,
            force_download=force_download,
        )
        checked = check_hash and check_backbone
        loaded, *_ = loading.load(
            path, backbone_model, name, cls, checked, sample_inputs, delta_config
        )
        inside = {name for delta in loaded for name in delta.config.children}
        return cast(AnyDelta, next(delta for delta in loaded if delta.name not in inside))

    # ------------------------------------------------------- attaching, detaching
    @one_at_a_time
    def attach(
        self,
        module: nn.Module | None = None,
        reset_state_dict: bool = True,
        *,
        before: Delta | str | None = None,
        after: Delta | str | None = None,
    ) -> None:
        """Put the delta back at its old place in the order, or next to another delta.

        Its layers get the device, dtype and training mode of their modules. If the delta is
        attached already, only its place in the order changes.

        Args:
            module: the backbone that the delta was made for, which is the only one possible.
            reset_state_dict: ignored; OpenDelta 0.3 had it.
            before: a delta or its name: put this delta right before it in the order.
            after: a delta or its name: put this delta right after it in the order.

        Raises:
            SiteError: a module cannot take its layer back, or a delta is attached to a module
                around or inside this backbone. Nothing is attached then.
            DeltaError: both neighbours are given, or one is not on this backbone; or the delta
                would act beneath a merged one.
        """
        self._require_backbone(module, "attach")
        if before is not None and after is not None:
            raise DeltaError("attach(before=..., after=...): give one neighbour, not both")
        backbone = Backbone.of(self.backbone_model)
        known = known_records(backbone)
        next_to = [neighbour(known, self, other) for other in (before, after)]
        if not self.attached:
            check_root(backbone)
            check_sizes(backbone, self.layers)
            commit(place(backbone, self, *next_to, known=known))
        elif any(next_to):
            move(backbone, self.record, *next_to)

    @one_at_a_time
    def detach(self, module: nn.Module | None = None, reset_state_dict: bool = True) -> None:
        """Take the delta off, at any place in the order; its tensors stay with this handle.

        When the last delta leaves, the flags that `freeze_module` changed are restored, and
        `state_dict()` of the backbone holds all tensors again.

        Args:
            module: the backbone that the delta was made for, which is the only one possible.
            reset_state_dict: ignored; OpenDelta 0.3 had it.
        """
        self._require_backbone(module, "detach")
        self.record.require_apart("cannot detach")
        take_off(Backbone.of(self.backbone_model), self)

    def _require_backbone(self, module: nn.Module | None, verb: str) -> None:
        if module is not None and module is not self.backbone_model:
            raise DeltaError(
                f"{verb}(module=...): {self.name!r} was made for a whole "
                f"{type(self.backbone_model).__name__}, not for this {type(module).__name__}: make "
                "another delta for it"
            )

    # ---------------------------------------------------------- the switches
    def enable(self) -> None:
        """Let the delta act. This does not attach it, and does not change which tensors train."""
        self.record.switch(True)

    def disable(self) -> None:
        """Let the backbone compute as if the delta were not there."""
        self.record.switch(False)

    @with_block
    def disabled(self) -> Iterator[None]:
        """Disable the delta inside a `with` block, for the thread and task that enters it.

        In a copy that is made inside (deepcopy, pickle, a saved folder) it stays disabled.
        """
        if self.record.active:
            self.record.require_apart("cannot switch")
        with OpenBlock({self.record: False}):
            yield

    def requires_grad_(self: AnyDelta, requires_grad: bool = True) -> AnyDelta:
        """Let the delta train, or freeze it; other deltas are not touched.

        Raises:
            SiteError: what is around the model, such as DistributedDataParallel, would not train
                it.
        """
        if requires_grad and self.attached:
            around = Backbone.of(self.backbone_model)
            frozen = [p for p in self.parameters() if not p.requires_grad]
            engines.check_synchronised(around, self.layers, frozen)
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def train(self: AnyDelta, mode: bool = True) -> AnyDelta:
        """Put the delta's layers into training mode, which turns their dropout on."""
        for layer in self.layers.values():
            layer.train(mode)
        return self

    def eval(self: AnyDelta) -> AnyDelta:
        """Put the delta's layers into evaluation mode."""
        return self.train(False)

    def freeze_module(
        self,
        module: nn.Module | None = None,
        exclude: Sequence[str | Delta] | str | Delta | None = ("deltas",),
        set_state_dict: bool | None = None,
    ) -> None:
        """Freeze the parameters of the backbone, or of one module, except the excluded ones.

        The last call decides: a parameter that an earlier call froze, and this call excludes,
        trains again.

        Args:
            module: a module of the backbone. None: the whole backbone.
            exclude: names or patterns of parameters, modules or deltas, or handles; `"deltas"`
                means all deltas. Excluded parameters are left as they are.
            set_state_dict: what `state_dict()` of the backbone holds until the last delta is
                detached. None: all tensors, and what `torch.save` or pickle writes of it only the
                deltas and what trains. True: only these. False: all tensors, in a file too. A
                state dict that lacks frozen tensors loads on a model of the same kind, with
                `strict=True` too; what it lacks stays as it is.

        Warns:
            UnsavedWarning: frozen normalisations keep statistics, as BatchNorm does, that move in
                training mode and that no file of a delta holds.
            UnusedWarning: a name selects nothing.

        Raises:
            AddressError: none of the names selects anything. Nothing is frozen then.
            DeltaError: a handle is not that of an attached delta.
        """
        backbone = Backbone.of(self.backbone_model)
        given: Any = [exclude] if isinstance(exclude, Delta) else exclude
        spared: list[Any] = [*as_list(given)]
        handles = [each for each in spared if isinstance(each, Delta)]
        attached_by_name(backbone.model, handles, backbone.records())
        spared = [join(SLOT, e.name) if isinstance(e, Delta) else e for e in spared]
        shared = self.record.shared
        unfrozen = {n for r in known_records(backbone) for n in r.config.unfrozen_modules or ()}

        def apply() -> None:
            freeze(backbone, shared, module, spared, unfrozen)
            shared.in_state_dict = {None: PICKLED, True: TRAINED, False: WHOLE}[set_state_dict]

        to_the_end(apply)
        warn_of_untrained(backbone, "is frozen")
        warn_of_moving(backbone)

    # --------------------------------------------------------------- tensors
    def to(
        self: AnyDelta,
        *targets: torch.dtype | torch.device | str | int,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> AnyDelta:
        """Convert the delta's tensors to another dtype, or move them to another device.

        The dtype becomes the option `dtype` of the delta. The parameters stay the same objects. An
        optimizer that has stepped keeps states of the old dtype, so make it anew. A backbone that
        moves takes its attached deltas along.

        Args:
            targets: a dtype or a device, or both.
            device: such as "cuda:0"; the backbone must be there when it runs.
            dtype: such as torch.bfloat16 or "bfloat16"; "backbone": the dtype in which each module
                computes.

        Raises:
            OptionError: a target is neither a device nor a dtype that a delta can have.
            AddressError: a module with a layer of the delta is no longer there.
            DeltaError: the delta is merged, its tensors are sharded or offloaded, or values are too
                large for `dtype`.

        Example:
            >>> from torch import nn
            >>> import opendelta
            >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).bfloat16()
            >>> delta = opendelta.LoraModel(model, modified_modules=["0"])
            >>> [str(p.dtype) for p in delta.parameters()]
            ['torch.float32', 'torch.float32']
            >>> [str(p.dtype) for p in delta.to("backbone").parameters()]
            ['torch.bfloat16', 'torch.bfloat16']
        """
        wanted = [*targets, *(target for target in (device, dtype) if target is not None)]
        if not wanted:
            raise OptionError(f"{self.name!r}.to() needs a dtype, such as 'float32', or a device")
        for target in wanted:
            if is_dtype(target):
                convert(self, target)
            else:
                carry(self, target)
        return self

    def shard(self, **options: Any) -> None:
        """Shard each layer by FSDP2 in a group of its own, before `fully_shard` around it.

        FSDP2 refuses a group that trains parameters of two dtypes, such as a float32 delta and
        `unfrozen_modules` in 16 bits. A delta that is attached after `fully_shard` needs no call.

        Args:
            options: `mesh`, `mp_policy` and `offload_policy`, as for torch's `fully_shard`.
        """
        for layer in self.layers.values():
            sharding.apart(layer, **options)

    def load_state_dict(self, state: dict[str, Tensor], strict: bool = True) -> None:
        """Copy tensors by full name into the delta.

        Args:
            strict: if False, tensors may be missing, and others, such as the backbone's, are
                ignored.

        Raises:
            DeltaLoadError: a tensor is missing, unexpected or misshaped, or none is the delta's.
                Nothing is copied then.
        """
        self.record.require_apart("cannot load")
        require_whole(self, "cannot load values into")
        own, source = self.state_dict(), f"state_dict of {self.name!r}"
        former.check_state(source, state)
        if not strict:
            both = own.keys() & state.keys()
            if not both:
                raise DeltaLoadError(f"{source}: none of its {len(state)} tensors is the delta's")
            own, state = ({key: given[key] for key in both} for given in (own, state))
        copy_into(own, state, source)

    # ------------------------------------------------------- showing, saving
    def log(
        self,
        module: nn.Module | None = None,
        delta_ratio: bool = True,
        trainable_ratio: bool = True,
        visualization: bool = True,
        cuda_memory: bool = True,
    ) -> None:
        """Print the backbone's tree with its deltas, and the share of parameters that train.

        Args:
            module: the module to print. None: the backbone.
            delta_ratio: print the delta parameters' share of all parameters.
            trainable_ratio: print the trainable parameters' share.
            visualization: print the tree.
            cuda_memory: print the memory in use, if there is CUDA.
        """
        log(module or self.backbone_model, delta_ratio, trainable_ratio, visualization, cuda_memory)

    def save_finetuned(
        self,
        finetuned_delta_path: str | os.PathLike = "./delta_checkpoints/",
        *former_values: Any,
        push_to_hub: bool | str = False,
        **former_options: Any,
    ) -> None:
        """Save the delta, its own modules, and the backbone parameters left trainable by name.

        Such backbone parameters are named by `unfrozen_modules` or by `freeze_module(exclude=...)`.
        The folder gets one JSON file and one safetensors file, and holds either its old or its new
        content at any moment.

        Args:
            finetuned_delta_path: the folder; it is made if need be.
            push_to_hub: save the delta on the hub too, in the repository "user/name". True: in the
                user's repository with the folder's name. See the method `push_to_hub`.
            *former_values: arguments of OpenDelta 0.3 by position.
            **former_options: arguments of OpenDelta 0.3 by name. Those for DeltaCenter are ignored.

        Warns:
            UnusedWarning: arguments for DeltaCenter were given, which is closed.

        Raises:
            OptionError: an argument is unknown. If `push_to_dc` is true, the delta is saved first.
        """
        unsent = former.check_saving(former_values, former_options)
        saving.save(self._to_save(), finetuned_delta_path, "finetuned_delta_path")
        if unsent:
            raise OptionError(f"{self.name!r} is saved in {finetuned_delta_path}, but {unsent}")
        if push_to_hub:
            name = os.path.basename(os.path.realpath(finetuned_delta_path))
            self.push_to_hub(name if push_to_hub is True else push_to_hub)

    def push_to_hub(
        self, repo_id: str, private: bool | None = None, token: str | None = None
    ) -> str:
        """Save the delta into a repository on the Hugging Face hub; return the address of its page.

        Args:
            repo_id: "user/name", or "name" for the user's own repository; it is made if need be.
            private: make a new repository private.
            token: the user's token. None: the token of the user who is logged in.

        Raises:
            DeltaError: values are not finite.
            huggingface_hub.errors.HfHubHTTPError: the hub refuses, or is out of reach.
        """
        return hub.push(self._to_save(), repo_id, private, token)

    def _to_save(self) -> list[Delta]:
        return [self]
