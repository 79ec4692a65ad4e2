"""OpenDelta 0.3's documented snippets, unchanged, and the figures that its documentation prints.

The figures depend on shapes only, so models without weights, on the meta device, must give them to
the last digit.
"""
# fmt: off
# ruff: noqa: E501, W291

import pytest
import torch
import transformers

import opendelta
from opendelta import AdapterModel, LoraModel, LowRankAdapterModel

pytestmark = pytest.mark.covers("statistics")


def roberta_base():
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    )
    return transformers.RobertaForSequenceClassification(config)


def bart_base(num_labels=3):
    config = transformers.BartConfig(
        d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
        decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072,
        num_labels=num_labels,
    )
    return transformers.BartForSequenceClassification(config)


def bert_base_cased():
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=28996))


@pytest.fixture(autouse=True)
def without_weights():
    with torch.device("meta"):
        yield


def delta_ratio(model):
    return f"{opendelta.statistics(model).delta_ratio:.6%}"


@pytest.mark.covers("Delta.log")
def test_lora_and_adapter_on_different_places(capsys):
    model = roberta_base()
    delta_model = LoraModel(backbone_model=model, modified_modules=['key'], lora_r=1)
    delta_model2 = AdapterModel(backbone_model=model, modified_modules=['output'], bottleneck_dim=12)
    delta_model.log()
    assert "Delta Parameter Ratio: 0.383228%" in capsys.readouterr().out
    assert delta_ratio(model) == "0.383228%"
    assert len(delta_model.modified_modules) == 12
    assert len(delta_model2.modified_modules) == 24


def test_three_deltas_on_the_same_layer(capsys):
    model = bart_base()
    delta_model = AdapterModel(backbone_model=model, modified_modules=['fc2'])
    delta_model2 = AdapterModel(backbone_model=model, modified_modules=['fc2'], bottleneck_dim=12)
    delta_model3 = LowRankAdapterModel(backbone_model=model, modified_modules=['fc2'], reduction_factor=12)
    delta_model.log()
    assert "Delta Parameter Ratio: 0.506210%" in capsys.readouterr().out
    names = [delta.name for delta in (delta_model, delta_model2, delta_model3)]
    assert names == opendelta.composition(model).names == ["adapter", "adapter_1", "low_rank_adapter"]
    assert list(model.model.encoder.layers[0].fc2.deltas) == names


def test_attach_and_detach_for_many_tasks():
    model = bart_base()
    before = opendelta.snapshot(model)
    delta_model = LoraModel(backbone_model=model, modified_modules=['fc2'])
    assert delta_ratio(model) == "0.262598%"
    delta_model.detach()
    assert delta_ratio(model) == "0.000000%"
    opendelta.assert_pristine(model, like=before)
    delta_model.attach()
    assert delta_ratio(model) == "0.262598%"
    delta_model2 = AdapterModel(backbone_model=model, modified_modules=['fc1'])
    assert delta_ratio(model) == "1.529844%"
    delta_model.detach()
    delta_model2.detach()
    delta_model.attach()
    assert delta_ratio(model) == "0.262598%"


@pytest.mark.covers("Delta.freeze_module")
def test_freezing_all_but_the_deltas_and_one_module():
    model = bart_base()
    delta_model = AdapterModel(backbone_model=model, modified_modules=['fc2'], bottleneck_dim=12)
    delta_model.freeze_module(exclude=["deltas", "layernorm_embedding"], set_state_dict=True)
    assert f"{opendelta.statistics(model).trainable_ratio:.6%}" == "0.166578%"


def test_default_places():
    model = bert_base_cased()
    delta_model = AdapterModel(model)
    delta_model.log(visualization=False)
    assert delta_ratio(model) == "0.827267%"


@pytest.mark.covers("AutoDeltaConfig", "AutoDeltaModel")
def test_a_config_from_a_dict():
    config = transformers.T5Config(d_model=64, d_kv=8, d_ff=96, num_layers=2, num_heads=8)
    backbone_model = transformers.T5ForConditionalGeneration(config)
    config_dict = {
        "delta_type":"lora", 
        "modified_modules":[
            "SelfAttention.q", 
            "SelfAttention.v",
            "SelfAttention.o"
        ], 
        "lora_r":4}
    delta_config = opendelta.AutoDeltaConfig.from_dict(config_dict)
    delta_model = opendelta.AutoDeltaModel.from_config(delta_config, backbone_model=backbone_model)
    assert len(delta_model.modified_modules) == 2 * 2 * 3
    assert delta_model.config.lora_r == 4


@pytest.mark.covers("DeltaConfig.modified_modules")
@pytest.mark.parametrize(
    ("pattern", "count", "example"),
    [
        (r"[r](\d)+\.output.dense", 12, "roberta.encoder.layer.11.output.dense"),
        (r"[r][0-5]\.attention", 6, "roberta.encoder.layer.5.attention"),
        ("attention.output.dense", 12, "roberta.encoder.layer.0.attention.output.dense"),
        ("output.dense", 24, "roberta.encoder.layer.0.output.dense"),
        ("0.attention.output.dense", 1, "roberta.encoder.layer.0.attention.output.dense"),
    ],
)
def test_addressing_as_documented(pattern, count, example):
    delta = AdapterModel(roberta_base(), modified_modules=[pattern])
    assert len(delta.modified_modules) == count
    assert example in delta.modified_modules


def test_the_documented_toy_network():
    import torch.nn as nn

    class MyNet1(nn.Module):
        def __init__(self,):
            super().__init__()
            self.name_a = nn.Linear(5,5)
        def forward(self, hiddens):
            return self.name_a(hiddens)

    class MyNet2(nn.Module):
        def __init__(self,):
            super().__init__()
            self.embedding = nn.Embedding(10,5)
            self.name_b = nn.Sequential(MyNet1(), MyNet1())
        def forward(self, input_ids):
            hiddens = self.embedding(input_ids)
            return self.name_b(hiddens)

    root = MyNet2()
    delta = AdapterModel(backbone_model=root, modified_modules=['name_b.0.name_a'])
    assert delta.modified_modules == ["name_b.0.name_a"]
