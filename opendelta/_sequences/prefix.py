"""Put trained keys and values, which all queries see, into transformers' attention functions.

They never pass through the KV cache: checkpointing drops the cache, sliding windows push a prefix
out of it, and encoders have no cache. A transformers attention module finds its function by the
name in its config (`ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, ...)`).
While prefixes act, the site shows a view of the config with another name: the name under which a
function of this file is registered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._layers.base import Acts, DeltaLayer, Handover
from .._layers.costs import Flops, counted
from .._layers.site import Heads, Site
from .._modules.calls import first_input
from ..errors import SiteError
from ..names import SLOT
from .places import names_in_forward, places_for

NAME = "opendelta|"  # before the name of transformers' own function
SUPPORTED = ("eager", "sdpa")
EAGER = "eager_attention_forward"  # in transformers' files, or with a word before it
looking = threading.RLock()  # to hold while `observed` is set
observed: dict[int, Heads] | None = None  # {id(module): sizes} found by a run on shapes alone
noted: list[Tensor] | None = None  # the keys of all attention in a trial


def uses_interface(cls: type) -> bool:
    """True if modules of this class find their function in transformers' registry."""
    return "get_interface" in names_in_forward(cls)


def is_attention(module: nn.Module) -> bool:
    """True if a prefix can be put on `module`."""
    config = module.__dict__.get("config")
    return hasattr(config, "_attn_implementation") and uses_interface(type(module))


class PrefixLayer(DeltaLayer):
    """Keys and values [heads, prefix, width of a head] before the keys and values of attention.

    A subclass calls `super().__init__(site)` and writes `keys_and_values`.
    """

    kinds = ("attention",)
    acts = Acts.WITHIN
    inside = True
    writes = "keys_and_values"
    gates_itself = True
    identity = False
    routes_itself = True
    shows_config = True

    def __init__(self, site: Site) -> None:
        super().__init__()
        register()
        config = site.module.__dict__["config"]
        used, self.config_class = config._attn_implementation, type(config)
        _view_class(self.config_class)
        if used not in SUPPORTED:
            raise SiteError(_refusal(type(site.module).__name__, used), where=site.name)
        self.heads = site.heads
        self.gate_width = site.heads.hidden
        self.eager = eager_function(type(site.module), site.name)
        self.open = Handover()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        register()  # an unpickled model may be in another process
        _view_class(self.config_class)

    @property
    def for_all_rows(self) -> None:
        """Return None: attention uses the prefix only for the rows that take it."""

    def shown_config(self, config: Any) -> Any:
        """Return a view of the config with the name of our attention function."""
        return view_of(config)

    def flops(self, module: nn.Module) -> Flops:
        """Count the operations of the queries on the prefix, and of computing the prefix."""
        made: list[tuple[Tensor, Tensor]] = []
        once = counted(lambda: made.append(self.keys_and_values()))
        rows, width = made[0][0].size(1), self.heads.key + self.heads.value
        queries = self.heads.count * getattr(module, "num_key_value_groups", 1)
        return Flops(2 * rows * queries * width, once)

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Return keys [heads, prefix, head] and values [heads, prefix, head]."""
        raise NotImplementedError

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        logit = None
        if self.gate is not None:
            logit = F.logsigmoid(self.gate.logit(_hidden_states(args, kwargs)))
        outer = self.open.value  # two blocks may hold it, the one inside the other
        self.open.put((logit,))
        try:
            return call(*args, **kwargs)
        finally:
            self.open.put(outer)

    @classmethod
    def companions(
        cls, made: Mapping[str, DeltaLayer], modules: Mapping[str, nn.Module], config: Any
    ) -> dict[str, DeltaLayer]:
        return places_for(made, modules, _key_seen)


def _hidden_states(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return the queries' hidden states; SAM calls them `query`, Idefics2 `latents`."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else first_input(args, kwargs)


def eager_function(cls: type, where: str | None = None) -> Callable[..., Any]:
    """Return the eager attention function that the forward of `cls` names.

    Or the one in the file that defines `cls` or a base class of it.

    Args:
        where: the full name of a module of this class, for the message.

    Raises:
        SiteError: there is no such function.
    """
    around = getattr(inspect.unwrap(cls.forward), "__globals__", {})  # type: ignore[attr-defined]
    named = (around.get(n) for n in names_in_forward(cls) if n.endswith(EAGER))
    beside = (getattr(sys.modules.get(base.__module__), EAGER, None) for base in cls.__mro__)
    found = next(filter(callable, (*named, *beside)), None)
    if found is None:
        raise SiteError(
            f"{where!r} ({cls.__name__}) names no function *{EAGER} in its forward, and none is "
            "beside it, as transformers has: give it one, or choose other modules",
            where=where,
        )
    return found


def _refusal(where: str, used: str | None) -> str:
    return (
        f"{where} computes attention by {used!r}; prefixes act with {' and '.join(SUPPORTED)}: "
        "model.set_attn_implementation('sdpa')"
    )


# --------------------------------------------------------------------------- the view of the config
_views: dict[type, type] = {}  # filled when a layer is made: compiled code finds the classes here


def _view_class(base: type) -> type:
    if base not in _views:
        shown = property(lambda self: NAME + str(self._attn_implementation_internal))
        _views[base] = type(base.__name__, (base,), {"_attn_implementation": shown})
    return _views[base]


def view_of(config: Any) -> Any:
    """Return a live view of `config` with another name of the attention function."""
    view: Any = object.__new__(_view_class(type(config)))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


# ---------------------------------------------------------------------------------- the computation
@functools.cache
def register() -> None:
    """Register a function of ours with transformers for each attention function of its own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()):
        if not name.startswith(NAME):
            ALL_ATTENTION_FUNCTIONS.register(NAME + name, functools.partial(_attend, name))


def _attend(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Compute attention of `query` to the prefixes of `module` and to `key` and `value`.

    Args:
        name: the name of transformers' own function.
        query: [batch, heads, length, head].
        key: [batch, key-value heads, keys, head]; `value` has the same form.
        attention_mask: [batch or 1, heads or 1, length, keys], boolean or additive.
    """
    if observed is not None:
        observed[id(module)] = Heads(key.size(1), key.size(3), value.size(3), 0)
    if noted is not None:
        noted.append(key)
    if name not in SUPPORTED:
        raise SiteError(_refusal(type(module).__name__, name))
    inner, prefixes = _function(name, module)
    if prefixes and kwargs.get("cache") is not None:
        raise SiteError(f"{type(module).__name__}: prefixes do not act with a paged cache")
    if prefixes and attention_mask is not None:
        _check_mask(module, attention_mask, key)
    causal = prefixes and name == "sdpa" and _is_causal(module, query, kwargs)
    if causal and attention_mask is None:
        # sdpa's own causal mask starts at the first key, and this key is now in the prefix
        shape = (query.size(2), key.size(2))
        attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()[None, None]
    for layer in prefixes:
        keys, values = layer.keys_and_values()
        (logit,) = layer.open.value
        router: Any = module.__dict__["_modules"][SLOT].routed
        if router is not None:
            logit = router.opened(layer, logit, key)
        rows = key.size(0)
        key = torch.cat([keys.type_as(key).expand(rows, -1, -1, -1), key], 2)
        value = torch.cat([values.type_as(value).expand(rows, -1, -1, -1), value], 2)
        attention_mask = _widened(attention_mask, keys.size(1), logit, query, key)
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = F.pad(kwargs["position_bias"], (keys.size(1), 0))
    if prefixes and name == "sdpa":
        kwargs["is_causal"] = False
    return inner(module, query, key, value, attention_mask, *args, **kwargs)


def _function(name: str, module: nn.Module) -> tuple[Callable[..., Any], list[PrefixLayer]]:
    """Return transformers' own function, and the prefixes around this call, in their order."""
    stack: Any = module.__dict__["_modules"].get(SLOT)
    on_it = () if stack is None else stack._modules.values()
    prefixes = [ly for ly in on_it if isinstance(ly, PrefixLayer) and ly.open.value is not None]
    if name == "eager":
        return (prefixes[0].eager if prefixes else eager_function(type(module))), prefixes
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name], prefixes


def _check_mask(module: nn.Module, mask: Tensor, key: Tensor) -> None:
    """Raise if a mask is for fewer keys than there are, as MiniMax gives with a cache."""
    if mask.size(-1) < key.size(2):
        raise SiteError(
            f"{type(module).__name__}: its mask is for {mask.size(-1)} keys, and it has "
            f"{key.size(2)}, so the mask cannot be widened by a prefix: call it without a cache, "
            "generate(use_cache=False), or without padding"
        )


def _is_causal(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if given is None else given
    return bool(causal) and query.size(2) > 1


def _widened(
    mask: Tensor | None, count: int, logit: Tensor | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """Widen `mask` by `count` keys, which all queries see; a gate weighs these keys.

    Args:
        logit: log of the gate [batch, length, 1], or None.
        key: the keys, with the new ones.
    """
    if logit is None:
        if mask is None:
            return None
        return F.pad(mask, (count, 0), value=True if mask.dtype == torch.bool else 0.0)
    if mask is None:
        mask = query.new_zeros(1, 1, query.size(2), key.size(2) - count)
    elif mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    weight = logit.type_as(mask).reshape(logit.size(0) if logit.ndim > 1 else 1, 1, -1, 1)
    rows = max(mask.size(0), weight.size(0))
    mask = mask.expand(rows, -1, query.size(2), -1)
    return torch.cat([weight.expand(rows, mask.size(1), query.size(2), count), mask], -1)


# ------------------------------------------------------------------------------------------- sizes
def show(module: nn.Module) -> None:
    """Let `module` find our functions, with or without a prefix; the caller restores its config."""
    module.__dict__["config"] = view_of(module.__dict__["config"])


@contextlib.contextmanager
def _key_seen(keys: list[Tensor]) -> Iterator[Callable[[nn.Module], None]]:
    """Note the keys of attention in a block, of models on which the yielded function was called."""
    global noted
    register()
    looking.acquire()
    before, noted = noted, keys
    try:
        yield _show_all
    finally:
        noted = before
        looking.release()


def _show_all(model: nn.Module) -> None:
    for module in model.modules():
        if is_attention(module):
            _view_class(type(module.__dict__["config"]))
            show(module)


@contextlib.contextmanager
def observing(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Heads]]:
    """Yield a dict that gets the sizes of `modules` at the end of the block.

    Call `show` on each module before, and run the modules inside the block. One thread at a time.
    """
    global observed
    looking.acquire()
    before, observed = observed, {}
    sizes: dict[str, Heads] = {}
    hidden: dict[str, int] = {}
    hooks = []
    for name, module in modules.items():

        def note(_: nn.Module, args: tuple, kwargs: dict[str, Any], name: str = name) -> None:
            hidden[name] = _hidden_states(args, kwargs).size(-1)

        hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield sizes
        for name, module in modules.items():
            sizes[name] = dataclasses.replace(observed[id(module)], hidden=hidden[name])
    finally:
        observed = before
        looking.release()
        for hook in hooks:
            hook.remove()
