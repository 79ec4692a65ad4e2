"""Find the sizes of modules that no table knows, by a run of the backbone on shapes alone.

The run uses fake tensors: it needs no arithmetic and no memory, and draws no random numbers. It is
made on a copy of the backbone, see `apart`. All that it changes on modules is put back.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from .._layers.site import Heads, Widths
from .._modules import calls, hooks, kept, trials
from .._modules.devices import device_and_dtype
from .._modules.faking import Restoring, on_shapes
from .._modules.process import eager, ignored_warnings, kept_random
from .._modules.tensors import is_lazy
from .._modules.wrappers import computing_device, placing_hooks
from .._sequences import prefix
from ..errors import SiteError
from . import inputs, sharding
from .apart import apart
from .backbone import Backbone
from .hidden_axes import check_hidden

PROBING: ContextVar[bool] = ContextVar("opendelta_probing", default=False)


@contextlib.contextmanager
def untouched(backbone: Backbone) -> Iterator[None]:
    """Put back all that a forward may change: attributes, tensors, hooks, and notes."""
    own: list[dict[str, Any]] = []
    for module in backbone.model.modules():
        if not isinstance(module, torch.jit.ScriptModule):  # its tables are views
            own += [module.__dict__, module._parameters, module._buffers]
            tables = module.__dict__.items()
            own += [t for key, t in tables if "_hooks" in key and isinstance(t, dict)]
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


def _run(
    backbone: Backbone,
    where: str,
    args: tuple,
    kwargs: dict[str, Any],
    grad: bool = False,
    look: Callable[[Any], None] = lambda _: None,
    values: bool = False,
) -> None:
    """Run a module on shapes in its own dtype, or else in bfloat16; give `look` the output.

    Some of torch's operations, such as products of grouped experts, find shapes only in bfloat16.
    At last it runs in eval mode. Users' hooks in which an error was raised are left out.

    Args:
        values: before, run it with values, if it has them: its forward may go by them. If it has
            none, the whole numbers that it is given have theirs.

    Raises:
        _Failed: the module raised an error each time; it holds the first error.
    """
    failure: Exception | None = None
    module = backbone.modules[where]
    parts, off = [*module.modules()], set[CodeType]()
    runs = deque[Callable[..., Any]](functools.partial(_run_as, d) for d in (None, torch.bfloat16))
    if values and not any(p.is_meta for p in module.parameters()):
        runs.append(_run_with_values)
    if values or module.training:  # in train() RT-DETR looks for infinite values
        runs.append(functools.partial(_run_as, None, at_rest=True, numbers=values))
    while runs:
        with untouched(backbone), ignored_warnings(), kept.putting_back(parts):
            hooks.take_off(parts, off)
            try:
                output = runs[0](backbone, where, args, kwargs, grad)
            except SiteError:
                raise
            except Exception as error:  # a model's forward may raise anything
                if found := hooks.raising(parts, error):
                    off |= found  # once more, without them
                    continue
                runs.popleft()
                if failure is None:  # without the frames, which hold this one and a new delta
                    failure = error.with_traceback(None)
                    failure.__cause__ = failure.__context__ = None
                continue
            look(output)
            return
    raise _Failed(failure)


class _Failed(Exception):
    """A run failed; it holds the reason."""


def _run_as(
    dtype: torch.dtype | None,
    backbone: Backbone,
    where: str,
    args: tuple,
    kwargs: dict[str, Any],
    grad: bool,
    at_rest: bool = False,
    numbers: bool = False,
) -> Any:
    """Run a module on shapes.

    Args:
        at_rest: in eval mode.
        numbers: inputs of whole numbers, such as lengths, have their values.
    """
    module = backbone.modules[where]
    for part in module.modules() if at_rest else ():
        if not isinstance(part, torch.jit.ScriptModule):
            part.training = False
    cast = dtype
    device, own = device_and_dtype([module])
    device = torch.device("cpu") if device.type == "meta" else device  # numbers have values there
    dtype = cast or (torch.float32 if own == torch.float16 else own)
    with on_shapes() as mode, torch.set_grad_enabled(grad):

        def fake(value: Tensor) -> Tensor:
            if numbers and not value.is_floating_point():
                return value.to(device)
            kind = dtype if value.is_floating_point() else value.dtype
            return mode.empty(value.shape, kind, device)

        _put_stand_ins(module, None, mode, cast, device)
        return module(*calls.map_tensors(fake, args), **calls.map_tensors(fake, kwargs))


def _run_with_values(
    backbone: Backbone, where: str, args: tuple, kwargs: dict[str, Any], grad: bool
) -> Any:
    module = backbone.modules[where]
    device, dtype = device_and_dtype([module])

    def moved(value: Tensor) -> Tensor:
        kind = dtype if value.is_floating_point() else value.dtype
        return value.to(device, kind).contiguous()

    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.clone()
    trials.share_parameters(module)
    drawn = kept_random()
    with eager(), drawn, Restoring(), torch.set_grad_enabled(grad):
        return module(*calls.map_tensors(moved, args), **calls.map_tensors(moved, kwargs))


def _put_stand_ins(
    module: nn.Module,
    device: torch.device | None,
    mode: Any,
    dtype: torch.dtype | None = None,
    for_meta: torch.device | None = None,
    made: dict[int, Tensor] | None = None,
) -> None:
    """Replace the tensors that a run would change or load.

    Fake tensors stand in for buffers, as an operation on real tensors alone is carried out even in
    fake mode, and for the parameters that accelerate offloaded; others of the same memory for the
    other parameters, as a forward may write to `.data`. All floating tensors get `dtype`, if given.

    Args:
        device: where accelerate brings the tensors of `module`, or None.
        for_meta: the device of tensors on the meta device that accelerate brings nowhere: WavLM on
            the meta device has one tensor on the CPU.
        made: {id of a parameter: what stands in for it}; a tied one is one there too.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return
    device = computing_device(module) or device
    made = {} if made is None else made
    for hook in placing_hooks(module):
        hook.offload = False
    tables: list[dict[str, Any]] = [module._parameters, module._buffers]
    for table in tables:
        for name, tensor in table.items():
            if tensor is None:
                continue
            to = device or (tensor.is_meta and for_meta) or tensor.device
            cast = dtype if tensor.is_floating_point() else None
            if tensor.is_meta and to.type != "meta":
                new = mode.empty(tensor.shape, cast or tensor.dtype, to)
                table[name] = made.setdefault(id(tensor), new.requires_grad_(tensor.requires_grad))
            elif cast is not None:
                table[name] = mode.from_tensor(tensor).to(to, cast)
            elif tensor.dtype == torch.float16:
                table[name] = mode.from_tensor(
                    tensor
                ).float()  # models check float16 values for overflow
            elif table is module._buffers:
                table[name] = mode.from_tensor(tensor)
            elif type(tensor) is nn.Parameter:
                table[name] = made.setdefault(id(tensor), trials.twin_of(tensor))
    _stand_in_attributes(module.__dict__, device or for_meta, mode, dtype)
    for child in module.children():
        _put_stand_ins(child, device, mode, dtype, for_meta, made)


def _stand_in_attributes(
    own: dict[str, Any], to: torch.device | None, mode: Any, dtype: torch.dtype | None
) -> None:
    """Replace tensors on the meta device that are no buffers, such as the angles of rotations."""
    for name, value in list(own.items()) if to is not None else ():
        if isinstance(value, Tensor) and value.is_meta:
            cast = dtype if value.is_floating_point() else None
            own[name] = mode.empty(value.shape, cast or value.dtype, to)


def widths(backbone: Backbone, names: Sequence[str]) -> dict[str, Widths]:
    """Return the widths of each named module's input and output, found by a run on shapes.

    Raises:
        SiteError: no run reached a module.
    """
    found = backbone.widths
    for name in names:
        if isinstance(module := backbone.modules[name], nn.MultiheadAttention):
            found[name] = Widths(module.embed_dim, module.embed_dim)

    def note(name: str, given: Any, output: Any) -> None:
        hidden = calls.hidden(output)
        check_hidden(name, backbone.modules[name], hidden)
        reads = isinstance(given, Tensor) and given.is_floating_point() and given.ndim
        if not reads:
            found[name] = Widths(None, hidden.size(-1))
            return
        before, after = list(given.shape[:-1]), list(hidden.shape[:-1])
        moved = (before, after) if before != after else None
        found[name] = Widths(given.size(-1), hidden.size(-1), moved)

    if wanted := [name for name in names if name not in found]:
        with apart(backbone) as twin:
            _observe(twin, wanted, note, "output width")
    return found


def attention_heads(backbone: Backbone, names: Sequence[str]) -> dict[str, Heads]:
    """Return the sizes of each named attention module, found by a run on shapes.

    Raises:
        SiteError: no run reached a module.
    """
    if wanted := [name for name in names if name not in backbone.heads]:
        prefix.register()
        with (
            apart(backbone) as twin,
            prefix.observing({name: twin.modules[name] for name in wanted}) as heads,
        ):
            _observe(twin, wanted, lambda *_: None, "number of heads", prefix.show)
        backbone.heads.update(heads)
    return backbone.heads


class _Enough(BaseException):
    """Ends a run on shapes that has reached every module in question."""


def _observe(
    backbone: Backbone,
    names: Sequence[str],
    note: Callable[[str, Any, Any], None],
    what: str,
    prepare: Callable[[nn.Module], None] = lambda _: None,
) -> None:
    """Run the backbone on shapes until `note` was called for each named module.

    A run ends with the last module in question. Modules that no run of the whole backbone reaches
    are run alone. `note` takes a module's name, first input and output.

    Args:
        what: the wanted size, for the message.
        prepare: called on each named module before a run; the module is put back after the run.
    """
    _check_shapes(backbone, names)
    missing: dict[str, None] = dict.fromkeys(names)

    def hook_of(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if PROBING.get():  # else another thread runs a backbone that has no copy
                kwargs = calls.in_order(calls.names_of(type(module).forward), args, kwargs)
                note(name, calls.first_given(args, kwargs), output)
                missing.pop(name, None)
                if not missing and not torch.compiler.is_compiling():
                    raise _Enough

        return hook

    def attempt(where: str, args: tuple, kwargs: dict[str, Any], values: bool) -> list[str]:
        """Return why the run failed, in at most one text."""
        enough = contextlib.suppress(_Enough)  # all that is wanted is known
        with untouched(backbone), sharding.whole(backbone.model), enough:
            for name in names:
                module = backbone.modules[name]
                prepare(module)
                # before others, as deltas act
                module.register_forward_hook(hook_of(name), with_kwargs=True, prepend=True)
            try:
                _run(backbone, where, args, kwargs, values=values)
            except _Failed as failed:
                return [_failure(backbone, where, args, kwargs, failed.args[0])]
        return []

    failures: list[str] = []
    for where, args, kwargs in inputs.of_backbone(backbone):
        if missing:
            failures += attempt(where, args, kwargs, backbone.samples is not None)
    for name in list(missing):
        for args, kwargs in inputs.of_module(backbone.modules[name]):
            if name in missing:
                attempt(name, args, kwargs, True)
    if missing:
        raise _unknown(backbone, next(iter(missing)), what, failures)


def _check_shapes(backbone: Backbone, names: Sequence[str] = ()) -> None:
    """Raise if a run would give lazy modules their sizes: that is for the user's own inputs.

    Or if one of the named modules takes no hooks.
    """
    for name in names:
        if isinstance(backbone.modules[name], torch.jit.ScriptModule):
            raise SiteError(
                f"{name!r} is compiled by TorchScript; attach before torch.jit.script", where=name
            )
    require_sizes(backbone)


def require_sizes(backbone: Backbone) -> None:
    """Raise if a module of the model is lazy, and has not run."""
    for name, module in backbone.modules.items():
        if any(map(is_lazy, module._parameters.values())):
            raise SiteError(
                f"{name!r} ({type(module).__name__}) gets its sizes in its first forward: run the "
                "model once before",
                where=name,
            )


def _unknown(backbone: Backbone, name: str, what: str, failures: Sequence[str]) -> SiteError:
    tried = "; ".join(failures) or "the shape-only run did not reach it"
    return SiteError(
        f"the {what} of {name!r} ({type(backbone.modules[name]).__name__}) is not known: {tried}. "
        f"Pass {_advice(backbone)}, or choose other modules, such as Linear",
        where=name,
    )


def _advice(backbone: Backbone) -> str:
    return (
        "sample_inputs={argument: tensor, ...}, inputs of "
        f"{type(backbone.model).__name__}.forward that reach it"
    )


def dry_run(
    backbone: Backbone,
    look: Callable[[Any], None],
    prepare: Callable[[nn.Module], None] = lambda _: None,
    enough: Callable[[], bool] = lambda: True,
) -> None:
    """Run the backbone on shapes, with gradients, and give `look` the output.

    When it looks, others stand in for the parameters.

    Args:
        backbone: what `apart` yields for the user's backbone.
        prepare: called on the module that runs, before each try; modules are put back after it.
        enough: asked after each run that succeeds; if not, further inputs are tried.

    Raises:
        SiteError: it runs on none of the inputs that `inputs.of_backbone` finds.
    """
    _check_shapes(backbone)
    failures, ran = [], False
    given = backbone.samples is not None or backbone.before is not None  # they come first
    for number, (where, args, kwargs) in enumerate(inputs.of_backbone(backbone)):
        with untouched(backbone), sharding.whole(backbone.model):
            prepare(backbone.modules[where])
            try:
                _run(backbone, where, args, kwargs, True, look, given and not number)
            except _Failed as failed:
                failures.append(_failure(backbone, where, args, kwargs, failed.args[0]))
                continue
            ran = True
            if enough():
                return
    if ran:
        return
    raise SiteError(
        f"{type(backbone.model).__name__} does not run on shapes: "
        f"{'; '.join(failures) or 'no layer'}. Give a batch, or {_advice(backbone)}",
    )


def _failure(
    backbone: Backbone, where: str, args: tuple, kwargs: dict[str, Any], error: Exception
) -> str:
    given = [*map(_shape, args), *(f"{k}={_shape(v)}" for k, v in kwargs.items())]
    reason = (str(error).strip().splitlines() or [""])[0]
    called = f"{type(backbone.modules[where]).__name__}({', '.join(given)})"
    return f"{called}: {type(error).__name__}: {reason}"


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else repr(value)
