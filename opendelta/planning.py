"""What a delta will be, before anything is touched: the sizes of its modules, its layers."""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from . import copies, foreign, labels, sharding, site, targets
from .addressing import Survey, ancestors, no_match
from .bases import DeltaLayer, Gate, OwnedModule, SharedTensors
from .errors import LostGradientWarning, SiteError, TiedWeightWarning
from .layers import Heads, Site, device_and_dtype, kind_of
from .options import DeltaConfig
from .shapes import attention_heads, output_widths

# Where the values of layers come from: they start; they are to be read from a file, and until then
# there is no memory for them; or they never come, as the layers are only looked at.
Values = Literal["new", "saved", "never"]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python looks for no garbage: it would visit all modules again for every few new ones.

    Without it the time for each module grows with their number.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def make_layers(
    found: Survey,
    config: DeltaConfig,
    layer_class: type[DeltaLayer],
    shared_class: Callable[..., nn.Module] | None = None,
    values: Values = "new",
) -> dict[str, DeltaLayer]:
    """{full name of the site: its new layer}, for a resolved config.

    Args:
        shared_class: makes the tensors that all layers share.
        values: "new" or else the tensors are on the meta device, those "saved" until `materialise`.

    Raises:
        SiteError: a module is of a kind that the method does not take, or of unknown width.
    """
    sharding.settle(found)
    sites = _sites(found, config, layer_class, values)
    starts = {n: s for n, s in sites.items() if s.end is not None or not layer_class.paired}
    _warn_of_lost_gradients(found)
    if layer_class.fold is not DeltaLayer.fold:
        _warn_if_tied(found, list(sites), config.delta_type)
    shared = shared_class(list(starts.values()), config) if shared_class is not None else None
    make: Any = layer_class  # a method's layer takes a site and its config
    made: dict[str, DeltaLayer] = {}
    for name, place in starts.items():
        place.shared = shared
        layer = made[name] = make(place, config)
        if config.gate:
            layer.gate = _gate(layer, place)
        if shared is not None:
            layer.share(shared)
    made |= _new(layer_class.companions(made, found.modules, config), made, config)
    if shared is not None:
        around = found.common(list(starts))
        if around in starts:
            made[around].tensors = shared
        else:
            made |= _new({around: SharedTensors(shared)}, made, config)
    made |= _new(_owned(found, config, values), made, config)
    if values == "new":
        _seed(made)
    return made


def places(
    found: Survey,
    name: str,
    config: DeltaConfig,
    layers: Mapping[str, DeltaLayer],
    planned: Mapping[str, PlannedStack] | None = None,
) -> dict[str, tuple[bool, sharding.Ranks | None]]:
    """{full name of a site: whether it shows folded weights, and who shares it}.

    Args:
        name: that of the delta.
        planned: {full name: the stack that the module has by then}. None: they are as they are.

    Raises:
        SiteError: one of `layers`, by full name, cannot go where it should.
    """
    check_owned(found, layers)
    before, chosen = planned or {}, {*(config.modified_modules or ())}
    wholes = {name for name, module in found.modules.items() if foreign.loads_inside(module)}
    sites = {}
    for where, layer in layers.items():
        if where not in found.modules:
            raise no_match(where, found.modules, found.root)
        module = found.modules[where]
        if wholes and wholes & {"", *ancestors(where)}:
            raise SiteError(
                f"{where!r} ({type(module).__name__}): accelerate loads this module as part of a "
                "whole (preload_module_classes) that the delta was not in; attach before offloading"
            )
        asked = (config.reads and where in chosen) or (where in before and before[where].reads)
        reads = site.wants_reads(module, asked)
        site.check(where, module, name, layer, reads, before.get(where))
        sites[where] = (reads, sharding.group_of(found, where, reads, layer))
    return sites


class PlannedStack(site.Stack):
    """The stack that a module would have with one more layer; the module does not carry it.

    Attributes:
        reads: whether the module would show folded weights.
    """

    def __init__(
        self, before: site.Stack | None, name: str, layer: DeltaLayer, reads: bool
    ) -> None:
        super().__init__()
        self.reads = reads
        if before is not None:
            self._modules.update(before._modules)
            self.steps = before.steps
        self._modules[name] = layer


def _seed(layers: dict[str, DeltaLayer]) -> None:
    """Let modules fill the buffers that they make from a seed and do not save."""
    for layer in layers.values():
        for module in layer.modules():
            if hasattr(type(module), "seed"):
                module.seed()  # type: ignore[operator]


def materialise(
    layer: DeltaLayer,
    device: torch.device,
    prefix: str,
    value_of: Callable[[str], torch.Tensor | None],
) -> None:
    """Give those tensors of a layer memory that have none, with given values or a seed's.

    Args:
        prefix: what the full names of its tensors start with.
        value_of: gives the values of a tensor by full name, in its dtype and in memory of their
            own; None: it has none.
    """
    for name, module in layer.named_modules(prefix=prefix.removesuffix(".")):
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is None or not tensor.is_meta:
                    continue
                new = value_of(f"{name}.{key}")
                if new is None:  # not empty_like, which torch writes in Python for tensors on meta
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                new, is_parameter = new.to(device), own is module._parameters
                own[key] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        if hasattr(type(module), "seed"):
            module.seed()


def _new(
    more: dict[str, DeltaLayer], made: dict[str, DeltaLayer], config: DeltaConfig
) -> dict[str, DeltaLayer]:
    """`more`, if none of its sites has a layer of this delta yet."""
    if twice := more.keys() & made.keys():
        raise SiteError(
            f"{config.delta_type!r} would need two layers on {', '.join(map(repr, twice))}; leave "
            "it out with exclude_modules"
        )
    return more


def _sites(
    found: Survey, config: DeltaConfig, layer_class: type[DeltaLayer], values: Values
) -> dict[str, Site]:
    """What the layers may know about each modified module."""
    names = config.modified_modules or []
    kinds = {name: kind_of(found.modules[name]) for name in names}
    unknown = [name for name in names if kinds[name] is None]

    @functools.cache
    def widths() -> dict[str, int]:
        return output_widths(found.root, unknown)

    @functools.cache
    def heads() -> dict[str, Heads]:
        return attention_heads(found.root, names)

    sites = {}
    for name, kind in kinds.items():
        module = found.modules[name]
        site.check_called(name, module)
        targets.check_kind(found, name, kind, config, layer_class)
        device, dtype = placement(found, name, config)
        device = device if values == "new" else torch.device("meta")
        of_width, of_heads = (lambda n: widths()[n]), (lambda n: heads()[n])
        new = values != "saved"
        sites[name] = Site(name, module, kind, device, dtype, of_width, of_heads, new)
    if layer_class.paired:
        for start, end in zip(names[::2], names[1::2], strict=True):
            sites[start].end = sites[end]
    return sites


def _gate(layer: DeltaLayer, place: Site) -> Gate:
    """The gate of a layer, as wide as what it reads."""
    linear = place.kind is not None and place.kind.name == "linear"
    on_input = layer.flow == "before" or (layer.flow == "beside" and linear)
    width = layer.gate_width
    if width is None:
        width = place.in_features if on_input else place.out_features
    return Gate(place, width, on_input)


def placement(found: Survey, name: str, config: DeltaConfig) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a layer on the module called `name`."""
    if name not in found.placements:
        found.placements[name] = device_and_dtype(found.chain(name), found.is_meta)
    device, dtype = found.placements[name]
    return device, getattr(torch, config.dtype) if config.dtype else dtype


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """All parameters and buffers in `module`, in less time than torch takes for their names."""
    for own in (module._parameters, module._buffers):
        yield from (tensor for tensor in own.values() if tensor is not None)
    for child in module._modules.values():
        if child is not None:
            yield from _tensors(child)


def fit(layer: DeltaLayer, module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Move a layer to where its module computes; the delta's own copy of it takes its dtypes."""
    tensors = list(_tensors(layer))
    if device.type != "meta" and any(t.is_meta and isinstance(t, nn.Parameter) for t in tensors):
        return  # accelerate offloaded the layer and brings its values for every run
    if not isinstance(layer, OwnedModule):
        moved = any(t.device != device for t in tensors)
        if moved or any(t.dtype != dtype for t in tensors if t.is_floating_point()):
            layer.to(device=device, dtype=dtype)
        return
    layer.to(device=device)
    like = dict(module.named_parameters())
    for name, parameter in layer.module.named_parameters():
        if name in like and parameter.dtype != like[name].dtype:
            parameter.data = parameter.data.to(like[name].dtype)


def check_owned(found: Survey, layers: Mapping[str, DeltaLayer]) -> None:
    """Raise if one of `layers`, by full name, would never run, or keep another from running.

    A delta's own copy of a module acts in the module's place, so nothing inside the module runs.
    """
    owners = {w: n for w, n, layer in found.layers() if isinstance(layer, OwnedModule)}
    for where in layers:
        around = next((name for name in [*ancestors(where)][1:] if name in owners), None)
        if around is not None:
            raise SiteError(
                f"{where!r} is inside {around!r}, in whose place {owners[around]!r} puts its own "
                "copy (modules_to_save): a delta on it would never run"
            )
    owned = {where for where, layer in layers.items() if isinstance(layer, OwnedModule)}
    for name, stack in found.stacks.items() if owned else ():
        around = next((w for w in [*ancestors(name)][1:] if w in owned), None)
        if around is not None and len(stack):
            raise SiteError(
                f"modules_to_save={around!r}: {', '.join(stack)} on {name!r} inside it would stop "
                "acting; detach it first, or put it on other modules"
            )


def _owned(found: Survey, config: DeltaConfig, values: Values) -> dict[str, DeltaLayer]:
    """The copies that the delta owns, and what says on the root how many labels its head has."""
    copied = {name: _own_copy(found, name, values) for name in config.modules_to_save or ()}
    more: dict[str, DeltaLayer] = {}
    count = config.num_labels
    if count is not None and count != labels.count_of(found.root):
        copied = {name: labels.resized(own, found.root, count) for name, own in copied.items()}
        more[""] = labels.LabelsLayer(found.root, count)
    return {**{name: OwnedModule(module) for name, module in copied.items()}, **more}


def _own_copy(found: Survey, name: str, values: Values) -> nn.Module:
    """A trainable copy of a backbone module, without the deltas that it carries."""
    if values != "saved":
        sharding.check_copy(found, name)
    memo: dict[int, Any] = {}
    for parameter in found.modules[name].parameters() if values != "new" else ():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
    copied = copies.plain_copy(found, name, memo)
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return copied


def _warn_of_lost_gradients(found: Survey) -> None:
    """Warn if torchao's weights pass no gradient on, as its dynamic-activation kinds do not.

    One module of each kind of weight is tried.
    """
    tried: dict[type, str] = {}
    for name, module in found.modules.items():
        weight = dict(module._parameters.items()).get("weight")
        plain = name not in found.stacks  # deltas must not run, nor lend their gradient
        if plain and type(weight).__module__.startswith("torchao"):
            tried.setdefault(type(weight), name)
    for name in tried.values():
        module, kind = found.modules[name], kind_of(found.modules[name])
        if kind is None or not isinstance(weight := module._parameters["weight"], torch.Tensor):
            continue
        x = torch.zeros(2, kind.in_features, device=weight.device, dtype=weight.dtype)
        with torch.enable_grad():
            out = module(x.requires_grad_())
            passed = torch.autograd.grad(out.sum(), x, allow_unused=True)[0]
        if passed is None:
            warnings.warn(
                f"{name!r} is quantised so that no gradient passes through it: deltas on modules "
                "before it will not train right. Use a weight-only kind of quantisation",
                LostGradientWarning,
                stacklevel=6,
            )


def tied(found: Survey, targets: Sequence[str]) -> dict[str, list[str]]:
    """{target: the other modules, no targets, that use a weight of it too}."""
    users: dict[int, dict[int, str]] = {}
    for name, module in found.modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), {})[id(module)] = name
    chosen = {id(found.modules[name]) for name in targets}
    shared: dict[str, list[str]] = {}
    for name in targets:
        for parameter in found.modules[name]._parameters.values():
            others = [n for m, n in users.get(id(parameter), {}).items() if m not in chosen]
            if others:
                shared[name] = [*shared.get(name, []), *others]
    return shared


def _warn_if_tied(found: Survey, targets: Sequence[str], delta_type: str) -> None:
    """Warn of a target whose weight other modules use too: a delta changes one use only."""
    for name, others in tied(found, targets).items():
        warnings.warn(
            f"{delta_type!r} on {name!r} changes one use of a weight that "
            f"{', '.join(map(repr, others))} uses too",
            TiedWeightWarning,
            stacklevel=6,
        )
