"""`GateModel(per="sequence")`: the tokens of a document weigh the deltas by their mean."""

import pytest
import torch
import transformers
from support.nets import filled
from torch import nn

from opendelta import (
    AdapterModel,
    GateModel,
    LoraModel,
    OptionError,
    SiteError,
    composition,
    watching,
)

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
IDS = torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(0))
QUERY = "encoder.layer.1.attention.self.query"


@pytest.fixture
def bert():
    torch.manual_seed(1)
    config = transformers.BertConfig(**SIZES, num_hidden_layers=2, vocab_size=99)
    model = transformers.BertModel(config).eval()
    deltas = [
        LoraModel(model, modified_modules=["query"], name="a"),
        AdapterModel(model, modified_modules=["query"], name="b"),
    ]
    gate = GateModel(model, deltas=deltas, per="sequence", noise=1.0, name="gate")
    filled(*deltas, gate)
    return model


@pytest.mark.covers("GateConfig.per")
def test_all_tokens_of_a_row_have_the_weights_of_their_mean_without_padding(bert):
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [0] * 2 + [1] * 5])
    inputs = []
    bert.get_submodule(QUERY).register_forward_hook(lambda _, args, out: inputs.append(args[0]))
    with watching(bert) as seen:
        bert(IDS, attention_mask=mask)
    layer = composition(bert)["gate"].layers[QUERY]
    for row in range(3):
        mean = inputs[0][row][mask[row] == 1].mean(0)
        wanted = (layer.weight @ mean + layer.bias).softmax(-1)
        found = seen["gate"][QUERY][row]
        torch.testing.assert_close(found, wanted.expand_as(found))


def test_a_padded_row_computes_what_it_computes_alone(bert):
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 7])
    together = bert(IDS, attention_mask=mask).last_hidden_state
    alone = bert(IDS[1:2, :4]).last_hidden_state
    torch.testing.assert_close(together[1, :4], alone[0])


@pytest.fixture
def packed():
    torch.manual_seed(1)
    config = transformers.ModernBertConfig(
        **SIZES, num_hidden_layers=2, vocab_size=99, pad_token_id=0, local_attention=8
    )
    model = transformers.ModernBertModel(config).eval()
    deltas = [LoraModel(model, modified_modules=["Wo"], name=name) for name in "ab"]
    gate = GateModel(model, deltas=deltas, per="sequence", noise=1.0, name="gate")
    filled(*deltas, gate)
    return model


PLACES = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])


def check_documents(weights):
    """Raise unless the first three tokens of a row have one weight, and the others another."""
    for rows in (slice(0, 3), slice(3, 7)):
        part = weights[0, rows]
        torch.testing.assert_close(part, part[:1].expand_as(part))
    assert (weights[0, 0] - weights[0, 3]).abs().max() > 1e-4


def test_each_document_that_is_packed_into_a_row_has_weights_of_its_own(packed):
    with watching(packed) as seen:
        packed(IDS[:1], position_ids=PLACES)
    for weights in seen["gate"].values():
        check_documents(weights)


@pytest.mark.covers("GateConfig.noise", "GateConfig.per")
def test_noise_is_drawn_once_for_a_row_and_once_for_a_packed_document(bert, packed):
    for model in (bert, packed):
        for p in composition(model)["gate"].train().parameters():
            nn.init.zeros_(p)  # the noise alone weighs
    with watching(bert) as seen:
        bert(IDS, attention_mask=torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 7]))
    weights = seen["gate"][QUERY]
    assert torch.equal(weights, weights[:, :1].expand_as(weights))
    assert len(weights[:, 0].unique()) == 6  # [rows, deltas]
    with watching(packed) as seen:
        packed(IDS[:1], position_ids=PLACES)
    for weights in seen["gate"].values():
        check_documents(weights)


def test_the_noise_of_a_row_has_its_standard_deviation():
    net = nn.Sequential(nn.Linear(8, 8))
    deltas = [LoraModel(net, modified_modules=["0"], name=name) for name in "ab"]
    GateModel(net, deltas=deltas, per="sequence", noise=0.5, name="gate").train()
    with watching(net) as seen:
        net(torch.zeros(4000, 3, 8))
    assert seen.logits("gate")["0"][:, 0].std(0).tolist() == pytest.approx([0.5, 0.5], rel=0.05)


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration"]
)
def test_models_whose_tokens_see_no_later_ones_are_refused(name):
    sizes = {
        "GPT2LMHeadModel": {"n_embd": 32, "n_head": 2, "n_layer": 1},
        "LlamaForCausalLM": {**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 2},
        "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1},
    }[name]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(vocab_size=99, **sizes))
    deltas = [LoraModel(model, name=name) for name in "ab"]
    with pytest.raises(SiteError, match='per="token"'):
        GateModel(model, deltas=deltas, per="sequence")
    GateModel(model, deltas=deltas, name="gate")


def test_the_encoder_of_a_seq2seq_model_is_taken():
    torch.manual_seed(1)
    config = transformers.T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, vocab_size=99)
    model = transformers.T5ForConditionalGeneration(config).eval()
    places = [r"[r]^encoder\..*SelfAttention\.q$"]
    deltas = [LoraModel(model, modified_modules=places, name=name) for name in "ab"]
    gate = GateModel(model, deltas=deltas, per="sequence", name="gate")
    filled(*deltas, gate)
    mask = torch.tensor([[1] * 4 + [0] * 3])
    start = torch.zeros(1, 1, dtype=torch.long)
    padded = model(IDS[:1], attention_mask=mask, decoder_input_ids=start).logits
    alone = model(IDS[:1, :4], decoder_input_ids=start).logits
    torch.testing.assert_close(padded, alone)


def test_plain_modules_count_all_tokens():
    net = nn.Sequential(nn.Linear(8, 8))
    deltas = [LoraModel(net, modified_modules=["0"], name=name) for name in "ab"]
    gate = GateModel(net, deltas=deltas, per="sequence", name="gate")
    filled(*deltas, gate)
    x = torch.randn(2, 5, 8)
    with watching(net) as seen:
        net(x)
    layer = gate.layers["0"]
    wanted = (x.mean(1) @ layer.weight.T + layer.bias).softmax(-1)
    torch.testing.assert_close(seen["gate"]["0"], wanted[:, None].expand(2, 5, 2))
    with pytest.raises(OptionError, match="per='row'"):
        GateModel(net, deltas=deltas, per="row")
