"""Soft prompts: rows that start as tokens compute what those tokens written before the input do."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.models import FAMILIES, build, token_ids, tower
from support.nets import shake, untouched

from opendelta import OptionError, SiteError, SoftPromptModel

pytestmark = pytest.mark.covers(
    "SoftPromptModel", "SoftPromptConfig.soft_token_num", "SoftPromptConfig.token_init"
)

TOKENS = [7, 9, 11]
LENGTH = len(TOKENS)
IDS = token_ids()
LONGER = torch.cat([torch.tensor([TOKENS, TOKENS]), IDS], 1)
DECODERS, ENCODERS, BOTH = ["gpt2", "llama", "mistral"], ["bert", "roberta"], ["t5", "bart"]


def prompt(model, **options):
    return SoftPromptModel(model, soft_token_num=LENGTH, token_init=TOKENS, **options)


def run(model, ids, **more):
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = IDS[:, :4]
    with torch.no_grad():
        return model(input_ids=ids, **more)


def near(one, other):
    assert one.shape == other.shape
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", DECODERS + ENCODERS + BOTH)
def test_it_is_what_its_tokens_before_the_input_are(name, masked):
    model = build(name)
    masks = [{}, {}]
    if masked:
        mask = torch.ones_like(IDS)
        mask[1, -2:] = 0
        masks = [{"attention_mask": m} for m in (F.pad(mask, (LENGTH, 0), value=1), mask)]
    expected = run(model, LONGER, **masks[0]).logits
    with untouched(model):
        delta = prompt(model)
        found = run(model, IDS, **masks[1]).logits
        near(found, expected if name in BOTH else expected[:, LENGTH:])
        delta.detach()


@pytest.mark.parametrize("name", DECODERS + ENCODERS)
def test_all_hidden_states_are_those_of_the_tokens(name):
    model = build(name)
    expected = run(model, LONGER, output_hidden_states=True).hidden_states
    prompt(model)
    found = run(model, IDS, output_hidden_states=True).hidden_states
    for one, other in zip(found, expected, strict=True):
        near(one, other[:, LENGTH:])


@pytest.mark.parametrize("name", BOTH)
def test_an_encoders_output_keeps_the_prompt_for_the_decoder(name):
    model = build(name)
    expected = run(model, LONGER).encoder_last_hidden_state
    prompt(model)
    near(run(model, IDS).encoder_last_hidden_state, expected)


def test_labels_and_logits_to_keep_know_nothing_of_the_prompt():
    model = build("gpt2")
    shake(prompt(model))
    out = run(model, IDS, labels=IDS)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert torch.allclose(out.loss, expected)
    near(run(model, IDS, logits_to_keep=2).logits, out.logits[:, -2:])


@pytest.mark.covers("SoftPromptConfig.strip")
@pytest.mark.parametrize("strip", [True, False])
def test_a_pooler_reads_the_first_token_or_without_strip_the_first_row(strip):
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(FAMILIES["bert"].config).eval()
    hidden = model.bert(LONGER).last_hidden_state
    first = hidden[:, LENGTH:] if strip else hidden
    expected = model.classifier(model.bert.pooler(first))
    prompt(model, strip=strip)
    near(model(IDS).logits, expected)
    assert model.bert(IDS).last_hidden_state.size(1) == IDS.size(1) + (0 if strip else LENGTH)


def test_what_it_cannot_start_from_or_stand_before_is_refused():
    model = build("gpt2")
    with untouched(model):
        with pytest.raises(OptionError, match=r"token_init='sort' needs tokenizer="):
            SoftPromptModel(model, token_init="sort")
        with pytest.raises(OptionError, match=r"token_init names 1 tokens \[96\]; .* of the 96"):
            SoftPromptModel(model, token_init=[96])
    delta = prompt(model)
    with pytest.raises(SiteError, match=r"the attention mask of GPT2Model must be \[batch, length"):
        run(model, IDS, attention_mask=torch.zeros(2, 1, 7, 7))
    delta.detach()
    vectors = tower()
    with untouched(vectors), pytest.raises(SiteError, match=r"cannot carry 'soft_prompt'"):
        prompt(vectors)
