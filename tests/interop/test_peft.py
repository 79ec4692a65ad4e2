"""PEFT's adapters as deltas and deltas as PEFT's adapters: equal logits, or an error."""

import copy
import errno
import itertools
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
import transformers
from support.nets import shake, untouched

import opendelta
from opendelta import (
    AutoDeltaModel,
    FourierFTModel,
    IA3Model,
    LNTuningModel,
    LohaModel,
    LokrModel,
    LoraModel,
    OFTModel,
    SoftPromptModel,
    VeraModel,
)
from opendelta._files import folder as files
from opendelta.interop import peft as interop
from opendelta.interop.peft import reading

pytestmark = [
    pytest.mark.covers("load"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (load|save) vera_A:UserWarning"),
]
SIZES = {"vocab_size": 60}
BERT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "initializer_range": 0.3, **SIZES,
}  # fmt: skip
LLAMA_SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, **SIZES,
}  # fmt: skip
GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, **SIZES}
TINY = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA_SIZES)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(bos_token_id=1, eos_token_id=1, **GPT2_SIZES)
    ),
    "llama-classifier": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(pad_token_id=0, **LLAMA_SIZES)
    ),
    "gpt2-classifier": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(pad_token_id=0, **GPT2_SIZES)
    ),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**BERT)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**BERT)
    ),
    "gemma": lambda: transformers.GemmaForCausalLM(
        transformers.GemmaConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=48, head_dim=16, **SIZES,
        )
    ),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            dim=32, n_layers=1, n_heads=2, hidden_dim=48, max_position_embeddings=40, **SIZES
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0,
            **SIZES,
        )
    ),
}  # fmt: skip
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
LLAMA, GPT2, ROBERTA = ["q_proj", "down_proj"], ["c_attn", "c_proj"], ["query", "output.dense"]


def tiny(kind):
    """The same tiny model every time."""
    torch.manual_seed(0)
    return TINY[kind]().eval()


def run(model):
    """The logits of a model, or the output of a plain one for random images."""
    with torch.no_grad():
        if not hasattr(model, "config") or not hasattr(model.config, "is_encoder_decoder"):
            generator = torch.Generator().manual_seed(0)
            return model(torch.randn(2, 3, 9, 9, generator=generator))
        more = {"decoder_input_ids": IDS[:, :4]} if model.config.is_encoder_decoder else {}
        return model(input_ids=IDS, **more).logits


def write(config, base, folder, scale=0.3):
    """Save an adapter of PEFT's with other values than it starts with; what it computes."""
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    expected = run(theirs)
    theirs.save_pretrained(folder)
    return expected


def test_several_active_adapters_and_weighted_ones_have_counterparts(tmp_path):
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=LLAMA), "one")
    theirs.add_adapter("two", peft.LoraConfig(r=3, target_modules=LLAMA)), theirs.eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    theirs.save_pretrained(tmp_path)
    theirs.base_model.set_adapter(["one", "two"])
    both = run(theirs)
    theirs.add_weighted_adapter(["one", "two"], [0.7, -0.4], "cat", combination_type="cat")
    theirs.set_adapter("cat")
    weighted, model = run(theirs), tiny("llama")
    for name in ("one", "two"):
        AutoDeltaModel.from_finetuned(tmp_path / name, backbone_model=model, name=name)
    torch.testing.assert_close(run(model), both)
    with opendelta.route(model, [{"one": 0.7, "two": -0.4}] * 2):
        torch.testing.assert_close(run(model), weighted)
    mean = opendelta.AverageModel(model, deltas=["one", "two"], weights=[0.7, -0.4])
    torch.testing.assert_close(run(model), weighted)
    mean.detach()
    with opendelta.composition(model).only(opendelta.combine(model, {"one": 0.7, "two": -0.4})):
        torch.testing.assert_close(run(model), weighted)


def edit(folder, **fields):
    """Change fields of an adapter_config.json."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def retensor(folder, change):
    """Let `change` edit the tensors of an adapter_model.safetensors."""
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def lora(**options):
    return peft.LoraConfig(r=4, lora_alpha=6, **options)


READ = {
    "lora": ("llama", lambda: lora(target_modules=LLAMA, lora_dropout=0.1)),
    "lora-gpt2": ("gpt2", lambda: lora(target_modules=GPT2, fan_in_fan_out=True)),
    "lora-bert": ("bert", lambda: lora(target_modules=["query"], task_type="SEQ_CLS")),
    "lora-roberta": (
        "roberta",
        lambda: lora(target_modules=["query"], modules_to_save=["classifier"]),
    ),
    "lora-distilbert": ("distilbert", lambda: lora(target_modules=["q_lin"], task_type="SEQ_CLS")),
    "rslora": ("llama", lambda: lora(target_modules=LLAMA, use_rslora=True)),
    "dora": ("llama", lambda: lora(target_modules=LLAMA, use_dora=True)),
    "dora-gpt2": ("gpt2", lambda: lora(target_modules=GPT2, use_dora=True)),
    "patterns": (
        "llama",
        lambda: lora(
            target_modules=LLAMA,
            rank_pattern={"^model.layers.1.mlp.down_proj": 2, r".*\.0\.mlp.*": 3},
            alpha_pattern={"q_proj": 3},
        ),
    ),
    "embedding": ("llama", lambda: lora(target_modules=["embed_tokens"])),
    "regex": ("llama", lambda: lora(target_modules=r".*\.1\..*_proj")),
    "orthogonal": ("llama", lambda: lora(target_modules=LLAMA, init_lora_weights="orthogonal")),
    "all-linear": ("llama", lambda: lora(target_modules="all-linear")),
    "excluded": ("llama", lambda: lora(target_modules=LLAMA, exclude_modules=["0.mlp.down_proj"])),
    "excluded-by-regex": (
        "llama",
        lambda: lora(target_modules=LLAMA, exclude_modules=r".*\.1\..*q_proj"),
    ),
    "layers-by-pattern": (
        "llama",
        lambda: lora(target_modules=LLAMA, layers_to_transform=0, layers_pattern="layers"),
    ),
    "only-layer-1": ("llama", lambda: lora(target_modules=LLAMA, layers_to_transform=[1])),
    "ia3": (
        "llama",
        lambda: peft.IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"]),
    ),
    "ia3-gpt2": (
        "gpt2",
        lambda: peft.IA3Config(target_modules=GPT2, feedforward_modules=r".*mlp\.c_proj"),
    ),
    "loha": (
        "llama",
        lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=LLAMA, alpha_pattern={"q_proj": 2}),
    ),
    "lokr": (
        "llama",
        lambda: peft.LoKrConfig(r=2, target_modules=LLAMA, decompose_both=True, decompose_factor=4),
    ),
    "oft": (
        "llama",
        lambda: peft.OFTConfig(oft_block_size=8, target_modules=LLAMA, use_cayley_neumann=False),
    ),
    "oft-neumann": (
        "llama",
        lambda: peft.OFTConfig(oft_block_size=8, target_modules=LLAMA, block_share=True),
    ),
    "oft-blocks": (
        "llama",
        lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj", "v_proj"]),
    ),
    "vera": ("llama", lambda: peft.VeraConfig(r=5, target_modules=LLAMA)),
    "vera-one": ("llama", lambda: peft.VeraConfig(r=5, target_modules=["layers.1.mlp.up_proj"])),
    "vera-seed": (
        "llama",
        lambda: peft.VeraConfig(
            r=5, target_modules=LLAMA, save_projection=False, projection_prng_key=7
        ),
    ),
    "vera-gpt2": ("gpt2", lambda: peft.VeraConfig(r=5, target_modules=GPT2)),
    "fourierft": ("llama", lambda: peft.FourierFTConfig(n_frequency=20, target_modules=LLAMA)),
    "fourierft-gpt2": ("gpt2", lambda: peft.FourierFTConfig(n_frequency=20, target_modules=GPT2)),
    "ln": ("roberta", lambda: peft.LNTuningConfig(target_modules=["LayerNorm"])),
    "ln-rms": ("llama", lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "ln-gemma": ("gemma", lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "prompt": (
        "gpt2",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ),
    "prompt-llama": (
        "llama",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ),
    "prompt-roberta": (
        "roberta",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    ),
    "prompt-llama-classifier": (
        "llama-classifier",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    ),
    "prompt-gpt2-classifier": (
        "gpt2-classifier",
        lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS"),
    ),
    "prompt-t5": (
        "t5",
        lambda: peft.PromptTuningConfig(
            num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=1
        ),
    ),
}


@pytest.mark.covers(
    "AutoDeltaModel", "LoraModel", "LoraConfig.lora_r", "LoraConfig.lora_alpha",
    "LoraConfig.use_rslora", "LoraConfig.use_dora", "LoraConfig.rank_pattern",
    "LoraConfig.alpha_pattern", "IA3Model", "IA3Config.feedforward_modules", "LohaModel",
    "LohaConfig.alpha", "LohaConfig.alpha_pattern", "LokrModel", "LokrConfig.decompose_both",
    "LokrConfig.decompose_factor", "OFTModel", "OFTConfig.oft_block_size", "OFTConfig.block_share",
    "OFTConfig.use_cayley_neumann", "VeraModel", "VeraConfig.r", "VeraConfig.projection_prng_key",
    "VeraConfig.save_projection", "FourierFTModel", "FourierFTConfig.n_frequency", "LNTuningModel",
    "SoftPromptModel", "SoftPromptConfig.soft_token_num",
)  # fmt: skip
@pytest.mark.parametrize("case", READ)
def test_an_adapter_of_peft_gives_the_same_logits_here(case, tmp_path):
    kind, config = READ[case]
    base = tiny(kind)
    expected = write(config(), base, tmp_path)
    with untouched(base):
        plain = run(base)
        delta = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=base)
        found = run(base)
        if case in ("prompt", "prompt-llama"):  # PEFT leaves the prompt in what a decoder gives
            expected = expected[:, 3:]
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.equal(plain, found)
        delta.detach()
    fresh = tiny(kind)
    assert opendelta.load(tmp_path, fresh).names == [delta.delta_type]
    assert torch.equal(run(fresh), found)


def test_a_prompt_of_peft_trains_with_the_labels_of_the_tokens(tmp_path):
    base = tiny("llama")
    write(READ["prompt-llama"][1](), base, tmp_path)
    (delta,) = opendelta.load(tmp_path, base)
    ids = torch.arange(7)[None]
    base(ids, labels=ids).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in delta.parameters())


def images(**options):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 5, (3, 2), stride=2, padding=1, **options))


@pytest.mark.parametrize(
    "config",
    [
        lora(target_modules=["0"]),
        lora(target_modules=["0"], use_dora=True),
        peft.LoHaConfig(target_modules=["0"]),
    ],
)
def test_convolutions_go_both_ways(config, tmp_path):
    base = images()
    expected = write(config, base, tmp_path / "theirs")
    delta = AutoDeltaModel.from_finetuned(tmp_path / "theirs", backbone_model=base)
    assert torch.allclose(run(base), expected, atol=1e-5)
    interop.save(delta, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(images(), tmp_path / "ours").eval()
    assert torch.allclose(run(theirs), expected, atol=1e-5)


WRITE = {
    "lora": ("llama", LoraModel, {"lora_r": 3, "modified_modules": LLAMA}),
    "rslora": ("llama", LoraModel, {"use_rslora": True, "modified_modules": LLAMA}),
    "dora-gpt2": ("gpt2", LoraModel, {"use_dora": True, "modified_modules": GPT2}),
    "lora-gpt2": ("gpt2", LoraModel, {"modified_modules": GPT2}),
    "patterns": (
        "llama",
        LoraModel,
        {
            "modified_modules": LLAMA,
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "pissa": (
        "llama",
        LoraModel,
        {"init": "pissa", "modified_modules": LLAMA, "alpha_pattern": {"q_proj": 3}},
    ),
    "olora-rs-dora": (
        "llama",
        LoraModel,
        {
            "init": "olora",
            "use_rslora": True,
            "use_dora": True,
            "modified_modules": LLAMA,
            "rank_pattern": {"q_proj": 3},
        },
    ),
    "embedding": ("llama", LoraModel, {"modified_modules": ["embed_tokens"]}),
    "head": (
        "roberta",
        LoraModel,
        {"modified_modules": ["query"], "modules_to_save": ["classifier"]},
    ),
    "head-bert": (
        "bert",
        LoraModel,
        {"modified_modules": ["query"], "modules_to_save": ["classifier"]},
    ),
    "head-distilbert": (
        "distilbert",
        LoraModel,
        {"modified_modules": ["q_lin"], "modules_to_save": ["classifier"]},
    ),
    "ia3": ("llama", IA3Model, {"modified_modules": LLAMA}),
    "ia3-gpt2": (
        "gpt2",
        IA3Model,
        {"modified_modules": GPT2, "feedforward_modules": ["mlp.c_proj"]},
    ),
    "loha": (
        "llama",
        LohaModel,
        {"r": 3, "modified_modules": LLAMA, "rank_pattern": {"q_proj": 2}},
    ),
    "lokr": (
        "llama",
        LokrModel,
        {"r": 2, "decompose_both": True, "decompose_factor": 4, "modified_modules": LLAMA},
    ),
    "oft": ("llama", OFTModel, {"oft_block_size": 8, "modified_modules": LLAMA}),
    "oft-neumann": (
        "llama",
        OFTModel,
        {
            "oft_block_size": 8,
            "use_cayley_neumann": True,
            "num_cayley_neumann_terms": 6,
            "modified_modules": LLAMA,
        },
    ),
    "vera": ("llama", VeraModel, {"r": 5, "modified_modules": LLAMA}),
    "vera-gpt2": ("gpt2", VeraModel, {"r": 5, "projection_prng_key": 3, "modified_modules": GPT2}),
    "fourierft": ("llama", FourierFTModel, {"n_frequency": 20, "modified_modules": LLAMA}),
    "ln": ("roberta", LNTuningModel, {}),
    "ln-rms": ("llama", LNTuningModel, {}),
    "ln-gemma": ("gemma", LNTuningModel, {}),
    "prompt": ("llama", SoftPromptModel, {"soft_token_num": 3}),
    "prompt-roberta": (
        "roberta",
        SoftPromptModel,
        {"soft_token_num": 3, "strip": False, "modules_to_save": ["classifier"]},
    ),
    "prompt-bert-no-head": ("bert", SoftPromptModel, {"soft_token_num": 3, "strip": False}),
    "prompt-t5": ("t5", SoftPromptModel, {"soft_token_num": 3}),
}


def written(case, folder):
    """A delta, saved for PEFT."""
    kind, method, options = WRITE[case]
    base = tiny(kind)
    delta = shake(method(base, **options))
    with untouched_deltas(base):
        interop.save(delta, folder)
    return kind, base, delta


class untouched_deltas:
    """Saving changes no logits."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.before = run(self.model)

    def __exit__(self, *_):
        assert torch.equal(run(self.model), self.before)


@pytest.mark.covers(
    "LoraModel", "LoraConfig.init", "LoraConfig.use_rslora", "LoraConfig.use_dora",
    "LoraConfig.rank_pattern", "LoraConfig.alpha_pattern", "DeltaConfig.modules_to_save",
    "LohaConfig.rank_pattern", "OFTConfig.num_cayley_neumann_terms", "SoftPromptConfig.strip",
)  # fmt: skip
@pytest.mark.parametrize("case", WRITE)
def test_peft_reads_what_is_written_for_it(case, tmp_path):
    kind, base, _ = written(case, tmp_path)
    plain = tiny(kind)
    before = run(plain)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    expected, found = run(base), run(theirs)
    found = found[:, 3:] if case == "prompt" else found
    assert torch.allclose(found, expected, atol=1e-5)
    assert before.shape != expected.shape or not torch.allclose(before, expected, atol=1e-3)


SCALED = [
    case
    for case, (_, method, options) in WRITE.items()
    if method.layer_class.scales and not options.get("use_dora")
]
UNSCALED = [c for c in SCALED if WRITE[c][1] is opendelta.VeraModel]


@pytest.mark.covers("Delta.scale")
@pytest.mark.parametrize("case", [c for c in SCALED if c not in UNSCALED])
def test_peft_gets_the_scale_of_a_delta(case, tmp_path):
    kind, method, options = WRITE[case]
    base = tiny(kind)
    delta = shake(method(base, **options))
    before = run(base)
    delta.scale = -0.5
    interop.save(delta, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    assert torch.allclose(run(theirs), run(base), atol=1e-5)
    assert not torch.allclose(run(base), before, atol=1e-4)


@pytest.mark.parametrize("how", ["exclude", "unfrozen_modules"])
def test_what_was_trained_in_place_is_refused(how, tmp_path):
    base = tiny("llama")
    named = ["norm"] if how == "unfrozen_modules" else None
    delta = LoraModel(base, modified_modules=["q_proj"], unfrozen_modules=named)
    delta.freeze_module(exclude=["deltas"] + ["norm"] * (named is None))
    with pytest.raises(
        opendelta.DeltaError, match=r"in place \(.*norm.weight.*use modules_to_save"
    ):
        interop.save(delta, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", UNSCALED)
def test_a_scale_that_peft_has_no_place_for_is_refused(case, tmp_path):
    kind, method, options = WRITE[case]
    delta = method(tiny(kind), **options)
    delta.scale = 0.5
    with pytest.raises(opendelta.DeltaError, match="its 'vera' has no scale"):
        interop.save(delta, tmp_path)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
@pytest.mark.parametrize("owned", [["classifier"], None])
def test_peft_finds_the_class_of_a_classifier_whose_head_is_written(kind, owned, tmp_path):
    base = tiny(kind)
    base.save_pretrained(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    interop.save(shake(LoraModel(base, modules_to_save=owned)), tmp_path / "delta")
    assert read_task(tmp_path / "delta") == ("SEQ_CLS" if owned else None)
    if owned:
        theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "delta")
        assert torch.allclose(run(theirs.eval()), run(base), atol=1e-5)


def read_task(folder):
    return json.loads((folder / "adapter_config.json").read_text())["task_type"]


@pytest.mark.parametrize("case", [c for c in WRITE if not c.startswith(("prompt", "vera"))])
def test_transformers_reads_what_is_written_for_peft(case, tmp_path):
    """It takes no prompts and no VeRA, whoever wrote them."""
    kind, base, _ = written(case, tmp_path)
    plain = tiny(kind)
    plain.load_adapter(str(tmp_path))
    assert torch.allclose(run(plain.eval()), run(base), atol=1e-5)


@pytest.mark.parametrize("case", WRITE)
def test_what_is_written_for_peft_comes_back(case, tmp_path):
    kind, base, delta = written(case, tmp_path)
    fresh = tiny(kind)
    again = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert torch.allclose(run(fresh), run(base), atol=1e-6)
    exact = kind != "distilbert" and case not in ("pissa", "olora-rs-dora", "prompt-bert-no-head")
    if delta.delta_type in ("lora", "ia3", "loha", "lokr", "vera", "soft_prompt") and exact:
        state = again.state_dict()
        for name, tensor in delta.state_dict().items():
            assert torch.equal(state[name], tensor)
        assert torch.equal(run(fresh), run(base))
    for option in ("lora_r", "lora_alpha", "use_dora", "rank_pattern") if exact else ():
        ours, back = (getattr(d.config, option, None) or None for d in (delta, again))
        assert ours == back


def test_keys_are_those_that_vllm_reads(tmp_path):
    """base_model.model., a module, and lora_A.weight or lora_B.weight."""
    _, base, _ = written("lora", tmp_path)
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    modules = dict(base.named_modules())
    for key in keys:
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key)
        assert match is not None
        assert match[1] in modules
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 3
    assert config["target_modules"][0] == "model.layers.0.self_attn.q_proj"


def test_keys_without_peft_s_prefix_are_read_too(tmp_path):
    base = tiny("llama")
    expected = write(lora(target_modules=LLAMA), base, tmp_path)

    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("base_model.model.")] = tensors.pop(key)

    retensor(tmp_path, strip)
    opendelta.load(tmp_path, base)
    assert torch.allclose(run(base), expected, atol=1e-5)


class Twins(torch.nn.Module):
    """A module whose name is the end of another's."""

    def __init__(self):
        super().__init__()
        self.config = transformers.PreTrainedConfig()
        self.fc = torch.nn.Linear(8, 8)
        self.inner = torch.nn.ModuleDict(
            {"fc": torch.nn.Linear(8, 8), "xfc": torch.nn.Linear(8, 8)}
        )

    def forward(self, x):
        return self.fc(x) + self.inner["fc"](x) * 2 + self.inner["xfc"](x) * 3


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LoraModel, {"rank_pattern": {"[r]fc": 2}}),
        (
            LoraModel,
            {
                "modified_modules": ["[r]fc", "inner.fc"],
                "rank_pattern": {"inner.fc": 2},
                "alpha_pattern": {"inner.fc": 2},
            },
        ),
        (IA3Model, {"modified_modules": ["fc", "xfc"], "feedforward_modules": ["xfc"]}),
        (IA3Model, {"modified_modules": ["fc", "xfc"], "feedforward_modules": ["inner.fc"]}),
        (IA3Model, {"modified_modules": ["fc", "xfc"], "exclude": "fc"}),
    ],
)
def test_names_that_end_like_others_stay_apart(method, options, tmp_path):
    torch.manual_seed(0)
    base = Twins()
    fresh, x = copy.deepcopy(base), torch.randn(3, 8)
    modules = {name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    if method is LoraModel and "modified_modules" not in options:
        options = {
            "modified_modules": ["fc"],
            "exclude_modules": ["inner"],
            "rank_pattern": {"fc": 2},
        }
    if options.pop("exclude", None):
        options = {
            "modified_modules": ["fc", "xfc"],
            "feedforward_modules": ["fc"],
            "exclude_modules": ["inner.fc"],
        }
    delta = shake(method(base, **options))
    interop.save(delta, tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path)
    changed = {
        n.split(".lora_")[0].split(".ia3_")[0] for n, _ in theirs.base_model.model.named_modules()
    }
    assert {n for n in modules if f"{n}.base_layer" in changed} == {*delta.modified_modules}
    assert torch.allclose(theirs(x), base(x), atol=1e-5)


def test_float32_adapters_stay_float32_on_half_backbones(tmp_path):
    write(lora(target_modules=LLAMA), tiny("llama"), tmp_path)
    base = tiny("llama").to(torch.bfloat16)
    delta = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=base)
    assert {p.dtype for p in delta.parameters()} == {torch.float32}
    theirs = peft.PeftModel.from_pretrained(tiny("llama").to(torch.bfloat16), tmp_path).eval()
    assert torch.allclose(run(base).float(), run(theirs).float(), atol=5e-2)


# ---------------------------------------------------------------------------------------- refusals
@pytest.fixture
def adapter(tmp_path):
    """A folder of PEFT's with a plain LoRA on Llama."""
    write(lora(target_modules=LLAMA), tiny("llama"), tmp_path)
    return tmp_path


def refused(folder, message, kind="llama"):
    base = tiny(kind)
    with untouched(base), pytest.raises(opendelta.DeltaLoadError, match=message) as caught:
        opendelta.load(folder, base)
    assert str(folder) in str(caught.value)
    return caught.value.details


FIELDS = {
    "peft_type": "ADALORA",
    "bias": "all",
    "lora_bias": True,
    "alora_invocation_tokens": [1, 2],
    "trainable_token_indices": [3],
    "use_qalora": True,
    "layer_replication": [[0, 1], [0, 2]],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "velora_config": {"num_groups": 2},
    "kasa_config": {"beta": 1.0},
    "use_bdlora": {"nblocks": 2},
    "ensure_weight_tying": True,
    "of_the_future": "yes",
    "init_lora_weights": "mica",
    "modules_to_save": "classifier",
    "rank_pattern": ["q_proj"],
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_changes_the_computation_is_refused_by_name(adapter, field):
    edit(adapter, **{field: FIELDS[field]})
    refused(adapter, rf"adapter_config.json: {field}={re.escape(repr(FIELDS[field]))} ")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["model.layers.0.self_attn.q_proj"]},
        {"target_modules": r".*\.0\..*"},
        {"target_modules": []},
        {"exclude_modules": ["down_proj"]},
        {"exclude_modules": r".*\.1\..*"},
        {"layers_to_transform": 1},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"layers_to_transform": [0, 1], "layers_pattern": ["h"]},
        {"modules_to_save": ["mlp"]},
    ],
)
def test_tensors_that_peft_would_leave_out_are_refused(adapter, fields):
    edit(adapter, **fields)
    found = refused(adapter, "adapter_config.json does not select by target_modules and the like")
    assert found.unexpected


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": None},
        {"target_modules": 3},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": ["q_proj", 3]},
        {"exclude_modules": 3},
        {"layers_to_transform": "all"},
        {"layers_to_transform": [True]},
        {"layers_pattern": "layers"},
        {"layers_pattern": 3, "layers_to_transform": [0]},
        {"corda_config": 3},
        {"init_lora_weights": 1},
        {"rank_pattern": {"q_proj": None}},
        {"rank_pattern": {"nothing": 2.5}},
        {"rank_pattern": {"nothing": True}},
        {"alpha_pattern": {"nothing": "x"}},
    ],
)
def test_a_field_of_another_form_than_peft_writes_is_refused_by_name(adapter, fields):
    edit(adapter, **fields)
    refused(adapter, rf"adapter_config.json: {next(iter(fields))}=")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {"fan_in_fan_out": True}),
        ("gpt2", {"fan_in_fan_out": False}),
        ("llama", {"rank_pattern": {"nothing": 2}, "alpha_pattern": {"nothing": 2}}),
        ("llama", {"alpha_pattern": {r".*\.1\..*": 2.5}, "init_lora_weights": "Gaussian"}),
        ("llama", {"modules_to_save": ["of_another_model"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to", "ignore:The following")
def test_fields_that_peft_overlooks_or_mends_are_read_as_by_peft(kind, fields, tmp_path):
    write(lora(target_modules=LLAMA if kind == "llama" else GPT2), tiny(kind), tmp_path)
    edit(tmp_path, **fields)
    theirs = peft.PeftModel.from_pretrained(tiny(kind), tmp_path).eval()
    base = tiny(kind)
    opendelta.load(tmp_path, base)
    assert torch.allclose(run(base), run(theirs), atol=1e-5)


def test_a_module_to_save_without_its_tensors_is_refused(adapter):
    edit(adapter, modules_to_save=["lm_head"])
    refused(adapter, "no tensors for 'lm_head', which modules_to_save selects")


def test_the_error_for_a_folder_of_several_adapters_names_their_folders(tmp_path):
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]), "one")
    model.add_adapter("two", peft.LoraConfig(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(opendelta.DeltaLoadError, match=r"the folders 'one', 'two' in it may hold"):
        opendelta.load(tmp_path, tiny("llama"))
    assert opendelta.load(tmp_path / "two", tiny("llama")).names == ["lora"]


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_starts_that_changed_the_backbone_are_refused(adapter, init):
    edit(adapter, init_lora_weights=init)
    refused(adapter, r"init_lora_weights=.*path_initial_model_for_weight_conversion")


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_pissa_is_read_once_peft_has_converted_it(tmp_path):
    base = tiny("llama")
    config = lora(target_modules=LLAMA, init_lora_weights="pissa")
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    theirs.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    expected = run(theirs)
    theirs.save_pretrained(tmp_path / "end")
    refused(tmp_path / "end", "changed the weights of the backbone")
    start = str(tmp_path / "start")
    edit(tmp_path / "start", init_lora_weights=True)
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=start)
    opendelta.load(tmp_path / "plain", base)
    assert torch.allclose(run(base), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (
            lambda: peft.OFTConfig(oft_block_size=8, target_modules=LLAMA),
            {"coft": True},
            "coft=True",
        ),
        (
            lambda: peft.OFTConfig(oft_block_size=8, target_modules=LLAMA),
            {"num_cayley_neumann_terms": 2},
            "at least 4",
        ),
        (
            lambda: peft.LoKrConfig(target_modules=LLAMA),
            {"rank_dropout": 0.1},
            "rank_dropout=0.1.*training only",
        ),
        (
            lambda: peft.FourierFTConfig(n_frequency=9, target_modules=LLAMA),
            {"n_frequency_pattern": {"q": 2}},
            "n_frequency_pattern=",
        ),
        (
            lambda: peft.IA3Config(target_modules=LLAMA, feedforward_modules=[]),
            {"feedforward_modules": 3},
            "feedforward_modules=3",
        ),
        (
            lambda: peft.IA3Config(target_modules=LLAMA, feedforward_modules=[]),
            {"feedforward_modules": ["q_proj"]},
            "of another shape",
        ),
        (
            lambda: peft.VeraConfig(r=4, target_modules=LLAMA),
            {"save_projection": False},
            "2 unexpected",
        ),
        (
            lambda: peft.VeraConfig(r=4, target_modules=LLAMA, save_projection=False),
            {"save_projection": True},
            "2 missing",
        ),
        (
            lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
            {"num_virtual_tokens": 10**12},
            "of another shape",
        ),
        (lambda: lora(target_modules=LLAMA), {"r": 10**12}, "of another shape"),
        (lambda: lora(target_modules=LLAMA), {"r": "many"}, "lora_r"),
        (lambda: lora(target_modules=LLAMA), {"rank_pattern": {"(a+)+b": 4}}, "repeats too much"),
        (lambda: lora(target_modules=LLAMA), {"alpha_pattern": {"(": 4}}, "no regular expression"),
        (
            lambda: lora(target_modules=LLAMA),
            {"alpha_pattern": {"(?i)q": 4}},
            "no regular expression",
        ),
        (lambda: lora(target_modules=LLAMA), {"use_dora": True}, "missing.*lora_magnitude_vector"),
    ],
)
def test_adapters_that_no_delta_is_like_are_refused(config, fields, message, tmp_path):
    write(config(), tiny("llama"), tmp_path)
    edit(tmp_path, **fields)
    base = tiny("llama")
    with untouched(base), pytest.raises(opendelta.DeltaLoadError, match=message):
        opendelta.load(tmp_path, base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_version": "0.17.1"}, "peft_version='0.17.1' cannot be loaded: PEFT before 0.18"),
        ({"peft_version": None}, "peft_version=None"),
        ({}, "blocks have different sizes: 6 on .*where 8 goes with 8"),
    ],
)
def test_blocks_of_other_sizes_and_ages_are_refused(fields, message, tmp_path):
    config = peft.OFTConfig(oft_block_size=8, target_modules=LLAMA)
    write(config, tiny("llama"), tmp_path)
    key = "base_model.model.model.layers.0.mlp.down_proj.oft_R.weight"
    retensor(tmp_path, lambda tensors: tensors.update({key: torch.zeros(8, 15)}))
    edit(tmp_path, **fields)
    refused(tmp_path, message)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.covers("GateModel")
def test_a_mixture_with_a_forward_of_its_own_is_refused_and_its_loras_are_read(tmp_path):
    for name in "ab":
        write(lora(target_modules=LLAMA), tiny("llama"), tmp_path / name)
    base = tiny("llama")
    base.config.use_cache = False
    paths = {name: str(tmp_path / name) for name in "ab"}
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=paths)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "x")
    refused(tmp_path / "x", r"peft_type='XLORA'.*one by one, and train a GateModel\(model, deltas=")
    base = tiny("llama")
    names = [opendelta.load(path, base).names[-1] for path in paths.values()]
    opendelta.GateModel(base, deltas=names)


def test_a_prompt_for_the_decoder_too_is_refused(tmp_path):
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_2_SEQ_LM")
    write(config, tiny("t5"), tmp_path)
    refused(tmp_path, "num_transformer_submodules=2", "t5")


def test_normalisations_whose_weight_is_0_are_refused(tmp_path):
    base = tiny("roberta")
    write(peft.LNTuningConfig(target_modules=["LayerNorm"]), base, tmp_path)
    with torch.no_grad():
        base.roberta.embeddings.LayerNorm.weight[3] = 0
    with (
        untouched(base),
        pytest.raises(
            opendelta.DeltaLoadError,
            match=r"'roberta.embeddings.LayerNorm': 1 weights are exactly 0",
        ),
    ):
        opendelta.load(tmp_path, base)


def test_normalisations_that_peft_tunes_and_we_do_not_are_refused(tmp_path):
    write(peft.LNTuningConfig(target_modules=["query"]), tiny("roberta"), tmp_path)
    refused(tmp_path, r"\(Linear\) is no normalisation", "roberta")


def test_tensors_must_be_those_of_this_model(adapter):
    message = "8 of 8 tensors of this LORA belong to nothing in GPT2LMHeadModel"
    assert len(refused(adapter, message, "gpt2").unexpected) == 8
    key = "base_model.model.model.layers.1.self_attn.q_proj"
    retensor(adapter, lambda tensors: tensors.pop(f"{key}.lora_A.weight"))
    refused(adapter, "missing: model.layers.1.self_attn.q_proj.deltas.lora.lora_A")
    retensor(adapter, lambda tensors: tensors.pop(f"{key}.lora_B.weight"))
    refused(adapter, "no tensors for 1 modules that target_modules selects: model.layers.1.self")
    retensor(adapter, lambda tensors: tensors.clear())
    refused(adapter, "holds no tensor of a LORA")


def test_files_must_be_whole_and_no_pickles(adapter):
    weights = adapter / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-8])
    refused(adapter, "no safetensors file")
    weights.rename(adapter / "adapter_model.bin")
    refused(adapter, r"adapter_model.bin, a pickle.*safe_serialization=True")
    (adapter / "adapter_model.bin").unlink()
    refused(adapter, "adapter_model.safetensors is missing")
    weights.write_bytes(content)
    (adapter / "adapter_config.json").write_text('{"peft_type": ')
    refused(adapter, "cannot be read as JSON")
    (adapter / "adapter_config.json").write_text("[]")
    refused(adapter, "must hold a JSON object")


def test_a_link_out_of_the_folder_is_refused(adapter, tmp_path_factory):
    weights = adapter / "adapter_model.safetensors"
    outside = tmp_path_factory.mktemp("outside") / "adapter_model.safetensors"
    weights.rename(outside)
    weights.symlink_to(outside)
    refused(adapter, "link out of its folder")


def test_other_folders_are_not_recognised(tmp_path):
    assert not interop.recognises(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"model_class": "AdapterHub\'s"}')
    assert not interop.recognises(tmp_path)


def test_embeddings_that_were_resized_are_refused(tmp_path):
    base = tiny("llama")
    write(lora(target_modules=["embed_tokens"]), base, tmp_path)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    retensor(tmp_path, lambda tensors: tensors[key].add_(1))
    refused(tmp_path, r"another weight \[60, 32\] for 'model.embed_tokens'")


class Equalised(torch.nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 0.3 * weight, bias)


def equalised():
    return torch.nn.Sequential(Equalised(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: images(dilation=2), r"ignores the dilation"),
        (equalised, r"makes its factors of this convolution's own class, Equalised"),
    ],
    ids=["dilated", "of another class"],
)
def test_convolutions_that_peft_computes_otherwise_are_refused(made, why, tmp_path):
    base = made()
    theirs = peft.get_peft_model(made(), lora(target_modules=["0"]))
    theirs.save_pretrained(tmp_path / "theirs")
    with untouched(base), pytest.raises(opendelta.DeltaLoadError, match=why):
        opendelta.load(tmp_path / "theirs", base)
    delta = LoraModel(base, modified_modules=["0"])
    with pytest.raises(opendelta.DeltaError, match=why):
        interop.save(delta, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("kind", "method", "options", "message"),
    [
        ("llama", opendelta.AdapterModel, {}, "it has no 'adapter'; it has lora,"),
        ("llama", LoraModel, {"gate": True}, "no gates"),
        ("llama", LoraModel, {"unfrozen_modules": ["lm_head"]}, "use modules_to_save"),
        (
            "llama",
            LoraModel,
            {"reads": True, "modified_modules": ["o_proj"]},
            "is read by the module",
        ),
        ("gpt2", LohaModel, {"modified_modules": ["c_attn"]}, "PEFT's loha takes no Conv1D"),
        ("llama", OFTModel, {"modified_modules": LLAMA, "oft_block_size": 32}, "differ in size"),
        ("roberta", SoftPromptModel, {"soft_token_num": 3}, "use strip=False"),
    ],
)
def test_deltas_that_peft_does_not_have_are_not_written(kind, method, options, message, tmp_path):
    delta = method(tiny(kind), **options)
    with pytest.raises(opendelta.DeltaError, match=message):
        interop.save(delta, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("outputs", [8, 6])
def test_dora_on_a_weight_of_another_layout_is_not_written(outputs, tmp_path):
    class Turned(torch.nn.Linear):
        def __init__(self):
            super().__init__(8, outputs)
            self.weight = torch.nn.Parameter(torch.randn(8, outputs))

        def forward(self, x):
            return x @ self.weight + self.bias

    delta = LoraModel(torch.nn.Sequential(Turned()), modified_modules=["0"], use_dora=True)
    with pytest.raises(opendelta.DeltaError, match="PEFT's DoRA takes no Turned, whose weight is"):
        interop.save(delta, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.covers("AverageModel", "GateModel", "FuseModel")
@pytest.mark.parametrize("block", ["average", "gate", "fuse"])
def test_blocks_are_not_written_but_the_deltas_in_them(block, tmp_path):
    base = tiny("llama")
    for name in "ab":
        LoraModel(base, name=name)
    delta = opendelta.AutoDeltaModel.from_config(
        {"delta_type": block, "deltas": ["a", "b"]}, backbone_model=base
    )
    with pytest.raises(opendelta.DeltaError, match=r"has no blocks; write .* one by one: a, b"):
        interop.save(delta, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    interop.save(opendelta.composition(base)["a"], tmp_path / "a")


def test_names_with_steps_of_wrappers_are_not_written(tmp_path):
    base = tiny("llama")
    base.model.layers[0] = torch.compile(base.model.layers[0])
    with pytest.raises(opendelta.DeltaError, match=r"_orig_mod.*inside a wrapper"):
        interop.save(LoraModel(base, modified_modules=["q_proj"]), tmp_path)


def test_only_an_adapter_of_peft_is_replaced(tmp_path):
    delta = LoraModel(tiny("llama"))
    interop.save(delta, tmp_path)
    shake(delta)
    interop.save(delta, tmp_path)
    fresh = tiny("llama")
    opendelta.load(tmp_path, fresh)
    assert torch.equal(run(fresh), run(delta.backbone_model))
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(opendelta.DeltaError, match=r"is not PEFT's"):
        interop.save(delta, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(opendelta.DeltaError, match=r"has a config.json"):
        interop.save(delta, tmp_path)


def two_of(folder):
    """Two deltas that differ in rank, alpha and values; the first is saved in `folder`."""
    small = LoraModel(tiny("llama"), lora_r=2, lora_alpha=2)
    large = LoraModel(tiny("llama"), lora_r=4, lora_alpha=16)
    for delta in (small, large):
        with torch.no_grad():
            for parameter in delta.parameters():
                parameter.fill_(delta.config.lora_alpha)
    interop.save(small, folder)
    return small, large


def loaded(folder):
    """(alpha, the one value of all tensors) of what `opendelta.load` makes of a folder."""
    delta = AutoDeltaModel.from_finetuned(folder, backbone_model=tiny("llama"))
    (value,) = {float(v) for p in delta.parameters() for v in p.detach().unique()}
    return delta.config.lora_alpha, value


FILES = ["adapter_config.json", "adapter_model.safetensors"]


def test_a_folder_that_is_replaced_while_it_is_read_is_never_a_mixture(tmp_path, monkeypatch):
    _, large = two_of(tmp_path)
    read = reading.read_json

    def between(path):
        monkeypatch.setattr(reading, "read_json", read)
        config = read(path)
        interop.save(large, tmp_path)  # somebody saves now
        return config

    monkeypatch.setattr(reading, "read_json", between)
    assert loaded(tmp_path) == (16, 16)


def test_readers_beside_a_writer_see_the_one_or_the_other(tmp_path):
    deltas, stop, found = itertools.cycle(two_of(tmp_path)), threading.Event(), []

    def write_on():
        while not stop.is_set():
            interop.save(next(deltas), tmp_path)

    writer = threading.Thread(target=write_on)
    writer.start()
    try:
        for _ in range(40):
            found.append(loaded(tmp_path))
    finally:
        stop.set()
        writer.join()
    assert {*found} <= {(2, 2), (16, 16)}


def test_writers_at_once_leave_the_adapter_of_one_of_them(tmp_path):
    deltas = two_of(tmp_path)

    def write_on(delta):
        for _ in range(30):
            interop.save(delta, tmp_path)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(write_on, delta) for delta in deltas * 2]:
            done.result()
    assert loaded(tmp_path) in {(2, 2), (16, 16)}
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


@pytest.mark.parametrize("step", ["write_tensors", "flush"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=repr)
def test_a_save_that_fails_leaves_the_old_adapter(tmp_path, monkeypatch, step, error):
    small, large = two_of(tmp_path)

    def fail(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files, step, fail)
        with pytest.raises(type(error)):
            interop.save(large, tmp_path)
        with pytest.raises(type(error)):
            interop.save(large, tmp_path / "new")
    assert loaded(tmp_path) == (2, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    (tmp_path / ".delta-0123456789abcdef.tmp").mkdir()  # of a process that was killed
    interop.save(small, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


@pytest.mark.parametrize("number", [1, 2])
def test_a_save_that_is_stopped_between_its_files_is_ended(tmp_path, monkeypatch, number):
    _, large = two_of(tmp_path)
    replace, left = os.replace, number

    def stopping(*paths):
        nonlocal left
        replace(*paths)
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        interop.save(large, tmp_path)
    assert loaded(tmp_path) == (16, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_weights_of_the_backbone_in_a_folder_may_have_been_rounded_since(target, dtype, tmp_path):
    write(lora(target_modules=[target]), tiny("llama"), tmp_path)
    base = tiny("llama").to(dtype)
    opendelta.load(tmp_path, base)
    theirs = peft.PeftModel.from_pretrained(tiny("llama").to(dtype), tmp_path).eval()
    assert torch.allclose(run(base).float(), run(theirs).float(), atol=5e-2)
    base = tiny("llama").to(dtype)
    with torch.no_grad():
        base.get_submodule("model.embed_tokens" if target[0] == "e" else target).weight[1] += 1
    refused_by(base, tmp_path, r"it brings another weight \[60, 32\]")


def refused_by(base, folder, message):
    with untouched(base), pytest.raises(opendelta.DeltaLoadError, match=message):
        opendelta.load(folder, base)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_folder_that_may_not_be_entered_is_one_error(tmp_path, monkeypatch):
    folder = tmp_path / "closed"
    folder.mkdir()
    exists = Path.exists

    def closed(path, **options):
        if path.parent == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return exists(path, **options)

    delta = LoraModel(tiny("llama"))
    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(opendelta.DeltaError, match=r"cannot write into .*closed.*denied"):
        interop.save(delta, folder)


def test_one_of_ours_is_not_saved_among_the_files_of_another_library(tmp_path):
    write(lora(target_modules=LLAMA), tiny("llama"), tmp_path / "peft")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "adapter_setup.json").write_text("{}")
    delta = LoraModel(tiny("llama"))
    for library in ("peft", "adapters"):
        before = sorted(path.name for path in (tmp_path / library).iterdir())
        for save in (delta.save_finetuned, opendelta.composition(delta.backbone_model).save):
            with pytest.raises(opendelta.DeltaError, match=rf"another library \({library}\)"):
                save(tmp_path / library)
        assert sorted(path.name for path in (tmp_path / library).iterdir()) == before


def test_peft_s_folders_hold_one_delta(tmp_path):
    model = tiny("llama")
    LoraModel(model)
    with pytest.raises(
        opendelta.DeltaError, match=r"takes a delta, not a Composition: .* just one"
    ):
        interop.save(opendelta.composition(model), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_ours_is_ours_whatever_else_lies_in_it(tmp_path):
    delta = shake(LoraModel(tiny("llama"), lora_r=2))
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    write(lora(target_modules=LLAMA), tiny("llama"), tmp_path)
    (tmp_path / "adapter_setup.json").write_text("{}")
    fresh = tiny("llama")
    opendelta.load(tmp_path, fresh)
    assert torch.equal(run(fresh), run(delta.backbone_model))
    delta.save_finetuned(tmp_path)
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json cannot be read as JSON")
