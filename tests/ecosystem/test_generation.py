"""`generate()` with every method: cache or none, beams, padding; and five methods together."""

import pytest
import torch
import transformers
from support.models import SMALL, build, put_default, token_ids
from support.nets import shake

from opendelta import (
    AdapterModel,
    BitFitModel,
    LoraModel,
    LoReftModel,
    PrefixModel,
    SoftPromptModel,
)
from opendelta._deltas.registry import METHODS

pytestmark = pytest.mark.covers("*Model")

DECODERS = ["gpt2", "llama", "mistral"]
MODELS = [*DECODERS, "t5", "bart"]
PAD = 0

on_all_models = pytest.mark.parametrize("name", MODELS)
with_all_methods = pytest.mark.parametrize("method", METHODS)


# ------------------------------------------------------------------------------------------ helpers
def put_five(model):
    """Five deltas of different kinds, each of which acts."""
    torch.manual_seed(7)
    deltas = (
        LoraModel(model),
        PrefixModel(model, **SMALL["prefix"]),
        SoftPromptModel(model, **SMALL["soft_prompt"]),
        AdapterModel(model),
        BitFitModel(model),
    )
    for delta in deltas:
        shake(delta, scale=0.05)
    return deltas


def plain_first_scores(name):
    """What a plain model gives for the first new token."""
    return generate(build(name), new=1).scores[0]


def generate(model, ids=None, new=4, **options):
    """A continuation of `ids`, with the scores that led to it."""
    return model.generate(
        token_ids() if ids is None else ids,
        max_new_tokens=new, min_new_tokens=new, do_sample=False,
        output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip


def assert_same(one, other, rows=slice(None)):
    """The same tokens by the same scores; `rows` are those of `other`."""
    for first, second in zip(one.scores, other.scores, strict=True):
        torch.testing.assert_close(first, second[rows], atol=1e-4, rtol=0)
    count = len(one.scores)
    assert torch.equal(one.sequences[:, -count:], other.sequences[rows, -count:])


def padded(ids, lengths, left):
    """`ids` [batch, length] cut to `lengths` and padded on one side, and the attention mask."""
    rows, mask = torch.full_like(ids, PAD), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(ids.size(1) - length, None) if left else slice(length)
        rows[row, place], mask[row, place] = ids[row, :length], 1
    return rows, mask


def assert_padding_is_invisible(model, left):
    """Each row of a padded batch is continued as the row alone is."""
    ids, lengths = token_ids(), (7, 4)
    rows, mask = padded(ids, lengths, left)
    together = generate(model, rows, attention_mask=mask)
    for row, length in enumerate(lengths):
        alone = generate(model, ids[row : row + 1, :length])
        assert_same(alone, together, slice(row, row + 1))


@pytest.mark.covers("LoReftConfig.first")
@pytest.mark.parametrize(("name", "blocks"), [("gpt2", r"[r]h\.\d+"), ("llama", r"[r]layers\.\d+")])
def test_the_first_tokens_are_those_before_the_cache_and_no_padding(name, blocks):
    model = build(name)
    shake(LoReftModel(model, modified_modules=[blocks], first=2, last=0))
    assert_same(generate(model), generate(model, use_cache=False))
    assert_padding_is_invisible(model, left=True)


# ---------------------------------------------------------------------------------- every method
@on_all_models
@with_all_methods
def test_the_cache_changes_nothing_and_the_delta_acts(method, name):
    model = build(name)
    put_default(method, model)
    for beams in (1, 3):
        with_cache = generate(model, num_beams=beams, use_cache=True)
        without = generate(model, num_beams=beams, use_cache=False)
        assert_same(with_cache, without)
        if beams == 1:
            assert not torch.allclose(with_cache.scores[0], plain_first_scores(name), atol=1e-4)


@on_all_models
@with_all_methods
def test_padding_does_not_change_what_a_row_is_continued_with(method, name):
    model = build(name)
    put_default(method, model)
    for left in (True,) if name in DECODERS else (True, False):
        if name == "bart" and left:
            continue  # its positions count padding, with or without a delta
        assert_padding_is_invisible(model, left)


# ------------------------------------------------------------------------------------ five together
@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", DECODERS)
def test_five_deltas_together_generate_the_same_with_and_without_the_cache(name, beams):
    model = build(name)
    deltas = put_five(model)
    found = generate(model, new=6, num_beams=beams)
    assert_same(found, generate(model, new=6, num_beams=beams, use_cache=False))
    for delta in deltas:
        with delta.disabled():
            scores = generate(model, new=1, num_beams=beams).scores[0]
        assert not torch.allclose(scores, found.scores[0], atol=1e-5), delta.name


@pytest.mark.parametrize("name", DECODERS)
def test_five_deltas_together_take_left_padded_batches(name):
    model = build(name)
    put_five(model)
    assert_padding_is_invisible(model, left=True)


@on_all_models
def test_five_deltas_train_together(name):
    model = build(name).train()
    deltas = put_five(model)
    deltas[0].freeze_module()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.03)
    ids = token_ids(4, 8) % 4 + 5  # few tokens, which is soon learnt
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.abs().sum() > 0 for p in trained)
        optimizer.step()
        losses.append(loss.item())
    # the frozen head of a tiny random model lets the loss fall only so far
    assert losses[-1] < losses[0] - 0.3, losses
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_a_cache_that_counts_no_tokens_stops_nobody():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "state_size": 4, "intermediate_size": 32}
    config = transformers.MambaConfig(num_hidden_layers=1, **sizes)
    model = transformers.MambaForCausalLM(config).eval()
    shake(LoReftModel(model, modified_modules=[r"[r]layers\.\d+"], first=2, last=2))
    ids = torch.arange(5)[None]
    assert torch.equal(model(ids).logits, model(ids, use_cache=False).logits)
