"""A head with random values that is frozen is named when it is frozen, saved and checked."""

import warnings

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
    "BertForMultipleChoice": ["classifier"],
    "RobertaForTokenClassification": ["classifier"],
    "DistilBertForSequenceClassification": ["pre_classifier", "classifier"],
    "LlamaForSequenceClassification": ["score"],
}


def made(name):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = SMALL
    if "Distil" in name:
        config = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "vocab_size": 99}
    return kind(kind.config_class(**config))


def by_from_pretrained(name, folder):
    """The model with the weights of a checkpoint that has no head."""
    made(name).base_model.save_pretrained(folder)
    return getattr(transformers, name).from_pretrained(folder)


def by_state_dict(name, folder):
    model = made(name)
    model.base_model.load_state_dict(made(name).base_model.state_dict())
    return model


@pytest.mark.parametrize("load", [by_from_pretrained, by_state_dict])
@pytest.mark.parametrize("name", HEADS)
def test_it_is_named_when_it_is_frozen_and_when_the_delta_is_saved(name, load, tmp_path):
    delta = LoraModel(load(name, tmp_path))
    named = ", ".join(map(repr, HEADS[name]))
    with pytest.warns(UntrainedWarning, match=f"^{named} of {name} is frozen.*modules_to_save"):
        delta.freeze_module()
    with pytest.warns(UntrainedWarning, match=f"^{named} of {name} is not saved"):
        delta.save_finetuned(tmp_path / "delta")


def trained(model, heads, **options):
    """The model after two steps of its head, with a small learning rate."""
    own = [p for head in heads for p in model.get_submodule(head).parameters()]
    optimizer = torch.optim.AdamW(own, lr=1e-5, **options)
    for _ in range(2):
        for parameter in own:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return model


@pytest.mark.parametrize("load", [by_from_pretrained, by_state_dict])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("how", ["trains", "trained", "fused", "copied", "loaded", "random"])
def test_other_heads_are_not_named(how, name, load, tmp_path, recwarn):
    model, heads = load(name, tmp_path / "base"), HEADS[name]
    if how == "trained":
        trained(model, heads)
    if how == "fused":  # Trainer's default, and torch counts none of its steps
        trained(model, heads, fused=True)
    if how == "loaded":
        model.save_pretrained(tmp_path / "whole")
        model = type(model).from_pretrained(tmp_path / "whole")
    if how == "random":
        model = made(name)
    delta = LoraModel(model, modules_to_save=heads if how == "copied" else None)
    delta.freeze_module(exclude=["deltas", *(heads if how == "trains" else ())])
    delta.save_finetuned(tmp_path / "delta")
    assert [str(each.message) for each in recwarn if each.category is UntrainedWarning] == []


COPY = "classifier.deltas.x"


@pytest.mark.covers("check")
@pytest.mark.parametrize("labels", [None, 5])
@pytest.mark.parametrize("how", ["frozen", "trained", "fused", "loaded"])
def test_a_copy_of_a_random_head_is_named_until_it_was_trained(how, labels, tmp_path):
    model = by_state_dict("BertForSequenceClassification", None)
    x = LoraModel(model, modules_to_save=["classifier"], num_labels=labels, name="x")
    LoraModel(model, name="y")
    if how != "frozen":
        copied = [p for name, p in x.named_parameters() if name.startswith("classifier")]
        assert len(copied) == 2
        optimizer = torch.optim.AdamW(copied, lr=1e-3, fused=how == "fused")
        for parameter in copied:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    if how == "loaded":
        x.freeze_module(exclude=["x"])
        x.save_finetuned(tmp_path / "x")
        x.detach()
        composition = opendelta.load(tmp_path / "x", model)
        x = composition[composition.names[-1]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x.freeze_module(exclude=["y"])
    told = [str(each.message) for each in caught if each.category is UntrainedWarning]
    report = opendelta.check(model, {"input_ids": torch.ones(1, 3).long()})
    assert report.untrained == ([COPY] if how == "frozen" else [])
    if how != "frozen":
        assert told == []
        return
    assert len(told) == 1
    assert told[0].startswith(f"'{COPY}' of BertForSequenceClassification")
    assert "exclude=['deltas']" in told[0]
    with pytest.warns(UntrainedWarning, match=f"^'{COPY}' of .* never trained"):
        x.save_finetuned(tmp_path / "x")


def test_a_head_that_a_fused_optimizer_reaches_later_is_not_named(recwarn):
    model = by_state_dict("BertForSequenceClassification", None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    delta = LoraModel(model)
    delta.freeze_module(exclude=["deltas", "bert.pooler", "classifier"])
    for parts in (["bert.pooler"], ["classifier"]):
        optimizer.zero_grad()
        for part in parts:
            for parameter in model.get_submodule(part).parameters():
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    delta.freeze_module()
    assert [str(each.message) for each in recwarn if each.category is UntrainedWarning] == []


@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM", "BertModel"])
def test_a_language_model_is_not_named(name, tmp_path, recwarn):
    made(name).save_pretrained(tmp_path)
    LoraModel(getattr(transformers, name).from_pretrained(tmp_path)).freeze_module()
    assert [str(each.message) for each in recwarn if each.category is UntrainedWarning] == []


class Wrapped(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(self.encoder(ids).last_hidden_state[:, 0])


def test_a_head_of_one_s_own_is_named(tmp_path):
    made("BertModel").save_pretrained(tmp_path)
    model = Wrapped(transformers.BertModel.from_pretrained(tmp_path))
    delta = LoraModel(model)
    with pytest.warns(UntrainedWarning, match="^'head' of Wrapped is frozen"):
        delta.freeze_module()


def test_a_head_that_was_replaced_by_hand_is_named():
    body = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
    model = nn.Sequential(*body, nn.Linear(8, 4))
    model.load_state_dict(model.state_dict())
    LoraModel(model, modified_modules=["0"], name="first").freeze_module()
    model[3] = nn.Linear(8, 10)
    with pytest.warns(UntrainedWarning, match="^'3' of Sequential is frozen"):
        LoraModel(model, modified_modules=["0"]).freeze_module()


@pytest.mark.covers("check", "CheckReport")
def test_check_names_it(tmp_path):
    model = by_state_dict("BertForSequenceClassification", None).train()
    with pytest.warns(UntrainedWarning):
        LoraModel(model).freeze_module()
    report = opendelta.check(model, {"input_ids": torch.ones(1, 3).long()})
    assert report.untrained == ["classifier"]
    assert "classifier" in str(report)


def test_a_model_that_is_random_as_a_whole_is_not_named(recwarn):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    LoraModel(model, modified_modules=["0"]).freeze_module()
    assert list(recwarn) == []
