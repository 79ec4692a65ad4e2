"""Read and replace a module's stored tensors: plain, quantised or sharded."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..errors import SiteError
from ..names import unwrapped

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@contextlib.contextmanager
def lasting(exact: bool = True) -> Iterator[None]:
    """Make tensors that can train later, also inside `torch.inference_mode()`.

    Args:
        exact: compute them in their own dtypes, also inside `torch.autocast`.
    """
    with contextlib.ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
            modes.enter_context(torch.no_grad())  # the former turns gradients on
        if exact and torch._C._is_any_autocast_enabled():
            modes.callback(torch.clear_autocast_cache)  # it may hold 16-bit copies of old values
            for device in filter(torch.is_autocast_enabled, AUTOCAST):
                modes.enter_context(torch.autocast(device, enabled=False))
        yield


AUTOCAST = ("cpu", "cuda", "mps", "xpu", "hpu")


def stored(module: nn.Module, name: str) -> Tensor | None:
    """Return the stored parameter, or the buffer, attribute or property in its place, or None.

    After pruning and on a DataParallel replica, it is an attribute; of a parametrization, a
    property.
    """
    for table in (module._parameters, module._buffers, module.__dict__):
        if name in table:
            return table[name]
    own = (vars(cls) for cls in type(module).__mro__)
    found = next((table[name] for table in own if name in table and "_site_of" not in table), None)
    return found.__get__(module) if isinstance(found, property) else None


def stored_params(module: nn.Module) -> dict[str, Tensor]:
    """Return the stored weight and bias of `module` by name; a missing one is left out."""
    found = {name: stored(module, name) for name in ("weight", "bias")}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}


def is_sharded(tensor: Tensor | None) -> bool:
    """True if `tensor` has its values spread over several processes."""
    return is_dtensor(tensor) or is_partitioned(tensor)


def is_partitioned(tensor: Any) -> bool:
    """True if DeepSpeed's ZeRO-3 keeps the values of `tensor`: it is empty but for a while."""
    return hasattr(tensor, "ds_numel")


def size(tensor: Tensor) -> int:
    """Return the number of values of `tensor`, also while it is partitioned; 0: it has no size."""
    if is_lazy(tensor):
        return 0
    return getattr(tensor, "ds_numel", None) or tensor.numel()


def shape(tensor: Tensor) -> torch.Size:
    """Return the shape of `tensor`, also while it is partitioned."""
    return getattr(tensor, "ds_shape", None) or tensor.shape


def is_dtensor(tensor: Tensor | None) -> TypeGuard[DTensor]:
    """True if `tensor` is a DTensor, as made by FSDP2 and tensor parallelism."""
    if type(tensor) in (Tensor, nn.Parameter) or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES, torch.float64)


# While set: the whole values of sharded tensors by id, for one process that acts alone.
GATHERED: ContextVar[dict[int, Tensor] | None] = ContextVar("gathered", default=None)


@contextlib.contextmanager
def gathered(module: nn.Module, state: Mapping[str, Any] | None) -> Iterator[None]:
    """Let `full` take the values that a state dict of `module` holds, and wait for no process.

    None, or a state dict of shards: `full` is a collective call, as it is elsewhere.
    """
    given = state or {}
    own = itertools.chain(module.named_parameters(), module.named_buffers())
    keys = [(name if name in given else unwrapped(name), tensor) for name, tensor in own]
    known = {id(tensor): given[key] for key, tensor in keys if key in given}
    token = GATHERED.set(None if any(map(is_sharded, known.values())) else known or None)
    try:
        yield
    finally:
        GATHERED.reset(token)


def full(tensor: Tensor) -> Tensor:
    """Return the values of `tensor` as a whole; a collective call if it is sharded.

    In `gathered` these are the values of the state dict, and a sharded tensor that is not in it has
    none.
    """
    if (known := GATHERED.get()) is not None:
        if id(tensor) in known:
            return known[id(tensor)]
        if is_sharded(tensor):
            return torch.empty(shape(tensor), device="meta")
    if is_partitioned(tensor):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """Return `tensor`, which each rank has as a whole, in the same shards as `like`."""
    from torch.distributed.tensor import distribute_tensor

    if not is_dtensor(like):
        return tensor
    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None)


def is_finite(tensor: Tensor, usual: Tensor | None = None) -> bool:
    """True if no value is NaN or infinite, except values that `usual` has too."""
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    if tensor.itemsize == 1:  # torch has no isfinite for 8-bit floats
        tensor = tensor.float()
    # If the sum is finite, all values are finite, and a sum is much cheaper.
    if math.isfinite(tensor.sum()) or torch.isfinite(tensor).all():
        return True
    if usual is None or usual.is_meta or usual.shape != tensor.shape:
        return False
    whole = full(usual).detach().to(tensor)
    return bool((torch.isfinite(tensor) | (tensor == whole)).all())


def is_plain(parameter: Any) -> bool:
    """True if `parameter` is an ordinary floating parameter: not quantised, sharded or sparse."""
    return type(parameter) is nn.Parameter and parameter.dtype in FLOATS and is_dense(parameter)


def is_dense(tensor: Tensor) -> bool:
    """True if the values of `tensor` lie in memory by strides; not so in a sparse layout."""
    return tensor.layout == torch.strided


def is_lazy(tensor: Tensor | None) -> bool:
    """True if `tensor` gets its shape in the first forward, as in `nn.LazyLinear`."""
    return type(tensor) in (UninitializedBuffer, UninitializedParameter)


def in_full(module: nn.Module, key: str) -> Tensor:
    """Return the values of a module's parameter in at least float32.

    If the parameter is in float32 already, the result shares its memory.

    Raises:
        SiteError: its kind of quantisation is not known.
    """
    parameter: Any = stored(module, key)
    if parameter is None:
        raise SiteError(f"{type(module).__name__} has no {key}")
    if is_plain(parameter) or type(parameter) is Tensor:
        return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
    kind = type(parameter).__name__
    if kind == "Params4bit":
        return _of_4_bit(parameter)
    if kind == "Int8Params":
        rows, scales = _of_8_bit(module, parameter)
        if scales is not None:
            return rows.float() * scales.float()[:, None] / 127
    if hasattr(parameter, "dequantize") and type(parameter).__module__.startswith(TENSOR_CLASSES):
        return parameter.dequantize().float()
    raise _unknown(module, key, parameter)


def packed_values(module: nn.Module, key: str) -> list[Tensor]:
    """Return the tensors that hold the values of a quantised parameter.

    What the first forward of bitsandbytes moves and rounds is left out or as it was before.
    """
    parameter: Any = module._parameters[key]
    kind = type(parameter).__name__
    if kind == "Params4bit":
        return [_unpacked_4_bit(parameter)[0]]
    if kind == "Int8Params":
        return [_of_8_bit(module, parameter)[0]]
    return [part for part in held_in(parameter) if isinstance(part, Tensor)]


def _of_8_bit(module: nn.Module, parameter: Any) -> tuple[Tensor, Tensor | None]:
    """Return the rows of a weight of bitsandbytes, and the scale of each row, or None."""
    rows, scales = parameter.CB, parameter.SCB
    state: Any = getattr(module, "state", None)
    if scales is None and state is not None:  # the first forward moves them into the state
        rows, scales = state.CB, state.SCB
    return parameter.data if rows is None else rows, scales


def _unpacked_4_bit(parameter: Any) -> tuple[Tensor, Any]:
    """Return the packed values of a weight of bitsandbytes, and the state of its quantisation.

    On some CPUs its first forward puts the weight in another order, which only its kernel knows.
    """
    from bitsandbytes import functional

    data, state = parameter.data, copy.copy(parameter.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax.T.reshape(-1).float()
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax, state.nested = scales, False
    return data, state


def _of_4_bit(parameter: Any) -> Tensor:
    """Return the values of a weight of bitsandbytes."""
    from bitsandbytes import functional

    return functional.dequantize_4bit(*_unpacked_4_bit(parameter)).float()


def params_in_full(module: nn.Module) -> dict[str, Tensor]:
    """Return the weight and bias of a module by name, in at least float32; see `in_full`.

    A weight that is no parameter of the module's own is left out.
    """
    given = {"weight": module._parameters.get("weight"), "bias": stored(module, "bias")}
    return {key: in_full(module, key) for key, t in given.items() if isinstance(t, Tensor)}


def kept(module: nn.Module, key: str) -> Any:
    """Return the current values of a module's parameter, for `put_back`."""
    parameter: Any = module._parameters[key]
    return parameter.data if is_plain(parameter) else (parameter, module.__dict__.get("state"))


def replace(module: nn.Module, key: str, tensor: Tensor) -> None:
    """Give a module's parameter new values, quantised as the old ones.

    The old storage stays as it is, so that other modules that share it do not change.

    Raises:
        SiteError: its kind of quantisation is not known.
    """
    parameter: Any = module._parameters[key]
    if is_plain(parameter):
        new = tensor.to(parameter.dtype)
        if parameter.is_inference():  # it cannot hold a tensor of the other sort
            with torch.inference_mode():
                new = new.clone()
        parameter.data = new
        return
    new = _requantised(module, key, parameter, tensor)
    if type(parameter).__name__ == "Int8Params":
        fresh: Any = copy.copy(module.__dict__.get("state"))
        fresh.CB = fresh.SCB = None
        module.__dict__["state"] = fresh
    module._parameters[key] = new


TENSOR_CLASSES = ("torchao", "optimum.quanto")  # packages whose weights are tensors of own classes


def _requantised(module: nn.Module, key: str, parameter: Any, tensor: Tensor) -> Any:
    kind, device = type(parameter).__name__, parameter.device
    if kind == "Params4bit":
        return type(parameter)(
            tensor.cpu(),
            requires_grad=False,
            blocksize=parameter.blocksize,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
            module=module,
        ).to(device)
    if kind == "Int8Params":
        return type(parameter)(tensor.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    if kind == "Int8Tensor" and parameter.act_quant_kwargs is None:
        from torchao.quantization import PerRow, PerTensor

        whole = list(parameter.block_size) == list(parameter.shape)
        made = type(parameter).from_hp(tensor, PerTensor() if whole else PerRow())
        return nn.Parameter(made, requires_grad=False)
    if kind == "IntxUnpackedToInt8Tensor":
        made = type(parameter).from_hp(
            tensor,
            tuple(parameter.block_size),
            parameter.target_dtype,
            activation_quantization=parameter.activation_quantization,
        )
        return nn.Parameter(made, requires_grad=False)
    if type(parameter).__module__.startswith("optimum.quanto"):
        module._parameters[key] = nn.Parameter(tensor.to(parameter.dtype), requires_grad=False)
        try:
            return nn.Parameter(module.qweight, requires_grad=False)  # type: ignore[arg-type]
        finally:
            module._parameters[key] = parameter
    raise _unknown(module, key, parameter)


def put_back(module: nn.Module, key: str, kept: Any) -> None:
    """Undo `replace`, bit for bit; if the model was moved since, the old values are moved too.

    Args:
        kept: the result of `kept`. To put it back twice is the same as once.
    """
    parameter: Any = module._parameters[key]
    if isinstance(kept, Tensor):
        parameter.data = kept.to(parameter.device, parameter.dtype)
        return
    module._parameters[key], state = kept
    if state is not None:
        module.__dict__["state"] = state


def in_parts(tensor: Tensor) -> bool:
    """True if several tensors hold the values, as in a sparse layout and in torchao's."""
    whole = is_dtensor(tensor) or not hasattr(tensor, "__tensor_flatten__")
    return not (whole and is_dense(tensor)) or tensor.is_quantized


def held_in(tensor: Tensor) -> list[Any]:
    """Return the plain tensors and the settings that hold the values of a tensor of any sort."""
    tensor = tensor.detach()
    if is_dtensor(tensor):
        return [tensor.to_local()]
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's, and nested tensors
        names, settings = tensor.__tensor_flatten__()
        parts = (held_in(getattr(tensor, name)) for name in names)
        return [type(tensor).__name__, repr(settings), *(each for part in parts for each in part)]
    if tensor.is_quantized:
        return [repr(tensor.qscheme()), tensor.int_repr(), tensor.dequantize()]
    if tensor.layout == torch.sparse_coo:
        return [tensor.coalesce().indices(), tensor.coalesce().values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor if is_dense(tensor) else tensor.to_dense()]


def _unknown(module: nn.Module, key: str, parameter: Any) -> SiteError:
    if not is_dense(parameter):
        return SiteError(
            f"the {key} of {type(module).__name__} has the layout {parameter.layout}, which holds "
            "no change of all values; merge into the model with an ordinary weight, then convert it"
        )
    return SiteError(
        f"the {key} of {type(module).__name__}, a {type(parameter).__name__}, cannot be taken out "
        "of its quantisation and put back; merge into the model in full precision, then quantise it"
    )


def memory_of(tensor: Tensor) -> int:
    """Return a number that a tensor shares with its views."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # a quantised one has none
        return id(tensor)
