"""Try a module out without its layers and hooks, and find which axis a normalisation works on."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from ..names import SLOT
from .copies import copied
from .facts import facts, parts, remembered
from .faking import Restoring, Shapes, on_shapes
from .kept import around_copies
from .process import ignored_warnings, kept_random, seed_all
from .tensors import is_dense, is_plain, lasting, size
from .tensors import shape as shape_of

AXES = (-1, -3, -2, -4, 1, 0, 2)  # where a normalisation may work, in the order of trial
CLEAR = 0.1  # the share of a change that may be by chance
PROBES = 4  # of a narrow weight
WIDE = 512
MOST_AXES = 5  # of an input that is tried
IMAGE = 4  # axes
SIZES = (2, 3, 5, 7, 11, 13)  # of the other axes, with two to spare
_found: dict[tuple, int | None] = {}
_scaling: dict[tuple, bool] = {}
_turning: dict[tuple, bool | None] = {}
_turned: Any = WeakKeyDictionary()  # {module: (its weight, its facts, if that is [in, out])}


def bare(module: nn.Module, base: type[nn.Module] | None = None) -> nn.Module:
    """Return a module like `module` without layers: the same tensors, in tables of its own.

    Args:
        base: its class. None: the class of `module`.
    """
    made = object.__new__(base or type(module))
    made.__dict__.update(module.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        own = module.__dict__[table]
        made.__dict__[table] = {key: value for key, value in own.items() if key != SLOT}
    return made


def alone(module: nn.Module, writes: bool = False) -> nn.Module:
    """Return what `bare` does, of which a run changes nothing that the model has.

    Its buffers are copies, and so are the modules inside, and the objects that they hold if those
    can be copied.

    Args:
        writes: its parameters are copies too, as a forward may write to them; but no quantised or
            sharded ones.
    """
    made = _bare_inside(module)
    parts = [*made.modules()]
    if not any(hasattr(type(part), "__del__") for part in parts):
        made = copied(made) or made
    for part in made.modules():
        own: dict[str, Any] = part.__dict__["_buffers"]
        own.update({k: t.detach().clone() for k, t in own.items() if t is not None})
        if writes:
            copy_parameters(part)
    return made


def run(module: nn.Module, *args: Tensor) -> Any:
    """Return what a module's forward gives; what it writes to its inputs, it writes to copies."""
    return type(module).forward(module, *(each.clone() for each in args))


def copy_parameters(module: nn.Module) -> None:
    """Give `module` copies of its own parameters: new objects with memory of their own."""
    own: dict[str, Any] = module.__dict__["_parameters"]
    plain = {k: p for k, p in own.items() if is_plain(p) and not p.is_meta}
    own.update({k: nn.Parameter(p.detach().clone(), p.requires_grad) for k, p in plain.items()})


def share_parameters(module: nn.Module) -> None:
    """Give `module`, and those inside, other parameters of the same memory.

    A forward may write to their `.data`.
    """
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        if not isinstance(part, torch.jit.ScriptModule):
            own = {k: p for k, p in part._parameters.items() if type(p) is nn.Parameter}
            part._parameters.update({k: made.setdefault(id(p), twin_of(p)) for k, p in own.items()})


def twin_of(parameter: nn.Parameter) -> nn.Parameter:
    """Return another parameter of the same memory, whose writes are counted apart."""
    new = nn.Parameter(parameter.data, parameter.requires_grad)
    new.__dict__.update(parameter.__dict__)
    return new


def _bare_inside(module: nn.Module) -> nn.Module:
    made = bare(module)
    own: dict[str, Any] = made.__dict__["_modules"]
    own.update({k: _bare_inside(child) for k, child in own.items() if child is not None})
    return made


def without_values(module: nn.Module, mode: Shapes) -> nn.Module:
    """Return what `alone` does, in eval mode, without hooks, and with tensors of shapes alone.

    Args:
        mode: the block of runs on shapes that is open.
    """
    made = at_rest(module)
    for part in made.modules():
        for table in (part.__dict__["_parameters"], part.__dict__["_buffers"]):
            table.update({k: mode.like(t) for k, t in table.items() if t is not None})
    return made


def at_rest(module: nn.Module, writes: bool = False) -> nn.Module:
    """Return what `alone` does, in eval mode and without hooks.

    Args:
        writes: see `alone`. Else its parameters are others of the same memory.
    """
    made = alone(module, writes)
    if not writes:
        share_parameters(made)
    for part in made.modules():
        own = part.__dict__
        own.pop("forward", None)  # a wrapper of another library, around the module itself
        hooks = [key for key, table in own.items() if "_hooks" in key and isinstance(table, dict)]
        own.update({key: type(own[key])() for key in hooks})
        part.training = False
    return made


def norm_axis(module: nn.Module, width: int) -> int | None:
    """Return the axis that a normalisation of `width` channels works on; None: no fixed one.

    It counts from the end, or from the front if that holds for inputs of any number of axes. A
    forward is run once for its class, on shapes alone; see `facts`. -1 if it runs on no shape.
    """
    known = facts(module)
    key = None if known is None else (width == 1, *known)
    return remembered(_found, key, lambda: _axis(module, width))


def own_axis(module: nn.Module) -> tuple[int, int] | None:
    """Return the one width of a module's parameters, and the axis that `norm_axis` finds for it.

    None: the parameters have several widths, or there is no such axis.
    """
    own = [p for p in module.parameters() if size(p) != 1]
    widths = {size(p) for p in own}
    if len(widths) != 1 or 0 in widths or any(max(shape_of(p)) != size(p) for p in own):
        return None
    (width,) = widths
    with unset_fake_temporarily():
        axis = norm_axis(module, width)
    return None if axis is None else (width, axis)


def _axis(module: nn.Module, width: int) -> int | None:
    with on_shapes(module) as mode:
        takes = functools.partial(_runs, without_values(module, mode), mode, width)
        axis = common_axis(takes)
        taken = sum(takes(IMAGE, at) for at in range(IMAGE))
        return None if 1 < taken < IMAGE else axis  # one that is not that of all goes by sizes


def common_axis(takes: Callable[[int, int], bool]) -> int | None:
    """Return the axis of the width that fits inputs of any number of axes; None: there is none.

    It counts from the end, or from the front. -1 if no input is taken.

    Args:
        takes: tells if inputs of so many axes are taken with the width at this one, from the front.
    """
    tried = functools.cache(takes)

    def fits(axis: int, count: int) -> bool:
        if -count <= axis < count and tried(count, axis % count):
            return True
        return not any(tried(count, other) for other in range(count))

    counts = range(2, MOST_AXES + 1)
    return next((axis for axis in AXES if all(fits(axis, n) for n in counts)), None)


def shape_with(width: int, axis: int, others: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that has `width` at `axis`, from the front, and the other sizes around."""
    return (*others[:axis], width, *others[axis:])


@torch.no_grad()
def _runs(made: nn.Module, mode: Shapes, width: int, count: int, axis: int) -> bool:
    """True if a forward takes and gives an input of `count` axes with `width` channels at `axis`.

    Args:
        made: a module without values.
    """
    others = [size for size in SIZES if size != width]  # the same size would hide a wrong axis
    shape = shape_with(width, axis, others[: count - 1])
    like = next(made.parameters(), torch.empty(0))
    try:
        x = mode.empty(shape, like.dtype, like.device)
        return type(made).forward(made, x).shape == x.shape
    except Exception:  # whatever a forward of somebody's own raises on such an input
        return False


@torch.no_grad()
def takes_transposed(module: nn.Module) -> bool:
    """True if a linear module's forward takes its square weight for [in, out].

    A forward is run on inputs of two and of three axes, and with other values than the weight has:
    it may be on the meta device. Once for its class, if that shows it; see `facts`. Else once for
    each weight. False if it runs on no input.
    """
    weight: Any = module._parameters["weight"]
    if isinstance(weight, FakeTensor):
        return False
    with unset_fake_temporarily():  # in a run on shapes, too: the weight has values
        return _is_known_turned(module, weight)


def _is_known_turned(module: nn.Module, weight: Any) -> bool:
    known, now = _turned.get(module), facts(module)
    now = None if now is None else (*now, weight.dtype, *_flags(module, weight))
    if known is None or known[0] is not weight or now is None or known[1] != now:
        device = _device_of(weight)  # not the default one
        with lasting(), _leaving_nothing(module), device:
            turned = remembered(_turning, now, lambda: _is_turned(alone(module), weight))
            if turned is None:
                turned = _multiplies_by(alone(module), weight)
            _turned[module] = known = weight, now, turned
    return known[2]


@contextlib.contextmanager
def _leaving_nothing(module: nn.Module) -> Iterator[None]:
    """Put back what the code of a module changes in the process, and show no warnings of it."""
    with ignored_warnings(), kept_random(), Restoring(), around_copies(module.modules()):
        yield


def _flags(module: nn.Module, weight: Tensor) -> Iterator[Any]:
    """Yield what a forward may go by in tensors: single numbers, and if others are all zero."""
    tables: list[Any] = [t for part in parts(module) for t in (part._parameters, part._buffers)]
    for tensor in [each for table in tables for each in table.values()]:
        if tensor is not weight and _is_usual(tensor) and not tensor.is_meta:
            yield tensor.item() if tensor.numel() == 1 else bool(tensor.any())


def _inputs(weight: Tensor) -> Iterator[Tensor]:
    """Return inputs of two and of three axes for a linear module with a square weight."""
    device, width = _device_of(weight), shape_of(weight)[0]
    draw = torch.Generator().manual_seed(0)
    for shape in ((16, width), (2, 8, width)):
        yield torch.randn(shape, generator=draw, device="cpu").to(device, weight.dtype)


def _is_turned(made: nn.Module, weight: Any) -> bool | None:
    """True if a forward surely takes its weight for [in, out], False if it may be [out, in].

    None: it has another weight in its place.
    """
    width = shape_of(weight)[0]
    draw = torch.Generator().manual_seed(0)
    for part in made.modules():
        part.training = False
    ran = False
    for ones, x in itertools.product((False, True), _inputs(weight)):
        with contextlib.suppress(Exception):  # whatever a forward of somebody's own raises
            count = PROBES if width < WIDE else 1
            leaks = [_leaks(made, weight, x, draw, ones) for _ in range(count)]
            rows, columns = torch.stack(leaks).sum(0).tolist()
            if 0 < rows + columns < math.inf:
                return columns < CLEAR * rows
            ran = True
    return None if ran else False


def _leaks(made: nn.Module, weight: Tensor, x: Tensor, draw: torch.Generator, ones: bool) -> Tensor:
    """Return how much other outputs change than those of the rows, and columns, that are negated.

    Where a weight is [out, in], one of its rows has a part in one output: then the first is 0,
    whatever is done with the weight and with each output. Where it is [in, out], the second is.

    Args:
        ones: see `_with_weight`.
    """
    width = shape_of(weight)[0]
    drawn = torch.randn(width, width, generator=draw, device="cpu")
    signs = torch.ones(width, device="cpu")
    signs[torch.randperm(width, generator=draw, device="cpu")[: width // 2]] = -1
    values = [drawn, -drawn, signs[:, None] * drawn, drawn * signs]
    values = [value.to(x.device, weight.dtype) for value in values]
    outs = [_with_weight(made, weight, value, x, ones).float() for value in values]
    same, other = (signs > 0).to(x.device), (signs < 0).to(x.device)
    found = [_size(out - outs[0], same) + _size(out - outs[1], other) for out in outs[2:]]
    return torch.stack(found)


def _size(change: Tensor, channels: Tensor) -> Tensor:
    return change[..., channels].square().sum().cpu()


def _multiplies_by(made: nn.Module, weight: Tensor) -> bool:
    """True if a forward adds x W to what it gives for zeros, with the values that it has."""
    for part in made.modules():
        part.training = False
    for ones, x in itertools.product((False, True), _inputs(weight)):
        with contextlib.suppress(Exception):  # whatever a forward of somebody's own raises
            found = _is_product(made, weight, x, ones)
            if found is not None:
                return found
    return False


def _is_product(made: nn.Module, weight: Tensor, x: Tensor, ones: bool) -> bool | None:
    """True if a forward adds x W, False if another product; None: its output shows nothing."""
    given = (x, torch.zeros_like(x))
    outs = [_with_weight(made, weight, weight, each, ones).float() for each in given]
    rows = outs[0] - outs[1]
    size = float(rows.norm())
    if not 0 < size < math.inf:
        return None
    plain, turned = (x.float() @ matrix for matrix in (weight.float().T, weight.float()))
    off = float((rows - turned).norm())
    return off < CLEAR * size and off < CLEAR * float((rows - plain).norm())


def _device_of(tensor: Tensor) -> torch.device:
    """Return where a tensor is, or where another one with values may be in its place."""
    return torch.device("cpu") if tensor.is_meta else tensor.device


def _with_weight(made: nn.Module, weight: Tensor, new: Tensor, x: Tensor, ones: bool) -> Tensor:
    """Return the output of a forward with other values for a weight, on inputs `x`.

    What else the module has without values is ones.

    Args:
        ones: so are zeros, which may be a factor. Else they stay: they may be a flag.
    """
    own = [part.__dict__ for part in made.modules()]
    tables: list[dict[str, Any]] = [each[k] for each in own for k in ("_parameters", "_buffers")]
    kept = [table.copy() for table in tables]
    try:
        for table in tables:
            table.update({k: new if t is weight else _valued(t, ones) for k, t in table.items()})
        seed_all()  # for a forward that draws
        return run(made, x)
    finally:
        for table, before in zip(tables, kept, strict=True):
            table.update(before)


def _valued(tensor: Any, ones: bool) -> Any:
    if not _is_usual(tensor):
        return tensor
    if tensor.is_meta or (ones and tensor.is_floating_point() and not tensor.any()):
        return torch.ones_like(tensor, device=_device_of(tensor))
    return tensor.detach().clone()


def _is_usual(tensor: Any) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and is_dense(tensor)


def scales_by_weight(module: nn.Module, shape: tuple[int, ...], axis: int) -> bool:
    """True if a normalisation's output is its weight times something else, channel by channel.

    A forward is run once for its class; see `facts`.

    Args:
        shape: of an input.
        axis: where the channels are in it, from the end.
    """
    return remembered(_scaling, facts(module), lambda: _scales(module, shape, axis))


@torch.no_grad()
def _scales(module: nn.Module, shape: tuple[int, ...], axis: int) -> bool:
    made = alone(module)
    own: Any = made._parameters
    after = (1,) * (-1 - axis)
    with lasting(), _leaving_nothing(module), torch.device("cpu"):
        seed_all()
        own.update({k: torch.randn(p.shape) for k, p in own.items() if p is not None})
        x, by = torch.randn(shape), torch.linspace(-1.5, 2.5, len(own["weight"]))
        bias = own["bias"].view(-1, *after) if own.get("bias") is not None else 0
        try:
            plain = run(made, x) - bias
            own["weight"] = own["weight"] * by
            out = run(made, x) - bias
            return torch.allclose(out, plain * by.view(-1, *after), atol=1e-5)
        except Exception:  # whatever a forward of somebody's own raises on such an input
            return False
