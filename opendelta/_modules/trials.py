"""Try a module out without its layers and hooks, and find which axis a normalisation works on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..names import SLOT
from .copies import copied
from .faking import Shapes
from .process import silent_fakes

AXES = (-1, -3, -2, -4, 1, 0, 2)  # where a normalisation may work, in the order of trial
SIZES = (2, 3, 5, 7, 11)  # of the other axes, with one to spare
_found: dict[tuple, int | None] = {}
_turned: dict[tuple, bool] = {}


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


def alone(module: nn.Module, base: type[nn.Module] | None = None) -> nn.Module:
    """Return what `bare` does, of which a run changes nothing that the model has.

    Its buffers are copies, and so are the modules inside, and the objects that they hold if those
    can be copied. The parameters are the same.
    """
    made = _bare_inside(module, base)
    parts = [*made.modules()]
    if not any(hasattr(type(part), "__del__") for part in parts):
        made = copied(made) or made
    for part in made.modules():
        own: dict[str, Any] = part.__dict__["_buffers"]
        own.update({k: t.detach().clone() for k, t in own.items() if t is not None})
    return made


def _bare_inside(module: nn.Module, base: type[nn.Module] | None = None) -> nn.Module:
    made = bare(module, base)
    own: dict[str, Any] = made.__dict__["_modules"]
    own.update({k: _bare_inside(child) for k, child in own.items() if child is not None})
    return made


def without_values(module: nn.Module, mode: Shapes) -> nn.Module:
    """Return what `alone` does, in eval mode, without hooks, and with tensors of shapes alone.

    Args:
        mode: the block of runs on shapes that is open.
    """
    made = alone(module)
    for part in made.modules():
        own = part.__dict__
        own.pop("forward", None)  # a wrapper of another library, around the module itself
        hooks = [key for key, table in own.items() if "_hooks" in key and isinstance(table, dict)]
        own.update({key: type(own[key])() for key in hooks})
        for table in (own["_parameters"], own["_buffers"]):
            table.update({k: mode.like(t) for k, t in table.items() if t is not None})
        part.training = False
    return made


def facts(module: nn.Module) -> tuple:
    """Return what tells two modules of one class apart.

    That is texts and flags, such as `data_format`, and small numbers, such as an axis.
    """
    own = [(k, v) for k, v in module.__dict__.items() if k != "training"]
    return type(module), *((k, v) for k, v in own if type(v) in (str, bool) or _is_small(v))


def _is_small(value: Any) -> bool:
    return type(value) is int and abs(value) < len(SIZES)


def norm_axis(module: nn.Module, width: int) -> int | None:
    """Return the axis that a normalisation of `width` channels works on; None: it is not one.

    It counts from the end, or from the front if that holds for inputs of any number of axes. A
    forward is run once for its class, on shapes alone; see `facts`. -1 if it runs on no shape.
    """
    key = (width == 1, *facts(module))
    if key not in _found:
        with silent_fakes(), Shapes() as mode:
            made = without_values(module, mode)
            counts = range(2, len(SIZES) + 1)
            runs = [{a for a in range(n) if _runs(made, mode, width, n, a)} for n in counts]
        taken = [(n, axes) for n, axes in enumerate(runs, 2) if axes]
        fits = (a for a in AXES if all(-n <= a < n and a % n in axes for n, axes in taken))
        _found[key] = next(fits, None)
    return _found[key]


@torch.no_grad()
def _runs(made: nn.Module, mode: Shapes, width: int, count: int, axis: int) -> bool:
    """True if a forward takes and gives an input of `count` axes with `width` channels at `axis`.

    Args:
        made: a module without values.
    """
    shape = [size for size in SIZES if size != width]  # the same size would hide a wrong axis
    shape = shape[: count - 1]
    shape.insert(axis, width)
    own = (t for t in made._parameters.values() if t is not None)
    like = next(own, torch.empty(0))
    try:
        x = mode.empty(shape, like.dtype, like.device)
        return type(made).forward(made, x).shape == x.shape
    except Exception:  # whatever a forward of somebody's own raises on such an input
        return False


def takes_transposed(module: nn.Module) -> bool:
    """True if a linear module's forward takes its weight for [in, out]; False if nothing shows it.

    A forward is run once for its class, on shapes alone; see `facts`.
    """
    key = facts(module)
    if key not in _turned:
        with silent_fakes(), Shapes() as mode:
            made = without_values(module, mode)
            runs = [_maps(made, mode, sizes, weight) for sizes, weight in
                    (((3, 5), (5, 3)), ((3, 5), (3, 5)))]  # fmt: skip
        _turned[key] = runs == [False, True]
    return _turned[key]


@torch.no_grad()
def _maps(made: nn.Module, mode: Shapes, sizes: tuple[int, int], shape: tuple[int, int]) -> bool:
    """True if a forward with a weight of `shape` maps from the first size to the second."""
    own: Any = made._parameters
    like = {"dtype": own["weight"].dtype, "device": own["weight"].device}
    made.__dict__ |= {"in_features": sizes[0], "out_features": sizes[1]}
    own["weight"] = mode.empty(shape, **like)
    if own.get("bias") is not None:
        own["bias"] = mode.empty(sizes[1:], **like)
    try:
        return type(made).forward(made, mode.empty((2, sizes[0]), **like)).shape == (2, sizes[1])
    except Exception:  # whatever a forward of somebody's own raises on such an input
        return False
