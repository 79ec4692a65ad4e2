"""Choose a name and modules for a delta: the first step of attaching. It raises AddressErrors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from .._backbone import reading, roles
from .._backbone.backbone import Backbone
from .._backbone.patterns import (
    as_list,
    leave_out,
    literal,
    select,
    select_known,
    select_modules,
)
from .._layers import labels
from .._layers.base import Acts, DeltaLayer
from .._layers.record import Record
from .._modules import first_argument, fitting
from .._modules.kinds import kind_of
from .._modules.probing import is_known
from .._sites import swap
from .._sites.stack import check_name
from ..errors import AddressError, OptionError, SiteError
from ..names import SLOT, ancestors, computes_weight, is_inside, parent
from .base import BaseDelta
from .blocks import sites_of_children
from .options import DeltaConfig
from .order import check_root, free_name, known_records
from .pairing import in_pairs
from .taking import is_empty, kinds_of, other_axis

Config = TypeVar("Config", bound=DeltaConfig)


@dataclass(frozen=True)
class Choice:
    """The result of the first step: a delta's name and options.

    Attributes:
        method: the class of the delta.
        name: a name that is free on the backbone.
        config: the options, with full names of modules in the place of patterns.
        known: the deltas that act before it, in their order.
    """

    method: type[BaseDelta]
    name: str
    config: DeltaConfig
    known: list[Record]

    @property
    def layer_class(self) -> type[DeltaLayer]:
        """Return the class of layers for the options."""
        return self.method.layer_for(self.config)


def choose(backbone: Backbone, method: type[BaseDelta], config: DeltaConfig) -> Choice:
    """Find a name, and the modules that the patterns and roles in `config` select.

    Raises:
        SiteError: the name is taken, or has a wrong form.
        AddressError: a pattern or a role selects nothing, or exclusions leave nothing.
    """
    check_root(backbone)
    known = known_records(backbone)
    name = _free_name(backbone, config, known)
    layer_class, defaults = method.layer_for(config), method.default_modified_modules
    return Choice(method, name, resolve(backbone, config, defaults, layer_class), known)


def as_chosen(
    backbone: Backbone, method: type[BaseDelta], config: DeltaConfig, known: list[Record]
) -> Choice:
    """Take the names in `config` as full names; none is taken as a pattern.

    Args:
        known: all deltas of the backbone, which `check_root` has passed.

    Raises:
        SiteError: the name is taken, or has a wrong form.
        AddressError: the backbone has no module of such a name.
    """
    name = _free_name(backbone, config, known)
    return Choice(method, name, take_literally(backbone, config), known)


def _free_name(backbone: Backbone, config: DeltaConfig, known: Iterable[Record]) -> str:
    """Return the name for a new delta beside the known ones; raise if it is taken."""
    if config.interactive_modify:
        raise OptionError(
            f"{type(config).__name__}: interactive_modify={config.interactive_modify!r} opens a "
            "page when a delta is made; here there is no page: leave it out"
        )
    taken = [record.name for record in known]
    name = free_name(config.delta_type, taken) if config.name is None else config.name
    check_name(name)
    if name in taken:
        raise SiteError(
            f"{type(backbone.model).__name__} has a delta {name!r} already, attached, or detached "
            "and still in a variable, so that it may come back; pass another name=, such as "
            f"{free_name(name, taken)!r}"
        )
    return name


def resolve(
    backbone: Backbone, config: Config, defaults: Sequence[str], layer_class: type[DeltaLayer]
) -> Config:
    """Return the config with full names of modules in the place of its patterns and roles.

    Args:
        defaults: the roles that get a layer if the config names no modules.
        layer_class: the class of the layers; it decides if modules come in pairs, and if a module
            stands for the modules inside it.

    Raises:
        AddressError: a pattern or a role selects nothing, or exclusions leave nothing.
    """
    modified = _modified(backbone, config, defaults, layer_class)
    owned = _owned(backbone, as_list(config.modules_to_save))
    _check_apart(backbone, modified, owned)
    unfrozen = _unfrozen(backbone, config)
    some: dict[str, Any] = {
        field.name: _some_of(backbone, modified, config, field)
        for field in dataclasses.fields(config)
        if "modules" in field.metadata
    }
    return dataclasses.replace(
        config,
        modified_modules=modified,
        exclude_modules=None,
        common_structure=None,
        modules_to_save=list(owned) or None,
        num_labels=labels.check(backbone.model, owned, config.num_labels),
        unfrozen_modules=unfrozen or None,
        **some,
    )


def _modified(
    backbone: Backbone, config: DeltaConfig, defaults: Sequence[str], layer_class: type[DeltaLayer]
) -> list[str]:
    """Return the full names of the modules that get a layer; see `resolve`.

    With an empty list of them, a delta that has copies (`modules_to_save`) has no other layers.
    """
    if config.modified_modules == []:
        if config.modules_to_save and not layer_class.is_block:
            return []
        raise AddressError(
            "modified_modules is an empty list; None selects the default places, and "
            "modules_to_save gives a delta of copies alone"
        )
    wanted = list(defaults) if config.modified_modules is None else config.modified_modules
    select_all = _selection(config, layer_class)
    if layer_class.is_block:
        return _at_children(backbone, config, select_all)
    by_role = select_all is not _by_name
    if layer_class.paired:
        modified = in_pairs(backbone, wanted, select_all, as_list(config.exclude_modules))
    else:
        names = fitting_inside(backbone, select_all(backbone, wanted), layer_class, by_role)
        modified = leave_out(backbone, names, as_list(config.exclude_modules))
    if by_role:
        modified = _acting_sites(backbone, modified, wanted, config, layer_class)
    return modified


def _at_children(
    backbone: Backbone,
    config: DeltaConfig,
    select_all: Callable[[Backbone, Sequence[str]], list[str]],
) -> list[str]:
    """Return the sites of the deltas that a block combines: all, or those that the names select.

    Raises:
        AddressError: none is left.
    """
    sites = sites_of_children(backbone, config.children)
    if config.modified_modules is not None:
        chosen = {id(backbone.modules[n]) for n in select_all(backbone, config.modified_modules)}
        sites = [name for name in sites if id(backbone.modules[name]) in chosen]
    sites = leave_out(backbone, sites, as_list(config.exclude_modules)) if sites else sites
    if not sites:
        raise AddressError(
            f"modified_modules={config.modified_modules}: none of {list(config.children)} acts "
            "on such a module"
        )
    return sites


def _unfrozen(backbone: Backbone, config: DeltaConfig) -> list[str]:
    """Return the full names that `unfrozen_modules` selects; "deltas" means the deltas, as ever."""
    wanted = [name for name in as_list(config.unfrozen_modules) if name != SLOT]
    names = _names(backbone) if wanted else []
    return select_known("unfrozen_modules", names, wanted, backbone.model, what="name")


def _selection(
    config: DeltaConfig, layer_class: type[DeltaLayer]
) -> Callable[[Backbone, Sequence[str]], list[str]]:
    """Return the function by which the config's names select modules: by patterns or by roles.

    An architecture may lack some of the default roles.
    """
    by_default = config.modified_modules is None
    if not by_default and not config.common_structure:
        return _by_name
    some = by_default and not layer_class.paired
    return functools.partial(roles.with_roles, override=_override(config), some=some)


def _by_name(backbone: Backbone, wanted: Sequence[str]) -> list[str]:
    """Return the modules that the patterns select; an error says if a pattern is a role."""
    try:
        return select_modules(backbone, wanted)
    except AddressError as error:
        role = next((name for name in wanted if name in (*roles.ROLES, *roles.GROUPS)), None)
        if role is None or repr(role) not in str(error):
            raise
        raise AddressError(
            f"{error}; {role!r} is a role: for roles pass common_structure=True",
            pattern=error.pattern,
            nearest=error.nearest,
        ) from None


def _override(config: DeltaConfig) -> dict[str, str | None] | None:
    """Return the roles that the user decides, or None."""
    return config.common_structure if isinstance(config.common_structure, dict) else None


def _owned(backbone: Backbone, wanted: Sequence[str]) -> dict[str, nn.Module]:
    """Return the outermost selected modules by full name; a module with several names once."""
    chosen = select(backbone.modules, wanted, backbone.model)
    outermost = [n for n in chosen if not ({*ancestors(n)} - {n}) & {*chosen}]
    names = {id(backbone.modules[name]): name for name in reversed(outermost)}
    return {name: backbone.modules[name] for name in reversed(names.values())}


def fitting_inside(
    backbone: Backbone, names: list[str], layer_class: type[DeltaLayer], by_role: bool = False
) -> list[str]:
    """Replace each name that the layer cannot sit on by the names of the fitting modules inside it.

    Args:
        by_role: roles selected the names. Then a module that does not fit, and has no fitting
            module inside, is left out: fused experts, for example.
    """
    if not layer_class.inside:
        return names
    fitting = [name for name in backbone.modules if kinds_of(backbone, name) & {*layer_class.kinds}]
    expanded = []
    for name in names:
        within = [n for n in fitting if is_inside(n, name) and not computes_weight(n)]
        expanded += [name] if name in fitting or not (within or by_role) else within
    return list(dict.fromkeys(expanded)) or names


def _acting_sites(
    backbone: Backbone,
    names: list[str],
    wanted: Sequence[str],
    config: DeltaConfig,
    layer_class: type[DeltaLayer],
) -> list[str]:
    """Return where layers for the modules `names`, which roles selected, act.

    Raises:
        AddressError: they act nowhere.
    """
    sites = (_acting_at(backbone, name, config, layer_class) for name in names)
    acting = [site for site in sites if site is not None]
    if not acting and not any(kinds_of(backbone, n) & {*layer_class.kinds} for n in names):
        return names  # they are refused by their kind
    if not acting:
        raise AddressError(
            f"the modules that {list(wanted)} selects are never called, or return something else "
            f"than their kind: the modules around read their weights, which a "
            f"{layer_class.__name__} does not fold into, or they have forwards of their own, which "
            "may work on another axis or on one that depends on their input; choose others"
        )
    return acting


def misfit(module: nn.Module, layer_class: type[DeltaLayer], acts: Any) -> str | None:
    """Return in words why the output, or the input, of a module is none for a layer, or None.

    Args:
        acts: where the layer acts.
    """
    compiled = isinstance(module, torch.jit.ScriptModule)  # it is refused by that
    if compiled or acts in (Acts.WITHIN, Acts.INSTEAD, Acts.SERVES):
        return None
    own_class = swap.plain_class(module) or type(module)
    if is_known(own_class):
        return None
    needs: fitting.Needs = "input" if acts is Acts.BEFORE else layer_class.needs()
    return first_argument.misfit(module, own_class) or fitting.misfit(module, own_class, needs)


def _acting_at(
    backbone: Backbone, name: str, config: DeltaConfig, layer_class: type[DeltaLayer]
) -> str | None:
    """Return where a layer for the module `name` acts: there, or on the module around it.

    A module that reads the weight of `name` never calls `name`. A layer that no weight can hold
    acts on the module around, if its kind fits. None: the layer acts on neither.
    """
    module = backbone.modules[name]
    kind = kind_of(module)
    unfit = is_empty(kind) or other_axis(kind, config, layer_class) is not None
    if unfit or misfit(module, layer_class, layer_class.acts) is not None:
        return None
    read = swap.weight_is_read(module, reading.weight_is_read(backbone, name))
    if not read or layer_class.can_fold_on(module):
        return name
    return parent(name) if kinds_of(backbone, parent(name)) & {*layer_class.kinds} else None


def _some_of(
    backbone: Backbone, modified: list[str], config: DeltaConfig, field: dataclasses.Field
) -> Any:
    """Return the modified modules that an option selects: by its patterns, or by its default roles.

    An option {pattern: value} becomes {full name: value}. If several patterns select a module, the
    first decides.
    """
    patterns = getattr(config, field.name)
    if patterns is None:
        if not field.metadata["modules"]:
            return None
        known = roles.roles_of(backbone, _override(config))
        return [name for name in modified if known.get(name) in field.metadata["modules"]] or None
    if isinstance(patterns, dict):
        values: dict[str, Any] = {}
        for pattern, value in patterns.items():
            for name in _some(backbone, modified, [pattern], config):
                values.setdefault(name, value)
        return values
    return _some(backbone, modified, patterns, config)


def _some(
    backbone: Backbone, modified: list[str], patterns: list[str], config: DeltaConfig
) -> list[str]:
    if config.common_structure:
        patterns = roles.with_roles(backbone, patterns, _override(config))
    return select(modified, patterns, backbone.model, what="modified module")


def _check_apart(backbone: Backbone, modified: list[str], owned: Mapping[str, nn.Module]) -> None:
    """Raise if a module that gets a layer is in a module that the delta owns a copy of."""
    given = {id(module): name for name, module in owned.items()}
    names = {n: given[id(m)] for n, m in backbone.modules.items() if id(m) in given}
    for name in modified if names else ():
        if around := next((each for each in ancestors(name) if each in names), None):
            also = "" if around == names[around] else f", which is {around!r} too,"
            raise AddressError(
                f"{name!r} is selected by modified_modules, but modules_to_save={names[around]!r}"
                f"{also} puts a copy in its place; add exclude_modules=[{around!r}]",
                pattern=name,
            )


def _check_distinct(backbone: Backbone, names: Iterable[str]) -> None:
    """Raise if two of the names are names of one module."""
    first: dict[int, str] = {}
    for name in names:
        other = first.setdefault(id(backbone.modules[name]), name)
        if other != name:
            raise AddressError(
                f"{other!r} and {name!r} are one {type(backbone.modules[name]).__name__} in this "
                f"{type(backbone.model).__name__}, which cannot carry a layer for each; use a "
                "model in which they are two",
                pattern=name,
            )


def take_literally(backbone: Backbone, config: Config) -> Config:
    """Check each full name in `config` and return `config`; no name is taken as a pattern.

    Raises:
        AddressError: the backbone has no module of such a name.
    """
    for names in (config.modified_modules, config.modules_to_save):
        literal(backbone.modules, names or [], backbone.model)
    _check_distinct(backbone, [*(config.modified_modules or ()), *(config.modules_to_save or ())])
    if config.num_labels is not None:
        owned = {name: backbone.modules[name] for name in config.modules_to_save or ()}
        labels.check(backbone.model, owned, config.num_labels)
    if config.unfrozen_modules:
        literal(_names(backbone), config.unfrozen_modules, backbone.model, what="name")
    return config


def _names(backbone: Backbone) -> list[str]:
    """Return the full names of all modules, parameters and persistent buffers of the backbone."""
    return [*backbone.modules, *backbone.tensors()]
