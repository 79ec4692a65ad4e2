"""One call loads a backbone and its deltas, from each folder that knows the backbone."""

import json

import pytest
import torch
from support.models import build, logits
from support.nets import net, shake
from transformers import pipeline

import opendelta
from opendelta import (
    AdapterModel,
    BitFitModel,
    DeltaLoadError,
    LoraModel,
    OptionError,
    from_pretrained,
)

pytestmark = pytest.mark.covers("from_pretrained")


def prepared(model):
    lora, adapter = LoraModel(model), AdapterModel(model)
    shake(lora)
    shake(adapter)
    lora.freeze_module()
    return model.eval()


@pytest.fixture
def home(tmp_path):
    """The folder of a plain model."""
    build("bert").save_pretrained(tmp_path / "home")
    return tmp_path / "home"


def loaded(home):
    return prepared(type(build("bert")).from_pretrained(home))


def assert_same(found, model):
    assert opendelta.composition(found).names == opendelta.composition(model).names
    assert type(found).__name__ == type(model).__name__
    assert not found.training
    assert torch.equal(logits(found), logits(model))


def test_the_folder_of_save_pretrained_has_both(tmp_path):
    model = prepared(build("bert"))
    model.save_pretrained(tmp_path)
    assert_same(from_pretrained(tmp_path), model)
    half = from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_pipeline_opens_it_as_the_plain_model(tmp_path):
    model = prepared(build("bert"))
    model.save_pretrained(tmp_path)
    plain = pipeline("fill-mask", model=str(tmp_path), tokenizer=WithoutWords()).model
    assert torch.equal(logits(plain.eval()), logits(build("bert").eval()))


class WithoutWords:
    """A tokenizer that a pipeline can hold and that nobody asks for words."""

    mask_token_id, pad_token_id, padding_side = 1, 0, "right"
    deprecation_warnings: dict = {}  # noqa: RUF012


def test_a_folder_of_deltas_names_its_backbone(home, tmp_path):
    model = loaded(home)
    opendelta.composition(model).save(tmp_path / "deltas-alone")
    assert_same(from_pretrained(tmp_path / "deltas-alone"), model)
    home.rename(tmp_path / "moved")
    with pytest.raises(DeltaLoadError, match=r"home' cannot be loaded .*download_backbone=True"):
        from_pretrained(tmp_path / "deltas-alone")
    assert_same(from_pretrained(tmp_path / "deltas-alone", tmp_path / "moved"), model)


def test_a_head_of_its_own_labels_comes_back(home, tmp_path):
    from transformers import BertForSequenceClassification

    names = {"id2label": dict(enumerate("abc")), "label2id": {k: i for i, k in enumerate("abc")}}
    model = BertForSequenceClassification.from_pretrained(home, **names)
    lora = LoraModel(model, modules_to_save=["classifier", "pooler"])
    shake(lora)
    lora.freeze_module()
    opendelta.composition(model).save(tmp_path / "deltas-alone")
    again = from_pretrained(tmp_path / "deltas-alone")
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert torch.equal(logits(again), logits(model.eval()))


def test_another_backbone_is_refused_by_its_values(home, tmp_path):
    model = loaded(home)
    opendelta.composition(model).save(tmp_path / "deltas-alone")
    other = build("bert")
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DeltaLoadError, match="differ"):
        from_pretrained(tmp_path / "deltas-alone", tmp_path / "other")
    from_pretrained(tmp_path / "deltas-alone", tmp_path / "other", check_backbone=False)


def test_what_does_not_say_its_backbone_or_is_not_of_transformers_is_refused_by_name(tmp_path):
    model = prepared(build("bert"))
    opendelta.composition(model).save(tmp_path / "unknown")
    with pytest.raises(DeltaLoadError, match=r"what model .* \(a BertForMaskedLM\): give it"):
        from_pretrained(tmp_path / "unknown")
    own = net()
    LoraModel(own, modified_modules=["linear"]).freeze_module()
    opendelta.composition(own).save(tmp_path / "own")
    build("bert").save_pretrained(tmp_path / "home")
    with pytest.raises(DeltaLoadError, match=r"for a Net, .*opendelta\.load\(folder, model\)"):
        from_pretrained(tmp_path / "own", tmp_path / "home")


@pytest.mark.parametrize("how", ["merged", "detached", "loaded again"])
def test_deltas_beside_a_model_that_was_saved_without_them_later_are_refused(how, tmp_path):
    model = build("bert")
    model.requires_grad_(True)
    shake(BitFitModel(model))  # it changes no weight
    model.save_pretrained(tmp_path)
    assert_same(from_pretrained(tmp_path / "deltas"), model)
    if how == "merged":
        model = opendelta.composition(model).to_backbone()
    elif how == "detached":
        opendelta.composition(model)["bitfit"].detach()
    else:
        model = type(model).from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "deltas"):
        with pytest.raises(DeltaLoadError, match=r"saved without the deltas beside it"):
            from_pretrained(folder)
    with pytest.raises(DeltaLoadError, match=r"Remove .*deltas; or"):
        opendelta.load(tmp_path, plain)
    opendelta.load(tmp_path / "deltas", plain)
    assert_same(from_pretrained(tmp_path / "deltas", tmp_path), plain.eval())


def test_the_folder_of_a_part_of_the_model_is_refused(tmp_path):
    model = prepared(build("llama"))
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "part")
    with pytest.raises(DeltaLoadError, match=r"holds a LlamaModel, and .* on a LlamaForCausalLM"):
        from_pretrained(tmp_path / "part")
    assert_same(from_pretrained(tmp_path / "part", tmp_path / "whole"), model)


def test_a_model_in_the_place_of_its_name_is_refused_in_few_words(tmp_path):
    model = prepared(build("bert"))
    model.save_pretrained(tmp_path)
    with pytest.raises(OptionError, match=r"^backbone='BertForMaskedLM' must be .{0,150}$"):
        from_pretrained(tmp_path, backbone=model)


def test_nothing_is_downloaded_unasked(tmp_path):
    model = prepared(build("bert"))
    model.config._name_or_path = "nobody/nothing"
    opendelta.composition(model).save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["backbone_path"] == "nobody/nothing"
    with pytest.raises(DeltaLoadError, match=r"nobody/nothing.*download_backbone=True"):
        from_pretrained(tmp_path)
