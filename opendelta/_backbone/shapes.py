"""Find the sizes of modules that no table knows, by a run of the backbone on shapes alone.

The run uses fake tensors: it needs no arithmetic and no memory, and draws no random numbers. All
that it changes on modules is put back.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .._layers import prefix
from .._layers.site import Heads
from .._modules import calls
from .._modules.devices import device_and_dtype
from .._modules.kinds import Embedding, kind_of
from .._modules.wrappers import computing_device, placing_hooks
from ..errors import SiteError
from . import sharding
from .backbone import Backbone

PROBING: ContextVar[bool] = ContextVar("opendelta_probing", default=False)


@contextlib.contextmanager
def untouched(backbone: Backbone) -> Iterator[None]:
    """Put back all that a forward may change: attributes, tensors, hooks' and stacks' notes."""
    own: list[dict[str, Any]] = []
    for module in backbone.model.modules():
        if not isinstance(module, torch.jit.ScriptModule):  # its tables are views
            own += [module.__dict__, module._parameters, module._buffers]
            own += [vars(hook) for hook in placing_hooks(module)]
    kept = [dict(table) for table in own]
    for stack in backbone.stacks.values():
        stack.ran = set(stack.ran)
    token = PROBING.set(True)
    try:
        yield
    finally:
        PROBING.reset(token)
        for table, before in zip(own, kept, strict=True):
            if table.keys() != before.keys() or any(table[k] is not before[k] for k in before):
                table.clear()
                table.update(before)


def _inputs(backbone: Backbone) -> Iterator[tuple[str, tuple, dict[str, Any]]]:
    """Yield (name of the module to run, args, kwargs) to try, the likeliest first."""
    outermost: list[str] = []
    for name, module in backbone.modules.items():
        inside = any(not o or name.startswith(f"{o}.") for o in outermost)
        if not inside and isinstance(getattr(module, "dummy_inputs", None), dict):
            outermost.append(name)
            config = getattr(module, "config", None)
            if getattr(module, "main_input_name", "") == "pixel_values" and config is not None:
                side = getattr(config, "image_size", 224)
                channels = getattr(config, "num_channels", 3)
                yield name, (), {"pixel_values": torch.zeros(1, channels, side, side)}
            yield name, (), dict(module.dummy_inputs)  # type: ignore[arg-type]
    first = next((k for m in backbone.modules.values() if (k := kind_of(m)) is not None), None)
    ids = torch.zeros(1, 3, dtype=torch.long)
    if first is None:
        return
    if isinstance(first, Embedding):
        yield "", (ids,), {}
    elif hasattr(first, "patch"):
        yield "", (torch.zeros(1, first.patch[0], 32, 32),), {}
    else:
        yield "", (torch.zeros(1, 3, first.in_features or first.out_features),), {}


def _run(
    backbone: Backbone,
    where: str,
    args: tuple,
    kwargs: dict[str, Any],
    grad: bool = False,
    look: Callable[[Any], None] = lambda _: None,
) -> None:
    """Run a module on shapes in its own dtype, or else in bfloat16; give `look` the output.

    Some of torch's operations, such as products of grouped experts, find shapes only in bfloat16.

    Raises:
        _Failed: the module raised an error both times; it holds the first error.
    """
    failure: Exception | None = None
    for dtype in (None, torch.bfloat16):
        with untouched(backbone), _no_log():
            try:
                output = _run_as(dtype, backbone, where, args, kwargs, grad)
            except SiteError:
                raise
            except Exception as error:  # a model's forward may raise anything
                failure = failure or error
                continue
            look(output)
            return
    raise _Failed(failure)


class _Failed(Exception):
    """A run failed; it holds the reason."""


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    """Keep torch from logging each operation that fails on shapes."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _run_as(
    dtype: torch.dtype | None,
    backbone: Backbone,
    where: str,
    args: tuple,
    kwargs: dict[str, Any],
    grad: bool,
) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = backbone.modules[where]
    cast = dtype
    device, own = device_and_dtype([module])
    dtype = cast or (torch.float32 if own == torch.float16 else own)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.set_grad_enabled(grad):

        def fake(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.to(dtype) if value.is_floating_point() else value
            return mode.from_tensor(value.to(device))

        _put_stand_ins(module, None, mode.from_tensor, cast)
        return module(*tree_map(fake, args), **tree_map(fake, kwargs))


def _put_stand_ins(
    module: nn.Module,
    device: torch.device | None,
    fake: Callable[[Tensor], Tensor],
    dtype: torch.dtype | None = None,
) -> None:
    """Replace by fake tensors the tensors that a run would change or load.

    These are the buffers: an operation on real tensors alone is carried out even in fake mode. And
    they are the parameters that accelerate offloaded. All floating tensors get `dtype`, if given.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return
    device = computing_device(module) or device
    for hook in placing_hooks(module):
        hook.offload = False
    tables: list[dict[str, Any]] = [module._parameters, module._buffers]
    for table in tables:
        for name, tensor in table.items():
            if tensor is not None and dtype is not None and tensor.is_floating_point():
                table[name] = fake(tensor).to(device or tensor.device, dtype)
            elif tensor is not None and tensor.is_meta and device is not None:
                table[name] = torch.empty_like(tensor, device=device)
            elif tensor is not None and tensor.dtype == torch.float16:
                table[name] = fake(tensor).float()  # models check float16 values for overflow
            elif tensor is not None and table is module._buffers:
                table[name] = fake(tensor)
    for child in module.children():
        _put_stand_ins(child, device, fake, dtype)


def output_widths(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """Return the width of each named module's output, found by one run on shapes.

    Raises:
        SiteError: the run failed, or did not reach a module.
    """
    backbone = Backbone.of(model)
    known = {
        name: module.embed_dim
        for name in names
        if isinstance(module := backbone.modules[name], nn.MultiheadAttention)
    }
    widths: dict[str, int] = dict(known)
    names = [name for name in names if name not in known]

    def note(name: str, output: Any) -> None:
        hidden = calls.hidden(output)
        if hidden.ndim > 3 and not _ends_in_width(backbone.modules[name], hidden):
            raise SiteError(
                f"{name!r} ({type(backbone.modules[name]).__name__}) returns an image or so, "
                f"{list(hidden.shape)}: hidden states must be [..., width] in 2 or 3 axes",
                where=name,
            )
        widths[name] = hidden.size(-1)

    if names:
        _observe(backbone, names, note, "output width")
    return widths


def attention_heads(model: nn.Module, names: Sequence[str]) -> dict[str, Heads]:
    """Return the sizes of each named attention module, found by one run on shapes.

    Raises:
        SiteError: the run failed, or did not reach a module.
    """
    backbone = Backbone.of(model)
    prefix.register()
    with prefix.observing({name: backbone.modules[name] for name in names}) as heads:
        _observe(backbone, names, lambda *_: None, "number of heads", prefix.show)
    return heads


def _observe(
    backbone: Backbone,
    names: Sequence[str],
    note: Callable[[str, Any], None],
    what: str,
    prepare: Callable[[nn.Module], None] = lambda _: None,
) -> None:
    """Run the backbone on shapes until `note` was called with each named module's output.

    The inputs are the backbone's own `dummy_inputs`, which each transformers model has. A model
    without `dummy_inputs` gets token ids, vectors or images, depending on its first layer.

    Args:
        what: the wanted size, for the message.
        prepare: called on each named module before a run; the module is put back after the run.
    """
    reached: set[str] = set()
    failures = []

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            note(name, output)
            reached.add(name)

        return hook

    for where, args, kwargs in _inputs(backbone):
        with untouched(backbone), sharding.whole(backbone.model), contextlib.ExitStack() as hooks:
            for name in names:
                prepare(backbone.modules[name])
                hook = backbone.modules[name].register_forward_hook(hook_of(name))
                hooks.callback(hook.remove)
            try:
                _run(backbone, where, args, kwargs)
            except _Failed as failed:
                failures.append(_failure(backbone, where, args, kwargs, failed.args[0]))
        if reached >= set(names):
            return
    unknown = next(name for name in names if name not in reached)
    tried = "; ".join(failures) or "the shape-only run did not reach it"
    raise SiteError(
        f"the {what} of {unknown!r} ({type(backbone.modules[unknown]).__name__}) is not known: "
        f"{tried}. Set model.dummy_inputs = {{argument: tensor, ...}} to inputs of "
        f"{type(backbone.model).__name__}.forward, or choose other modules, such as Linear",
        where=unknown,
    )


def dry_run(backbone: Backbone, look: Callable[[Any], None]) -> None:
    """Run the backbone once on shapes, with gradients, and give `look` the output.

    Raises:
        SiteError: it runs neither on its `dummy_inputs`, nor on an input for its first layer.
    """
    failures = []
    for where, args, kwargs in _inputs(backbone):
        with untouched(backbone), sharding.whole(backbone.model):
            try:
                _run(backbone, where, args, kwargs, True, look)
            except _Failed as failed:
                failures.append(_failure(backbone, where, args, kwargs, failed.args[0]))
                continue
            return
    raise SiteError(
        f"{type(backbone.model).__name__} does not run on shapes: "
        f"{'; '.join(failures) or 'no layer'}. Give a batch, or set "
        "model.dummy_inputs = {argument: tensor, ...}",
        where=where,
    )


def _failure(
    backbone: Backbone, where: str, args: tuple, kwargs: dict[str, Any], error: Exception
) -> str:
    given = [*map(_shape, args), *(f"{k}={_shape(v)}" for k, v in kwargs.items())]
    reason = (str(error).strip().splitlines() or [""])[0]
    called = f"{type(backbone.modules[where]).__name__}({', '.join(given)})"
    return f"{called}: {type(error).__name__}: {reason}"


def _ends_in_width(module: nn.Module, output: Tensor) -> bool:
    """True if a weight shows that the last axis is the width, as a norm's weight does for heads."""
    sizes = {p.numel() for p in module.parameters() if p.ndim == 1}
    return output.size(-1) in sizes and output.size(1) not in sizes


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else repr(value)
