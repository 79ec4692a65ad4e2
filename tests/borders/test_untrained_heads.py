"""A head with random values that is frozen is named when it is frozen, saved and checked."""

import pytest
import torch
import transformers
from torch import nn

import opendelta
from opendelta import LoraModel
from opendelta.errors import UntrainedWarning

pytestmark = pytest.mark.covers("Delta.freeze_module", "Delta.save_finetuned", "UntrainedWarning")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 99}
SMALL |= {"num_attention_heads": 2, "pad_token_id": 0}
HEADS = {
    "BertForSequenceClassification": ["classifier"],
    "BertForQuestionAnswering": ["qa_outputs"],
    "RobertaForTokenClassification": ["classifier"],
    "DistilBertForSequenceClassification": ["pre_classifier", "classifier"],
    "LlamaForSequenceClassification": ["score"],
}


def made(name, **options):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = {**SMALL, **options}
    if "Distil" in name:
        config = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "vocab_size": 99}
    return kind(kind.config_class(**config))


@pytest.mark.parametrize("name", HEADS)
def test_it_is_named_when_it_is_frozen_and_when_the_delta_is_saved(name, tmp_path):
    delta = LoraModel(made(name))
    named = ", ".join(map(repr, HEADS[name]))
    with pytest.warns(UntrainedWarning, match=f"^{named} of {name} is frozen.*modules_to_save"):
        delta.freeze_module()
    with pytest.warns(UntrainedWarning, match=f"^{named} of {name} is not saved"):
        delta.save_finetuned(tmp_path)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_trains_was_trained_or_is_copied_is_not_named(name, tmp_path, recwarn):
    model = made(name)
    delta = LoraModel(model)
    delta.freeze_module(exclude=["deltas", *HEADS[name]])
    delta.save_finetuned(tmp_path / "trains")
    delta.detach()
    for head in HEADS[name]:
        for parameter in model.get_submodule(head).parameters():
            nn.init.uniform_(parameter, 0.01, 0.1)
    delta = LoraModel(model)
    delta.freeze_module()
    delta.save_finetuned(tmp_path / "trained")
    delta = LoraModel(made(name), modules_to_save=HEADS[name])
    delta.freeze_module()
    delta.save_finetuned(tmp_path / "copied")
    assert [str(warning.message) for warning in recwarn] == []


def test_a_language_model_s_head_is_none_that_waits_for_training(recwarn):
    for name in ("BertForMaskedLM", "LlamaForCausalLM", "BertModel"):
        LoraModel(made(name)).freeze_module()
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.covers("check", "CheckReport")
def test_check_names_it():
    model = made("BertForSequenceClassification").train()
    with pytest.warns(UntrainedWarning):
        LoraModel(model).freeze_module()
    report = opendelta.check(model, {"input_ids": torch.ones(1, 3).long()})
    assert report.untrained == ["classifier"]
    assert "classifier" in str(report)
