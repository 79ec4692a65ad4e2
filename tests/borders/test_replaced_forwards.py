"""Forwards that other code puts in the place of a model's own: what is told of them."""

import types

import pytest
import torch
import transformers as T
from support.nets import shake
from torch import nn

import opendelta
from opendelta import LoraModel, LoReftModel, SiteError, UnreachedWarning

SIZES = {
    "vocab_size": 30, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
IDS = torch.randint(1, 30, (2, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])


def by_weight(self, input_ids, attention_mask=None):
    """A forward like that of TRL's losses in parts."""
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    return hidden @ self.lm_head.weight.T


@pytest.mark.covers("UnreachedWarning", "unreached")
def test_a_layer_that_notes_alone_is_not_told_as_silent_if_one_inside_has_noted():
    torch.manual_seed(0)
    model = T.LlamaForCausalLM(T.LlamaConfig(**SIZES)).eval()
    shake(LoReftModel(model, modified_modules=["layers.0"], first=2, last=1))
    expected = model(input_ids=IDS, attention_mask=MASK).logits
    delta = opendelta.composition(model)["loreft"]
    delta.detach()
    delta.attach()  # it watches the next forward again
    model.forward = types.MethodType(by_weight, model)
    assert torch.equal(model(input_ids=IDS, attention_mask=MASK), expected)
    assert not opendelta.unreached(model)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.fc = nn.Embedding(30, 16), nn.Linear(16, 16)

    def forward(self, idx):
        return self.fc(self.table(idx))


@pytest.mark.covers("UnreachedWarning")
def test_one_that_no_other_stands_for_is_told():
    model = Own()
    LoReftModel(model, modified_modules=["fc"], first=2)
    model.forward = lambda idx: model.fc(model.table(idx))
    with pytest.warns(UnreachedWarning, match=r"1 delta layers .*: deltas.loreft\."):
        model(IDS)


@pytest.mark.covers("SiteError")
@pytest.mark.parametrize("verb", ["attach", "copy"])
def test_a_forward_that_was_replaced_is_named_without_its_model(verb):
    model = Own()

    def replaced(self, idx):
        return Own.forward(self, idx)

    if verb == "attach":
        model.forward = types.MethodType(replaced, model)
        with pytest.raises(SiteError, match=r"the root \(Own\) had its forward replaced") as error:
            LoReftModel(model, modified_modules=["fc"], first=2)
    else:
        delta = shake(LoraModel(model, modified_modules=["fc"]))
        own = model.fc.forward
        model.fc.forward = lambda x: own(x)
        with pytest.raises(SiteError, match=r"'fc' \(Linear\) had its forward replaced") as error:
            opendelta.composition(model).to_backbone()
        assert delta.attached
    text = str(error.value)
    assert "test_a_forward_that_was_replaced_is_named_without_its_model.<locals>" in text
    assert len(text) < 500
