"""Latents that read the tokens: a mask of tokens says nothing of them, also if they are as many."""

import pytest
import torch
from torch import nn
from transformers import PerceiverConfig, PerceiverForSequenceClassification

import opendelta
from opendelta import GateModel, LoraModel, LoReftModel, SiteError

LENGTH = 8


class Reader(nn.Module):
    """Latents [latents, width] that read embedded tokens, and a feed-forward on these."""

    def __init__(self, latents):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, 16))
        self.cross = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 16)

    def read(self, x, attention_mask):
        hidden = None if attention_mask is None else attention_mask == 0
        h, _ = self.cross(self.latents.expand(len(x), -1, -1), x, x, key_padding_mask=hidden)
        return h + self.fc(h)


class OfIds(Reader):
    def __init__(self, latents):
        super().__init__(latents)
        self.embed = nn.Embedding(50, 16)

    def forward(self, input_ids, attention_mask=None):
        return self.read(self.embed(input_ids), attention_mask)


class OfFloats(Reader):
    def forward(self, x, attention_mask=None):
        return self.read(x, attention_mask)


class WithPlaces(Reader):
    """Has a table of few places, which longer rows go beyond."""

    def __init__(self, latents):
        super().__init__(latents)
        self.places = nn.Embedding(2 * LENGTH, 16)

    def forward(self, x, attention_mask=None):
        places = torch.arange(x.size(1), device=x.device)
        return self.read(x + self.places(places), attention_mask)


class Padded(nn.Module):
    """Makes its rows longer, up to the next multiple of 8."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Embedding(50, 16), nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask=None):
        more = -input_ids.size(1) % 8
        return self.fc(self.embed(nn.functional.pad(input_ids, (0, more))))


def positions(model, delta, ids, **more):
    """Return the [row, position] that a delta changes."""
    with torch.no_grad():
        on = model(ids, **more)
        with delta.disabled():
            return (on != model(ids, **more)).any(-1).nonzero().tolist()


def given(model):
    ids = torch.randint(1, 50, (2, LENGTH))
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, 5:] = 0
    return ids if isinstance(model, OfIds) else torch.randn(2, LENGTH, 16), mask


FORMS = [OfIds, OfFloats, WithPlaces]
PROBLEM = "gives {} positions in rows of any length"


@pytest.mark.covers("LoReftModel", "SiteError")
@pytest.mark.parametrize("latents", [LENGTH, LENGTH - 2, LENGTH - 3])
@pytest.mark.parametrize("form", FORMS)
def test_a_mask_of_tokens_chooses_no_latents(form, latents):
    model = form(latents).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    delta = LoReftModel(model, modified_modules=["fc"], last=1)
    with torch.no_grad():
        delta.layers["fc"].learned_source.bias.fill_(1.0)
    rows, mask = given(model)
    assert positions(model, delta, rows) == [[0, latents - 1], [1, latents - 1]]
    with pytest.raises(SiteError, match=PROBLEM.format(latents)):
        model(rows, mask)
    delta.detach()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    opendelta.assert_pristine(model)


@pytest.mark.covers("GateModel", "SiteError")
@pytest.mark.parametrize("latents", [LENGTH, LENGTH - 2])
@pytest.mark.parametrize("form", FORMS)
def test_gates_mean_latents_without_the_mask_of_tokens(form, latents):
    model = form(latents).eval()
    for name in "ab":
        LoraModel(model, modified_modules=["fc"], name=name)
    layer = GateModel(model, ["a", "b"], per="sequence", name="gate").layers["fc"]
    rows, mask = given(model)
    inputs = []
    model.fc.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad(), opendelta.watching(model) as seen:
        layer.weight.normal_()
        model(rows)
        expected = (inputs[0].mean(1, keepdim=True) @ layer.weight.T + layer.bias).softmax(-1)
    torch.testing.assert_close(seen["gate"]["fc"], expected.expand(-1, latents, -1))
    with pytest.raises(SiteError, match=PROBLEM.format(latents)):
        model(rows, mask)


class Cut(Padded):
    """Makes all its rows as long."""

    def forward(self, input_ids, attention_mask=None):
        ids = nn.functional.pad(input_ids, (0, LENGTH))[:, :LENGTH]
        return self.fc(self.embed(ids))


@pytest.mark.covers("LoReftModel")
@pytest.mark.parametrize("form", [Padded, Cut])
def test_rows_that_a_model_makes_longer_or_shorter_are_tokens(form):
    model = form().eval()
    delta = LoReftModel(model, modified_modules=["fc"], last=1)
    with torch.no_grad():
        delta.layers["fc"].learned_source.bias.fill_(1.0)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, 5:] = 0
    assert positions(model, delta, mask, attention_mask=mask) == [[0, 4], [1, 7]]


@pytest.mark.covers("LoReftModel")
@pytest.mark.parametrize("length", [8, 12])
def test_the_last_latent_of_perceiver_is_no_token(length):
    config = PerceiverConfig(
        num_latents=8, d_latents=32, d_model=16, num_blocks=1, num_self_attends_per_block=2,
        num_self_attention_heads=2, num_cross_attention_heads=2, vocab_size=60,
        max_position_embeddings=16,
    )  # fmt: skip
    model = PerceiverForSequenceClassification(config).eval()
    where = "perceiver.encoder.self_attends.1.mlp.dense2"
    delta = LoReftModel(model, modified_modules=[where], last=1)
    seen = []
    model.get_submodule(where).register_forward_hook(lambda *call: seen.append(call[2]))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, 5:] = 0
    with torch.no_grad():
        delta.layers[where].learned_source.bias.fill_(1.0)
        model(input_ids=torch.ones(2, length, dtype=torch.long), attention_mask=mask)
        with delta.disabled():
            model(input_ids=torch.ones(2, length, dtype=torch.long), attention_mask=mask)
    changed = (seen[0] != seen[1]).any(-1).nonzero().tolist()
    assert changed == [[0, 7], [1, 7]]
