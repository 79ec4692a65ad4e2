"""Read a state dict of OpenDelta 0.3 into the deltas of a model."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..._backbone.backbone import Backbone, attached_records
from ..._deltas.base import BaseDelta
from ..._deltas.order import handle_of, known_records
from ..._deltas.state_dict import all_inside
from ..._deltas.state_loading import TRANSLATORS
from ..._files.reading import as_path, undamaged
from ..._files.tensors import copy_into
from ...errors import DeltaLoadError, OptionError, listed, shown
from ...names import parent
from .._draft import has_values, named
from .._files import read_pickle
from .content import KEY, NETWORK, PROMPT, Content, content_of, own_names


def load_state_dict(model: nn.Module, path: str | os.PathLike) -> None:
    """Copy the tensors of several deltas of OpenDelta 0.3 into the same deltas on `model`.

    The file was written by `torch.save(model.state_dict(), path)`: the documentation of 0.3 saved
    a composition so. First attach the same deltas in the same order. Give SoftPromptModel
    strip=False, as 0.3 did not strip.

    Args:
        model: carries the deltas; the values of other trainable tensors of it are copied too.

    Raises:
        DeltaLoadError: the file's tensors do not fit these deltas. Nothing is copied then.
    """
    source = as_path(path, "path", hint="; the model comes first, then the path")
    if not isinstance(model, nn.Module):
        raise OptionError(f"model must be a torch.nn.Module, not {shown(model)}")
    found = Backbone.of(model)
    deltas = [handle_of(found, record) for record in known_records(found)]
    if not deltas:
        raise DeltaLoadError(
            f"{source} holds tensors of deltas, but this {type(model).__name__} has none: attach "
            "the deltas that it was saved from first, in the same order"
        )
    with undamaged(source):
        into, given = _matched(source, found, deltas)
    copy_into(into, given, str(source))


def _matched(
    source: Path, backbone: Backbone, deltas: Iterable[BaseDelta]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the model's tensors by our full names, and the values for them in a file."""
    content = content_of(read_pickle(source))
    counts: dict[tuple[str, str], int] = defaultdict(int)
    into: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    for delta in deltas:
        _check_prompt(content, delta)
        into |= delta.state_dict()
        given |= _of_delta(delta, backbone, content, counts)
    unused = {
        f"{where}.{kind}": value
        for (kind, _), part in content.sites.items()
        for where, own in part.items()
        for value in own.values()
    }
    of_backbone, own = _of_backbone(source, backbone, content.others), backbone.tensors()
    into |= {key: own[key] for key in of_backbone if key in own}
    return into, {**given, **of_backbone, **unused}


def _renamed(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Give the tensors of deltas in a state dict of OpenDelta 0.3 the names that they have here.

    Plain biases of its BitFit are the backbone's, and stay so where the module has a bias.

    Raises:
        DeltaLoadError: the model has no delta for some of them, or one with other results.
    """
    theirs = any(e.fullmatch(key) for key in state for e in (KEY, NETWORK, PROMPT))
    inside = all_inside(model)
    if not theirs and inside is not None and all(r.config.delta_type != "bitfit" for r in inside):
        return state
    backbone = Backbone.of(model)
    content, counts = content_of(state), defaultdict[tuple[str, str], int](int)
    biases = {k for k in content.others if k.endswith(".bias") and _has_none(backbone, k)}
    if not theirs and not biases:
        return state
    others = {key: value for key, value in content.others.items() if key not in biases}
    content.others = {key: content.others[key] for key in biases}
    given: dict[str, Tensor] = {}
    for record in attached_records(model):
        delta = handle_of(backbone, record)
        _check_prompt(content, delta)
        given |= _of_delta(delta, backbone, content, counts)
    if left := [f"{n} ({kind})" for (kind, _), part in content.sites.items() for n in part]:
        raise DeltaLoadError(
            f"the state dict is OpenDelta 0.3's, and this {type(model).__name__} has no "
            f"delta for {listed(left)}: attach the same deltas in the same order, with these names "
            "as modified_modules"
        )
    return {**others, **content.others, **given}


def _has_none(backbone: Backbone, key: str) -> bool:
    """True if `key` is the bias of a module that has no bias."""
    module = backbone.modules.get(parent(key))
    return module is not None and module._parameters.get("bias") is None


def _check_prompt(content: Content, delta: BaseDelta) -> None:
    """Raise if a prompt of 0.3, which stays in the output, is for a delta that takes it out."""
    if content.prompt is None or delta.delta_type != "soft_prompt":
        return
    if delta.config.strip:  # type: ignore[attr-defined]
        raise DeltaLoadError(
            f"OpenDelta 0.3 left prompts in the output, and {delta.name!r} takes its own out: make "
            "it by SoftPromptModel(..., strip=False)"
        )


TRANSLATORS.append(_renamed)


def _of_delta(
    delta: BaseDelta, backbone: Backbone, content: Content, counts: dict[tuple[str, str], int]
) -> dict[str, Tensor]:
    """Take the tensors of a delta out of `content` and return them by our full names.

    Args:
        counts: {(method, module): layers that earlier deltas have there}; this delta is added.
    """
    kind, wanted = delta.delta_type, list(dict.fromkeys(delta.modified_modules))
    sites: dict[str, dict[str, Tensor]] = {}
    for where in wanted:
        nth = counts[kind, where]
        counts[kind, where] += 1
        part = content.sites.get((kind, nth), {})
        # We put a prefix on the attention module, 0.3 put it on the module around.
        around = (n for n in part if where == n or (kind == "prefix" and where.startswith(f"{n}.")))
        if (theirs := next(around, None)) is not None:
            sites[where] = part.pop(theirs)
        if kind == "bitfit" and (key := f"{where}.bias") in content.others:
            sites.setdefault(where, {})["whole"] = content.others.pop(key)
    return named(own_names(kind, backbone, content, sites, wanted), delta.name)


def _of_backbone(source: Path, backbone: Backbone, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the trainable tensors of the backbone, which are to be copied.

    A tensor that does not fit the model is returned too, for `copy_into` to refuse.

    Raises:
        DeltaLoadError: a frozen tensor differs from the model's.
    """
    own = backbone.tensors()
    copied = {}
    for key, tensor in given.items():
        there = own.get(key)
        if there is None or there.shape != tensor.shape or there.requires_grad:
            copied[key] = tensor
        elif not has_values(there, tensor):
            raise DeltaLoadError(
                f"{source} brings other values for {key!r}, which is frozen here: it was saved "
                "from another backbone, or trained it: make it trainable to take them"
            )
    return copied
