"""Models of somebody's own with a state of earlier tokens, and embeddings with own forwards."""

import pytest
import torch
import transformers as T
from support.nets import shake
from torch import nn

import opendelta
from opendelta import LoReftModel, SiteError, SoftPromptModel

pytestmark = pytest.mark.covers("LoReftModel", "SoftPromptModel")
IDS = torch.randint(2, 59, (2, 9), generator=torch.Generator().manual_seed(0))
KNOWN = "past_key_values"


class Attends(nn.Module):
    """Two blocks of attention over a state of its own."""

    def __init__(self, as_dict):
        super().__init__()
        self.embedding, self.as_dict = nn.Embedding(60, 16), as_dict
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def run(self, h, state):
        new = []
        for index, layer in enumerate(self.layers):
            x = layer(h)
            keys = x if state is None else torch.cat([state[index], x], 1)
            new.append(keys)
            seen = torch.ones(h.size(1), keys.size(1)).tril(keys.size(1) - h.size(1)).bool()
            h = h + (x @ keys.mT).masked_fill(~seen, -1e9).softmax(-1) @ keys
        return {"h": h, KNOWN: new} if self.as_dict else (h, new)


class Masked(Attends):
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **state):
        h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        return self.run(h, next(iter(state.values()), None))


class Unmasked(Attends):
    def forward(self, input_ids, **state):
        return self.run(self.embedding(input_ids), next(iter(state.values()), None))


def loreft(model):
    return shake(LoReftModel(model, modified_modules=["layers.0"], first=2))


def prompt(model):
    return shake(SoftPromptModel(model, soft_token_num=3, token_init=False))


def both(model, name, masks):
    """The outputs of one call, and of two that hand on the state under `name`."""

    def out(given):
        found = model(**given)
        return (found["h"], found[KNOWN]) if isinstance(found, dict) else found

    def mask(count):
        return {"attention_mask": torch.ones(2, count)} if masks else {}

    whole, _ = out({"input_ids": IDS, **mask(9)})
    first, state = out({"input_ids": IDS[:, :5], **mask(5)})
    second, _ = out({"input_ids": IDS[:, 5:], name: state, **mask(9)})
    return whole, torch.cat([first, second], 1)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", [KNOWN, "past", "kv_cache", "memory", "prev", "history"])
@pytest.mark.parametrize("put", [loreft, prompt])
def test_a_state_under_any_name_is_right_or_refused_by_name(put, name, masks):
    torch.manual_seed(0)
    model = Masked(as_dict=True)
    torch.testing.assert_close(*both(model, name, masks))
    put(model)
    if masks or name == KNOWN:
        torch.testing.assert_close(*both(model, name, masks))
    else:
        with pytest.raises(SiteError, match=f"'{name}'"):
            both(model, name, masks)


@pytest.mark.parametrize("name", ["past", "memory"])
def test_a_state_that_lost_the_prompt_is_refused(name):
    model = Masked(as_dict=False)  # all [batch, length, width] in a tuple are hidden states
    prompt(model)
    with pytest.raises(SiteError, match=rf"'{name}' holds no 8 positions, of 5 tokens and of pro"):
        both(model, name, masks=True)


def test_a_model_that_takes_no_mask_is_not_taken_for_one_without_a_state():
    model = Unmasked(as_dict=True)
    loreft(model)
    torch.testing.assert_close(*both(model, KNOWN, masks=False))
    model = Unmasked(as_dict=False)  # what is in a tuple has no name
    loreft(model)
    with pytest.raises(SiteError, match="how many came before"):
        both(model, KNOWN, masks=False)


@pytest.mark.parametrize("modules", [["backbone.blocks.0"], None])
def test_xlstm_s_state_counts_the_tokens(modules):
    config = T.xLSTMConfig(
        vocab_size=60, hidden_size=64, num_heads=4, num_blocks=2, num_hidden_layers=2,
        chunk_size=4, qk_dim_factor=1.0, v_dim_factor=1.0, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T.xLSTMForCausalLM(config).eval()
    shake(LoReftModel(model, first=2, **({} if modules is None else {"modified_modules": modules})))
    given = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    given |= {"return_dict_in_generate": True}
    ids = IDS[:1]
    cached, not_cached = (model.generate(ids, use_cache=c, **given).logits for c in (True, False))
    torch.testing.assert_close(torch.stack(cached), torch.stack(not_cached), atol=1e-4, rtol=1e-4)


class Normed(nn.Embedding):
    def forward(self, ids):
        return nn.functional.rms_norm(super().forward(ids), (self.embedding_dim,))


def test_a_prompt_starts_as_what_an_embedding_of_its_own_forward_gives():
    torch.manual_seed(0)
    model = T.LlamaModel(
        T.LlamaConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24,
        )
    ).eval()  # fmt: skip
    model.embed_tokens = Normed(60, 16)
    tokens = [7, 9, 11]
    written = torch.cat([torch.tensor([tokens] * 2), IDS], 1)
    expected = model(written).last_hidden_state[:, 3:]
    lora = shake(opendelta.LoraModel(model, modified_modules=["embed_tokens"]))
    lora.disable()
    SoftPromptModel(model, soft_token_num=3, token_init=tokens)
    torch.testing.assert_close(model(IDS).last_hidden_state, expected)


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 8), nn.BatchNorm1d(8), nn.InstanceNorm1d(8, affine=True)], ids=str
)
def test_norms_over_the_channels_before_the_time_are_refused(norm):
    model = nn.Sequential(nn.Conv1d(4, 8, 3), norm)
    with pytest.raises(SiteError, match=r"'1' .* returns \[batch, channels, ...\], \[2, 8, 14"):
        opendelta.AdapterModel(model, modified_modules=["1"], sample_inputs=torch.randn(2, 4, 16))
