"""Layers that no method writes: modules that a delta owns, and tensors that its layers share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._modules import calls
from .._modules.holding import TABLES
from .._modules.tensors import FLOATS
from .._modules.writing import may_write, through
from ..names import SLOT
from .base import Acts, DeltaLayer, Params, Passive
from .dtypes import dtype_for


class SharedTensors(Passive):
    """Holds the tensors that all layers of a delta share; it is on a module around all of them."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.tensors = shared

    def fold(self, params: Params) -> Params:
        return params


class OwnedModule(DeltaLayer):
    """The delta's own copy of a module; it acts in the module's place (`modules_to_save`).

    If the copy has another dtype than the module, it computes in its own: inputs are cast to it,
    outputs are cast back to the module's.
    """

    acts = Acts.INSTEAD
    sees_module = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.writes_input = module, may_write(module)

    def seeded(self) -> list[nn.Module]:
        """Return none: a method `seed` of the copied module is its own."""
        return []

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if (given := getattr(call.call, "given", None)) is not None:  # type: ignore[attr-defined]
            args, kwargs = given(args, kwargs)
        # Not by __call__: hooks for all modules have seen the site's call already.
        for hook in filter(computes_weight, self.module._forward_pre_hooks.values()):
            hook(self.module, args)
        run, dtypes = self.module.forward, _differing(call.module, self.module)  # type: ignore[attr-defined]
        if dtypes is None:
            return run(*args, **kwargs)
        theirs, ours = dtypes
        given = args, kwargs
        args, kwargs = _cast(given, theirs, ours)
        if self.writes_input:
            tensors = (calls.every(Tensor, each) for each in (given, (args, kwargs)))
            run = functools.partial(through, [*zip(*tensors, strict=True)], run)
        try:
            return _cast(run(*args, **kwargs), ours, theirs)
        except RuntimeError as error:
            error.add_note(
                f"{self.record.name!r} has a copy of this {type(self.module).__name__} in {ours}, "
                f"and the module is in {theirs}. If its forward uses tensors that no module holds, "
                "attach the delta with dtype='backbone'"
            )
            raise

    @property
    def stand_in(self) -> nn.Module:
        """Return the copy."""
        return self.module

    def fit(
        self, module: nn.Module, device: torch.device, computes: torch.dtype, asked: str | None
    ) -> None:
        """Move to the device where `module` computes; compare each tensor with that of `module`."""
        if device.type != "meta" and any(p.is_meta for p in self.parameters()):
            return  # accelerate offloaded the copy, and loads its values for each run
        self.to(device=device)
        theirs = _dtypes(module)

        def wanted(name: str, tensor: Tensor) -> torch.dtype:
            return dtype_for(asked, theirs.get(name, computes), tensor.dtype)

        convert(self.module, wanted)
        _follow(self.module, module)


def computes_weight(hook: Any) -> bool:
    """True if a hook is one of torch's that compute a weight before each run of a module.

    Those are of the old spectral_norm and weight_norm, and of pruning.
    """
    return type(hook).__module__.startswith("torch.nn.utils.")


def convert(module: nn.Module, wanted: Callable[[str, Tensor], torch.dtype]) -> None:
    """Give the ordinary floating tensors of `module` the dtype that `wanted(name, tensor)` says.

    Quantised and sharded tensors stay as they are.
    """
    for name, tensor in _floats(module):
        dtype = wanted(name, tensor)
        if tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)
            if tensor.grad is not None:
                tensor.grad = tensor.grad.to(dtype)


def convert_like(module: nn.Module, other: nn.Module) -> None:
    """Give the ordinary floating tensors of `module` the dtype of those of the same name."""
    theirs = _dtypes(other)
    convert(module, lambda name, tensor: theirs.get(name, tensor.dtype))
    _follow(module, other)


def _floats(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in FLOATS:
            yield name, tensor


def _follow(module: nn.Module, other: nn.Module) -> None:
    """Give the tensors in no table of `module` the dtype of its parameters.

    A tensor follows the parameters that have its dtype in `other`, of which `module` is a copy.
    """
    theirs, now = _dtypes(other), dict(_held(other))
    dtypes = {theirs[name]: t.dtype for name, t in _floats(module) if name in theirs}
    for name, tensor in _held(module):
        own = now.get(name, tensor)
        if own is not tensor and dtypes.get(own.dtype, tensor.dtype) != tensor.dtype:
            tensor.data = tensor.data.to(dtypes[own.dtype])


def _held(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in no table of `module`: attributes, in containers, of modules there.

    Those of the deltas on it are none of its own.
    """
    seen = {id(each) for each in (*module.modules(), *module.parameters(), *module.buffers())}
    todo = [(n, part) for n, part in module.named_modules() if SLOT not in n.split(".")]
    while todo:
        where, part = todo.pop()
        beside = [(key, value) for key, value in part.__dict__.items() if key not in TABLES]
        for key, value in beside:
            for index, each in enumerate(calls.every((Tensor, nn.Module), value)):
                name = f"{where}?{key}.{index}"
                inside = dict(each.named_modules()) if isinstance(each, nn.Module) else {}
                own = _floats(each) if inside else [("", each)]
                yield from ((f"{name}.{n}", t) for n, t in own if id(t) not in seen)
                todo += [(f"{name}.{n}", m) for n, m in inside.items() if id(m) not in seen]
                seen.update(id(m) for m in (*inside.values(), each))


def _dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in _floats(module)}


def _differing(one: nn.Module, other: nn.Module) -> tuple[torch.dtype, torch.dtype] | None:
    """Return the two dtypes of the first parameter of the same name that differ; None: none do."""
    theirs, ours = _tensors_of(one), _tensors_of(other)
    for key in theirs.keys() & ours.keys():
        dtypes = theirs[key].dtype, ours[key].dtype
        if dtypes[0] != dtypes[1] and dtypes[0] in FLOATS and dtypes[1] in FLOATS:
            return dtypes
    for key, child in other._modules.items():
        inside = dict(one._modules.items()).get(key)
        if child is not None and inside is not None and (found := _differing(inside, child)):
            return found
    return None


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's own parameters; on a DataParallel replica, the tensors in their place."""
    own = module.__dict__.get("_former_parameters") or module._parameters
    return {key: parameter for key, parameter in own.items() if parameter is not None}


def _cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """Return `value` with the tensors of one dtype, at any depth, in another."""
    return calls.map_tensors(lambda t: t.to(after) if t.dtype == before else t, value)
