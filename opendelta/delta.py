"""A delta: one method on one backbone. Attach, detach, freeze, save, show."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from . import freezing, inspection, sharding, site, structure
from .addressing import Survey, as_list, literal, no_match, resolve, select, survey
from .errors import AddressError, DeltaError, OptionError, SiteError, TiedWeightWarning, nearest
from .layers import KINDS, Site, device_and_dtype, kind_of
from .options import DeltaConfig
from .record import SLOT, Record, Shared
from .shapes import output_widths
from .site import DeltaLayer, OwnedModule

METHODS: dict[str, type[Delta]] = {}
HANDLES: weakref.WeakSet[Delta] = weakref.WeakSet()
AnyDelta = TypeVar("AnyDelta", bound="Delta")


def method(delta_type: str) -> type[Delta]:
    """The class registered for `delta_type`.

    Raises:
        OptionError: there is none.
    """
    if delta_type not in METHODS:
        near = nearest(str(delta_type), METHODS)
        hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(sorted(METHODS))}"
        raise OptionError(f"no method {delta_type!r}; {hint}")
    return METHODS[delta_type]


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

    def __init_subclass__(cls) -> None:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        fields = {field.name: field for field in dataclasses.fields(cls.config_class)}
        cls.config_class.delta_type = cls.delta_type
        cls.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("backbone_model", kind, annotation=nn.Module)]
            + [
                inspect.Parameter(n, kind, default=fields[n].default, annotation=fields[n].type)
                for n in cls.config_class.option_names()
            ]
        )
        METHODS[cls.delta_type] = cls

    def __init__(self, backbone_model: nn.Module, *args: Any, **options: Any) -> None:
        names = self.config_class.option_names()
        if len(args) > len(names):
            raise OptionError(f"{type(self).__name__} takes at most {len(names)} options")
        given = dict(zip(names, args, strict=False))
        if twice := given.keys() & options.keys():
            raise OptionError(f"{type(self).__name__}: {sorted(twice)} given twice")
        config = self.config_class.from_dict({**given, **options})
        self._prepare(backbone_model, config)
        self._enter()

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
        local_files_only: bool = True,
    ) -> AnyDelta:
        """Put a delta that `save_finetuned` wrote on `backbone_model`.

        Args:
            finetuned_delta_path: the folder.
            name: the delta's name here. None: its own, or the next free one.
            local_files_only: folders are the only source, so this changes nothing.

        Raises:
            DeltaLoadError: the folder holds another method, is damaged, or does not fit.
        """
        from . import checkpoint

        return checkpoint.load(finetuned_delta_path, backbone_model, name=name, expected=cls)

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.parameters())
        state = ["attached" if self.attached else "detached"]
        state.append("active" if self.active else "disabled")
        state.append("trainable" if any(p.requires_grad for p in self.parameters()) else "frozen")
        return (
            f"{type(self).__name__}({self.name!r} on {type(self.backbone_model).__name__}: "
            f"{len(self.layers)} modules, {count:,} parameters, {', '.join(state)})"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        HANDLES.add(self)

    # --------------------------------------------------------------------------------- what it is
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
    def attached(self) -> bool:
        """Whether its layers are on the backbone."""
        return any(layer.record is self.record for _, _, layer in survey(self.backbone_model).layers())

    @property
    def active(self) -> bool:
        """Whether its layers act where they are attached; see `enable` and `disable`."""
        return self.record.active

    # ------------------------------------------------------------------------------ making the layers
    def _prepare(self, model: nn.Module, config: DeltaConfig, as_named: bool = False) -> None:
        """Everything but changing the model: names, sizes, layers. `as_named`: run no pattern."""
        if not isinstance(model, nn.Module):
            raise OptionError(f"backbone_model must be a torch.nn.Module, not {type(model).__name__}")
        found = survey(model)
        known = known_records(found)
        taken = {record.name for record in known}
        name = config.name or free_name(config.delta_type, taken)
        site.check_name(name)
        if name in taken:
            raise SiteError(
                f"{type(model).__name__} has a delta {name!r} already, attached or detached but "
                f"held; pass another name=, such as {free_name(name, taken)!r}"
            )
        config = self._resolved(found, config, as_named)
        shared = known[0].shared if known else Shared()
        place = known[-1].place + 1 if known else 0
        self.backbone_model = model
        self.record = Record(name, config, place, shared)
        self.layers = self._make_layers(found, config)
        for layer in self.layers.values():
            layer.record = self.record
        HANDLES.add(self)

    def _resolved(self, found: Survey, config: DeltaConfig, as_named: bool) -> DeltaConfig:
        """The config with full module names in place of patterns and roles."""
        if as_named:
            for names in (config.modified_modules, config.modules_to_save, config.unfrozen_modules):
                literal(found, names or [])
            return config
        modified = self._targets(found, config)
        owned = select(found.modules, as_list(config.modules_to_save), found.root)
        for name in modified:
            if around := next((o for o in owned if f"{name}.".startswith(f"{o}.")), None):
                raise AddressError(
                    f"{name!r} is selected by modified_modules, but modules_to_save={around!r} "
                    f"replaces it; add exclude_modules=[{around!r}]"
                )
        changes: dict[str, Any] = {
            "modified_modules": modified,
            "exclude_modules": None,
            "common_structure": None,
            "modules_to_save": owned or None,
            "unfrozen_modules": select(found.modules, as_list(config.unfrozen_modules), found.root)
            or None,
        }
        for field in dataclasses.fields(config):
            if "modules" in field.metadata:
                chosen = self._some_of(found, modified, config, field)
                changes[field.name] = chosen
        return dataclasses.replace(config, **changes)

    def _targets(self, found: Survey, config: DeltaConfig) -> list[str]:
        wanted, by_role = config.modified_modules, config.common_structure
        if wanted is None:
            wanted, by_role = list(self.default_modified_modules), by_role is not False
        if not wanted:
            raise AddressError(f"{self.delta_type!r} needs modified_modules: the list is empty")
        if by_role:
            names = structure.with_roles(found.root, wanted)
            out = set(select(found.modules, as_list(config.exclude_modules), found.root, inside=True))
            wanted = [name for name in names if name not in out]
            return literal(found, wanted) or resolve(found, names, as_list(config.exclude_modules))
        return resolve(found, wanted, as_list(config.exclude_modules))

    def _some_of(
        self, found: Survey, modified: list[str], config: DeltaConfig, field: dataclasses.Field
    ) -> list[str]:
        """The modified modules that an option selects: by its patterns, or by its default roles."""
        patterns = getattr(config, field.name)
        if patterns is None:
            known, wanted = structure.roles(found.root), field.metadata["modules"]
            return [name for name in modified if known.get(name) in wanted]
        if config.common_structure:
            patterns = structure.with_roles(found.root, patterns)
        return select(modified, patterns, found.root, what="modified module")

    def _make_layers(self, found: Survey, config: DeltaConfig) -> dict[str, DeltaLayer]:
        targets = config.modified_modules or []
        unknown = [name for name in targets if kind_of(found.modules[name]) is None]

        @functools.cache
        def widths() -> dict[str, int]:
            return output_widths(found.root, unknown)

        made: dict[str, DeltaLayer] = {}
        sites = []
        for name in targets:
            module = found.modules[name]
            kind = kind_of(module)
            self._check_kind(found, name, kind.name if kind is not None else "other")
            device, dtype = placement(found, name, config)
            sites.append(Site(name, module, kind, device, dtype, lambda n: widths()[n]))
        if self.layer_class.fold is not DeltaLayer.fold:
            warn_if_tied(found, targets, self.delta_type)
        for place in sites:
            made[place.name] = self.layer_class(place, config)  # type: ignore[call-arg, arg-type]
        for name in config.modules_to_save or ():
            made[name] = OwnedModule(own_copy(found, name))
        return made

    def _check_kind(self, found: Survey, name: str, kind: str) -> None:
        if kind in self.layer_class.kinds:
            return
        takes = "; ".join(KINDS[k] for k in self.layer_class.kinds)
        inside = [
            other
            for other, module in found.modules.items()
            if other.startswith(f"{name}." if name else "")
            and (inner := kind_of(module)) is not None
            and inner.name in self.layer_class.kinds
        ]
        raise SiteError(
            f"{name or 'the root'!r} ({type(found.modules[name]).__name__}) cannot carry "
            f"{self.delta_type!r}, which takes: {takes}."
            + (f" Inside it there are {', '.join(map(repr, inside[:4]))}" if inside else "")
        )

    # -------------------------------------------------------------------------- attaching, detaching
    def _enter(self, before: Record | None = None, after: Record | None = None) -> None:
        """Plan, then commit: put all layers on the backbone, at the delta's place in the order."""
        found = survey(self.backbone_model)
        plan = []
        for where, layer in self.layers.items():
            if where not in found.modules:
                raise no_match(where, found.modules, found.root)
            reads = site.wants_reads(found.modules[where], self.config.reads)
            site.check(where, found.modules[where], [(self.name, layer)], reads)
            plan.append((where, layer, reads, sharding.group_of(found, where, reads)))
        known = [record for record in known_records(found) if record is not self.record]
        if any(record.name == self.name for record in known):
            raise SiteError(f"another delta of this backbone is called {self.name!r} by now")
        moved = renumber(known, self.record, before, after)
        done: list[nn.Module] = []
        try:
            for where, layer, reads, group in plan:
                if group is None:
                    device, dtype = placement(found, where, self.config)
                    fit(layer, device, dtype)
                else:
                    sharding.shard(layer, group)
                site.add(found.modules[where], self.name, layer, reads)
                done.append(found.modules[where])
        except BaseException:
            for module in done:
                site.remove(module, self.name)
            raise
        if known and self.record.shared is not known[0].shared:
            known[0].shared.frozen |= self.record.shared.frozen
            self.record.shared = known[0].shared
        if moved:
            for stack in survey(self.backbone_model).stacks.values():
                stack.sort()
        self._watch()

    def _watch(self) -> None:
        found = survey(self.backbone_model)
        inspection.watch_forward(found)
        freezing.watch_state(found)

    def attach(self, *, before: Delta | str | None = None, after: Delta | str | None = None) -> None:
        """Put the delta back at its place in the order, or next to another delta.

        Its tensors follow the modules to their device, dtype and training flag. If it is attached
        already, only its place changes.

        Args:
            before: the delta, or its name, that is to act right after this one.
            after: the delta, or its name, that is to act right before this one.

        Raises:
            SiteError: a module cannot take the layer back. Nothing is attached then.
            DeltaError: both neighbours are given, or one is not on this backbone.
        """
        if before is not None and after is not None:
            raise DeltaError("attach(before=..., after=...): give one neighbour, not both")
        found = survey(self.backbone_model)
        known = known_records(found)
        neighbours = [self._neighbour(known, other) for other in (before, after)]
        if not self.attached:
            self._enter(*neighbours)
        elif any(neighbours):
            renumber([r for r in known if r is not self.record], self.record, *neighbours)
            for stack in found.stacks.values():
                stack.sort()

    def _neighbour(self, known: list[Record], other: Delta | str | None) -> Record | None:
        if other is None:
            return None
        name = other.name if isinstance(other, Delta) else other
        for record in known:
            is_it = record is other.record if isinstance(other, Delta) else record.name == other
            if is_it and record is not self.record:
                return record
        names = [record.name for record in known if record is not self.record]
        raise DeltaError(
            f"{self.name!r} cannot stand next to {name!r}: the other deltas of this "
            f"{type(self.backbone_model).__name__} are {names}"
        )

    def detach(self) -> None:
        """Take the delta off, whatever came before or after it; its tensors stay with this handle.

        The last one to leave restores the flags that `freeze_module` changed and takes the
        state-dict filter along.
        """
        found = survey(self.backbone_model)
        for where, name, layer in list(found.layers()):
            if layer.record is self.record:
                site.remove(found.modules[where], name)
        if not any(len(stack) for stack in found.stacks.values()):
            excluded = set(self.record.shared.excluded)
            freezing.restore(found, self.record.shared)
            self.record.shared.excluded = excluded  # what was trained by name is still saved
            freezing.unwatch_state(found)
            inspection.unwatch_forward(found)

    # ---------------------------------------------------------------------------------- the switches
    def enable(self) -> None:
        """Let the delta act. Whether it is attached, and whether it trains, stays as it is."""
        self.record.active = True

    def disable(self) -> None:
        """Let the backbone compute as if the delta were not there."""
        self.record.active = False

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the delta inside a `with` block."""
        before = self.record.active
        self.record.active = False
        try:
            yield
        finally:
            self.record.active = before

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
        names = [*as_list(exclude), *self.unfrozen_modules]  # type: ignore[arg-type]
        freezing.freeze(found, self.record.shared, module, names)
        hook = freezing.state_hook(self.backbone_model)
        if hook is not None:
            hook.only_trainable = set_state_dict

    @property
    def unfrozen_modules(self) -> list[str]:
        """The backbone modules that stay trainable and are saved with the delta."""
        return list(self.config.unfrozen_modules or ())

    # -------------------------------------------------------------------------------------- tensors
    def _prefix(self, where: str, name: str | None = None) -> str:
        return (f"{where}." if where else "") + f"{SLOT}.{name or self.name}."

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(full name, parameter) of the delta, the same whether it is attached or not."""
        for where, layer in self.layers.items():
            for name, parameter in layer.named_parameters():
                yield self._prefix(where) + name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """The delta's parameters."""
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self, named: str | None = None) -> dict[str, Tensor]:
        """The delta's tensors by full name, the same whether it is attached or not.

        Args:
            named: the full names that they would have if the delta were called so.
        """
        return {
            self._prefix(where, named) + name: tensor
            for where, layer in self.layers.items()
            for name, tensor in layer.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy tensors by full name into the delta.

        Raises:
            DeltaLoadError: a tensor is missing, unexpected or misshaped. Nothing is copied then.
        """
        from . import checkpoint

        checkpoint.copy_into(self.state_dict(), state, f"state_dict of {self.name!r}")

    # ------------------------------------------------------------------------------ showing, saving
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
        from . import tree

        tree.log(self.backbone_model, delta_ratio, trainable_ratio, visualization, cuda_memory)

    def save_finetuned(self, save_directory: str | os.PathLike = "./output") -> None:
        """Save the delta, the modules it owns, and the backbone parameters left trainable by name.

        These are the parameters of `unfrozen_modules`, and those that `freeze_module(exclude=...)`
        named. The folder gets one JSON file and one safetensors file, and holds either its old or
        its new content at any moment.

        Args:
            save_directory: the folder; it is made if need be.
        """
        from . import checkpoint

        checkpoint.save(self, save_directory)


# -------------------------------------------------------------------------------------------- helpers
def free_name(wanted: str, taken: set[str]) -> str:
    """`wanted`, or the first of wanted_1, wanted_2, ... that is not taken."""
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def known_records(found: Survey) -> list[Record]:
    """The deltas of a backbone in their total order: the attached, and the detached that are held."""
    records = {id(record): record for record in found.records()}
    inside = {id(module) for module in found.modules.values()}
    for handle in list(HANDLES):
        if id(handle.backbone_model) in inside:
            records.setdefault(id(handle.record), handle.record)
    return sorted(records.values(), key=lambda record: record.place)


def renumber(
    known: list[Record], record: Record, before: Record | None, after: Record | None
) -> bool:
    """Give `record` its place among the `known` others; whether it got another than it had."""
    order = sorted([*known, record], key=lambda r: (r.place, r is record))
    if before is not None or after is not None:
        order.remove(record)
        at = order.index(before) if before is not None else order.index(after) + 1  # type: ignore
        order.insert(at, record)
    for place, each in enumerate(order):
        each.place = place
    return before is not None or after is not None


def placement(found: Survey, name: str, config: DeltaConfig) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a layer on the module called `name`."""
    device, dtype = device_and_dtype(found.chain(name))
    return device, getattr(torch, config.dtype) if config.dtype else dtype


def fit(layer: DeltaLayer, device: torch.device, dtype: torch.dtype) -> None:
    """Move a layer to where its module computes; a module of the delta's own keeps its dtype."""
    layer.to(device=device, dtype=None if isinstance(layer, OwnedModule) else dtype)


def own_copy(found: Survey, name: str) -> nn.Module:
    """A trainable copy of a backbone module, without the deltas that it carries."""
    module = found.modules[name]
    prefix = f"{name}." if name else ""
    if inside := [w for w in found.stacks if w == name or w.startswith(prefix)]:
        taken = {w: list(found.stacks[w]) for w in inside if len(found.stacks[w])}
        if any(w != name for w in taken):
            raise SiteError(
                f"modules_to_save={name!r}: {taken} are inside it and would stop acting; detach "
                "them, or attach them to other modules"
            )
    memo = {id(stack): None for w, stack in found.stacks.items() if w in inside}
    copied = copy.deepcopy(module, memo)  # type: ignore[arg-type]
    for part in copied.modules():
        if SLOT in part._modules and part._modules[SLOT] is None:
            del part._modules[SLOT]
        base = site.plain_class(part)
        if base is not None:
            part.__class__ = base
    for parameter in copied.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return copied


def warn_if_tied(found: Survey, targets: Sequence[str], delta_type: str) -> None:
    """Warn of a target whose weight other modules use too: a delta changes one use only."""
    users: dict[int, dict[int, str]] = {}
    for name, module in found.modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), {})[id(module)] = name
    chosen = set(targets)
    for name in targets:
        for parameter in found.modules[name]._parameters.values():
            others = [n for n in users.get(id(parameter), {}).values() if n not in chosen]
            if others:
                warnings.warn(
                    f"{delta_type!r} on {name!r} changes one use of a weight that "
                    f"{', '.join(map(repr, others))} uses too",
                    TiedWeightWarning,
                    stacklevel=5,
                )


def handle_of(found: Survey, record: Record) -> Delta:
    """The handle of an attached delta: the one that somebody holds, or a new one."""
    for handle in list(HANDLES):
        if handle.record is record:
            return handle
    cls = method(record.config.delta_type)
    handle = cls.__new__(cls)
    handle.backbone_model, handle.record = found.root, record
    handle.layers = {where: x for where, _, x in found.layers() if x.record is record}
    HANDLES.add(handle)
    return handle
