"""A delta whose module was replaced by another one is named, and not dropped in silence."""

import pytest
import torch
from support.nets import IDS, net, shake
from torch import nn

import opendelta
from opendelta import LoraModel, SiteError, UnreachedWarning

pytestmark = pytest.mark.covers("Composition.merge", "Composition.to_backbone", "unreached")
VERBS = ["merge", "to_backbone"]


def replaced(*names):
    model = net()
    delta = shake(LoraModel(model, modified_modules=list(names)))
    delta.freeze_module()
    model(IDS)
    model.head = nn.Linear(8, 3).requires_grad_(False)
    return model, delta


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("names", [["head"], ["head", "linear"]])
def test_neither_a_merge_nor_a_plain_model_drops_it(names, verb):
    model, delta = replaced(*names)
    assert opendelta.unreached(model) == ["head.deltas.lora"]
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match="'head': 'lora' was on another module") as caught:
        getattr(opendelta.composition(model), verb)()
    assert caught.value.where == "head"
    assert opendelta.snapshot(model) == before
    delta.detach()
    delta.attach()
    output = model(IDS)
    made = getattr(opendelta.composition(model), verb)()
    torch.testing.assert_close((model if verb == "merge" else made)(IDS), output)


@pytest.mark.parametrize("verb", VERBS)
def test_a_disabled_one_and_one_whose_module_is_gone_are_no_obstacle(verb):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    shake(LoraModel(model, modified_modules=["0", "2"]))
    shake(LoraModel(model, modified_modules=["1"], name="off")).disable()
    model[1] = nn.Linear(4, 4)
    del model[2]
    x = torch.randn(2, 4)
    with pytest.warns(UnreachedWarning):
        output = model(x)
    made = getattr(opendelta.composition(model), verb)()
    torch.testing.assert_close((model if verb == "merge" else made)(x), output)


def test_saving_says_so_and_holds_it(tmp_path):
    _, delta = replaced("head", "linear")
    with pytest.warns(UnreachedWarning, match=r"1 delta layers .*: head \(lora\)"):
        delta.save_finetuned(tmp_path)
    fresh = net()
    (loaded,) = opendelta.load(tmp_path, fresh, check_backbone=False)
    for name, value in delta.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
