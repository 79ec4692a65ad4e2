"""PEFT's names for our methods and options, and `Adapter`: an adapter of PEFT, half read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..._backbone import copying
from ..._backbone.backbone import Backbone
from ..._modules.kinds import Conv2d, Norm, kind_of
from ..._modules.tensors import full, stored_params
from ..._sites.swap import plain_class
from .._draft import Draft

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX, PROMPT_PREFIX = "base_model.model.", "base_model."
PEFT_VERSION = "0.21.2"  # our files are as of this version; PEFT checks it in files with OFT
PROMPT, PROJECTIONS = "prompt_embeddings", ("vera_A", "vera_B")


@dataclass(frozen=True)
class Method:
    """PEFT's names for one of our methods.

    Attributes:
        peft_type: PEFT's name of the method.
        options: {PEFT's field: PEFT's default} for the fields that are options of ours.
        tensors: {end of PEFT's key of a tensor: our tensor}.
        free: further fields that change nothing; most say how the training started.
        renamed: {PEFT's field: our option} where the two names differ.
    """

    peft_type: str
    options: dict[str, Any]
    tensors: dict[str, str]
    free: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)


PATTERNS: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
ALPHAS = {"lora_alpha", "alpha", "scaling"}  # the fields that multiply a change
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
XLORA = (
    "one classifier weighs its LoRAs by the hidden states of a forward pass of their own, which no "
    "block does; load the LoRAs that its field adapters names one by one, and train a "
    "GateModel(model, deltas=[...]) over them"
)
STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
HEADS = {  # {task: ends of the names of the modules that PEFT saves with a prompt}
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


@dataclass
class Adapter(Draft):
    """An adapter of PEFT on its way to a delta, whose name is our name of the method."""

    @property
    def method(self) -> Method:
        """PEFT's names for the adapter's method."""
        return METHODS[self.name]


def norm_terms(backbone: Backbone, where: str) -> tuple[float | None, dict[str, Tensor]]:
    """Return (o, weight and bias) of a normalisation that scales by o + weight.

    For example o is 0 in LayerNorm, and 1 in Gemma. It is None if the module scales in another way.
    A copy of the module is run to find o.
    """
    base = stored_params(backbone.modules[where])
    norm = isinstance(kind_of(backbone.modules[where]), Norm) and "weight" in base
    if not norm or any(t.is_meta or t.ndim != 1 for t in base.values()):
        return None, {}
    plain = copying.plain_copy(backbone, where, {})
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
    values = {n: full(t).detach().cpu().double() for n, t in base.items()}
    return (offsets[0] if offsets else None), values


def conv_problem(name: str, module: nn.Module) -> str:
    """Return why PEFT computes another result than we do on a convolution; "" if it does not."""
    kind = kind_of(module)
    if isinstance(kind, Conv2d) and kind.pad_mode != "zeros":
        return f"PEFT's {name} ignores padding_mode={kind.pad_mode!r} of this convolution"
    if isinstance(kind, Conv2d) and name == "lora" and tuple(kind.dilation) != (1, 1):
        return f"PEFT's LoRA ignores the dilation {tuple(kind.dilation)} of this convolution"
    own = plain_class(module) or type(module)
    if isinstance(kind, Conv2d) and name == "lora" and own is not nn.Conv2d:
        return f"PEFT's LoRA makes its factors of this convolution's own class, {own.__name__}"
    return ""
