"""PEFT's checkpoints: read as deltas, and written from them, without PEFT itself."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .. import copies, merging, prompting, sharding, site
from .. import folder as files
from ..addressing import Survey, ancestors, survey, unwrapped
from ..bases import OwnedModule
from ..delta import Delta
from ..errors import DeltaError, DeltaLoadError
from ..layers import (
    Conv2d,
    Norm,
    TransposedLinear,
    device_and_dtype,
    kind_of,
    stored,
    stored_params,
)
from ..record import SLOT

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX, PROMPT_PREFIX = "base_model.model.", "base_model."
PEFT_VERSION = "0.21.2"  # whose files these are; PEFT asks it of files with OFT
PROMPT, PROJECTIONS = "prompt_embeddings", ("vera_A", "vera_B")


# ---------------------------------------------------------------------- how PEFT calls what we have
@dataclass(frozen=True)
class Method:
    """PEFT's terms for one of our methods.

    Attributes:
        peft_type: its name there.
        options: {PEFT's field: its default there} of the fields that are options of ours.
        tensors: {how the key of a tensor ends: our tensor}.
        free: further fields that change nothing, most of them how the training started.
        renamed: {PEFT's field: our option} where those differ.
    """

    peft_type: str
    options: dict[str, Any]
    tensors: dict[str, str]
    free: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)


PATTERNS: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
LYCORIS = {"r": 8, "alpha": 8, **PATTERNS}
METHODS = {
    "lora": Method(
        "LORA",
        {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
         **PATTERNS},
        {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "lora_embedding_A": "lora_A",
         "lora_embedding_B": "lora_B", "lora_magnitude_vector": "lora_magnitude_vector",
         "lora_magnitude_vector.weight": "lora_magnitude_vector"},
        ("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
         "megatron_core", "qalora_group_size", "runtime_config"),
        {"r": "lora_r"},
    ),
    "ia3": Method("IA3", {}, {"ia3_l": "ia3_l"}, ("init_ia3_weights", "feedforward_modules")),
    "loha": Method(
        "LOHA", LYCORIS, {t: t for t in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
        ("use_effective_conv2d",),
    ),
    "lokr": Method(
        "LOKR", {**LYCORIS, "decompose_both": False, "decompose_factor": -1},
        {f"lokr_w{i}{end}": f"lokr_w{i}{end}" for i in (1, 2) for end in ("", "_a", "_b")},
        ("use_effective_conv2d", "rank_dropout_scale"),
    ),
    "oft": Method(
        "OFT",
        {"block_share": False, "use_cayley_neumann": True, "num_cayley_neumann_terms": 5},
        {"oft_R.weight": "oft_R"}, ("r", "oft_block_size", "eps"),
    ),
    "vera": Method(
        "VERA",
        {"r": 256, "d_initial": 0.1, "vera_dropout": 0.0, "projection_prng_key": 0,
         "save_projection": True},
        {"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"},
    ),
    "fourierft": Method(
        "FOURIERFT", {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777},
        {"fourierft_spectrum": "fourierft_spectrum"},
    ),
    "ln_tuning": Method(
        "LN_TUNING", {}, {"ln_tuning_layers.weight": "scale", "ln_tuning_layers.bias": "bias"}
    ),
    "soft_prompt": Method(
        "PROMPT_TUNING", {"num_virtual_tokens": None}, {},
        ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
         "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path",
         "tokenizer_kwargs"),
        {"num_virtual_tokens": "soft_token_num"},
    ),
}  # fmt: skip
FREE = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "modules_to_save", "fan_in_fan_out",
    "layers_to_transform", "layers_pattern", "init_weights",
}  # fmt: skip
WHY = {
    "bias": "biases of the backbone were trained too: train with bias='none', and a BitFitModel",
    "alora_invocation_tokens": "an activated LoRA acts after certain tokens only",
    "trainable_token_indices": "rows of the embeddings were trained too",
    "layer_replication": "layers of the model were repeated",
    "target_parameters": "it changes parameters that are not the weight of a module",
    "rank_dropout": "it acts in training only: set it to 0 in the file to load the rest",
    "module_dropout": "it acts in training only: set it to 0 in the file to load the rest",
}
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
HEADS = {  # the ends of names of what PEFT saves with a prompt for such a task
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


# ------------------------------------------------------------------------------------------ reading
@dataclass
class Adapter:
    """An adapter of PEFT's on its way to a delta.

    Attributes:
        folder: where it is.
        config: its JSON.
        found: the backbone.
        name: our name of its method.
        options: the delta's options so far.
        sites: {full name of a module: {our tensor: values}}.
        others: tensors by the full names that they have in our files.
    """

    folder: Path
    config: dict[str, Any]
    found: Survey
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        """PEFT's terms for its method."""
        return METHODS[self.name]

    def key(self, where: str, tensor: str) -> str:
        """The full name that a tensor on the module called `where` has in our files."""
        return (f"{where}." if where else "") + f"{SLOT}.{self.name}.{tensor}"

    def error(self, what: str) -> DeltaLoadError:
        """An error of this folder."""
        return DeltaLoadError(f"{self.folder}: {what}")

    def refusal(self, name: str, why: str) -> DeltaLoadError:
        """The error for a field of the JSON."""
        given = self.config.get(name)
        return DeltaLoadError(f"{self.folder / CONFIG}: {name}={given!r} cannot be loaded: {why}")


def recognises(folder: Path) -> bool:
    """Whether PEFT wrote `folder`."""
    config = folder / CONFIG
    if not config.is_file():
        return False
    if (folder / WEIGHTS).is_file() or (folder / PICKLE).is_file():
        return True
    with open(config, "rb") as file:
        return b'"peft_type"' in file.read(files.LARGEST_CONFIG)


def translate(folder: Path, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What PEFT saved in `folder`, as what `opendelta.load` finds in a folder of ours.

    Nothing is unpickled, and the modules are those that the tensors name: no pattern selects them.

    Args:
        model: the backbone, for the names of its modules, and for weights that PEFT replaces.

    Returns:
        The JSON, and the tensors by full name.

    Raises:
        DeltaLoadError: the adapter does what no delta does, is damaged, or is of another model.
    """
    config = _read_config(folder)
    adapter = Adapter(folder, config, survey(model), _method_of(folder, config))
    method = adapter.method
    _check_fields(adapter)
    for theirs, default in method.options.items():
        adapter.options[method.renamed.get(theirs, theirs)] = config.get(theirs, default)
    _sort_tensors(adapter, _read_tensors(folder))
    if not adapter.sites:
        raise adapter.error(f"{WEIGHTS} holds no tensor of a {method.peft_type}")
    order = {name: place for place, name in enumerate(adapter.found.modules)}
    adapter.sites = dict(sorted(adapter.sites.items(), key=lambda item: order[item[0]]))
    _check_complete(adapter)
    finish = FINISH.get(adapter.name)
    if finish is not None:
        finish(adapter)
    own = {adapter.key(w, t): v for w, part in adapter.sites.items() for t, v in part.items()}
    return _facts(adapter), {**own, **adapter.others}


def _facts(adapter: Adapter) -> dict[str, Any]:
    """The JSON that a folder of ours would have."""
    mapping = adapter.config.get("auto_mapping")
    made_for = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    made_for = made_for or adapter.config.get("base_model_name_or_path") or "model"
    chains = [adapter.found.chain(where) for where in adapter.sites]
    computes = {device_and_dtype(chain)[1] for chain in chains}
    kinds = {tensor.dtype for own in adapter.sites.values() for tensor in own.values()}
    full = kinds == {torch.float32} and computes & {torch.float16, torch.bfloat16}
    common = {"modified_modules": list(adapter.sites), "dtype": "float32" if full else None}
    fact = {
        "delta_type": adapter.name,
        "name": adapter.name,
        "active": True,
        "frozen": [],
        "options": {**common, **adapter.options},
    }
    return {"backbone_class": str(made_for), "backbone_tensors": [], "deltas": [fact]}


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        if (size := path.stat().st_size) > files.LARGEST_CONFIG:
            raise DeltaLoadError(f"{path} has {size:,} bytes, more than {files.LARGEST_CONFIG:,}")
        given = json.loads(path.read_text(encoding="utf-8"))
    except DeltaLoadError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise DeltaLoadError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(given, dict):
        raise DeltaLoadError(f"{path} must be a JSON object with peft_type in it")
    return given


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        hint = f"it has {PICKLE}, a pickle, which is never read: " * (folder / PICKLE).is_file()
        raise DeltaLoadError(
            f"{folder}: {WEIGHTS} is missing; {hint}load the adapter with PEFT and save it with "
            "save_pretrained(folder, safe_serialization=True)"
        )
    if path.is_symlink() and path.resolve().parent != folder.resolve():
        files._check_cached(path, folder)
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise DeltaLoadError(f"{path} is no safetensors file: {error}") from None


def _method_of(folder: Path, config: dict[str, Any]) -> str:
    given = config.get("peft_type")
    for name, method in METHODS.items():
        if method.peft_type == given:
            return name
    raise DeltaLoadError(
        f"{folder / CONFIG}: peft_type={given!r} is none of those that opendelta reads: "
        f"{', '.join(method.peft_type for method in METHODS.values())}"
    )


def _check_fields(adapter: Adapter) -> None:
    """Raise for the first field that changes what the adapter computes, and is not understood."""
    method, config = adapter.method, adapter.config
    known = FREE | {*method.free, *method.options}
    for name, value in config.items():
        if name not in known and value and not (name == "bias" and value == "none"):
            why = WHY.get(name, "no delta of opendelta does that")
            raise adapter.refusal(name, f"{why}. Load it with PEFT")
    start = config.get("init_lora_weights") if adapter.name == "lora" else None
    if isinstance(start, str) and start.lower().startswith(MUTATING):
        raise adapter.refusal(
            "init_lora_weights",
            "that start changed the weights of the backbone, and the adapter fits the changed ones "
            "only; save it anew with PEFT's save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=<the adapter before training>), or put the "
            "changed weights into the model, and true into this field",
        )
    if start not in STARTS:
        raise adapter.refusal("init_lora_weights", "no such start is known; load it with PEFT")
    owned = config.get("modules_to_save") or []
    if not isinstance(owned, list) or not all(isinstance(n, str) and n for n in owned):
        raise adapter.refusal("modules_to_save", "it must be a list of names")


# ------------------------------------------------------------------------------ sorting the tensors
def _sort_tensors(adapter: Adapter, given: dict[str, Tensor]) -> None:
    """Give each tensor its place; those that have none are an error."""
    names, unknown = adapter.found.modules, []
    owners: dict[str, None] = {}
    prompt = adapter.name == "soft_prompt"
    for key, tensor in given.items():
        name = key.removeprefix(PROMPT_PREFIX if prompt else PREFIX)
        end = next((end for end in adapter.method.tensors if name.endswith(f".{end}")), "")
        where = name[: -len(end) - 1] if end else ""
        own = adapter.sites.get(where, {})
        if prompt and name == PROMPT:
            adapter.sites[_stack_of(adapter)] = {"soft_embeds": tensor}
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
            f"nothing in {type(adapter.found.root).__name__}: {', '.join(unknown[:3])}"
            f"{', ...' * (len(unknown) > 3)}; load it on the model that it was trained on"
        )
    adapter.options["modules_to_save"] = [name for name in names if name in owners] or None


def _owner(adapter: Adapter, name: str) -> str | None:
    """The outermost module around a tensor that modules_to_save names the end of."""
    ends = tuple(adapter.config.get("modules_to_save") or ())
    for around in reversed([*ancestors(name)][1:]):
        if around in adapter.found.modules and ends and around.endswith(ends):
            return around
    return None


def _is_of_backbone(adapter: Adapter, name: str, tensor: Tensor) -> bool:
    """Whether a tensor is a backbone's weight that PEFT saved too, as it does with embeddings.

    Raises:
        DeltaLoadError: it is, but the model has another.
    """
    where = name.removesuffix(".weight").removesuffix(".base_layer")
    module = adapter.found.modules.get(where)
    own = None if module is None or where == name else stored(module, "weight")
    if own is None:
        return False
    if own.shape == tensor.shape and not own.is_meta:
        whole = sharding.full(own.detach()).cpu()
        if torch.equal(whole.to(tensor.dtype), tensor):
            return True
    raise adapter.error(
        f"it brings another weight {list(tensor.shape)} for {where!r}, which has "
        f"{list(own.shape)} here: the vocabulary was resized, or the embeddings were trained; put "
        f"{name!r} of {WEIGHTS} into the model first"
    )


def _stack_of(adapter: Adapter) -> str:
    """The full name of the module that embeds the tokens."""
    both = 2 if adapter.config.get("task_type") == "SEQ_2_SEQ_LM" else 1
    if (adapter.config.get("num_transformer_submodules") or both) != 1:
        raise adapter.refusal(
            "num_transformer_submodules", "the decoder has a prompt of its own; train with 1"
        )
    adapter.options |= {"strip": False, "token_init": False}
    stacks = [
        n for n, is_decoder in prompting.stacks(adapter.found.modules).items() if not is_decoder
    ]
    if len(stacks) != 1:
        raise adapter.error(
            f"a prompt needs one module that embeds tokens; {type(adapter.found.root).__name__} "
            f"has {len(stacks)}: {stacks}"
        )
    return stacks[0]


def _check_complete(adapter: Adapter) -> None:
    """Raise if a module that target_modules lists has no tensors, as in a file that was cut."""
    config = adapter.config
    targets = config.get("target_modules")
    less = any(config.get(n) for n in ("layers_to_transform", "exclude_modules"))
    if not isinstance(targets, list) or less:
        return
    missing, seen = [], {id(adapter.found.modules[name]) for name in adapter.sites}
    for name, module in adapter.found.modules.items():
        parts = name.split(".")
        ends = {".".join(parts[i:]) for i in range(len(parts))}
        kept = any(f".{m}." in f".{name}." for m in config.get("modules_to_save") or ())
        if (
            not kept
            and ends & {t for t in targets if isinstance(t, str)}
            and id(module) not in seen
        ):
            missing.append(name)
    if missing:
        raise adapter.error(
            f"{WEIGHTS} has no tensors for {len(missing)} modules that target_modules selects: "
            f"{', '.join(missing[:3])}{', ...' * (len(missing) > 3)}"
        )


# --------------------------------------------------------------------- what is special to a method
def _test_of(adapter: Adapter, name: str, pattern: Any, form: str = "{}") -> re.Pattern[str]:
    """A regular expression of the JSON, put into `form`, unless it could take forever."""
    try:
        if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 3:
            raise adapter.refusal(name, f"{pattern!r} repeats too much; write names of modules")
        return re.compile(form.replace("{}", pattern))
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise adapter.refusal(name, f"{pattern!r} is no regular expression: {error}") from None


def _finish_patterns(adapter: Adapter) -> None:
    """Give the modules the ranks and alphas of the first pattern that fits the end of the name."""
    for name in PATTERNS:
        given = adapter.config.get(name) or {}
        if not isinstance(given, dict):
            raise adapter.refusal(name, "it must give patterns values")
        tests = [(_test_of(adapter, name, k, r"(.*\.)?({})$"), v) for k, v in given.items()]
        values = {
            where: next((value for test, value in tests if test.match(where)), None)
            for where in adapter.sites
        }
        adapter.options[name] = {w: v for w, v in values.items() if v is not None} or None
    for where, own in adapter.sites.items():
        if why := _conv_problem(adapter.name, adapter.found.modules[where]):
            raise adapter.error(f"{where!r}: {why}")
        for key, tensor in own.items():
            vector = key == "lora_magnitude_vector"
            own[key] = tensor.flatten() if vector else _matrix(tensor)


def _matrix(tensor: Tensor) -> Tensor:
    """A matrix from the weight of a convolution."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def _finish_ia3(adapter: Adapter) -> None:
    given = adapter.config.get("feedforward_modules") or []
    if isinstance(given, str):
        test = _test_of(adapter, "feedforward_modules", given)
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
    """Find the size of block from the tensors: PEFT's fields may be adjusted module by module."""
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
        width = getattr(kind_of(adapter.found.modules[where]), "in_features", size)
        ours = next(b for b in range(min(limit, width), 0, -1) if width % b == 0) if width else size
        if ours != size:
            raise adapter.error(
                f"its blocks have different sizes: {size} on {where!r}, where {ours} goes with "
                f"{limit} elsewhere. No delta has such; train with an oft_block_size that divides "
                "all inputs"
            )


def _finish_vera(adapter: Adapter) -> None:
    around = adapter.found.common(list(adapter.sites))
    for name in PROJECTIONS:
        if name in adapter.others:
            adapter.others[adapter.key(around, f"tensors.{name}")] = adapter.others.pop(name)


def _finish_ln(adapter: Adapter) -> None:
    """Turn new weights and biases into changes of those that the model has."""
    for where, own in adapter.sites.items():
        offset, base = _norm(adapter.found, where)
        if offset is None:
            what = type(adapter.found.modules[where]).__name__
            raise adapter.error(f"{where!r} ({what}) is no normalisation that scales by its weight")
        old, new = base["weight"] + offset, own.get("scale", torch.zeros(0)).cpu().double() + offset
        if old.shape != new.shape:
            continue  # missing or misshaped, as the core will say
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


def _norm(found: Survey, where: str) -> tuple[float | None, dict[str, Tensor]]:
    """(o, weight and bias) of a normalisation that scales by o + weight; o is 0, or 1 as in Gemma.

    None: it does otherwise. What it does is seen by running a copy of it.
    """
    base = stored_params(found.modules[where])
    norm = isinstance(kind_of(found.modules[where]), Norm) and "weight" in base
    if not norm or any(t.is_meta or t.ndim != 1 for t in base.values()):
        return None, {}
    plain = copies.plain_copy(found, where, {})
    outs = []
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
        weight: Any = plain.weight
        x = torch.linspace(1, 2, weight.numel(), device=weight.device, dtype=weight.dtype)
        for value in (0.0, 1.0):
            weight.fill_(value)
            outs.append(plain(x[None, None]).double())
        offsets = [
            o for o in (0.0, 1.0) if torch.allclose((o + 1) * outs[0], o * outs[1], atol=1e-2)
        ]
    values = {n: sharding.full(t.detach()).cpu().double() for n, t in base.items()}
    return (offsets[0] if offsets else None), values


def _conv_problem(name: str, module: nn.Module) -> str:
    """Why PEFT computes something else than we do on a convolution, or nothing."""
    kind = kind_of(module)
    if isinstance(kind, Conv2d) and kind.pad_mode != "zeros":
        return f"PEFT's {name} ignores padding_mode={kind.pad_mode!r} of this convolution"
    if isinstance(kind, Conv2d) and name == "lora" and tuple(kind.dilation) != (1, 1):
        return f"PEFT's LoRA ignores the dilation {tuple(kind.dilation)} of this convolution"
    return ""


FINISH = {
    "lora": _finish_patterns,
    "loha": _finish_patterns,
    "lokr": _finish_patterns,
    "ia3": _finish_ia3,
    "oft": _finish_oft,
    "vera": _finish_vera,
    "ln_tuning": _finish_ln,
}


# ------------------------------------------------------------------------------------------ writing
def save(delta: Delta, folder: str | os.PathLike) -> None:
    """Write a delta into `folder` as an adapter that PEFT and transformers read.

    Whether it is active, and what trains, is not in such files. A LoRA that started from the
    weights ("pissa", "olora") gets twice the rank, for the part that it takes off again.

    Args:
        folder: it is made if need be; an adapter of PEFT's in it is replaced.

    Raises:
        DeltaError: PEFT has no such delta, or the folder holds something else.
    """
    path, found = Path(folder), survey(delta.backbone_model)
    _check_free(path)
    _check_writable(delta, found)
    names, owned = _owned_by_peft(delta, found)
    config = {
        "peft_type": METHODS[delta.delta_type].peft_type,
        "task_type": _task(delta),
        "base_model_name_or_path": getattr(
            getattr(found.root, "config", None), "_name_or_path", None
        ) or None,
        "peft_version": PEFT_VERSION,
        "inference_mode": True,
        "modules_to_save": names or None,
        **_fields(delta, found),
    }  # fmt: skip
    tensors = {**_tensors(delta, found), **owned}
    plain = {k: sharding.full(t.detach()).cpu().contiguous().clone() for k, t in tensors.items()}
    weights = safetensors.torch.save(plain, metadata={"format": "pt"})
    path.mkdir(parents=True, exist_ok=True)
    with files._locked(path):  # at any moment there is the old adapter, none, or the new one
        (path / CONFIG).unlink(missing_ok=True)
        files._replace(path / WEIGHTS, weights)
        files._replace(path / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _check_free(folder: Path) -> None:
    if (folder / files.CONFIG).exists():
        raise DeltaError(
            f"{folder} has a {files.CONFIG}, so it is a model's or another delta's; save into a "
            "folder of its own"
        )
    path = folder / CONFIG
    if path.exists() and b'"peft_type"' not in path.read_bytes():
        raise DeltaError(f"{path} is not PEFT's; save into a folder of its own")


def _check_writable(delta: Delta, found: Survey) -> None:
    """Raise if PEFT has no such delta."""
    name, config = delta.delta_type, delta.config
    what = f"{delta.name!r} cannot be written for PEFT: "
    if name not in METHODS:
        raise DeltaError(f"{what}it has no {name!r}; it has {', '.join(METHODS)}")
    if config.gate:
        raise DeltaError(f"{what}it has no gates; make the delta with gate=False")
    if config.unfrozen_modules:
        raise DeltaError(
            f"{what}it has no unfrozen_modules={config.unfrozen_modules}; use modules_to_save"
        )
    for where in delta.modified_modules:
        module = found.modules[where]
        kind, conv1d = kind_of(module), type(module).__name__ == "Conv1D"
        why = _conv_problem(name, module)
        if unwrapped(where) != where:
            why = "it is inside a wrapper such as torch.compile's; write it from the plain model"
        if site.wants_reads(module, config.reads):
            why = "its weight is read by the module around it, which PEFT's layer is not asked for"
        if isinstance(kind, TransposedLinear) and name in ("loha", "lokr", "oft"):
            why = f"PEFT's {name} takes no {'Conv1D' if conv1d else type(module).__name__}"
        if why or (not where and name != "soft_prompt"):
            raise DeltaError(f"{what}{where!r}: {why or 'PEFT changes no model as a whole'}")
    layers: Any = delta.layers
    stripped = name == "soft_prompt" and layers[delta.modified_modules[0]].strip
    if stripped and _task(delta) != "CAUSAL_LM":
        raise DeltaError(f"{what}its prompts stay in what the model gives; use strip=False")


def _task(delta: Delta) -> str | None:
    """PEFT's name of what the model is for; for others than prompts, it would add heads to some."""
    model = delta.backbone_model
    config = getattr(model, "config", None)
    name = next((t for end, t in TASKS.items() if type(model).__name__.endswith(end)), None)
    if delta.delta_type != "soft_prompt":
        return "CAUSAL_LM" if name == "CAUSAL_LM" else None
    default = "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else None
    return name or default or "FEATURE_EXTRACTION"


def _owned_by_peft(delta: Delta, found: Survey) -> tuple[list[str], dict[str, Tensor]]:
    """The modules that PEFT will own, as it matches ends of names, and their tensors by key.

    Raises:
        DeltaError: those would be in each other, or in the way of the delta.
    """
    prompt = delta.delta_type == "soft_prompt"
    own = delta.config.modules_to_save or []
    ends = (*own, *(HEADS.get(_task(delta) or "", []) if prompt else []))
    names = [name for name in found.modules if ends and name.endswith(ends)]
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
        module = (
            layer.module if isinstance(layer, OwnedModule) else copies.plain_copy(found, name, {})
        )
        for key, tensor in module.state_dict().items():
            tensors[f"{PROMPT_PREFIX if prompt else PREFIX}{name}.{key}"] = tensor
    return names, tensors


def _regex(names: Iterable[str]) -> str:
    return "|".join(re.escape(name) for name in names)


def _fields(delta: Delta, found: Survey) -> dict[str, Any]:
    """The JSON fields of the method, and the modules that it is on."""
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
    unclear = any(name.endswith(ends) for name in found.modules)
    if delta.delta_type == "ia3":
        before = own["feedforward_modules"] or []
        unclear |= any(n.endswith(tuple(before)) for n in targets if n not in before)
        given["feedforward_modules"] = _regex(before) if unclear else before
    if delta.delta_type in ("lora", "ia3", "vera", "fourierft"):
        kinds = [kind_of(found.modules[name]) for name in targets]
        given["fan_in_fan_out"] = all(
            isinstance(kind, TransposedLinear) and kind.name == "linear" for kind in kinds
        )
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
    """Twice the ranks, and the alphas that leave the scalings as they are."""
    factor = math.sqrt(2) if given["use_rslora"] else 2
    given["r"], given["lora_alpha"] = 2 * given["r"], factor * given["lora_alpha"]
    given["rank_pattern"] = {name: 2 * rank for name, rank in given["rank_pattern"].items()}
    given["alpha_pattern"] = {name: factor * a for name, a in given["alpha_pattern"].items()}


def _only(delta: Delta, attribute: str) -> int:
    """The size that all layers have in common."""
    layers: Mapping[str, Any] = {name: delta.layers[name] for name in delta.modified_modules}
    given = {name: getattr(layer, attribute) for name, layer in layers.items()}
    sizes = {n: v.numel() if isinstance(v, Tensor) else int(v) for n, v in given.items()}
    if len(set(sizes.values())) > 1:
        raise DeltaError(
            f"{delta.name!r} cannot be written for PEFT: its modules differ in size: {sizes}; "
            "make one delta for each size"
        )
    return next(iter(sizes.values()))


def _tensors(delta: Delta, found: Survey) -> dict[str, Tensor]:
    """The tensors of the delta by PEFT's keys."""
    tensors: dict[str, Tensor] = {}
    for where in delta.modified_modules:
        layer: Any = delta.layers[where]
        if delta.delta_type == "soft_prompt":
            return {PROMPT: layer.soft_embeds}
        own = _of_lora(layer) if delta.delta_type == "lora" else dict(layer.named_parameters())
        if delta.delta_type == "ia3":
            own = {"ia3_l": layer.ia3_l[None] if layer.flow == "before" else layer.ia3_l[:, None]}
        if delta.delta_type == "oft":
            own = {"oft_R.weight": layer.oft_R}
        if delta.delta_type == "ln_tuning":
            own = _of_norm(delta, found, where)
        tensors |= {f"{PREFIX}{where}.{key}": tensor for key, tensor in own.items()}
        if delta.delta_type == "vera":
            tensors |= {f"base_model.{name}": getattr(layer.shared, name) for name in PROJECTIONS}
    return tensors


def _of_lora(layer: Any) -> dict[str, Tensor]:
    A, B = layer.pair()
    if layer.kind.name == "embedding":
        return {"lora_embedding_A": A, "lora_embedding_B": B}
    own: dict[str, Tensor] = {}
    axes: tuple[int, ...] = ()
    if layer.kind.name == "conv2d":
        A, B, axes = A.unflatten(1, layer.kind.patch), B[..., None, None], (1, -1, 1, 1)
    if hasattr(layer, "lora_magnitude_vector"):
        magnitude = layer.lora_magnitude_vector
        # PEFT's own key lacks the end, and reads both; transformers' load_adapter only this one
        own["lora_magnitude_vector.weight"] = magnitude.view(axes) if axes else magnitude
    return {"lora_A.weight": A, "lora_B.weight": B, **own}


def _of_norm(delta: Delta, found: Survey, where: str) -> dict[str, Tensor]:
    """The weight and bias that the normalisation has with the delta."""
    merging.check_apart(delta.record, "cannot write for PEFT")
    layer: Any = delta.layers[where]
    offset, base = _norm(found, where)
    if offset is None:
        raise DeltaError(
            f"{delta.name!r} cannot be written for PEFT: {where!r} "
            f"({type(found.modules[where]).__name__}) does not scale by its weight"
        )
    scale = sharding.full(layer.scale.detach()).cpu().double()
    own = {"weight": scale * (base["weight"] + offset) - offset}
    if layer.bias is not None:
        own["bias"] = scale * base["bias"] + sharding.full(layer.bias.detach()).cpu().double()
    return {f"ln_tuning_layers.{n}": tensor.type_as(layer.scale) for n, tensor in own.items()}
