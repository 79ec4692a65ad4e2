"""Try a module out without its layers and hooks, and find which axis a normalisation works on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..names import SLOT

AXES = (-1, -3, -2, -4, 1, 0, 2)  # where a normalisation may work, in the order of trial
SIZES = (2, 3, 5, 7, 11)  # of the other axes, with one to spare
_found: dict[tuple, int | None] = {}


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


def on_meta(module: nn.Module) -> nn.Module:
    """Return a module like `module` in eval mode, without layers and hooks, on the meta device."""
    made = bare(module)
    own = made.__dict__
    own.pop("forward", None)  # a wrapper of another library, around the module itself
    hooks = [key for key, table in own.items() if "_hooks" in key and isinstance(table, dict)]
    own.update({key: type(own[key])() for key in hooks})
    tables: list[dict[str, Any]] = [own["_parameters"], own["_buffers"]]
    for table in tables:
        table.update({k: t.detach().to("meta") for k, t in table.items() if t is not None})
    children: dict[str, Any] = own["_modules"]
    children.update({k: on_meta(child) for k, child in children.items() if child is not None})
    made.training = False
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
        made = on_meta(module)
        runs = [{a for a in range(n) if _runs(made, width, n, a)} for n in range(2, len(SIZES) + 1)]
        taken = [(n, axes) for n, axes in enumerate(runs, 2) if axes]
        fits = (a for a in AXES if all(-n <= a < n and a % n in axes for n, axes in taken))
        _found[key] = next(fits, None)
    return _found[key]


@torch.no_grad()
def _runs(made: nn.Module, width: int, count: int, axis: int) -> bool:
    """True if a forward takes and gives an input of `count` axes with `width` channels at `axis`.

    Args:
        made: a module on the meta device.
    """
    shape = [size for size in SIZES if size != width]  # the same size would hide a wrong axis
    shape = shape[: count - 1]
    shape.insert(axis, width)
    dtype = next((t.dtype for t in made._parameters.values() if t is not None), torch.float32)
    try:
        x = torch.empty(shape, dtype=dtype, device="meta")
        return type(made).forward(made, x).shape == x.shape
    except Exception:  # whatever a forward of somebody's own raises on such an input
        return False
