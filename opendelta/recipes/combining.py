"""Arithmetic between deltas of any methods, on their changes of the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from .._backbone.backbone import Backbone
from .._deltas.choosing import choose
from .._deltas.committing import commit
from .._deltas.making import make
from .._deltas.order import free_name, known_records
from .._deltas.placing import place
from .._handles.composition import composition
from .._layers.base import Acts, DeltaLayer
from .._modules import tensors
from .._modules.kinds import kind_of
from .._show.notebooks import InNotebooks
from .._sites import merged
from ..errors import OptionError, SiteError, nearest, shown
from ..methods.lora import LoraConfig, LoraLayer, LoraModel

EXACT = 1e-5  # relative; float32 gives about 1e-6
How = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
HOWS: tuple[How, ...] = get_args(How)


@dataclass(frozen=True)
class Combination(InNotebooks):
    """Rank and error of the delta that `combine` made.

    Attributes:
        errors: {full name of a module: |change of its weight - wanted change| / |wanted change|}.
        ranks: {full name of a module: rank of the change there}.
    """

    errors: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda name: self.errors[name])
        exact = sum(error < EXACT for error in self.errors.values())
        return (
            f"{exact} of {len(self.errors)} modules exact, rank up to {max(self.ranks.values())}; "
            f"largest relative error {self.errors[worst]:.2g}, in {worst}"
        )


@tensors.lasting()
def combine(
    model: nn.Module,
    weights: Mapping[Any, float],
    how: How = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    name: str | None = None,
) -> LoraModel:
    """Make a new delta from attached deltas: a weighted sum of their changes of the weights.

    Each delta counts with the change that it would make alone, whatever its method, so that
    "linear" is the true sum of the changes. The new delta is a LoRA, attached and disabled; the
    other deltas stay as they are. Its `combination` has the rank and error for each module.

    Args:
        weights: {a delta or its name: its weight}, positive or negative.
        how: "linear": the sum. "cat": the sum, by low-rank factors side by side; refused if that is
            not exact. "svd": the nearest change of `rank`. "ties" (arXiv:2306.01708): keep the
            share `density` of largest values of each change, elect a sign for each entry, and
            average the values with this sign. "dare_linear", "dare_ties" (arXiv:2311.03099): keep
            each value with probability `density`, scaled up. "magnitude_prune": keep the share
            `density` of largest values, and sum.
        rank: rank of the new delta. None: as high as an exact change needs.
        density: share of kept values, in (0, 1]; the last four ways need it.
        seed: seed of the values that "dare" keeps.
        name: name of the new delta. None: the names joined.

    Raises:
        DeltaError: a name is unknown, a delta does not change weights alone, or nothing is left.
        OptionError: `how`, `rank` or `density` is wrong.

    Example:
        >>> from torch import nn
        >>> import opendelta
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> a = opendelta.LoraModel(model, modified_modules=["0"], lora_r=2, name="a")
        >>> b = opendelta.LokrModel(model, modified_modules=["0"], r=1, name="b")
        >>> opendelta.combine(model, {"a": 0.7, "b": -0.3}).name
        'a_b'
    """
    _check_options(weights, how, rank, density, seed)
    backbone = Backbone.of(model)
    all_of = composition(model)
    chosen = [(all_of[given], float(weight)) for given, weight in weights.items()]
    names = [delta.name for delta, _ in chosen]
    if twice := next((each for each in names if names.count(each) > 1), None):
        raise OptionError(f"combine: weights= names {twice!r} twice, by name and by handle")
    sites: dict[str, list[tuple[DeltaLayer, float]]] = {}
    for delta, weight in chosen:
        for where, layer in delta.layers.items():
            if layer.acts is not Acts.SERVES:
                _check_layer(backbone, where, delta.name, layer)
                sites.setdefault(where, []).append((layer, weight))
    generator = torch.Generator().manual_seed(seed)
    factors, errors = {}, {}
    for where, parts in sites.items():
        factors[where], errors[where] = _combined(
            backbone.modules[where], where, parts, how, rank, density, generator
        )
    ranks = {where: A.size(0) for where, (A, _) in factors.items()}
    delta = _as_lora(model, factors, ranks, name or _joined(backbone, names))
    delta.combination = Combination(errors, ranks)
    return delta


def _joined(backbone: Backbone, names: list[str]) -> str:
    return free_name("_".join(names)[:60], [record.name for record in known_records(backbone)])


def _check_options(
    weights: Mapping[str, float], how: str, rank: Any, density: Any, seed: Any
) -> None:
    for option, value, kind in (
        ("rank", rank, int),
        ("density", density, Real),
        ("seed", seed, int),
    ):
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            kinds = "a number" if kind is Real else "a whole number"
            raise OptionError(f"combine({option}={shown(value)}) must be {kinds}")
    if not isinstance(weights, Mapping):
        raise OptionError(
            "combine: weights must be a mapping {name of a delta: its weight}, not "
            f"{shown(weights)}"
        )
    if how not in HOWS:
        near = nearest(str(how), HOWS)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise OptionError(f"combine(how={how!r}) must be one of {', '.join(HOWS)}{hint}")
    if not weights or not all(map(_is_finite, weights.values())):
        raise OptionError(f"combine takes {{name of a delta: finite weight}}, not {dict(weights)}")
    if how == "svd" and rank is None:
        raise OptionError("combine(how='svd') needs rank=, that of the new delta")
    if rank is not None and rank < 1:
        raise OptionError(f"combine(how={how!r}, rank={rank}): rank must be at least 1")
    sparse = how in ("ties", "dare_linear", "dare_ties", "magnitude_prune")
    if sparse and density is None:
        raise OptionError(f"combine(how={how!r}) needs density=, the share of values to keep")
    if density is not None and sparse and not 0 < density <= 1:
        raise OptionError(f"combine(how={how!r}, density={density}): density must be in (0, 1]")
    if not sparse and density is not None:
        raise OptionError(f"combine(how={how!r}) keeps all values: it takes no density")


def _is_finite(weight: Any) -> bool:
    try:
        return math.isfinite(weight)
    except TypeError:  # no number
        return False


def _check_layer(backbone: Backbone, where: str, name: str, layer: DeltaLayer) -> None:
    kind = kind_of(backbone.modules[where])
    if layer.is_block:
        weights = ", ".join(f"{each!r}: weight" for each in layer.record.config.children)
        raise SiteError(
            f"{where!r}: {name!r} is a block, and what it does depends on the deltas in it: "
            f"combine those instead, {{{weights}}}; or merge",
            where=where,
        )
    if not layer.folds or kind is None or kind.name not in LoraLayer.kinds:
        raise SiteError(
            f"{where!r}: {name!r} ({type(layer).__name__}) does not change a weight matrix "
            "alone, so it has no part in sums of weight changes",
            where=where,
        )


# ------------------------------------------------------------------------------------- the changes
def _change_of(module: nn.Module, where: str, layer: DeltaLayer) -> Tensor:
    """Return the change of a module's weight by one layer; raise if it changes the bias too."""
    change, biased = merged.change_of(where, module, layer)
    if biased:
        raise SiteError(
            f"{where!r}: {layer.record.name!r} ({type(layer).__name__}) changes the bias too, "
            "which a sum of weight changes would lose",
            where=where,
        )
    return change


def _combined(
    module: nn.Module,
    where: str,
    parts: list[tuple[DeltaLayer, float]],
    how: str,
    rank: int | None,
    density: float | None,
    generator: torch.Generator,
) -> tuple[tuple[Tensor, Tensor], float]:
    """Return the factors A [rank, in] and B [out, rank] of a combined change, and their error."""
    wanted = _wanted(module, where, parts, how, density, generator)
    pairs = {layer: layer.folds_as() for layer, _ in parts}
    without = next((layer for layer, pair in pairs.items() if pair is None), None)
    limit = min(wanted.shape) if rank is None and how == "linear" else rank
    if how in ("linear", "cat") and without is None:
        ups = [weight * pairs[layer].scale * pairs[layer].B.to(wanted) for layer, weight in parts]
        A = torch.cat([pair.A.to(wanted) for pair in pairs.values()]).detach()
        B = torch.cat(ups, 1).detach()
        if limit is None or A.size(0) <= limit:
            return (A, B), _error(A, B, wanted)
    if how == "cat":
        reason = f"together they have a rank above {rank}"
        if without is not None:
            reason = f"{without.record.name!r} ({type(without).__name__}) has none"
        raise SiteError(
            f"{where!r}: how='cat' puts low-rank factors side by side, but {reason}; "
            "how='linear' takes any",
            where=where,
        )
    A, B = _truncated(wanted, rank)
    return (A, B), _error(A, B, wanted)


def _error(A: Tensor, B: Tensor, wanted: Tensor) -> float:
    size = wanted.norm()
    return float((B @ A - wanted).norm() / size) if size > 0 else float((B @ A).norm())


def _truncated(matrix: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Return A [rank, in] and B [out, rank] with B A nearest to `matrix`.

    Args:
        rank: the rank. None: the numerical rank of `matrix`, so that B A is exact up to rounding.
    """
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    if rank is None:
        eps = torch.finfo(matrix.dtype).eps * max(matrix.shape)
        rank = max(1, int((S[0] * eps < S).sum()))
    root = S[:rank].sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


def _wanted(
    module: nn.Module,
    where: str,
    parts: list[tuple[DeltaLayer, float]],
    how: str,
    density: float | None,
    generator: torch.Generator,
) -> Tensor:
    """Return the combined change [out, in]."""
    changes = [_change_of(module, where, layer) for layer, _ in parts]
    if how in ("ties", "magnitude_prune"):
        changes = [_largest(change, density or 1.0) for change in changes]
    if how.startswith("dare"):
        changes = [_dropped(change, density or 1.0, generator) for change in changes]
    weighted = torch.stack([w * change for change, (_, w) in zip(changes, parts, strict=True)])
    if how not in ("ties", "dare_ties"):
        return weighted.sum(0)
    sign = weighted.sum(0).sign()
    agree = (weighted.sign() == sign) & (weighted != 0)
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)


def _largest(change: Tensor, density: float) -> Tensor:
    """Keep the share `density` of values that are largest in magnitude; the others become 0."""
    count = max(1, round(density * change.numel()))
    kept = change.abs().flatten().topk(count).indices
    mask = torch.zeros(change.numel(), dtype=torch.bool, device=change.device)
    mask[kept] = True
    return change * mask.view_as(change)


def _dropped(change: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep each value with probability `density`, scaled so that the expectation stays."""
    mask = torch.rand(change.shape, generator=generator) < density
    return change * mask.to(change.device) / density


# ------------------------------------------------------------------------------------ the new delta
def _as_lora(
    model: nn.Module,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    ranks: Mapping[str, int],
    name: str,
) -> LoraModel:
    """Return a LoRA with these factors, attached and disabled."""
    names = list(factors)
    largest = max(ranks.values())
    config = LoraConfig(
        modified_modules=names,
        lora_r=largest,
        lora_alpha=float(largest),
        rank_pattern={where: rank for where, rank in ranks.items() if rank != largest} or None,
        alpha_pattern={w: float(r) for w, r in ranks.items() if r != largest} or None,
        name=name,
    )
    backbone = Backbone.of(model)
    delta = make(backbone, choose(backbone, LoraModel, config))
    with torch.no_grad():
        for where, (A, B) in factors.items():
            layer: Any = delta.layers[where]
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
    delta.record.enabled = False
    commit(place(backbone, delta))
    return cast(LoraModel, delta)
