"""Make the layers of a delta: the second step of attaching. The model stays as it is."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from .._backbone import shapes, sharding
from .._backbone.backbone import Backbone
from .._layers import seeded
from .._layers.base import Acts, DeltaLayer
from .._layers.bound import arranged
from .._layers.dtypes import dtype_for
from .._layers.gate import Gate
from .._layers.owned import SharedTensors
from .._layers.record import Record, Shared
from .._layers.site import Heads, Site, Widths
from .._modules.kinds import is_packed, kind_of
from .._modules.tensors import TENSOR_CLASSES, lasting
from .._sites import swap
from .._sites.stack import acting_on
from ..errors import LostGradientWarning, OptionError, SiteError, TiedWeightWarning, warn
from ..names import is_inside
from . import resizing
from .base import BaseDelta
from .choosing import Choice
from .options import DeltaConfig
from .owning import owned
from .taking import check_copies, check_kind, sizes_for

# Where the values of layers come from. "new": the layers set their start values. "saved": a file
# will give them, and until then they have no memory. "never": the layers are only looked at.
Values = Literal["new", "saved", "never"]


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Stop Python's garbage collection inside a `with` block that makes many modules.

    Else Python visits all modules again after every few new ones, so that the time for a module
    grows with the number of modules.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@lasting()
def make(
    backbone: Backbone, choice: Choice, into: BaseDelta | None = None, values: Values = "new"
) -> BaseDelta:
    """Make the layers of a chosen delta; the backbone stays as it is.

    Args:
        into: a new delta that gets the layers. None: make a delta.
        values: see `Values`. If it is not "new", the tensors are on the meta device; "saved" ones
            get memory by `materialise`.

    Raises:
        SiteError: a module is of a kind that the method does not take, or of unknown width.
    """
    delta = choice.method.__new__(choice.method) if into is None else into
    known = choice.known
    delta.layers = _layers(backbone, choice, values)
    if choice.layer_class.paired:
        _check_rows(backbone, choice.config)
    rank, shared = (known[-1].rank + 1, known[0].shared) if known else (0, Shared())
    delta.record = Record(choice.name, choice.config.fixed(), rank, shared, tuple(delta.layers))
    delta.backbone_model = backbone.model
    for name, layer in delta.layers.items():
        layer.record = delta.record
        layer.__dict__["made_for"] = sizes_for(backbone, name, layer)
    return delta


def _layers(backbone: Backbone, choice: Choice, values: Values) -> dict[str, DeltaLayer]:
    """Return {full name of the site: its new layer}."""
    config, layer_class = choice.config, choice.layer_class
    make_shared = choice.method.shared_for(config)
    sharding.settle(backbone)
    sites = _sites(backbone, choice, values)
    starts = {n: s for n, s in sites.items() if s.end is not None or not layer_class.paired}
    _warn_of_lost_gradients(backbone)
    if layer_class.can_fold():
        _warn_if_tied(backbone, list(sites), config.delta_type)
    needed = layer_class.check_written()
    shared = make_shared([*starts.values()], config) if make_shared and starts else None
    made: dict[str, DeltaLayer] = {}
    for name, site in starts.items():
        site.shared = shared
        layer = made[name] = _new_layer(layer_class, site, config)
        if unset := [attribute for attribute in needed if not hasattr(layer, attribute)]:
            raise OptionError(
                f"{layer_class.__name__}.__init__ must set self.{unset[0]}, which its forward reads"
            )
        layer.check_made()
        if layer_class.any_axis and site.axis != -1:
            layer.__dict__["axis"] = site.axis
        if config.gate:
            layer.gate = _gate(layer, site)
        if shared is not None:
            layer.share(shared)
    made |= _only_new(layer_class.companions(made, backbone.modules, config), made, config)
    if shared is not None:
        around = backbone.innermost_around(list(starts))
        if around in made:
            made[around].tensors = shared
        else:
            made |= _only_new({around: SharedTensors(shared)}, made, config)
    made |= _only_new(owned(backbone, config, values), made, config)
    resizing.guard(backbone, made)
    if values == "new":
        for layer in made.values():
            for module in layer.seeded():
                seeded.fill(module)
    return made


def _new_layer(layer_class: type[DeltaLayer], site: Site, config: DeltaConfig) -> DeltaLayer:
    """Make one layer; raise if its class leaves out what all layers have."""
    layer: Any = layer_class.__new__(layer_class)
    try:
        layer.__init__(site, config)  # a method's layer takes a site and its config
    except AttributeError:
        if "gate" in vars(layer):
            raise
    if "gate" not in vars(layer):
        raise OptionError(f"{layer_class.__name__}.__init__ must call super().__init__() first")
    return layer


def materialise(
    layer: DeltaLayer,
    device: torch.device,
    prefix: str,
    value_of: Callable[[str], torch.Tensor | None],
) -> None:
    """Give memory to a layer's tensors on the meta device, with given values or from a seed.

    Args:
        prefix: the start of the full names of its tensors.
        value_of: returns the values of a tensor by full name, in the tensor's dtype and in memory
            of their own; None if there are no values for it.
    """
    fills = layer.seeded()
    for name, module in layer.named_modules(prefix=prefix.removesuffix(".")):
        left = False
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is None or not tensor.is_meta:
                    continue
                new = value_of(f"{name}.{key}")
                if new is None:  # empty_like is slow here: for meta tensors it runs in Python
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    left = True
                new, is_parameter = new.to(device), own is module._parameters
                own[key] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        if left and module in fills:
            seeded.fill(module)


def _only_new(
    more: dict[str, DeltaLayer], made: dict[str, DeltaLayer], config: DeltaConfig
) -> dict[str, DeltaLayer]:
    """Return `more`; raise if one of its sites has a layer of this delta already."""
    if twice := more.keys() & made.keys():
        raise SiteError(
            f"{config.delta_type!r} would need two layers on {', '.join(map(repr, twice))}; leave "
            "it out with exclude_modules",
            where=next(iter(twice)),
        )
    return more


def _sites(backbone: Backbone, choice: Choice, values: Values) -> dict[str, Site]:
    """Return the `Site` of each modified module by full name."""
    config, layer_class = choice.config, choice.layer_class
    names = config.modified_modules or []
    kinds = {name: kind_of(backbone.modules[name]) for name in names}
    unknown = [name for name in names if kinds[name] is None]

    @functools.cache
    def widths() -> dict[str, Widths]:
        return shapes.widths(backbone, unknown)

    @functools.cache
    def heads() -> dict[str, Heads]:
        return shapes.attention_heads(backbone, names)

    sites = {}
    for name, kind in kinds.items():
        module = backbone.modules[name]
        swap.check_has_forward(name, module)
        check_kind(backbone, name, kind, config, layer_class)
        device, computes = backbone.device_and_dtype_of(name)
        device = device if values == "new" else torch.device("meta")
        of_widths, of_heads = (lambda n: widths()[n]), (lambda n: heads()[n])
        new = values != "saved"
        dtype = dtype_for(config.dtype, computes)
        site = Site(name, module, kind, device, dtype, of_widths, of_heads, new)
        if (stack := backbone.stacks.get(name)) is not None:
            check_copies(backbone, choice.name, name)
            site.beneath = arranged(acting_on(stack))
        sites[name] = site
    if layer_class.paired:
        for start, end in zip(names[::2], names[1::2], strict=True):
            sites[start].end = sites[end]
    return sites


def _check_rows(backbone: Backbone, config: DeltaConfig) -> None:
    """Raise if a branch would be around a module that a run has shown to give other tokens."""
    names = config.modified_modules or []
    around = [start for start, end in zip(names[::2], names[1::2], strict=True) if start == end]
    widths = {name: backbone.widths.get(name) for name in around}
    moved = {name: each.moved for name, each in widths.items() if each is not None and each.moved}
    for name, axes in moved.items():
        before, after = (f"[{', '.join(map(str, each))}, width]" for each in axes)
        raise SiteError(
            f"{config.delta_type!r} around {name!r}: its output is {after}, its input {before}; "
            "a branch needs the same rows and tokens at its start and end: choose other modules, "
            f"or leave it out: exclude_modules={[*moved]}",
            where=name,
        )


def _gate(layer: DeltaLayer, site: Site) -> Gate:
    """Make the gate of a layer, with the width of its input."""
    linear = site.known_kind is not None and site.known_kind.is_product
    on_input = layer.acts is Acts.BEFORE or (layer.acts is Acts.BESIDE and linear)
    width = layer.gate_width
    if width is None:
        width = (on_input and site.in_features) or site.out_features  # a norm has no columns
    return Gate(site, width, on_input)


def _warn_of_lost_gradients(backbone: Backbone) -> None:
    """Warn if a kind of quantised weights passes no gradient on.

    Dynamic-activation kinds, for example, pass none. One module of each kind of weight is tried.
    """
    tried: dict[type, str] = {}
    for name, module in backbone.modules.items():
        if name in backbone.stacks:  # a delta's own gradient would hide the loss
            continue
        weight = dict(module._parameters.items()).get("weight")
        if is_packed(module):
            tried.setdefault(type(module), name)
        elif type(weight).__module__.startswith(TENSOR_CLASSES):
            tried.setdefault(type(weight), name)
    for name in tried.values():
        module, kind = backbone.modules[name], kind_of(backbone.modules[name])
        if kind is None:
            continue
        device, dtype = backbone.device_and_dtype_of(name)
        x = torch.zeros(2, kind.in_features, device=device, dtype=dtype)
        was_training, module.training = module.training, True  # some pass gradients on only then
        try:
            with torch.enable_grad():
                out = module(x.requires_grad_())
                ends = [out.sum()] if out.requires_grad else []
                passed = torch.autograd.grad(ends, x, allow_unused=True)[0] if ends else None
        except Exception:  # a kernel that has no backward, or none on this device
            passed = None
        finally:
            module.training = was_training
        if passed is None:
            warn(
                f"{name!r} is quantised so that no gradient passes through it: deltas on modules "
                "before it will not train right. Use a weight-only kind of quantisation",
                LostGradientWarning,
            )


def tied(backbone: Backbone, targets: Sequence[str]) -> dict[str, list[str]]:
    """Return {target: the modules that share a weight with it and are no targets}."""
    users = backbone.users()
    chosen = {id(backbone.modules[name]) for name in targets}
    shared: dict[str, list[str]] = {}
    for name in targets:
        for key, parameter in backbone.modules[name]._parameters.items():
            by_id = {
                id(backbone.modules[n]): n
                for n in users.get(id(parameter), ())
                if key != "bias" or not is_inside(name, n)  # an attribute around it, as BERT's
            }
            if others := [other for module, other in by_id.items() if module not in chosen]:
                shared[name] = [*shared.get(name, []), *others]
    return shared


def _warn_if_tied(backbone: Backbone, targets: Sequence[str], delta_type: str) -> None:
    """Warn of a target whose weight other modules use too: a delta changes only one use."""
    for name, others in tied(backbone, targets).items():
        warn(
            f"{delta_type!r} on {name!r} changes one use of a weight that "
            f"{', '.join(map(repr, others))} uses too",
            TiedWeightWarning,
        )
