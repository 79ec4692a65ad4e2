"""Translate LoRA, DoRA and IA3 of the adapters library, which are on the weights they change."""

from __future__ import annotations

import re

from torch import Tensor

from ..._modules.kinds import kind_of
from ..._modules.tensors import stored_params
from .selection import check_selection
from .terms import Part

LETTERS = ("q", "k", "v")


def read(part: Part) -> None:
    """Fill in a part that holds tensors of LoRA or IA3."""
    groups = part.given.pop("loras")
    scale = part.config["composition_mode"] == "scale"
    if part.config["composition_mode"] not in ("add", "scale"):
        raise part.refusal("composition_mode", "it must be 'add' or 'scale'")
    part.method = "ia3" if scale else "lora"
    for path, own in groups.items():
        where = part.resolve(path)
        if where in part.sites:
            raise part.error(f"{path!r} is {where!r}, which has tensors already")
        part.sites[where] = _ia3(part, own, where) if scale else _lora(part, own, where)
        part.check_empty(own, where)
    check_selection(part, part.sites)
    if scale:
        part.options["feedforward_modules"] = []  # all vectors scale the output of a weight
        return
    part.options |= {
        "lora_r": part.whole("r"),
        "lora_alpha": part.number("alpha"),
        "lora_dropout": part.number("dropout"),
        "use_dora": bool(part.config["use_dora"]),
    }


def correct(config: dict, version: object) -> dict:
    """Return the options as their version used them: before adapters 1.1, alpha had no effect."""
    number = re.match(r"adapters\.(\d+)\.(\d+)", str(version))
    if number and (int(number[1]), int(number[2])) < (1, 1) and "r" in config:
        return {**config, "alpha": config["r"]}
    return config


def _outputs(part: Part, where: str) -> int:
    """Return the number of outputs of the linear module `where`."""
    kind = kind_of(part.backbone.modules[where])
    if kind is None or not kind.is_product:
        what = type(part.backbone.modules[where]).__name__
        raise part.error(f"{where!r} ({what}) is no linear module")
    return kind.out_features


def _thirds(part: Part, where: str) -> list[int] | None:
    """Return the changed thirds of a fused projection (0: q, 1: k, 2: v); None if not fused."""
    if part.roles.get(where) != "attn.qkv":
        return None
    given = part.config["attn_matrices"]
    if not isinstance(given, list) or not {*LETTERS} & {x for x in given if isinstance(x, str)}:
        raise part.refusal("attn_matrices", "it must be a list with some of q, k and v")
    return [place for place, letter in enumerate(LETTERS) if letter in given]


def _ia3(part: Part, own: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    outputs, thirds = _outputs(part, where), _thirds(part, where)
    rows = outputs if thirds is None else outputs // 3 * len(thirds)
    vector = part.take(own, "lora_B", rows, 1).flatten()
    if thirds is not None:
        given, vector = vector.chunk(len(thirds)), vector.new_ones(outputs)
        for place, third in zip(thirds, given, strict=True):
            vector[place * len(third) :][: len(third)] = third
    return {"ia3_l": vector * part.number("alpha")}


def _lora(part: Part, own: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    outputs, thirds, r = _outputs(part, where), _thirds(part, where), part.whole("r")
    if thirds is not None:
        return _fused(part, own, where, thirds)
    out = {"lora_A": part.take(own, "lora_A", r, -1), "lora_B": part.take(own, "lora_B", -1, r)}
    if part.config["use_dora"]:
        if part.number("alpha") != r:
            raise part.refusal("use_dora", "its norm leaves out alpha / r, which must be 1")
        if "bias" in stored_params(part.backbone.modules[where]):
            raise part.refusal("use_dora", f"it scales the bias of {where!r} too, as no delta does")
        out["lora_magnitude_vector"] = part.take(own, "m.weight", outputs, 1).flatten()
    return out


def _fused(part: Part, own: dict[str, Tensor], where: str, thirds: list[int]) -> dict[str, Tensor]:
    """Turn LoRA on some thirds of a fused projection into one LoRA of higher rank on all of it."""
    if part.config["use_dora"]:
        raise part.refusal("use_dora", f"{where!r} is a fused projection")
    r, n, rows = part.whole("r"), len(thirds), _outputs(part, where) // 3
    A = part.take(own, "lora_A", n * r, -1)
    B = part.take(own, "lora_B", n * rows, r)
    whole = B.new_zeros(3 * rows, n * r)
    for block, (place, third) in enumerate(zip(thirds, B.chunk(n), strict=True)):
        whole[place * rows : (place + 1) * rows, block * r : (block + 1) * r] = third
    part.options.setdefault("rank_pattern", {})[where] = n * r
    part.options.setdefault("alpha_pattern", {})[where] = n * part.number("alpha")
    return {"lora_A": A, "lora_B": whole}
