"""Write tests/interop/golden_adapters with the adapters library itself, in its own environment.

It was run with adapters 1.3.0, transformers 4.57.6, torch 2.13.0, safetensors 0.8.0:

    python -m venv golden && golden/bin/pip install torch==2.13.0 adapters==1.3.0
    golden/bin/python tools/write_golden_adapters.py
"""

import copy
import json
import os
import shutil
from pathlib import Path

import adapters
import torch
import transformers
from adapters import (
    AdapterPlusConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    DoRAConfig,
    DoubleSeqBnConfig,
    DynamicAdapterFusionConfig,
    IA3Config,
    LoRAConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
)
from adapters.composition import Fuse
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent / "tests" / "interop" / "golden_adapters"
VOCABULARY, LENGTH = 40, 6
BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 20, "initializer_range": 0.3,
    "num_labels": 3,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "initializer_factor": 0.5, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "initializer_range": 0.3,
}  # fmt: skip
BACKBONES = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig(**BERT)),
    "roberta": (transformers.RobertaForSequenceClassification, transformers.RobertaConfig(**BERT)),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(**GPT2)),
    "t5": (transformers.T5ForConditionalGeneration, transformers.T5Config(**T5)),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA)),
}
SMALL = {"reduction_factor": 4}
OWN_RULES = {**SMALL, "phm_dim": 2, "shared_phm_rule": False}
EVERY = {"intermediate_lora": True, "output_lora": True}
METHODS = {  # of every backbone
    "double_seq_bn": lambda: DoubleSeqBnConfig(**SMALL),
    "seq_bn": lambda: SeqBnConfig(**SMALL, leave_out=[0]),
    "par_bn": lambda: ParBnConfig(**SMALL),
    "adapter_plus": lambda: AdapterPlusConfig(**SMALL, stochastic_depth=0.0),
    "compacter": lambda: CompacterConfig(**SMALL, phm_dim=2),
    "lora": lambda: LoRAConfig(r=2, alpha=6, dropout=0.1),
    "lora_everywhere": lambda: LoRAConfig(r=2, alpha=3, attn_matrices=["q", "k", "v"], **EVERY),
    "ia3": lambda: IA3Config(alpha=2, output_lora=True),
    "prefix": lambda: PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
    "prefix_flat": lambda: PrefixTuningConfig(prefix_length=3, flat=True),
}
SPECIAL = {  # of some
    "bert": {
        "layer_norm": lambda: DoubleSeqBnConfig(**SMALL, ln_before=True, scaling="learned"),
        "layer_norm_after": lambda: SeqBnConfig(**SMALL, ln_after=True, scaling=2.0),
        "mam": lambda: MAMConfig(
            PrefixTuningConfig(prefix_length=3, bottleneck_size=5), ParBnConfig(**SMALL)
        ),
        "par_bn_attention": lambda: ParBnConfig(**SMALL, mh_adapter=True),
        "seq_bn_attention": lambda: SeqBnConfig(**SMALL, mh_adapter=True),
    },
    "t5": {  # of which the library saves no shared parameters
        "compacter": lambda: CompacterConfig(**OWN_RULES),
        "compacterplusplus": lambda: CompacterPlusPlusConfig(**OWN_RULES),
        "par_bn_attention": lambda: ParBnConfig(**SMALL, mh_adapter=True, cross_adapter=True),
        "seq_bn_attention": lambda: SeqBnConfig(**SMALL, mh_adapter=True, cross_adapter=True),
    },
    "gpt2": {"par_bn_attention": lambda: ParBnConfig(**SMALL, mh_adapter=True)},
    "llama": {
        "compacter_own_rules": lambda: CompacterConfig(
            **OWN_RULES, factorized_phm_rule=True, phm_bias=False
        ),
        "compacter_shared": lambda: CompacterConfig(**SMALL, phm_dim=2, shared_W_phm=True),
        "dora": lambda: DoRAConfig(r=2, alpha=2),
    },
}
FUSIONS = {  # {case: (the method of each adapter, its options, those of the fusion)}
    "bert": {
        "seq_bn": (SeqBnConfig, {}, {}),
        "double_seq_bn": (
            DoubleSeqBnConfig,
            {},
            {"query_before_ln": True, "value_before_softmax": False},
        ),
        "static": (SeqBnConfig, {"leave_out": [0]}, {"value": False, "residual_before": True}),
        "compacter": (CompacterConfig, {"phm_dim": 2}, {}),
        "par_bn": (ParBnConfig, {}, {}),
    },
    "roberta": {},
    "gpt2": {"seq_bn": (SeqBnConfig, {}, {})},
    "t5": {"double_seq_bn": (DoubleSeqBnConfig, {}, {})},
    "llama": {"seq_bn": (SeqBnConfig, {}, {})},
}
PICKLED = ("prefix", "prefix_flat", "mam", "layer_norm")  # not possible as safetensors


def inputs_of(kind):
    """Token ids with padding at the end of the second row."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -2:] = 0
    more = {"decoder_input_ids": ids[:, :4].contiguous()} if kind == "t5" else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def logits_of(model, kind):
    """What `model` gives for the inputs."""
    with torch.no_grad():
        return model(**inputs_of(kind)).logits.clone()


def shake(model, names):
    """Give the parameters whose names have one of `names` in them other values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in names):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def write(kind, case, model, config, safe, head=False):
    """Put an adapter on `model`, save it, and return the logits."""
    model.add_adapter("task", config=config)
    model.set_active_adapters("task")
    shake(model, [".task."] + ["classifier."] * head)
    model.save_adapter(
        f"{kind}/{case}", "task", with_head=head or "flex" in case, use_safetensors=safe
    )
    return logits_of(model.eval(), kind)


def write_fusion(kind, case, model, method, own, options):
    """Fuse three adapters on `model`, save each and the fusion side by side, return the logits."""
    folder, safe = f"{kind}/fused/{case}", case != "seq_bn"
    os.makedirs(folder)
    for name in "abc":
        model.add_adapter(name, config=method(**SMALL, **own))
    model.add_adapter_fusion(["a", "b", "c"], {**DynamicAdapterFusionConfig().to_dict(), **options})
    if case == "static":  # the library saves this one along, as its name starts with the same
        model.add_adapter_fusion(["a", "b", "c", "a"], "static")
    model.active_adapters = Fuse("a", "b", "c")
    shake(model, [".a.", ".b.", ".c.", ".a,b,c"])
    for name in "abc":
        model.save_adapter(f"{folder}/{name}", name, with_head=False, use_safetensors=safe)
    head = "a,b,c" in getattr(model, "heads", ())
    model.save_adapter_fusion(f"{folder}/fusion", "a,b,c", with_head=head, use_safetensors=safe)
    return logits_of(model.eval(), kind)


def main():
    """Write all backbones and all cases."""
    for kind in BACKBONES:
        shutil.rmtree(ROOT / kind, ignore_errors=True)
    os.chdir(ROOT)  # the names of folders go into files
    index = {}
    for kind, (cls, config) in BACKBONES.items():
        torch.manual_seed(0)
        config._attn_implementation = "eager"  # by "sdpa" the library masks its prefixes out
        base = cls(config).eval()
        base.save_pretrained(ROOT / kind / "backbone")
        fresh = lambda base=base: copy.deepcopy(base)  # noqa: E731
        tensors = {f"input.{k}": t for k, t in inputs_of(kind).items()}
        tensors["logits.base"] = logits_of(base, kind)
        cases = {**METHODS, **SPECIAL.get(kind, {})}
        if kind == "t5":
            del cases["prefix"]  # no T5 prefix can be read: prefix_flat shows that
        for place, (case, config) in enumerate(cases.items()):
            model = fresh()
            adapters.init(model)
            safe = place % 2 == 0 and case not in PICKLED
            tensors[f"logits.{case}"] = write(kind, case, model, config(), safe)
        if kind in ("bert", "roberta"):
            model = fresh()
            adapters.init(model)
            config = LoRAConfig(r=2)
            tensors["logits.head"] = write(kind, "head", model, config, safe=True, head=True)
            flex = adapters.AutoAdapterModel.from_pretrained(f"{kind}/backbone").eval()
            flex.add_classification_head("task", num_labels=4)
            tensors["logits.flex_head"] = write(kind, "flex_head", flex, LoRAConfig(r=2), safe=True)
            flex = adapters.AutoAdapterModel.from_pretrained(f"{kind}/backbone").eval()
            flex.add_classification_head("a,b,c", num_labels=4)
            tensors["fused.flex_head"] = write_fusion(kind, "flex_head", flex, SeqBnConfig, {}, {})
        for case, given in FUSIONS[kind].items():
            model = fresh()
            adapters.init(model)
            tensors[f"fused.{case}"] = write_fusion(kind, case, model, *given)
        save_file(tensors, ROOT / kind / "io.safetensors")
        named = lambda start, given=tensors: sorted(  # noqa: E731
            key.removeprefix(start) for key in given if key.startswith(start)
        )
        index[kind] = {
            "model_class": cls.__name__, "cases": named("logits."), "fused": named("fused."),
        }  # fmt: skip
    (ROOT / "index.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
