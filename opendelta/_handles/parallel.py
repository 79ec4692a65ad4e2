"""Run a model for several sets of deltas, with one forward of its backbone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from .._backbone.backbone import Backbone
from .._modules import calls
from .._modules.detours import detour
from .._sites.rows import cut
from .._texts.arguments import EMBEDDED
from ..errors import DeltaError, OptionError, SiteError
from .delta import Delta
from .route import Row, routed

IMAGES = "pixel_values", "image_", "video_"  # of all images of a batch, in the order of the rows


class _Reached(BaseException):
    """The backbone has run; what comes after it has not."""

    def __init__(self, output: Any) -> None:
        self.output = output


def parallel(
    model: nn.Module,
    sets: Sequence[Row],
    /,
    *,
    own: Mapping[int | str | Delta, Mapping[str, Any]] | None = None,
    **batch: Any,
) -> list[Any]:
    """Run `model` for several sets of deltas; return the output of each, with its head and loss.

    The backbone (`model.base_model` of transformers) runs once, on n times the rows for n sets.
    Then the rest of the model, such as the head, runs for each set by itself. So heads may have
    different numbers of labels. Gradients of all outputs reach each set's deltas. No KV cache is
    filled: the outputs have no `past_key_values`.

    Args:
        model: a transformers model, or any other, which then runs once as a whole.
        sets: each set is what one row of `route` may be: a name or a handle, several of them,
            {name: weight}, or None for the plain backbone.
        own: arguments of one set that replace those of the batch: {place of the set, or the name or
            handle of a delta that only one set has: {argument: value}}.
        batch: the arguments of the model's forward, by name.

    Raises:
        OptionError: `own` names no set.
        DeltaError: as for `route`; a KV cache is given or asked for; or the arguments of the sets
            do not fit into one batch.

    Example:
        >>> import torch, transformers
        >>> import opendelta
        >>> sizes = dict(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
        >>> config = transformers.BertConfig(**sizes, intermediate_size=8)
        >>> model = transformers.BertForSequenceClassification(config)
        >>> for name, count in (("topic", 3), ("tone", 5)):
        ...     _ = opendelta.LoraModel(
        ...         model, modules_to_save=["classifier"], num_labels=count, name=name
        ...     )
        >>> topic, tone = opendelta.parallel(
        ...     model, ["topic", "tone"], input_ids=torch.tensor([[1, 2, 3]])
        ... )
        >>> topic.logits.shape, tone.logits.shape
        (torch.Size([1, 3]), torch.Size([1, 5]))
    """
    batches = _batches(model, sets, own or {}, batch)
    counts = [_rows_of(model, each) for each in batches]
    rows = [row for row, count in zip(sets, counts, strict=True) for _ in range(count)]
    base = getattr(model, "base_model", model)
    if base is model:
        out = _whole(model, rows, batches, counts)
    else:
        out = _backbone(model, base, rows, batches, counts)
    outputs: list[Any] = []
    start = 0
    for row, each, count in zip(sets, batches, counts, strict=True):
        part = cut(out, sum(counts), slice(start, start + count))
        start += count
        if base is not model:
            with routed(model, [row] * count), detour(base, lambda *_, part=part, **__: part):
                part = model(**each)
        outputs.append(part)
    return outputs


def _batches(
    model: nn.Module,
    sets: Any,
    own: Mapping[int | str | Delta, Mapping[str, Any]],
    batch: dict[str, Any],
) -> list[dict[str, Any]]:
    """Return the arguments of each set."""
    if isinstance(sets, str | Mapping) or not isinstance(sets, Sequence) or not sets:
        raise DeltaError(
            "parallel(model, sets) takes a list of sets, such as [['a', 'head_a'], ['b'], None], "
            f"not {sets!r}"
        )
    batches = [dict(batch) for _ in sets]
    for key, arguments in own.items():
        key = key.name if isinstance(key, Delta) else key
        at = [i for i, row in enumerate(sets) if key == i or key in _names(row)]
        if len(at) != 1:
            raise OptionError(
                f"parallel(own={{{key!r}: ...}}) must name one of {len(sets)} sets, by its place "
                f"or by a delta that no other has; it names {len(at)}"
            )
        if not isinstance(arguments, Mapping):
            raise OptionError(
                f"parallel(own={{{key!r}: ...}}) must give the set's arguments by name, such as "
                f'{{"labels": labels}}, not a {type(arguments).__name__}'
            )
        batches[at[0]].update(arguments)
    for each in batches:
        for name in ("past_key_values", "use_cache"):
            if each.get(name) is not None and each[name] is not False:
                raise DeltaError(
                    f"parallel({name}=...) takes no KV cache, and its outputs have no "
                    "past_key_values: leave it out; to generate, give each set's rows to route()"
                )
        if "use_cache" in signature(model.forward).parameters:
            each["use_cache"] = False
    return batches


def _names(row: Row) -> list[str]:
    several: Any = row if isinstance(row, Collection) and not isinstance(row, str) else [row]
    return [each.name if isinstance(each, Delta) else each for each in several]


def _whole(
    model: nn.Module, rows: list[Row], batches: list[dict[str, Any]], counts: list[int]
) -> Any:
    """Run a model that has no backbone inside, once as a whole."""
    if any(each.get("labels") is not None for each in batches):
        raise OptionError(
            f"{type(model).__name__} has no base_model, so it runs once as a whole and has one "
            "loss for all sets: leave labels= out, and compute each loss from its output"
        )
    with routed(model, rows):
        return model(**_joined(model, batches, counts))


def _backbone(
    model: nn.Module,
    base: nn.Module,
    rows: list[Row],
    batches: list[dict[str, Any]],
    counts: list[int],
) -> Any:
    """Run `model` on the rows of all sets up to the end of its backbone; return its output."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        batches = [{k: v for k, v in each.items() if k != "labels"} for each in batches]
    name = next(n for n, m in Backbone.of(model).modules.items() if m is base)
    mine = ContextVar("mine", default=False)

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        if mine.get():
            raise _Reached(output)

    hook, token = base.register_forward_hook(stop), mine.set(True)
    try:
        with routed(model, rows, inside=name):
            model(**_joined(model, batches, counts))
    except _Reached as reached:
        return reached.output
    finally:
        mine.reset(token)
        hook.remove()
    raise SiteError(
        f"{type(model).__name__} does not call its base_model, so its head cannot run by itself: "
        "call it for each set inside composition(model).only(...)"
    )


def _rows_of(model: nn.Module, batch: dict[str, Any]) -> int:
    """Return the number of rows: that of the model's main input, wherever the caller writes it."""
    first = (getattr(model, "main_input_name", ""), *EMBEDDED, *signature(model.forward).parameters)
    names = [name for name in first if name in batch]
    tensors = [t for t in calls.every(Tensor, [batch[n] for n in (*names, *batch)]) if t.ndim]
    if not tensors:
        raise DeltaError("parallel() needs a batch, such as input_ids=...: it has no tensor")
    return tensors[0].size(0)


def _joined(
    model: nn.Module, batches: Sequence[dict[str, Any]], counts: Sequence[int]
) -> dict[str, Any]:
    """Join the arguments of all sets: tensors with the rows of their set, one below the other."""
    if len({frozenset(each) for each in batches}) > 1:
        raise DeltaError(
            f"parallel(): the sets have different arguments: {[sorted(each) for each in batches]}; "
            "give all of them the same ones"
        )
    joined: dict[str, Any] = {}
    for key in batches[0]:
        parts = [each[key] for each in batches]
        alike = [p is parts[0] or (not isinstance(p, Tensor) and p == parts[0]) for p in parts]
        axis = _axis_of_rows(key, parts, counts)
        if axis is not None and len({p.movedim(axis, 0).shape[1:] for p in parts}) == 1:
            joined[key] = torch.cat(parts, axis)
        elif axis is None and all(alike) and not _is_of_some(key, parts[0], counts):
            joined[key] = parts[0]
        else:
            shown = [list(p.shape) if isinstance(p, Tensor) else p for p in parts]
            raise DeltaError(
                f"parallel(): the sets have {key}= {shown} for {list(counts)} rows, which fit into "
                f"no one batch of a {type(model).__name__}: pad them to one length, or give all "
                "sets the same"
            )
    return joined


def _axis_of_rows(key: str, parts: Sequence[Any], counts: Sequence[int]) -> int | None:
    """Return the axis along which an argument of all sets is joined; None: it has no rows."""
    if not all(isinstance(part, Tensor) and part.ndim for part in parts):
        return None
    if key.startswith(IMAGES):
        return 0
    axis = _batch_axis(key, parts[0])
    rows = [part.size(axis) for part in parts]
    return axis if rows == list(counts) else None


def _batch_axis(key: str, part: Tensor) -> int:
    """Return the axis of the rows; positions in images have three numbers before it."""
    return 1 if key == "position_ids" and part.ndim == 3 else 0


def _is_of_some(key: str, part: Any, counts: Sequence[int]) -> bool:
    """True if a tensor that all sets share has the rows of some sets, and not those of others."""
    if not isinstance(part, Tensor) or not part.ndim:
        return False
    return part.size(_batch_axis(key, part)) in {*counts} - {1}
