"""Try a module out without its layers and hooks, and find which axis a normalisation works on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..names import SLOT

AFTER = (0, 2, 1)  # number of axes after the normalised one, in the order of trial
_found: dict[tuple, int] = {}


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


@contextlib.contextmanager
def on_shapes() -> Iterator[None]:
    """Let tensors have no values inside: a kernel that asks for their memory raises an error."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        yield


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
    """Return what tells two modules of one class apart: texts and flags, such as `data_format`."""
    own = module.__dict__.items()
    return type(module), *((k, v) for k, v in own if type(v) in (str, bool) and k != "training")


def axes_after(module: nn.Module, width: int) -> int:
    """Return the number of axes after the one that a normalisation of `width` channels works on.

    A forward is run once for its class, on shapes alone; see `facts`. 0 if it runs on no shape that
    is tried.
    """
    key = (width == 1, *facts(module))
    if key not in _found:
        _found[key] = next((n for n in AFTER if _runs(module, width, n)), 0)
    return _found[key]


@torch.no_grad()
def _runs(module: nn.Module, width: int, after: int) -> bool:
    """True if the forward takes and gives [2, 3, width], or [2, width, ...] with `after` axes."""
    others = [size for size in (3, 5, 7) if size != width]  # the same size would hide a wrong axis
    shape = (2, width, *others[:after]) if after else (2, others[0], width)
    made = on_meta(module)
    dtype = next((t.dtype for t in made._parameters.values() if t is not None), torch.float32)
    try:
        x = torch.empty(shape, dtype=dtype, device="meta")
        return type(made).forward(made, x).shape == x.shape
    except Exception:  # whatever a forward of somebody's own raises on such an input
        return False
