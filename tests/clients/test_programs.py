"""Programs written for OpenDelta 0.3 run as they stand, or end in one line with what to do."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.nets import shake, untouched
from torch import nn

import opendelta
from opendelta import (
    AdapterModel,
    AutoDeltaConfig,
    AutoDeltaModel,
    CompacterConfig,
    CompacterModel,
    DeltaError,
    DeltaLoadError,
    LoraConfig,
    LoraModel,
    OptionError,
    ParallelAdapterModel,
    SoftPromptModel,
    UnusedWarning,
)

IDS = torch.arange(5, 9)[None]


def roberta():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, pad_token_id=1, max_position_embeddings=140,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config).eval()


# ------------------------------------------------------------------------------------- arguments
@pytest.mark.covers("SoftPromptConfig.other_expand_ids", "ParallelAdapterConfig.scaled")
def test_arguments_by_position_are_those_of_0_3():
    lora = LoraModel(roberta(), 4, 32, 0.1, ["query"], ["classifier"]).config
    assert (lora.lora_r, lora.lora_alpha, lora.lora_dropout) == (4, 32, 0.1)
    assert (len(lora.modified_modules), lora.unfrozen_modules) == (2, ["classifier"])
    adapter = AdapterModel(roberta(), 12, "relu", ["attention"], ["0.attention"]).config
    assert (adapter.bottleneck_dim, adapter.non_linearity) == (12, "relu")
    assert adapter.modified_modules == ["roberta.encoder.layer.1.attention"]
    for backend in ((), ("hf",), (None,)):
        given = ["query"], None, None, None, False, *backend, 4, "relu"
        compacter = CompacterModel(roberta(), *given).config
        assert (compacter.reduction_factor, compacter.non_linearity) == (4, "relu")
    with pytest.raises(TypeError, match=r"CompacterConfig.* takes 1 positional argument"):
        CompacterConfig(32)  # bottleneck_dim in 0.3
    pair = ["attention", "attention"]
    for scale in ((), (2.0,)):
        parallel = ParallelAdapterModel(roberta(), 12, "relu", *scale, pair).config
        assert (parallel.scaled, len(parallel.modified_modules)) == (*(scale or (1.0,)), 4)
    prompt = SoftPromptModel(roberta(), 7, 0.25, False, None, None).config
    assert (prompt.soft_token_num, prompt.init_range, prompt.token_init) == (7, 0.25, False)


@pytest.mark.parametrize("cls", [LoraModel, AdapterModel, CompacterModel, SoftPromptModel])
def test_hf_is_the_only_backend(cls):
    cls(backbone_model=roberta(), backend="hf")
    for backend in ("bmt", "torch"):
        model = roberta()
        with untouched(model), pytest.raises(OptionError, match=rf"backend='{backend}': .*FSDP2"):
            cls(model, backend=backend)
    assert "backend" not in opendelta.LoraConfig.option_names()


BY_POSITION = [
    (LoraModel, (8, 16, 0.0)), (AdapterModel, (24, "relu")), (opendelta.BitFitModel, ()),
    (opendelta.LowRankAdapterModel, (32, "relu", "glorot-uniform", 1)),
    (ParallelAdapterModel, (24, "relu")), (ParallelAdapterModel, (24, "relu", 1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "first"), BY_POSITION)
def test_the_backend_comes_last_by_position(cls, first):
    places = ["query"] * (1 + (cls is ParallelAdapterModel))
    assert cls(roberta(), *first, places, None, None, None, False, "hf").modified_modules
    with pytest.raises(OptionError, match="backend='bmt'"):
        cls(roberta(), *first, places, None, None, None, False, "bmt")
    with pytest.raises(OptionError, match="takes at most"):
        cls(roberta(), *first, places, None, None, None, False, 7)


def test_how_a_prompt_widens_other_inputs():
    both = {"attention_mask": 1, "token_type_ids": 0}
    SoftPromptModel(roberta(), soft_token_num=3, other_expand_ids=both)
    with pytest.raises(OptionError, match=r"other_expand_ids=\{'attention_mask': 0\} must be one"):
        SoftPromptModel(roberta(), soft_token_num=3, other_expand_ids={"attention_mask": 0})


def test_an_argument_that_0_3_did_not_heed_may_be_none():
    CompacterConfig.from_dict({"bottleneck_dim": None, "sequential": True})
    with pytest.raises(OptionError, match=r"bottleneck_dim=8: .*use reduction_factor"):
        CompacterConfig.from_dict({"bottleneck_dim": 8})
    with pytest.raises(OptionError, match=r"sequential=False: ParallelAdapterModel"):
        opendelta.AdapterConfig.from_dict({"sequential": False})


# ---------------------------------------------------------------------- names that match nothing
@pytest.mark.covers("UnusedWarning", "DeltaConfig.unfrozen_modules", "DeltaConfig.exclude_modules")
def test_unfrozen_and_excluded_names_that_match_nothing_are_warned_of():
    model = roberta()
    delta = LoraModel(model, modified_modules=["query"], unfrozen_modules=["deltas", "classifier"])
    delta.freeze_module()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    own = {name for name, _ in delta.named_parameters()}
    assert trained == own | {n for n, _ in model.named_parameters() if n.startswith("classifier.")}
    with pytest.warns(UnusedWarning, match=r"unfrozen_modules: .*'layer_norm'.*'LayerNorm'"):
        other = LoraModel(
            roberta(), modified_modules=["query"], unfrozen_modules=["deltas", "layer_norm"]
        )
    assert other.unfrozen_modules == ["deltas"]
    with pytest.warns(UnusedWarning, match=r"exclude_modules: no module matches 'lm_head'"):
        LoraModel(roberta(), modified_modules=["query"], exclude_modules=["lm_head"])
    with pytest.raises(opendelta.AddressError, match="'qery'"):
        LoraModel(roberta(), modified_modules=["qery"])
    with pytest.raises(opendelta.AddressError, match="'head'"):
        LoraModel(roberta(), modified_modules=["query"], modules_to_save=["head"])


@pytest.mark.covers("Delta.freeze_module")
def test_an_exclusion_of_freezing_that_matches_nothing_is_warned_of():
    model = roberta()
    delta = LoraModel(model, modified_modules=["query"])
    with pytest.warns(UnusedWarning, match=r"freeze_module.*'layernorm_embedding'"):
        delta.freeze_module(exclude=["deltas", "layernorm_embedding"])
    own = {name for name, _ in delta.named_parameters()}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own
    delta.freeze_module(exclude=["lora_A"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name in own if name.endswith("lora_A")}
    model = roberta()
    LoraModel(model).freeze_module(module=model.base_model, exclude=["deltas"])
    assert all(p.requires_grad for p in model.classifier.parameters())
    assert not model.base_model.encoder.layer[0].output.dense.weight.requires_grad


# --------------------------------------------------------------------------------------- configs
@dataclasses.dataclass
class Arguments:
    """Arguments of a training script, with those of the delta among them."""

    delta_type: str = "lora"
    lora_r: int = 4
    lora_alpha: int = 8
    modified_modules: tuple = ("query",)
    unfrozen_modules: tuple = ("deltas", "classifier")
    backbone_model: str = "roberta"
    learning_rate: float = 3e-4
    lora_rank: int = 2
    common_structure: bool = False


@pytest.mark.covers("AutoDeltaConfig", "DeltaConfig")
def test_other_keys_of_a_dict_are_ignored_with_one_warning():
    given = dataclasses.asdict(Arguments())
    before = dict(given)
    with pytest.warns(UnusedWarning) as caught:
        config = AutoDeltaConfig.from_dict(given)
    assert given == before
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith("LoraConfig ignores backbone_model, learning_rate, lora_rank: ")
    assert text.endswith("of 'lora'; 'lora_rank' is near lora_r")
    assert (config.lora_r, config.lora_alpha) == (4, 8)
    with pytest.warns(UnusedWarning, match="'r' is near lora_r"):
        assert LoraConfig.from_dict({"r": 3}).lora_r == 8
    delta = AutoDeltaModel.from_config(config, backbone_model=roberta(), check_hash=False)
    assert len(delta.modified_modules) == 2
    with pytest.raises(OptionError, match="no option 'lora_rank'"):
        LoraConfig.from_dict({"lora_r": 3}, lora_rank=3)
    with pytest.raises(OptionError, match="is for 'lora', not 'adapter'"):
        LoraConfig.from_dict({"delta_type": "adapter"})


SCRIPTS = [
    {"delta_type": "lora", "lora_r": 4, "modified_modules": ["1.attention.self.query"],
     "unfrozen_modules": ["deltas", "layer_norm", "classifier"], "do_train": True, "seed": 42},
    {"delta_type": "adapter", "bottleneck_dim": 12, "task_name": "rte", "learning_rate": 3e-4},
    {"delta_type": "prefix", "unfrozen_modules": ["deltas", "classifier"], "push_to_hub": True},
    {"delta_type": "compacter", "non_linearity": "gelu_new", "hypercomplex_division": 4,
     "unfrozen_modules": ["deltas"], "max_source_length": 128, "load_best_model_at_end": True},
    {"delta_type": "parallel_adapter", "bottleneck_dim": 12, "warmup_steps": 0,
     "modified_modules": ["attn", "attn", "ff.w1", "ff.w2"], "common_structure": True},
    {"delta_type": "low_rank_adapter", "reduction_factor": 16, "output_dir": "outputs"},
    {"delta_type": "bitfit", "num_train_epochs": 3, "unfrozen_modules": ["deltas", "classifier"]},
    {"delta_type": "soft_prompt", "soft_token_num": 5, "backbone_model": "roberta-base"},
]  # fmt: skip


@pytest.mark.parametrize("config", SCRIPTS, ids=lambda config: config["delta_type"])
@pytest.mark.filterwarnings("ignore:.*:opendelta.UnusedWarning")
def test_a_config_of_a_script_makes_a_delta_that_trains(config):
    model = roberta()
    delta = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict(config), backbone_model=model)
    delta.freeze_module(exclude=config.get("unfrozen_modules", ["deltas"]), set_state_dict=True)
    before = model(IDS).logits
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(IDS, labels=torch.tensor([1])).loss.backward()
    optimizer.step()
    assert not torch.equal(model(IDS).logits, before)


def test_a_config_that_0_3_saved_is_read(tmp_path):
    saved = {
        "backbone_checkpoint_name": "roberta-base", "backbone_class": "RobertaModel",
        "backbone_hash": "93b7", "common_structure": True, "delta_type": "lora",
        "exclude_modules": ["lm_head"], "lora_alpha": 8, "lora_dropout": 0.0, "lora_r": 2,
        "modified_modules": ["attn@.q@", "attn@.v@"], "opendelta_version": "0.3.2",
        "transformers_version": "4.10.0",
    }  # fmt: skip
    config = AutoDeltaConfig.from_dict(saved)
    with pytest.warns(UnusedWarning, match="'lm_head'"):
        delta = AutoDeltaModel.from_config(config, roberta())
    assert [n.rpartition(".")[2] for n in delta.modified_modules] == ["query", "value"] * 2


def test_a_role_of_0_3_that_no_module_plays_is_left_out():
    saved = {
        "delta_type": "bitfit", "exclude_modules": ["lm_head"], "opendelta_version": "0.3.0",
        "modified_modules": ["attn@", "ff@", "layer_norm@", "lm_head@.proj@"],
        "common_structure": True,
    }  # fmt: skip
    model = roberta().roberta
    with pytest.warns(UnusedWarning) as caught:
        delta = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict(saved), model)
    assert [str(each.message).split(": ")[0] for each in caught] == [
        "modified_modules", "exclude_modules"
    ]  # fmt: skip
    default = opendelta.BitFitModel(roberta().roberta)
    assert delta.modified_modules == default.modified_modules
    with pytest.raises(opendelta.AddressError, match=r"the role 'lm_head\.proj'"):
        LoraModel(model, modified_modules=["lm_head@.proj@"], common_structure=True)
    with pytest.raises(opendelta.AddressError, match=r"the role 'lm_head\.proj'"):
        LoraModel(model, modified_modules=["attn", "lm_head.proj"], common_structure=True)


def test_cross_attention_has_its_name_of_0_3():
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 16, "num_layers": 1}
    model = transformers.T5Model(transformers.T5Config(vocab_size=9, **sizes))
    there = LoraModel(model, modified_modules=["crossattn@.q@"], common_structure=True)
    assert there.modified_modules == ["decoder.block.0.layer.1.EncDecAttention.q"]


@pytest.mark.covers("DeltaConfig", "AutoDeltaConfig")
def test_a_config_has_files_and_json_of_its_own(tmp_path):
    config = LoraConfig(lora_r=4, modified_modules=["query"])
    config.save_finetuned(tmp_path / "config")
    assert LoraConfig.from_finetuned(tmp_path / "config") == config
    assert AutoDeltaConfig.from_finetuned(tmp_path / "config") == config
    assert json.loads(config.to_json_string()) == config.to_dict()
    config.update({"lora_r": 5})
    assert config.lora_r == 5
    with pytest.raises(OptionError, match="lora_alpha='x'"):
        config.update({"lora_r": 6, "lora_alpha": "x"})
    assert config.lora_r == 5
    with pytest.raises(OptionError, match="is for 'adapter', not 'lora'"):
        opendelta.AdapterConfig.from_finetuned(tmp_path / "config")
    with pytest.raises(DeltaLoadError, match="options only"):
        opendelta.load(tmp_path / "config", roberta())
    delta = LoraModel.from_config(LoraConfig.from_finetuned(tmp_path / "config"), roberta())
    delta.freeze_module()
    delta.save_finetuned(tmp_path / "config")  # a saved delta takes the config's place
    assert LoraConfig.from_finetuned(tmp_path / "config").lora_r == 4
    with pytest.raises(DeltaError, match="holds a saved delta"):
        config.save_finetuned(tmp_path / "config")


# ----------------------------------------------------------------------- the delta as a module
@pytest.mark.covers(
    "Delta.children", "Delta.named_children", "Delta.modules", "Delta.named_modules",
    "Delta.training", "Delta.delta_modules", "Delta.to", "Delta.cpu", "Delta.cuda",
    "Delta.find_module", "Delta.apply", "Delta.buffers", "Delta.named_buffers", "Delta.zero_grad",
    "Delta.trainable_parameters", "Delta.num_trainable_parameters", "Delta.num_total_parameters",
    "Delta.trainable_parameters_names", "Delta.frozen_parameters_names", "Delta.stat",
)  # fmt: skip
def test_a_delta_answers_as_the_module_that_it_was():
    model = roberta()
    delta = LoraModel(model, lora_r=2, modified_modules=["query"])
    assert list(delta.children()) == list(delta.delta_modules) == list(delta.layers.values())
    assert dict(delta.named_children()) == delta.layers
    own = [m for _, m in delta.named_modules()]
    assert own == list(delta.modules())
    names = {name for name, _ in delta.named_parameters()}
    assert {f"{name}.lora_A" for name, _ in delta.named_modules()} <= names
    assert delta.train().training
    assert not delta.eval().training
    assert delta.to("cpu") is delta.to(torch.device("cpu")) is delta.cpu() is delta
    assert delta.to("cpu", torch.bfloat16).config.dtype == "bfloat16"
    assert delta.to(dtype="float32", device="cpu").config.dtype == "float32"
    with pytest.raises(OptionError, match=r"to\('float31'\): give a device, or a dtype"):
        delta.to("float31")
    with pytest.raises(DeltaError, match="move the backbone"):
        delta.to("meta")
    if not torch.cuda.is_available():
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            delta.cuda()
    assert {p.dtype for p in delta.half().parameters()} == {torch.float16}
    assert delta.bfloat16().config.dtype == "bfloat16"
    assert delta.float().config.dtype == "float32"
    seen = []
    assert delta.apply(seen.append) is delta
    assert set(seen) == set(own)
    assert list(delta.buffers()) == list(dict(delta.named_buffers()).values()) == []
    model(IDS).logits.sum().backward()
    delta.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in delta.parameters())
    delta.zero_grad()
    assert all(p.grad is None for p in delta.parameters())
    assert (delta.lora_r, delta.lora_alpha) == (2, 16)
    for name, instead in {
        "find_key": "modified_modules", "structure_mapping": "opendelta.roles", "backend": "'hf'",
        "default_exclude_modules": "exclude_modules", "default_unfrozen_modules": "unfrozen",
        "create_config_from_model": "delta.config", "set_active_state_dict": "freeze_module",
    }.items():  # fmt: skip
        with pytest.raises(AttributeError, match=f"{name}', as in OpenDelta 0.3; .*{instead}"):
            getattr(delta, name)
    assert (delta.config.backbone_hash, LoraConfig().backbone_class) == (None, None)
    with pytest.raises(AttributeError, match="no attribute 'lora_rank'"):
        _ = delta.lora_rank
    assert not hasattr(delta, "lora_rank")
    delta.freeze_module(exclude=["deltas", "classifier"])
    assert delta.num_total_parameters() == delta.num_trainable_parameters() == 2 * 2 * 64
    assert delta.num_trainable_parameters(model) == delta.stat["trainable_parameters"]
    assert sum(p.numel() for p in delta.trainable_parameters(model.classifier)) == 32 * 34 + 34
    every = {name for name, _ in model.named_parameters()}
    names = {*delta.trainable_parameters_names()}, {*delta.frozen_parameters_names()}
    assert (names[0] | names[1], names[0] & names[1]) == (every, set())
    holder, last, found = delta.find_module(model, "classifier.dense")
    assert (holder, last, found) == (model.classifier, "dense", model.classifier.dense)
    marked = {n for n, p in model.named_parameters() if getattr(p, "_is_delta", False)}
    assert marked == {name for name, _ in delta.named_parameters()}


@pytest.mark.covers("Delta.forward")
def test_a_delta_does_not_run_and_says_what_does(tmp_path):
    model = roberta()
    delta = LoraModel(model)
    for run in (delta, delta.forward):
        with pytest.raises(DeltaError, match="call, train and give to a Trainer the backbone"):
            run(IDS)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[])
    with pytest.raises(DeltaError, match="give to a Trainer the backbone"):
        transformers.Trainer(model=delta, args=arguments)


@pytest.mark.covers("Delta.log", "Delta.attach", "Delta.detach")
def test_verbs_take_the_arguments_of_0_3(capsys):
    model = roberta()
    plain = model(IDS).logits
    delta = LoraModel(model, modified_modules=["query"])
    shake(delta)
    changed = model(IDS).logits
    delta.log(module=model.classifier, delta_ratio=False)
    out = capsys.readouterr().out
    assert "out_proj" in out
    assert "query" not in out
    assert "Delta Parameter" not in out
    delta.detach(model, reset_state_dict=True)
    assert torch.equal(model(IDS).logits, plain)
    delta.attach(module=model)
    assert torch.equal(model(IDS).logits, changed)
    with pytest.raises(DeltaError, match=r"detach\(module=...\): .*not for this RobertaModel"):
        delta.detach(model.base_model)
    assert delta.attached


def test_three_deltas_are_attached_run_and_detached_in_turn(tmp_path):
    names, outputs = ["a", "b", "c"], {}
    for seed, name in enumerate(names):
        model = roberta()
        delta = LoraModel(model, modified_modules=["query"])
        shake(delta, seed)
        delta.freeze_module()
        delta.save_finetuned(tmp_path / name)
        outputs[name] = model(IDS).logits
    model = roberta()
    deltas = [AutoDeltaModel.from_finetuned(tmp_path / name, model) for name in names]
    for delta in deltas:
        delta.detach()
    for name, delta in zip(names, deltas, strict=True):
        delta.attach()
        assert torch.equal(model(IDS).logits, outputs[name])
        delta.detach()


@pytest.mark.covers("Delta")
def test_a_method_written_for_0_3_is_told_where_to_look():
    from opendelta.basemodel import DeltaBase

    with pytest.raises(OptionError, match=r"Mine.update_module: .*write_a_method.md"):

        class Mine(DeltaBase):
            delta_type = "mine"
            config_class = LoraConfig
            default_modified_modules = ("attn.q",)

            def update_module(self, module, key):
                raise NotImplementedError

    with pytest.raises(AttributeError, match=r"'insert_parallel_module'; .*write_a_method"):
        _ = LoraModel(roberta()).insert_parallel_module


# ----------------------------------------------------------------------------------------- files
@pytest.mark.covers(
    "Delta.save_finetuned", "Delta.from_finetuned", "Delta.save_checkpoint",
    "Delta.load_checkpoint", "Delta.load_state_dict",
)  # fmt: skip
def test_saving_and_loading_take_the_arguments_of_0_3(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = roberta()
    delta = LoraModel(model, lora_r=2, modified_modules=["query"])
    shake(delta)
    delta.freeze_module()
    changed = model(IDS).logits
    delta.save_finetuned()
    assert (tmp_path / "delta_checkpoints" / "config.json").is_file()
    delta.save_finetuned(finetuned_delta_path="here", push_to_dc=False)
    delta.save_finetuned("here", True, None, torch.save, False, {}, {}, [], {}, False, None, "")
    with pytest.raises(OptionError, match="a folder and 11 others"):
        delta.save_finetuned("here", True, None, torch.save, *[None] * 9)
    with pytest.raises(OptionError, match="save_function=3"):
        delta.save_finetuned("here", True, None, 3)
    for_center = {"center_args": {"name": "x"}, "list_tags": ["NLI"], "usage": "from_finetuned"}
    with pytest.warns(
        UnusedWarning, match="ignores center_args, list_tags, usage: DeltaCenter is closed"
    ):
        delta.save_finetuned("here", push_to_dc=False, save_function=torch.save, **for_center)
    with pytest.raises(OptionError, match=r"saved in there, but push_to_dc=True: .*push_to_hub"):
        delta.save_finetuned("there", push_to_dc=True)
    for folder in ("delta_checkpoints", "here", "there"):
        fresh = roberta()
        LoraModel.from_finetuned(
            folder, fresh, delta_config=LoraConfig(lora_r=2), cache_dir=None,
            force_download=False, local_files_only=True, check_hash=False,
        )  # fmt: skip
        assert torch.equal(fresh(IDS).logits, changed)
    model = roberta()
    with untouched(model), pytest.raises(DeltaLoadError, match="saved with lora_r=2, not 8"):
        LoraModel.from_finetuned("here", model, delta_config=LoraConfig())
    for wrong, words in (({"state_dict": {}}, "then give these"), ({"lora_r": 3}, "'lora_r'")):
        with untouched(model), pytest.raises(OptionError, match=f"from_finetuned.*{words}"):
            LoraModel.from_finetuned("here", model, **wrong)
    LoraModel.from_finetuned("here", model, state_dict=None).detach()
    for wrong in ({"state_dict": {}}, {"save_config": False}):
        with pytest.raises(OptionError, match=f"save_finetuned.{min(wrong)}="):
            delta.save_finetuned("nowhere", **wrong)
    with pytest.raises(OptionError, match="no argument 'push_to_huub'; nearest: push_to_hub"):
        delta.save_finetuned("nowhere", push_to_huub=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_checkpoint_is_loaded_into_a_delta_that_is_there(tmp_path):
    model, other = roberta(), roberta()
    delta = LoraModel(model, lora_r=2, modified_modules=["query"], unfrozen_modules=["out_proj"])
    shake(delta)
    delta.freeze_module()
    with torch.no_grad():
        model.classifier.out_proj.bias += 1
    delta.save_checkpoint(tmp_path)
    same = LoraModel(other, lora_r=2, modified_modules=["query"], name="mine")
    same.load_checkpoint(tmp_path)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    wider = LoraModel(roberta(), lora_r=3, modified_modules=["query"])
    before = {name: p.clone() for name, p in wider.named_parameters()}
    with pytest.raises(DeltaLoadError, match="saved with lora_r=2, not 3"):
        wider.load_checkpoint(tmp_path)
    with pytest.raises(DeltaLoadError, match="holds a 'lora'"):
        AdapterModel(roberta()).load_checkpoint(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in wider.named_parameters())
    delta.save_checkpoint(tmp_path, save_func=torch.save, backbone_model=model)
    same.load_checkpoint(tmp_path, load_func=torch.load, backbone_model=other)
    with pytest.raises(OptionError, match=r"load_checkpoint\(load_func="):
        same.load_checkpoint(tmp_path, json.load)
    with pytest.raises(OptionError, match=r"save_checkpoint\(backbone_model="):
        delta.save_checkpoint(tmp_path, torch.save, other)


@pytest.mark.covers("Delta.load_checkpoint", "Delta.load_state_dict")
def test_a_checkpoint_that_0_3_wrote_is_loaded_and_its_numbered_layers_are_refused(tmp_path):
    model = roberta()
    delta = LoraModel(model, lora_r=2, modified_modules=["0.attention.self.query"])
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    key = "roberta.encoder.layer.0.attention.self.query.lora.lora_"
    torch.save({f"{key}A": a, f"{key}B": b}, tmp_path / "pytorch_model.bin")
    delta.load_checkpoint(tmp_path)
    assert all(map(torch.equal, delta.parameters(), (a, b)))
    numbered = {"delta_modules.0.lora_A": b.T, "delta_modules.0.lora_B": a.T}
    for strict in (True, False):
        with pytest.raises(DeltaLoadError, match=r"'delta_modules\.0\.lora_A'.*save_finetuned"):
            delta.load_state_dict(numbered, strict=strict)
    assert all(map(torch.equal, delta.parameters(), (a, b)))


def test_a_state_dict_with_other_tensors_loads_if_it_need_not_fit():
    model, other = roberta(), roberta()
    delta, same = (LoraModel(each, modified_modules=["query"]) for each in (model, other))
    shake(delta)
    state = model.state_dict()
    with pytest.raises(DeltaLoadError, match="unexpected"):
        same.load_state_dict(state)
    same.load_state_dict(state, strict=False)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    with pytest.raises(DeltaLoadError, match="none of its 1 tensors is the delta's"):
        same.load_state_dict({"query.lora_A": torch.zeros(1)}, strict=False)


# ------------------------------------------------------------------------------------- backbones
class Scaled(nn.Module):
    """W x / sqrt(d), as BMTrain's and ModelCenter's linear layers compute."""

    def __init__(self, dim_in, dim_out):
        super().__init__()
        self.dim_in, self.dim_out = dim_in, dim_out
        self.weight = nn.Parameter(torch.randn(dim_out, dim_in))

    def forward(self, x):
        return F.linear(x, self.weight) / math.sqrt(self.dim_in)


class ScaledToo(Scaled):
    """The same with the sizes under torch's names."""

    def __init__(self, dim_in, dim_out):
        super().__init__(dim_in, dim_out)
        self.in_features, self.out_features = dim_in, dim_out


class Norm(nn.Module):
    """A norm with a weight and no bias."""

    def __init__(self, width):
        super().__init__()
        self.eps, self.weight = 1e-6, nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Words(nn.Module):
    """An embedding that scales."""

    def __init__(self, number, width):
        super().__init__()
        self.width, self.weight = width, nn.Parameter(torch.randn(number, width))

    def forward(self, ids):
        return F.embedding(ids, self.weight) / math.sqrt(self.width)


class Attention(nn.Module):
    def __init__(self, width, linear):
        super().__init__()
        self.project_q, self.project_k, self.project_v = (linear(width, width) for _ in range(3))
        self.attention_out = linear(width, width)

    def forward(self, x):
        q, k, v = self.project_q(x), self.project_k(x), self.project_v(x)
        return self.attention_out(torch.softmax(q @ k.mT / math.sqrt(x.shape[-1]), -1) @ v)


class Block(nn.Module):
    def __init__(self, width, linear):
        super().__init__()
        self.before_attention, self.self_attention = Norm(width), Attention(width, linear)
        self.before_ff, self.w_in, self.w_out = Norm(width), linear(width, 24), linear(24, width)

    def forward(self, x):
        x = x + self.self_attention(self.before_attention(x))
        return x + self.w_out(torch.tanh(self.w_in(self.before_ff(x))))


class Encoder(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.words = Words(30, 16)
        self.layers = nn.ModuleList(Block(16, linear) for _ in range(2))

    def forward(self, ids):
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("linear", [Scaled, ScaledToo])
@pytest.mark.parametrize(
    ("cls", "options", "count"),
    [
        # 0.3.2 trained as many: for each module r (in + out), 2 b w + b + w, and its width
        (LoraModel, {"lora_r": 4, "modified_modules": ["project_q", "project_v"]}, 4 * 4 * 32),
        (AdapterModel, {"bottleneck_dim": 6, "modified_modules": ["self_attention"]}, 2 * 214),
        (opendelta.BitFitModel, {"modified_modules": ["project_q", "w_in", "before_ff"]}, 2 * 56),
        (CompacterModel, {"reduction_factor": 4, "modified_modules": ["w_out"]}, 2 * 188),
    ],
    ids=["lora", "adapter", "bitfit", "compacter"],
)
def test_layers_written_by_hand_that_scale_take_deltas(linear, cls, options, count):
    torch.manual_seed(0)
    model = Encoder(linear).double()
    before = opendelta.snapshot(model)
    plain = model(IDS)
    delta = cls(model, backend="hf", **options)
    assert torch.equal(model(IDS), plain)
    assert sum(p.numel() for p in delta.parameters()) == count
    shake(delta)
    changed = model(IDS)
    assert not torch.allclose(changed, plain)
    if cls is LoraModel:
        composed = opendelta.composition(model)
        composed.merge()
        torch.testing.assert_close(model(IDS), changed)
        composed.unmerge()
    delta.detach()
    opendelta.assert_pristine(model, like=before)


class Wrapped(nn.Module):
    """Two models side by side, without a forward of their own."""

    def __init__(self):
        super().__init__()
        self.left, self.right = roberta().roberta, roberta().roberta


@pytest.mark.parametrize("kind", [script["delta_type"] for script in SCRIPTS])
def test_two_models_in_a_wrapper_without_a_forward_both_get_the_delta(kind):
    model = Wrapped()
    both = [part(IDS).last_hidden_state for part in (model.left, model.right)]
    delta = AutoDeltaModel.from_config(AutoDeltaConfig.from_dict({"delta_type": kind}), model)
    shake(delta)
    for part, plain in zip((model.left, model.right), both, strict=True):
        assert not torch.allclose(part(IDS).last_hidden_state, plain)
    delta.detach()
    assert torch.equal(model.left(IDS).last_hidden_state, both[0])


def test_two_wrappers_around_the_same_modules_share_them():
    class Head(nn.Module):
        def __init__(self, encoder):
            super().__init__()
            self.encoder, self.head = encoder, nn.Linear(32, 2)

        def forward(self, ids):
            return self.head(self.encoder(ids).last_hidden_state[:, 0])

    encoder = roberta().roberta
    one, other = Head(encoder), Head(encoder)
    before = other(IDS)
    delta = LoraModel(one, modified_modules=["query"])
    shake(delta)
    assert not torch.allclose(other(IDS), before)
    model = Head(encoder)
    with pytest.raises(opendelta.SiteError, match="Head"):
        LoraModel(model, modified_modules=["value"])
    delta.detach()
    assert torch.equal(other(IDS), before)


def test_a_wrapper_without_a_forward_is_no_place_for_a_layer():
    model = Wrapped()
    with untouched(model), pytest.raises(opendelta.SiteError, match=r"the root .* such as 'left'"):
        LoraModel(model, modified_modules=["root"])
