"""`reads`: a parent that reads a weight instead of calling its module sees what the delta does."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support.models import build, detach, inputs, reader, vectors
from support.nets import shake, untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, IA3Model, LoraModel, SiteError, UnreachedWarning

pytestmark = pytest.mark.covers("DeltaConfig.reads")


@pytest.mark.covers("UnreachedWarning")
def test_the_first_forward_warns_of_a_layer_that_its_parent_does_not_call():
    model = reader()
    LoraModel(model, modified_modules=["q"])
    with pytest.warns(UnreachedWarning, match=r"q\.deltas\.lora.*reads=True"):
        model(vectors(2, 8))
    model(vectors(2, 8))  # once is enough


@pytest.mark.covers("check")
def test_check_reports_a_layer_that_its_parent_does_not_call():
    model = reader()
    LoraModel(model, modified_modules=["q"])
    report = opendelta.check(model, vectors(2, 8))
    assert not report
    assert report.unreached == ["q.deltas.lora"]
    assert "q.deltas.lora" in str(report)


@pytest.mark.covers("unreached")
def test_disabled_layers_are_not_missed():
    model = reader()
    delta = LoraModel(model, modified_modules=["q"])
    delta.disable()
    model(vectors(2, 8))
    assert opendelta.unreached(model) == []


def test_reads_makes_deltas_act_on_a_weight_that_is_read():
    model, x = reader(), vectors(2, 8)
    before = opendelta.snapshot(model)
    raw, bias = model.q.weight, model.q.bias
    lora = shake(LoraModel(model, modified_modules=["q"], reads=True))
    ia3 = shake(IA3Model(model, modified_modules=["q"], reads=True))

    low_rank, scale = lora.layers["q"], ia3.layers["q"].ia3_l
    weight = raw + low_rank.scaling * low_rank.lora_B @ low_rank.lora_A
    expected = F.linear(x, weight, bias) * scale
    assert opendelta.check(model, x)
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert torch.allclose(model.q(x), expected, atol=1e-5)  # called, it applies them once only

    detach([lora, ia3])
    opendelta.assert_pristine(model, like=before)
    assert model.q.weight is raw


def test_deltas_on_a_weight_that_is_read_get_gradients():
    model = reader()
    lora = shake(LoraModel(model, modified_modules=["q"], reads=True))
    model(vectors(2, 8)).pow(2).sum().backward()
    for parameter in [*lora.parameters(), *model.parameters()]:
        assert parameter.grad.abs().sum() > 0


def test_the_stored_weight_of_a_reads_site_is_still_its_parameter():
    model, x = reader(), vectors(2, 8)
    raw, bias = model.q.weight, model.q.bias
    shake(LoraModel(model, modified_modules=["q"], reads=True))
    expected = model(x)

    assert dict(model.named_parameters())["q.weight"] is raw
    assert not torch.allclose(model.q.weight, raw)
    model.q.weight = other = nn.Parameter(torch.zeros(8, 8))
    assert model.q._parameters["weight"] is other
    model.load_state_dict({"q.weight": raw, "q.bias": bias}, strict=False)
    assert torch.equal(model(x), expected)
    model.load_state_dict({"q.weight": raw, "q.bias": bias}, strict=False, assign=True)
    assert torch.equal(model(x), expected)
    assert torch.allclose(model.double()(x.double()), expected.double(), atol=1e-6)


def test_a_second_delta_with_reads_turns_a_site_into_one_whose_weight_shows_the_first_too():
    model, x = reader(), vectors(2, 8)
    plain = model(x)
    first = shake(LoraModel(model, modified_modules=["q"]))
    second = LoraModel(model, modified_modules=["q"], reads=True)
    assert opendelta.check(model, x)
    assert not torch.allclose(model(x), plain)
    detach([second, first])
    assert torch.equal(model(x), plain)


def test_copies_of_a_reads_site_read_folded_weights_too():
    model, x = reader(), vectors(2, 8)
    shake(LoraModel(model, modified_modules=["q"], reads=True))
    expected = model(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x), expected)


class Attention(nn.Module):
    """Self-attention by `nn.MultiheadAttention`, which reads the weight of its `out_proj`."""

    def __init__(self):
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.mha(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_lora_on_out_proj_of_multihead_attention_acts_through_the_folded_weight(training):
    torch.manual_seed(0)
    model, x = Attention().train(training).requires_grad_(False), vectors(2, 5, 8)
    plain, merged = model(x), copy.deepcopy(model)
    delta = shake(LoraModel(model, modified_modules=["out_proj"]))
    layer = delta.layers["mha.out_proj"]
    with torch.no_grad():
        merged.mha.out_proj.weight += layer.scaling * layer.lora_B @ layer.lora_A

    for parameter in delta.parameters():  # torch's fused path asks that nothing requires grad
        parameter.requires_grad_(training)
    assert torch.allclose(model(x), merged(x), atol=1e-6)
    assert opendelta.unreached(model) == []
    delta.detach()
    assert torch.equal(model(x), plain)


def test_an_adapter_on_out_proj_of_multihead_attention_is_refused_by_name():
    model = Attention()
    refused = pytest.raises(SiteError, match=r"'mha\.out_proj'.*reads \.weight.*'adapter'")
    with untouched(model), refused:
        AdapterModel(model, modified_modules=["out_proj"])


@pytest.mark.covers("DeltaConfig.modules_to_save")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("above", [False, True])
def test_a_loss_that_reads_the_head_reads_the_copy_of_a_delta(above, dtype):
    model = build("llama").to(dtype)
    delta = shake(LoraModel(model, modules_to_save=["lm_head"], reads=True))
    if above:
        shake(LoraModel(model, modified_modules=["lm_head"], reads=True, name="above"), seed=1)
    batch = inputs(model)
    hidden = model.model(**batch).last_hidden_state
    head = model.get_output_embeddings()
    read = hidden @ head.weight.T
    assert head.weight.dtype == dtype
    torch.testing.assert_close(
        read, model(**batch).logits, atol=1e-5 if dtype.itemsize == 4 else 0.05, rtol=0.02
    )
    read.float().sum().backward()
    copied = delta.layers["lm_head"].module
    assert copied.weight.grad.abs().sum() > 0
    expected = copied.weight.detach().clone()
    with opendelta.composition(model).only():
        assert not torch.equal(head.weight, expected.to(dtype))
        assert torch.equal(head.weight, model.lm_head._parameters["weight"])


@pytest.mark.covers("DeltaConfig.modules_to_save")
def test_a_head_of_several_modules_is_copied_beside_reads():
    model = build("roberta")
    head = "classifier" if hasattr(model, "classifier") else "lm_head"
    delta = shake(LoraModel(model, modified_modules=["query"], modules_to_save=[head], reads=True))
    assert delta.layers[head].stand_in is not model.get_submodule(head)
    assert opendelta.check(model, inputs(model)).unreached == []
