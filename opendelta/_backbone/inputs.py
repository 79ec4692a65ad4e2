"""Find inputs on which a backbone, or one module of it, runs on shapes alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._modules.calls import map_tensors
from .._modules.kinds import Embedding, Kind, kind_of
from ..names import is_inside
from .backbone import Backbone

# What users give: arguments by keyword, by position, or one tensor.
Samples = Mapping[str, Any] | Sequence[Any] | Tensor
Inputs = tuple[tuple, dict[str, Any]]  # the arguments of a call, by position and by keyword
LENGTH = 3  # number of tokens
SAMPLES = 4000  # of a waveform


def blank(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return zeros that all lie in one place of memory: runs on shapes read no values."""
    return torch.zeros(1, dtype=dtype).expand(shape)


def of_samples(samples: Samples) -> Inputs:
    """Return the arguments in the user's `sample_inputs`: a mapping, a sequence, or one tensor.

    What was made inside `torch.inference_mode()`, where no gradients flow, is copied.
    """
    samples = map_tensors(lambda t: t.clone() if t.is_inference() else t, samples)
    if isinstance(samples, Mapping):
        return (), dict(samples)
    return ((samples,) if isinstance(samples, Tensor) else tuple(samples)), {}


def of_backbone(backbone: Backbone) -> Iterator[tuple[str, tuple, dict[str, Any]]]:
    """Yield (name of the module to run, args, kwargs) to try, the likeliest first.

    The user's `sample_inputs` are the only ones if they are given. Else these are those that the
    user gave before, the `dummy_inputs` of the model or of models inside it, inputs made from a
    transformers config, and an input for the first layer.
    """
    if backbone.samples is not None:
        yield "", *of_samples(backbone.samples)
        return
    if backbone.before is not None:
        yield "", *of_samples(backbone.before)
    inner: list[str] = []
    for name, module in backbone.modules.items():
        if isinstance(getattr(module, "dummy_inputs", None), dict):
            inner.append(name)
    outermost = [n for n in inner if not any(is_inside(n, other) for other in inner)]
    for name in sorted(inner, key=lambda n: n not in outermost):
        for kwargs in _of_model(backbone.modules[name]):
            yield name, (), kwargs
    first = next((k for m in backbone.modules.values() if (k := kind_of(m)) is not None), None)
    if first is not None:
        yield "", (_of_kind(first),), {}


def _of_kind(kind: Kind) -> Tensor:
    """Return an input of a model whose first layer is of this kind."""
    if isinstance(kind, Embedding):
        return blank(1, LENGTH, dtype=torch.long)
    if hasattr(kind, "patch"):
        return blank(1, kind.patch[0], 32, 32)
    return blank(1, LENGTH, kind.in_features or kind.out_features)


def _of_model(model: Any) -> Iterator[dict[str, Any]]:
    """Yield the inputs by keyword of a model that has `dummy_inputs`."""
    dummy, known = dict(model.dummy_inputs), _known(getattr(model, "config", None))
    main = str(getattr(model, "main_input_name", None))  # OneFormer has a list of names
    takes = inspect.signature(model.forward).parameters
    fitting = {key: value for key, value in known.items() if key in takes}
    if main in fitting:
        yield {main: fitting[main]}
    if dummy.keys() <= takes.keys() or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        yield dummy
    if fitting:
        yield fitting


def _known(config: Any) -> dict[str, Tensor]:
    """Return inputs of a transformers model by keyword, in the sizes that its config gives."""
    if config is None:
        return {}

    def of(name: str, default: Any = 1) -> Any:
        inner = (getattr(config, part, None) for part in ("vision_config", "audio_config"))
        known = [c for c in (config, *inner) if getattr(c, name, None) is not None]
        return getattr(known[0], name) if known else default

    side = of("image_size", 224)
    height, width = side if isinstance(side, list | tuple) else (side, side)
    ids = blank(1, LENGTH, dtype=torch.long)
    mels, past = of("num_mel_bins", None), of("context_length") + max(of("lags_sequence", [0]))
    features = of("feature_projection_input_dim", None) or of("input_feat_per_channel", mels)
    sound = blank(1, SAMPLES)
    spectrum = blank(1, of("max_length", 1024), mels or 1)  # AST's "input_values"
    frames = blank(1, 16, features or 1)
    if of("max_source_positions", None) and mels:  # Whisper's
        frames = blank(1, mels, 2 * of("max_source_positions"))
    if size := of("spec_size", 0):  # CLAP's, of one channel
        frames = blank(1, 1, size * (size // (mels or 1)), mels or 1)
    ahead, channels = of("prediction_length"), of("num_input_channels", 0) or of("input_size", 1)
    series = (channels,) if channels > 1 or of("num_input_channels", None) else ()
    return {
        "input_ids": ids,
        "decoder_input_ids": ids,
        "pixel_values": blank(1, of("num_channels", 3), height, width),
        "input_values": spectrum if mels else sound,
        "input_features": frames,
        "past_values": blank(1, past, *series),
        "past_time_features": blank(1, past, of("num_time_features", 0)),
        "past_observed_mask": blank(1, past, *series),
        "future_values": blank(1, ahead, *series),
        "future_time_features": blank(1, ahead, of("num_time_features", 0)),
        "states": blank(1, LENGTH, of("state_dim")),
        "actions": blank(1, LENGTH, of("act_dim")),
        "rewards": blank(1, LENGTH, 1),
        "returns_to_go": blank(1, LENGTH, 1),
        "timesteps": ids,
    }


def of_module(module: nn.Module) -> Iterator[Inputs]:
    """Yield inputs to try on one module alone: hidden states of its first linear layer's width.

    They are [1, length, width] and, as in packed vision models, [length, width]. Other arguments
    without default get what attention modules of transformers take, and at last hidden states.
    """
    kinds = [kind_of(part) for part in module.modules() if part is not module]
    sized = (kind for kind in kinds if kind is not None and kind.name != "convolution")
    first = next(sized, None)
    if first is None or not first.is_product:
        return
    width = first.in_features
    head = getattr(module, "head_dim", None)
    if not isinstance(head, int):
        heads = getattr(module, "num_heads", None)
        head = width // heads if isinstance(heads, int) and heads else width
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needed = [p.name for p in by_name if p.default is p.empty]
    for others in (False, True):
        for rows in ((1, LENGTH), (LENGTH,)):
            angles, hidden = blank(*rows, head), blank(*rows, width)
            known: dict[str, Any] = {
                "position_embeddings": (angles, angles),
                "cu_seqlens": torch.tensor([0, LENGTH], dtype=torch.int32),
            }
            given = {name: hidden if others and "mask" not in name else None for name in needed}
            given |= {p.name: known[p.name] for p in by_name if p.name in known}
            yield (hidden,), given
        if not needed:
            return
