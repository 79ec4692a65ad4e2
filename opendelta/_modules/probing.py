"""Find out by one run whether a module computes what its kind says: t (W x) + b."""

from __future__ import annotations

import contextlib
import inspect
import math
import operator
from collections.abc import Callable, Iterator
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn

from .devices import device_and_dtype
from .faking import Restoring
from .kept import around_copies
from .kinds import Kind, Norm, is_conv1d, kind_of, reads_plainly
from .process import ignored_warnings, kept_random, seed_all
from .tensors import in_full, is_plain, stored, stored_params
from .trials import alone, at_rest, run

# The forwards that compute what the table of kinds says, whatever subclass of module has them.
KNOWN = {
    nn.Linear.forward,
    nn.Embedding.forward,
    nn.Conv2d.forward,
    nn.LayerNorm.forward,
    nn.RMSNorm.forward,
}
ELSEWHERE = {  # (package, name of the forward) of libraries that may not be installed
    ("bitsandbytes", "Linear4bit.forward"),
    ("bitsandbytes", "Linear8bitLt.forward"),
}
calls_of = operator.attrgetter("__call__", "_wrapped_call_impl", "_call_impl")
IDS = 2048  # looked up at once
LARGEST = 1e10  # of the inputs that are tried: what saturates does so below
# In a float64 model some forwards compute in float32.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def is_known(cls: type[nn.Module]) -> bool:
    """True if a class's forward computes what the table of kinds says, with factor 1.

    A subclass may have something else for what that forward names: a method, or a property.
    """
    forward: Any = cls.forward
    if forward not in KNOWN and not is_conv1d(cls) and not _is_elsewhere(forward):
        return False
    if not reads_plainly(cls) or not _has_plain_call(cls):
        return False
    if "forward" in vars(cls):
        return True
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    names = inspect.unwrap(forward).__code__.co_names
    return all(getattr(cls, name, None) is getattr(owner, name, None) for name in names)


def _has_plain_call(cls: type[nn.Module]) -> bool:
    """True if a call of a module of this class runs its forward as torch does."""
    return calls_of(cls) == calls_of(nn.Module)


def _is_elsewhere(forward: Any) -> bool:
    package = (getattr(forward, "__module__", None) or "").partition(".")[0]
    return (package, getattr(forward, "__qualname__", "")) in ELSEWHERE


@torch.no_grad()
def factor_of(module: nn.Module) -> float | None:
    """Return the t of a module that computes t (W x) + b; None if it computes something else.

    Here W x is what the module's kind computes from the weight: a product, a lookup, a convolution.
    A normalisation has no t, so it is 1.0: see `acts_by_channel`.

    Args:
        module: one without layers.
    """
    cls, kind, was_training = type(module), kind_of(module), module.training
    if is_known(cls) and not _is_patched(module):
        return 1.0
    if isinstance(kind, Norm):
        return 1.0
    if kind is None or _takes_more(cls.forward):
        return None
    own = list(module.parameters())
    module = alone(module, writes=True)
    if stored(module, "weight") is None:
        return None
    factors, dtype = [], device_and_dtype([module])[1]
    largest = min(torch.finfo(dtype).max / 64, LARGEST)
    try:
        # What computes its weight may do so anew in each training step, as a spectral norm does.
        for mode in (False, True) if "weight" in module._parameters else (False,):
            for part in module.modules():
                part.training = mode
            with _put_back(module) as written, _in_full_precision(module):
                if module.training > was_training and _is_random(module, kind):
                    continue  # as dropout is: nobody expects a merge to keep it
                seed_all()
                factors.append(_of(module, kind, largest))
                with _other_values(module):
                    if not _call_keeps(module, (next(_inputs(module, kind)),)):
                        return None
                    factors.append(_of(module, kind, largest))
                    if kind.takes_ids and not module.training and not _is_alike(module, kind):
                        return None
                if written.wrote_to(own):
                    return None
        first = factors[0]
        if first is None or not all(each and _near(each, first, 1e-3) for each in factors):
            return None
        return first
    except Exception:  # whatever a forward of somebody's own raises on such an input
        return None


def _call_keeps(module: nn.Module, args: tuple[Tensor, ...]) -> bool:
    """True if a call of a module runs its forward on its own parameters, and changes none.

    It may change what the forward takes and gives.
    """
    if _has_plain_call(type(module)):
        return True
    made, same = at_rest(module, writes=True), list[bool]()
    before = {name: p.clone() for name, p in made.named_parameters()}

    def look() -> None:
        now = dict(made.named_parameters())
        same.append(
            now.keys() == before.keys() and all(map(torch.equal, now.values(), before.values()))
        )

    def forward(*given: Any, **named: Any) -> Any:
        look()
        return type(made).forward(made, *given, **named)

    for part in made.modules():
        part.training = module.training
    made.__dict__["forward"] = forward
    made(*args)
    ran = len(same)
    look()
    return ran > 0 and all(same)


def _is_patched(module: nn.Module) -> bool:
    """True if the module itself has another function for one that its forward names."""
    names = inspect.unwrap(type(module).forward).__code__.co_names
    return any(callable(vars(module).get(name)) for name in names)


def _takes_more(forward: Callable[..., Any]) -> bool:
    """True if a forward has arguments besides its input, whose values in a call are not known."""
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return sum(p.kind in named for p in inspect.signature(forward).parameters.values()) > 2


def _is_random(module: nn.Module, kind: Kind) -> bool:
    """True if a forward gives another output each time."""
    x = next(_inputs(module, kind))
    return not torch.equal(run(module, x), run(module, x))


@contextlib.contextmanager
def _put_back(module: nn.Module) -> Iterator[Restoring]:
    """Put back what the code of a module changes in the process, and draws at random."""
    kept = around_copies(module.modules())
    with ignored_warnings(), kept_random(), Restoring() as written, kept:
        yield written


@contextlib.contextmanager
def _in_full_precision(module: nn.Module) -> Iterator[None]:
    """Let the module's 16-bit parameters be float32 inside, so that rounding hides no factor."""
    own: Any = module._parameters
    kept = {key: p for key, p in own.items() if is_plain(p) and p.itemsize == 2}
    try:
        own.update({key: nn.Parameter(p.float(), False) for key, p in kept.items()})
        yield
    finally:
        own.update(kept)


@contextlib.contextmanager
def _other_values(module: nn.Module) -> Iterator[None]:
    """Let the parameters have other values inside, as after a merge: t must not depend on them."""
    own: Any = module._parameters
    kept = {key: p for key, p in own.items() if is_plain(p) and p.is_floating_point()}
    try:
        for key, p in kept.items():
            size = float(p.abs().amax()) or 1.0
            own[key] = nn.Parameter(3 * p + size * torch.randn_like(p), False)
        yield
    finally:
        own.update(kept)


def _of(module: nn.Module, kind: Kind, largest: float) -> float | None:
    matrix, bias = kind.matrix(in_full(module, "weight")), stored_params(module).get("bias")
    factors = []
    kept = [(p, p.clone()) for p in module.parameters() if is_plain(p)]
    for x in _inputs(module, kind, largest):
        with torch.set_grad_enabled(module.training):  # a forward may go by it
            out = run(module, x).detach()
        wide = x.to(matrix.dtype) if x.is_floating_point() else x
        plain = kind.product(wide, matrix)
        rest = out.to(matrix.dtype) - (0 if bias is None else kind.per_channel(bias, out))
        factor = float((rest * plain).sum() / plain.square().sum())
        if not math.isfinite(factor) or not factor:
            return None
        if not _close(rest, factor * plain, out.dtype):
            return None
        factors.append(factor)
    if not all(torch.equal(p, before) for p, before in kept):  # it would write to another one, too
        return None
    alike = all(_near(factor, factors[0], 1e-2) for factor in factors)
    return _rounded(factors[0]) if alike else None


def _is_alike(module: nn.Module, kind: Kind) -> bool:
    """True if a lookup gives each row of the weight, times one factor; a forward may mask an id."""
    matrix, factor = kind.matrix(in_full(module, "weight")), None
    device = device_and_dtype([module])[0]
    for ids in torch.arange(kind.in_features, device=device).split(IDS):
        out, plain = run(module, ids[None]), kind.product(ids[None], matrix)
        if factor is None:
            factor = (out * plain).sum() / plain.square().sum()
        off = (out - factor * plain).norm(dim=-1)
        if (off > TOLERANCES.get(out.dtype, 1e-4) * plain.norm(dim=-1)).any():
            return False
    return True


def _near(one: float, other: float, tolerance: float) -> bool:
    return math.isclose(one, other, rel_tol=tolerance)


def _rounded(factor: float) -> float:
    """Return 1.0 for a factor that differs from 1 by rounding."""
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-5) else factor


def _inputs(module: nn.Module, kind: Kind, largest: float = 1.0) -> Iterator[Tensor]:
    """Yield inputs of several sizes and magnitudes, on which only such a module agrees.

    The last ones have no row of the batch, if its forward takes such, and zeros in some places.
    """
    device, dtype = device_and_dtype([module])
    for length, rows, size in (
        (2, 3, 1.0), (3, 1, 30.0), (2, 2, 0.01), (17, 4, 1.0), (2, 1, largest), (4, 2, 1.0)
    ):  # fmt: skip
        x, _, _ = kind.example(length, dtype)
        shape = x.shape if x.size(0) > 1 else (rows, *x.shape[1:])
        if kind.takes_ids:
            x = torch.randint(kind.in_features, shape, device=device)
        else:
            x = torch.randn(shape, dtype=torch.float64).mul(size).to(device, dtype)
        yield x
    if _runs(module, x[0]):
        yield x[0]
    if not kind.takes_ids:
        yield x.index_fill(kind.axis - 1, torch.tensor([0], device=device), 0)


def _runs(module: nn.Module, *args: Tensor) -> bool:
    try:
        run(module, *args)
    except Exception:  # whatever a forward of somebody's own raises on such an input
        return False
    return True


@torch.no_grad()
def acts_by_channel(module: nn.Module, key: str) -> bool:
    """True if the weight of a normalisation scales its output, or the bias shifts it, by channel.

    Args:
        module: one without layers.
        key: "weight" or "bias".
    """
    own, was_training = list(module.parameters()), module.training
    module = alone(module, writes=True)
    try:
        for mode in (False, True):
            for part in module.modules():
                part.training = mode
            with _put_back(module) as written, _in_full_precision(module):
                seed_all()
                given = list(_of_norms(module))
                with _other_values(module):
                    if not _call_keeps(module, given[0]):
                        return False
                if mode > was_training and _differs(module, given[0]):
                    continue  # as dropout is: nobody expects a merge to keep it
                if not all(_is_by_channel(module, key, args) for args in given):
                    return False
                if written.wrote_to(own):
                    return False
        return True
    except Exception:  # whatever a forward of somebody's own raises on such an input
        return False


def _of_norms(module: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """Yield arguments of a normalisation: several lengths and rows, zeros, and all arguments."""
    kind: Any = kind_of(module)
    device, dtype = device_and_dtype([module])
    for length, rows in ((3, 2), (17, 3), (2, 1)):
        first, *others = kind.example(length, dtype)[0].shape
        shape = (first if kind.axis == 0 else rows, *others)  # channels may come first of all
        x = torch.randn(shape, dtype=torch.float64).to(device, dtype)
        yield (x,)
    if kind.axis == -1 and _runs(module, x[0]):
        yield (x[0],)
    yield (x.index_fill(-2 if kind.axis == -1 else -1, torch.tensor([0], device=device), 0),)
    named = list(inspect.signature(type(module).forward).parameters.values())[1:]
    count = sum(p.kind is Parameter.POSITIONAL_OR_KEYWORD for p in named)
    every = (x, *(torch.randn_like(x) for _ in range(count - 1)))
    if count > 1 and _runs(module, *every):
        yield every


def _differs(module: nn.Module, args: tuple[Tensor, ...]) -> bool:
    return not torch.equal(run(module, *args), run(module, *args))


def _is_by_channel(module: nn.Module, key: str, args: tuple[Tensor, ...]) -> bool:
    kind: Any = kind_of(module)
    own: Any = module._parameters
    kept, bias, x = own[key], stored_params(module).get("bias"), args[0]
    before = {name: p.clone() for name, p in own.items() if p is not None}
    by = torch.linspace(-49.5, 50.5, kept.numel(), device=x.device).to(kept.dtype).view(kept.shape)
    shift, each = 0 if bias is None else kind.per_channel(bias, x), kind.per_channel(by, x)
    with torch.set_grad_enabled(module.training):  # a forward may go by it
        plain = run(module, *args).detach()
        wanted = plain + each if key == "bias" else (plain - shift) * each + shift
        if not all(torch.equal(own[name], values) for name, values in before.items()):
            return False  # it writes to them itself
        try:
            own[key] = nn.Parameter(kept + by if key == "bias" else kept * by, False)
            out = run(module, *args).detach()
        finally:
            own[key] = kept
    return _close(out, wanted, plain.dtype)


def _close(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    size = other.float().norm()
    return bool((one.float() - other.float()).norm() <= TOLERANCES.get(dtype, 1e-4) * size)
