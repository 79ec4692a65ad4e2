"""Read a folder of PEFT: each tensor gets its place, or there is an error."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..._backbone.backbone import Backbone
from ..._files.reading import read_start
from ..._modules.tensors import stored
from ..._sequences.embedders import embedders
from ...errors import DeltaLoadError, listed
from ...names import ancestors
from .._draft import CONFIG, fact, has_values
from .._files import read_json, read_safetensors
from .methods import FINISH
from .targets import check_owned, check_selection
from .terms import (
    FREE,
    METHODS,
    MUTATING,
    PICKLE,
    PREFIX,
    PROJECTIONS,
    PROMPT,
    PROMPT_PREFIX,
    STARTS,
    WEIGHTS,
    WHY,
    XLORA,
    Adapter,
)

TRIES, WAIT = 50, 0.01  # how often a folder is read while others save, and seconds between


def recognises(folder: Path) -> bool:
    """True if PEFT wrote `folder`."""
    config = folder / CONFIG
    for _ in range(TRIES):
        if config.is_file():
            break
        if not (folder / WEIGHTS).is_file():
            return False
        time.sleep(WAIT)  # another process may be saving
    else:
        return False
    if (folder / WEIGHTS).is_file() or (folder / PICKLE).is_file():
        return True
    return b'"peft_type"' in read_start(config)


def translate(folder: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a folder of PEFT as the JSON and tensors that `opendelta.load` finds in ours.

    Nothing is unpickled. The keys of the tensors name the modified modules; no pattern is used.

    Args:
        model: the backbone. It gives the names of modules, and the weights that PEFT replaces.

    Returns:
        The JSON, and the tensors by full name.

    Raises:
        DeltaLoadError: no delta computes the same, the folder is damaged, or of another model.
    """
    for _ in range(TRIES):
        before = _identity(folder / CONFIG)
        try:
            found = _translated(folder, model)
        except DeltaLoadError:
            if before is not None and before == _identity(folder / CONFIG):
                raise
        else:
            if before is not None and before == _identity(folder / CONFIG):
                return found
        time.sleep(WAIT)
    raise DeltaLoadError(f"{folder / CONFIG} is written anew all the time: load when that ends")


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return what changes when another process saves a file; None: there is none."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_ino, found.st_mtime_ns, found.st_ctime_ns
    return None


def _translated(folder: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = read_json(folder / CONFIG)
    adapter = Adapter(folder, config, Backbone.of(model), _method_of(folder, config))
    method = adapter.method
    _check_fields(adapter)
    for theirs, default in method.options.items():
        adapter.options[method.renamed.get(theirs, theirs)] = config.get(theirs, default)
    _sort_tensors(adapter, _read_tensors(folder))
    if not adapter.sites:
        raise adapter.error(f"{WEIGHTS} holds no tensor of a {method.peft_type}")
    adapter.sort()
    finish = FINISH.get(adapter.name)
    if finish is not None:
        finish(adapter)
    check_selection(adapter)
    check_owned(adapter)
    return _facts(adapter), adapter.tensors()


def _facts(adapter: Adapter) -> dict[str, Any]:
    """Return the JSON that a folder of ours would have."""
    mapping = adapter.config.get("auto_mapping")
    made_for = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    made_for = made_for or adapter.config.get("base_model_name_or_path") or "model"
    options = {"modified_modules": list(adapter.sites), **adapter.options}
    deltas = [fact(adapter.name, adapter.name, options)]
    return {"backbone_class": made_for, "backbone_tensors": [], "deltas": deltas}


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        hint = f"it has {PICKLE}, a pickle, which is never read: " * (folder / PICKLE).is_file()
        raise DeltaLoadError(
            f"{folder}: {WEIGHTS} is missing; {hint}load the adapter with PEFT and save it with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    return read_safetensors(path)


def _method_of(folder: Path, config: dict[str, Any]) -> str:
    given = config.get("peft_type")
    if given == "XLORA":
        raise DeltaLoadError(f"{folder / CONFIG}: peft_type={given!r} cannot be loaded: {XLORA}")
    for name, method in METHODS.items():
        if method.peft_type == given:
            return name
    raise DeltaLoadError(
        f"{folder / CONFIG}: peft_type={given!r} is none of those that opendelta reads: "
        f"{', '.join(method.peft_type for method in METHODS.values())}. Load it with PEFT, or "
        "train such a delta here"
    )


def _check_fields(adapter: Adapter) -> None:
    """Raise for the first field that changes the result and that we do not understand."""
    method, config = adapter.method, adapter.config
    known = FREE | {*method.free, *method.options}
    for name, value in config.items():
        if name not in known and value and not (name == "bias" and value == "none"):
            why = WHY.get(name, "no delta of opendelta does that")
            raise adapter.refusal(name, f"{why}. Load it with PEFT")
        if name.endswith("_config") and value is not None and not isinstance(value, dict):
            raise adapter.refusal(name, "it must be an object")
    start = config.get("init_lora_weights") if adapter.name == "lora" else None
    if isinstance(start, str) and start.lower().startswith(MUTATING):
        raise adapter.refusal(
            "init_lora_weights",
            "that start changed the weights of the backbone, and the adapter fits the changed ones "
            "only; save it anew with PEFT's save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=<the adapter before training>), or put the "
            "changed weights into the model, and true into this field",
        )
    if isinstance(start, str):
        start = start.lower()
    if not any(start is known or (start == known and isinstance(start, str)) for known in STARTS):
        raise adapter.refusal("init_lora_weights", "no such start is known; load it with PEFT")
    owned = config.get("modules_to_save") or []
    if not isinstance(owned, list) or not all(isinstance(n, str) and n for n in owned):
        raise adapter.refusal("modules_to_save", "it must be a list of names")


# ------------------------------------------------------------------------------ sorting the tensors
def _sort_tensors(adapter: Adapter, given: dict[str, Tensor]) -> None:
    """Give each tensor its place; raise if a tensor has none."""
    names, unknown = adapter.backbone.modules, []
    owners: dict[str, None] = {}
    prompt = adapter.name == "soft_prompt"
    for key, tensor in given.items():
        name = key.removeprefix(PROMPT_PREFIX if prompt else PREFIX)
        end = next((end for end in adapter.method.tensors if name.endswith(f".{end}")), "")
        where = name[: -len(end) - 1] if end else ""
        own = adapter.sites.get(where, {})
        if prompt and name == PROMPT:
            adapter.sites[_embedder_of(adapter)] = {"soft_embeds": tensor}
        elif end and where in names and adapter.method.tensors[end] not in own:
            adapter.sites[where] = {**own, adapter.method.tensors[end]: tensor}
        elif adapter.name == "vera" and key.removeprefix("base_model.") in PROJECTIONS:
            adapter.others[key.removeprefix("base_model.")] = tensor
        elif owner := _owner(adapter, name):
            owners[owner] = None
            adapter.others[adapter.key(owner, f"module{name[len(owner) :]}")] = tensor
        elif not _is_of_backbone(adapter, name, tensor):
            unknown.append(key)
    if unknown:
        raise adapter.error(
            f"{len(unknown)} of {len(given)} tensors of this {adapter.method.peft_type} belong to "
            f"nothing in {type(adapter.backbone.model).__name__}: {listed(unknown)}"
            f"; load it on the model that it was trained on",
            unexpected=unknown,
        )
    adapter.options["modules_to_save"] = [name for name in names if name in owners] or None


def _owner(adapter: Adapter, name: str) -> str | None:
    """Return the outermost module around a tensor whose name ends as modules_to_save says."""
    ends = tuple(adapter.config.get("modules_to_save") or ())
    for around in reversed([*ancestors(name)][1:]):
        if around in adapter.backbone.modules and ends and around.endswith(ends):
            return around
    return None


def _is_of_backbone(adapter: Adapter, name: str, tensor: Tensor) -> bool:
    """True if a tensor is a weight of the backbone that PEFT saved too, such as an embedding.

    Raises:
        DeltaLoadError: the model's weight has other values.
    """
    where = name.removesuffix(".weight").removesuffix(".base_layer")
    module = adapter.backbone.modules.get(where)
    own = None if module is None or where == name else stored(module, "weight")
    if own is None:
        return False
    if has_values(own, tensor):
        return True
    sizes = list(tensor.shape), list(own.shape)
    raise adapter.error(
        f"it brings another weight {sizes[0]} for {where!r}, which has {sizes[1]} here: the "
        "vocabulary was resized, or the embeddings were trained; put "
        f"{name!r} of {WEIGHTS} into the model first",
        misshaped={} if sizes[0] == sizes[1] else {name: sizes},
    )


def _embedder_of(adapter: Adapter) -> str:
    """Return the full name of the module that embeds the tokens."""
    both = 2 if adapter.config.get("task_type") == "SEQ_2_SEQ_LM" else 1
    if (adapter.config.get("num_transformer_submodules") or both) != 1:
        raise adapter.refusal(
            "num_transformer_submodules", "the decoder has a prompt of its own; train with 1"
        )
    causal = adapter.config.get("task_type") == "CAUSAL_LM"  # each token has a label
    adapter.options |= {"strip": causal, "token_init": False}
    found = embedders(adapter.backbone.modules)
    names = [name for name, is_decoder in found.items() if not is_decoder]
    if len(names) != 1:
        raise adapter.error(
            "a prompt needs one module that embeds tokens; "
            f"{type(adapter.backbone.model).__name__} has {len(names)}: {names}"
        )
    return names[0]
