"""What people with programs for OpenDelta 0.3 met: their files, counts, attributes and names."""

import json

import pytest
import torch
import transformers
from support.nets import shake
from torch import nn

import opendelta
from opendelta import (
    AutoDeltaConfig,
    AutoDeltaModel,
    BitFitModel,
    CompacterConfig,
    DeltaLoadError,
    LoraConfig,
    LoraModel,
    OptionError,
    SoftPromptModel,
)

IDS = torch.arange(5, 9)[None]


def bert(**options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, **options,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


class Half(nn.Module):
    """One module with a bias and one without."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.covers("BitFitModel")
def test_biases_of_0_3_go_to_the_delta_where_the_module_has_none():
    model, x = Half(), torch.randn(2, 4)
    delta = BitFitModel(model, modified_modules=["a", "b"])
    state = {"a.bias": torch.randn(4), "b.bias": torch.randn(4)}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    expected = (x @ model.a.weight.T + state["a.bias"]) @ model.b.weight.T + state["b.bias"]
    torch.testing.assert_close(model(x), expected)
    delta.detach()
    assert model.load_state_dict(state, strict=False).unexpected_keys == ["b.bias"]


@pytest.mark.covers("SoftPromptConfig.strip")
def test_a_prompt_of_0_3_needs_a_delta_that_leaves_it_in_the_output(tmp_path):
    state = {"bert.soft_prompt_layer.soft_embeds": torch.randn(3, 32)}
    torch.save(state, tmp_path / "prompt.bin")
    model = bert()
    delta = SoftPromptModel(model, soft_token_num=3)
    before = [p.clone() for p in delta.parameters()]
    for load in (
        lambda: model.load_state_dict(state, strict=False),
        lambda: opendelta.interop.legacy.load_state_dict(model, tmp_path / "prompt.bin"),
    ):
        with pytest.raises(DeltaLoadError, match=r"SoftPromptModel\(..., strip=False\)"):
            load()
    assert all(torch.equal(*pair) for pair in zip(before, delta.parameters(), strict=True))
    delta.detach()
    whole = SoftPromptModel(model, soft_token_num=3, strip=False, name="whole")
    model.load_state_dict(state, strict=False)
    assert torch.equal(next(whole.parameters()), *state.values())


@pytest.mark.covers("BitFitModel")
@pytest.mark.parametrize(
    ("kind", "head", "excluded", "layer"),
    [
        # 0.3.2's count in a layer: biases of attention, feed-forward and two norms
        ("Bert", "SequenceClassification", ["embeddings"], 4 * 32 + 64 + 32 + 2 * 32),
        ("Bert", "MaskedLM", ["embeddings", "cls"], 4 * 32 + 64 + 32 + 2 * 32),
        ("DebertaV2", "SequenceClassification", ["embeddings", "intermediate"], 4 * 32 + 3 * 32),
    ],
)
def test_what_is_excluded_for_the_biases_that_0_3_trained_by_default(kind, head, excluded, layer):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    delta = BitFitModel(getattr(transformers, f"{kind}For{head}")(config), exclude_modules=excluded)
    assert sum(p.numel() for p in delta.parameters()) == 2 * layer


@pytest.mark.covers("AutoDeltaConfig", "DeltaConfig.exclude_modules")
def test_the_config_of_a_folder_of_0_3_keeps_what_is_excluded_and_unfrozen(tmp_path):
    given = {
        "delta_type": "lora", "lora_r": 2, "modified_modules": ["query"], "lora_alpha": None,
        "exclude_modules": ["layer.0"], "unfrozen_modules": ["deltas", "classifier"],
        "opendelta_version": "0.3.2", "backbone_class": "BertForSequenceClassification",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(given))
    alone = LoraConfig.from_finetuned(tmp_path)  # what 0.3's config.save_finetuned wrote
    key = "bert.encoder.layer.1.attention.self.query.lora.lora_"
    tensors = {f"{key}A": torch.zeros(2, 32), f"{key}B": torch.zeros(32, 2)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    for config in (alone, AutoDeltaConfig.from_finetuned(tmp_path)):
        assert (config.lora_r, config.lora_alpha) == (2, 16)
        delta = AutoDeltaModel.from_config(config, bert())
        assert delta.modified_modules == ["bert.encoder.layer.1.attention.self.query"]
        assert delta.unfrozen_modules == ["deltas", "classifier"]


@pytest.mark.covers("Delta.unfrozen_modules", "Delta.freeze_module")
def test_the_unfrozen_modules_are_what_freezing_takes():
    model = bert()
    delta = LoraModel(model, modified_modules=["query"], unfrozen_modules=["deltas", "classifier"])
    delta.freeze_module(exclude=delta.unfrozen_modules)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 8 * 64 + 2 * 32 + 2
    assert LoraModel(bert()).unfrozen_modules == ["deltas"]


def test_null_in_a_config_that_0_3_saved_is_the_default():
    given = {"delta_type": "parallel_adapter", "scaled": None, "backbone_class": "T5Model"}
    assert AutoDeltaConfig.from_dict(given).scaled == 1.0
    with pytest.raises(OptionError, match="scaled=None"):
        AutoDeltaConfig.from_dict({"delta_type": "parallel_adapter", "scaled": None})


@pytest.mark.covers("Delta.load_checkpoint")
def test_options_of_the_start_need_not_agree_with_a_checkpoint(tmp_path):
    model = bert()
    delta = SoftPromptModel(model, soft_token_num=3, token_init=False, init_range=0.1)
    delta.freeze_module()
    delta.save_checkpoint(tmp_path)
    other = SoftPromptModel(bert(), soft_token_num=3)
    other.load_checkpoint(tmp_path)
    assert torch.equal(next(other.parameters()), next(delta.parameters()))


def test_a_config_takes_what_0_3_took_and_did_not_heed():
    config = CompacterConfig(bottleneck_dim=None, sequential=True)
    assert config == CompacterConfig()
    assert "bottleneck_dim" not in config.to_dict()
    with pytest.raises(OptionError, match="use reduction_factor"):
        CompacterConfig(bottleneck_dim=8)
    changed = json.loads(LoraConfig(lora_r=3).to_json_string(use_diff=True))
    assert changed == {"delta_type": "lora", "lora_r": 3}


@pytest.mark.covers("Delta.save_finetuned", "Delta.from_finetuned")
def test_files_by_position_and_in_a_folder_of_downloads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = bert()
    delta = shake(LoraModel(model))
    delta.freeze_module()
    delta.save_finetuned("cache/mine", True)
    other = bert()
    LoraModel.from_finetuned("mine", other, None, "cache", None)
    assert torch.equal(other(IDS).logits, model(IDS).logits)
    with pytest.raises(OptionError, match="save_config=False"):
        delta.save_finetuned("cache/mine", False)


def test_functions_that_count_take_a_delta():
    from opendelta.utils.inspect import (
        inspect_module_statistics,
        num_delta_parameters,
        num_total_parameters,
        num_trainable_parameters,
    )

    delta = LoraModel(bert(), lora_r=2, modified_modules=["query"])
    assert num_total_parameters(delta) == num_delta_parameters(delta) == 2 * 2 * 64
    delta.requires_grad_(False)
    assert num_trainable_parameters(delta) == 0
    assert inspect_module_statistics(delta, verbose=False)["delta_ratio"] == 1.0


def test_names_of_the_package_itself():
    from opendelta.utils.structure_mapping import CommonStructureMap

    assert opendelta.CommonStructureMap is CommonStructureMap
    assert opendelta.logging.get_logger().name == "opendelta"
    for name in ("SaveLoadMixin", "set_axis_order", "global_setting", "GlobalSetting"):
        with pytest.raises(ImportError, match=rf"opendelta\.{name} of OpenDelta 0.3 is gone: "):
            getattr(opendelta, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = opendelta.nothing
    from opendelta.utils.name_based_addressing import endswith_in_normal

    assert endswith_in_normal("a.b", ["b"])


def test_a_module_without_forward_and_children_is_no_advice():
    model = bert()
    model.bert.encoder.empty = nn.Module()
    with pytest.raises(opendelta.SiteError, match="having no forward; choose others"):
        opendelta.AdapterModel(model, modified_modules=["empty"])
    with pytest.raises(OptionError, match="only 'hf' is known"):
        LoraModel(model, backend="torch")
