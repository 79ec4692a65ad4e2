"""Write deltas as adapters of PEFT."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._backbone import copying
from ..._backbone.backbone import Backbone
from ..._deltas.base import BaseDelta
from ..._deltas.buffers import saved
from ..._files import folder as files
from ..._files.reading import as_path, read_start
from ..._layers.base import Acts
from ..._modules.kinds import TransposedLinear, kind_of
from ..._modules.tensors import full
from ..._sequences.layout import is_read_by_ids
from ..._sites import swap
from ...errors import DeltaError, listed, to_the_end
from ...names import unwrapped
from .._draft import CONFIG
from .terms import (
    ALPHAS,
    HEADS,
    METHODS,
    PATTERNS,
    PEFT_VERSION,
    PREFIX,
    PROJECTIONS,
    PROMPT,
    PROMPT_PREFIX,
    TASKS,
    WEIGHTS,
    conv_problem,
    norm_terms,
)


def save(delta: BaseDelta, folder: str | os.PathLike) -> None:
    """Write a delta into `folder` as an adapter that PEFT and transformers read.

    Such files do not say if the delta is active, or which tensors train. A LoRA that started from
    the weights ("pissa", "olora") gets twice the rank: the other half subtracts its start.

    Args:
        folder: it is made if need be; an adapter of PEFT in it is replaced.

    Raises:
        DeltaError: `delta` is no delta, or PEFT has no such delta, or the folder holds other files.
    """
    if not isinstance(delta, BaseDelta):
        raise DeltaError(
            f"peft.save takes a delta, not a {type(delta).__name__}: a folder of PEFT's holds just "
            "one. Name it: peft.save(composition(model)['name'], folder)"
        )
    path, backbone = as_path(folder, "folder"), Backbone.of(delta.backbone_model)
    with files.writable(path):
        _check_free(path)
    _check_writable(delta, backbone)
    names, owned = _owned_by_peft(delta, backbone)
    config = {
        "peft_type": METHODS[delta.delta_type].peft_type,
        "task_type": _task(delta),
        "base_model_name_or_path": getattr(
            getattr(backbone.model, "config", None), "_name_or_path", None
        ) or None,
        "peft_version": PEFT_VERSION,
        "inference_mode": True,
        "modules_to_save": names or None,
        **_config_of(delta, backbone),
    }  # fmt: skip
    tensors = {**_tensors(delta, backbone), **owned}
    whole = {key: full(tensor).detach() for key, tensor in tensors.items()}
    files.check_values(whole)
    with files.writable(path), files.made(path):
        _write(path, config, whole)


def _write(path: Path, config: dict[str, Any], whole: dict[str, Tensor]) -> None:
    """Replace the adapter in a folder.

    Up to the moment in which its two files are renamed the old adapter stays. In that moment there
    is none: an old config must not be read with new weights.
    """
    with (
        files.locked(path) as alone,
        files.replacing(path) as (weights, put_weights),
        files.replacing(path) as (new, put_config),
    ):
        files.write_tensors(weights, whole)
        new.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for each in (weights, new):
            files.flush(each)

        def put() -> None:
            if new.exists():
                (path / CONFIG).unlink(missing_ok=True)
            put_weights(WEIGHTS)
            put_config(CONFIG)

        to_the_end(put)
        if alone:
            files.clear_left(path)


def _check_free(folder: Path) -> None:
    files.check_folder(folder)
    if (folder / files.CONFIG).exists():
        raise DeltaError(
            f"{folder} has a {files.CONFIG}, so it is a model's or another delta's; save into a "
            "folder of its own"
        )
    path = folder / CONFIG
    with contextlib.suppress(FileNotFoundError):  # another process may be saving
        if b'"peft_type"' not in read_start(path):
            raise DeltaError(f"{path} is not PEFT's; save into a folder of its own")


def _check_writable(delta: BaseDelta, backbone: Backbone) -> None:
    """Raise if PEFT has no such delta."""
    name, config = delta.delta_type, delta.config
    what = f"{delta.name!r} cannot be written for PEFT: "
    if config.children:
        raise DeltaError(
            f"{what}it has no blocks; write the deltas in it one by one: {listed(config.children)}"
        )
    if name not in METHODS:
        raise DeltaError(f"{what}it has no {name!r}; it has {', '.join(METHODS)}")
    if not delta.modified_modules:
        raise DeltaError(f"{what}it has no copies (modules_to_save) without layers beside them")
    if config.gate:
        raise DeltaError(f"{what}it has no gates; make the delta with gate=False")
    if delta.scale != 1 and not ALPHAS & METHODS[name].options.keys():
        raise DeltaError(f"{what}its {name!r} has no scale; set delta.scale = 1")
    if brought := saved(backbone, [delta.record]):
        raise DeltaError(
            f"{what}its folders hold nothing of the backbone that was trained in place "
            f"({listed(brought)}); use modules_to_save"
        )
    for where in delta.modified_modules:
        module = backbone.modules[where]
        kind, conv1d = kind_of(module), type(module).__name__ == "Conv1D"
        why = conv_problem(name, module)
        if unwrapped(where) != where:
            why = "it is inside a wrapper such as torch.compile's; write it from the plain model"
        if swap.weight_is_read(module, config.reads):
            why = "its weight is read by the module around it, which PEFT's layer is not asked for"
        turned = isinstance(kind, TransposedLinear)
        if turned and getattr(config, "use_dora", False) and not conv1d:
            why = f"PEFT's DoRA takes no {type(module).__name__}, whose weight is [in, out]"
        if turned and name in ("loha", "lokr", "oft"):
            why = f"PEFT's {name} takes no {'Conv1D' if conv1d else type(module).__name__}"
        if why or (not where and name != "soft_prompt"):
            raise DeltaError(f"{what}{where!r}: {why or 'PEFT changes no model as a whole'}")
    layers: Any = delta.layers
    stripped = name == "soft_prompt" and layers[delta.modified_modules[0]].strip
    apart = stripped and not is_read_by_ids(backbone.modules, delta.modified_modules[0])
    if apart and _task(delta) != "CAUSAL_LM":
        raise DeltaError(f"{what}its prompts stay in what the model gives; use strip=False")


def _task(delta: BaseDelta) -> str | None:
    """Return PEFT's name of the model's task, such as "CAUSAL_LM", or None.

    For most tasks PEFT adds a head to the saved modules: so a delta names such a task only if it
    owns that head, and a prompt always, as the head is written with it.
    """
    model: Any = delta.backbone_model
    config = getattr(model, "config", None)
    name = next((t for end, t in TASKS.items() if type(model).__name__.endswith(end)), None)
    if delta.delta_type != "soft_prompt":
        heads, own = HEADS.get(name or "", []), delta.config.modules_to_save or []
        ends = [each for each, _ in model.named_modules() if heads and each.endswith((*heads,))]
        owned = bool(ends) and all(each.endswith((*own,)) for each in ends)
        return name if name == "CAUSAL_LM" or owned else None
    default = "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else None
    return name or default or "FEATURE_EXTRACTION"


def _owned_by_peft(delta: BaseDelta, backbone: Backbone) -> tuple[list[str], dict[str, Tensor]]:
    """Return the modules that PEFT will own and their tensors by PEFT's key.

    PEFT owns each module whose name ends with an entry of modules_to_save.

    Raises:
        DeltaError: one such module is inside another, or has a layer of the delta inside.
    """
    prompt = delta.delta_type == "soft_prompt"
    own = delta.config.modules_to_save or []
    ends = (*own, *(HEADS.get(_task(delta) or "", []) if prompt else []))
    names = [name for name in backbone.modules if ends and name.endswith(ends)]
    targets = [] if prompt else delta.modified_modules
    tensors: dict[str, Tensor] = {}
    for name in names:
        clash = [o for o in names if o.startswith(f"{name}.")]
        clash += [t for t in targets if f"{t}.".startswith(f"{name}.")]
        clash += [t for t in targets for m in own if f".{m}." in f".{t}."]
        if clash:
            raise DeltaError(
                f"{delta.name!r} cannot be written for PEFT: modules_to_save={own} means "
                f"{name!r} too there, which keeps {clash[0]!r} from its own; rename a module"
            )
        layer = delta.layers.get(name)
        module = (None if layer is None else layer.stand_in) or copying.plain_copy(
            backbone, name, {}
        )
        for key, tensor in module.state_dict().items():
            tensors[f"{PROMPT_PREFIX if prompt else PREFIX}{name}.{key}"] = tensor
    return names, tensors


def _regex(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in names)


def _config_of(delta: BaseDelta, backbone: Backbone) -> dict[str, Any]:
    """Return the JSON fields of the method and of the modules that it is on."""
    method, own, layers = METHODS[delta.delta_type], vars(delta.config), delta.layers
    given = {theirs: own[method.renamed.get(theirs, theirs)] for theirs in method.options}
    targets = delta.modified_modules
    for name in PATTERNS.keys() & given.keys():
        given[name] = {f"^{re.escape(w)}": value for w, value in (given[name] or {}).items()}
    if delta.delta_type == "soft_prompt":
        layer: Any = layers[targets[0]]
        start = {"num_transformer_submodules": 1, "prompt_tuning_init": "RANDOM"}
        return {**given, **start, "token_dim": layer.width}
    ends = tuple(f".{name}" for name in targets)
    unclear = any(name.endswith(ends) for name in backbone.modules)
    if delta.delta_type == "ia3":
        before = own["feedforward_modules"] or []
        unclear |= any(n.endswith(tuple(before)) for n in targets if n not in before)
        given["feedforward_modules"] = _regex(before) if unclear else before
    if delta.delta_type in ("lora", "ia3", "vera", "fourierft"):
        kinds = [kind_of(backbone.modules[name]) for name in targets]
        given["fan_in_fan_out"] = all(
            isinstance(kind, TransposedLinear) and kind.is_product for kind in kinds
        )
    for name in ALPHAS & given.keys():
        given[name] = delta.scale * given[name]
    if "alpha_pattern" in given:
        given["alpha_pattern"] = {n: delta.scale * a for n, a in given["alpha_pattern"].items()}
    if delta.delta_type == "lora" and own["init"] in ("pissa", "olora"):
        _double(given)
    if delta.delta_type == "vera":
        given["save_projection"] = True
    if delta.delta_type == "oft":
        given |= {"r": 0, "oft_block_size": _only(delta, "size")}
    if delta.delta_type == "fourierft":
        given["n_frequency"] = _only(delta, "fourierft_spectrum")
    return {"target_modules": _regex(targets) if unclear else targets, **given}


def _double(given: dict[str, Any]) -> None:
    """Double the ranks in `given`, and raise the alphas so that the scalings stay as they are."""
    factor = math.sqrt(2) if given["use_rslora"] else 2
    given["r"], given["lora_alpha"] = 2 * given["r"], factor * given["lora_alpha"]
    given["rank_pattern"] = {name: 2 * rank for name, rank in given["rank_pattern"].items()}
    given["alpha_pattern"] = {name: factor * a for name, a in given["alpha_pattern"].items()}


def _only(delta: BaseDelta, attribute: str) -> int:
    """Return the size that all layers have in common; raise if they differ."""
    layers: Mapping[str, Any] = {name: delta.layers[name] for name in delta.modified_modules}
    given = {name: getattr(layer, attribute) for name, layer in layers.items()}
    sizes = {n: v.numel() if isinstance(v, Tensor) else int(v) for n, v in given.items()}
    if len(set(sizes.values())) > 1:
        raise DeltaError(
            f"{delta.name!r} cannot be written for PEFT: its modules differ in size: {sizes}; "
            "make one delta for each size"
        )
    return next(iter(sizes.values()))


def _tensors(delta: BaseDelta, backbone: Backbone) -> dict[str, Tensor]:
    """Return the tensors of the delta by PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for where in delta.modified_modules:
        layer: Any = delta.layers[where]
        if delta.delta_type == "soft_prompt":
            return {PROMPT: layer.soft_embeds}
        own = _of_lora(layer) if delta.delta_type == "lora" else dict(layer.named_parameters())
        if delta.delta_type == "ia3":
            own = {
                "ia3_l": layer.ia3_l[None] if layer.acts is Acts.BEFORE else layer.ia3_l[:, None]
            }
        if delta.delta_type == "oft":
            own = {"oft_R.weight": layer.oft_R}
        if delta.delta_type == "ln_tuning":
            own = _of_norm(delta, backbone, where)
        tensors |= {f"{PREFIX}{where}.{key}": tensor for key, tensor in own.items()}
        if delta.delta_type == "vera":
            tensors |= {f"base_model.{name}": getattr(layer.shared, name) for name in PROJECTIONS}
    return tensors


def _of_lora(layer: Any) -> dict[str, Tensor]:
    A, B = layer.pair()
    if layer.kind.takes_ids:
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    own: dict[str, Tensor] = {}
    axes: tuple[int, ...] = ()
    if layer.kind.axis == 1:  # an image
        A, B, axes = A.unflatten(1, layer.kind.patch), B[..., None, None], (1, -1, 1, 1)
    if hasattr(layer, "lora_magnitude_vector"):
        magnitude = layer.lora_magnitude_vector
        # PEFT writes the key without ".weight" and reads both; transformers' load_adapter reads
        # only this one.
        own["lora_magnitude_vector.weight"] = magnitude.view(axes) if axes else magnitude
    return {"lora_A.weight": A, "lora_B.weight": B, **own}


def _of_norm(delta: BaseDelta, backbone: Backbone, where: str) -> dict[str, Tensor]:
    """Return the weight and bias of the normalisation with the delta merged in."""
    delta.record.require_apart("cannot write for PEFT")
    layer: Any = delta.layers[where]
    offset, base = norm_terms(backbone, where)
    if offset is None:
        raise DeltaError(
            f"{delta.name!r} cannot be written for PEFT: {where!r} "
            f"({type(backbone.modules[where]).__name__}) does not scale by its weight"
        )
    scale = full(layer.scale).detach().cpu().double()
    own = {"weight": scale * (base["weight"] + offset) - offset}
    if layer.bias is not None:
        own["bias"] = scale * base["bias"] + full(layer.bias).detach().cpu().double()
    return {f"ln_tuning_layers.{n}": tensor.type_as(layer.scale) for n, tensor in own.items()}
