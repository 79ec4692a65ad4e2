"""The last step of reading one of PEFT's methods, for the methods that need one."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from ..._modules.kinds import kind_of
from .._files import repeats_too_much
from .terms import PATTERNS, PROJECTIONS, Adapter, conv_problem, norm_terms


def matcher(adapter: Adapter, name: str, pattern: Any, form: str = "{}") -> re.Pattern[str]:
    """Put a regular expression of the JSON into `form`; refuse one that could run forever."""
    try:
        if repeats_too_much(pattern):
            raise adapter.refusal(name, f"{pattern!r} repeats too much; write names of modules")
        return re.compile(form.replace("{}", pattern))
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise adapter.refusal(name, f"{pattern!r} is no regular expression: {error}") from None


def _finish_patterns(adapter: Adapter) -> None:
    """Give each module the rank and alpha of the first pattern that fits the end of its name."""
    for name in PATTERNS:
        given = adapter.config.get(name) or {}
        number = int if name == "rank_pattern" else int | float
        if not isinstance(given, dict) or not all(
            isinstance(value, number) and not isinstance(value, bool) for value in given.values()
        ):
            raise adapter.refusal(name, "it must give patterns numbers")
        tests = [(matcher(adapter, name, k, r"(.*\.)?({})$"), v) for k, v in given.items()]
        values = {
            where: next((value for test, value in tests if test.match(where)), None)
            for where in adapter.sites
        }
        adapter.options[name] = {w: v for w, v in values.items() if v is not None} or None
    for where, own in adapter.sites.items():
        if why := conv_problem(adapter.name, adapter.backbone.modules[where]):
            raise adapter.error(f"{where!r}: {why}")
        for key, tensor in own.items():
            vector = key == "lora_magnitude_vector"
            own[key] = tensor.flatten() if vector else _matrix(tensor)


def _matrix(tensor: Tensor) -> Tensor:
    """Flatten the weight of a convolution into a matrix."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def _finish_ia3(adapter: Adapter) -> None:
    given = adapter.config.get("feedforward_modules") or []
    if isinstance(given, str):
        test = matcher(adapter, "feedforward_modules", given)
        before = [where for where in adapter.sites if test.fullmatch(where)]
    elif isinstance(given, list) and all(isinstance(end, str) for end in given):
        before = [where for where in adapter.sites if where.endswith(tuple(given))]
    else:
        raise adapter.refusal("feedforward_modules", "it must be a list of names")
    adapter.options["feedforward_modules"] = before
    for where, own in adapter.sites.items():
        tensor = own["ia3_l"]
        if tensor.ndim == 2 and tensor.size(0 if where in before else 1) == 1:
            own["ia3_l"] = tensor.flatten()


def _finish_oft(adapter: Adapter) -> None:
    """Find the block size from the tensors: PEFT may have adjusted its field for each module."""
    number = re.match(r"(\d+)\.(\d+)", str(adapter.config.get("peft_version")))
    old = number is None or (int(number[1]), int(number[2])) < (0, 18)
    if "oft_block_size" not in adapter.config or (old and adapter.options["use_cayley_neumann"]):
        raise adapter.refusal(
            "peft_version", "PEFT before 0.18 computed this OFT otherwise; train it anew"
        )
    columns = {where: own["oft_R"].shape[-1:].numel() for where, own in adapter.sites.items()}
    sizes = {where: (1 + math.isqrt(1 + 8 * n)) // 2 for where, n in columns.items()}
    limit = adapter.options["oft_block_size"] = max(sizes.values())
    for where, size in sizes.items():
        width = getattr(kind_of(adapter.backbone.modules[where]), "in_features", size)
        ours = next(b for b in range(min(limit, width), 0, -1) if width % b == 0) if width else size
        if ours != size:
            raise adapter.error(
                f"its blocks have different sizes: {size} on {where!r}, where {ours} goes with "
                f"{limit} elsewhere. No delta has such; train with an oft_block_size that divides "
                "all inputs"
            )


def _finish_vera(adapter: Adapter) -> None:
    around = adapter.backbone.innermost_around(list(adapter.sites))
    for name in PROJECTIONS:
        if name in adapter.others:
            adapter.others[adapter.key(around, f"tensors.{name}")] = adapter.others.pop(name)


def _finish_ln(adapter: Adapter) -> None:
    """Turn PEFT's new weights and biases into changes of the model's weights and biases."""
    for where, own in adapter.sites.items():
        offset, base = norm_terms(adapter.backbone, where)
        if offset is None:
            what = type(adapter.backbone.modules[where]).__name__
            raise adapter.error(f"{where!r} ({what}) is no normalisation that scales by its weight")
        old, new = base["weight"] + offset, own.get("scale", torch.zeros(0)).cpu().double() + offset
        if old.shape != new.shape:
            continue  # a tensor is missing or has another shape: opendelta.load will say so
        if lost := int(((old == 0) & (new != 0)).sum()):
            raise adapter.error(
                f"{where!r}: {lost} weights are exactly 0 in this model but not in the adapter, so "
                "no factor leads from one to the other; use PEFT for this one"
            )
        dtype = torch.promote_types(own["scale"].dtype, torch.float32)
        scale = torch.where(old == 0, torch.ones_like(old), new / old)
        own["scale"] = scale.to(dtype)
        if "bias" in own and "bias" in base and own["bias"].shape == old.shape:
            own["bias"] = (own["bias"].cpu().double() - base["bias"] * scale).to(dtype)


FINISH = {
    "lora": _finish_patterns,
    "loha": _finish_patterns,
    "lokr": _finish_patterns,
    "ia3": _finish_ia3,
    "oft": _finish_oft,
    "vera": _finish_vera,
    "ln_tuning": _finish_ln,
}
