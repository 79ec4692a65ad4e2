"""The module that deltas are attached through; containers as sites, and modules replaced later."""

from collections import OrderedDict

import pytest
import torch
from support.nets import IDS, X, net, shake, small, untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, LoraModel

pytestmark = pytest.mark.covers("Delta.attach", "SiteError")


def test_all_deltas_of_a_model_are_attached_through_the_same_module():
    wrapped = nn.Sequential(small())
    with untouched(wrapped):
        inner = LoraModel(wrapped[0], modified_modules=["0"])
        with pytest.raises(opendelta.SiteError, match=r"attached through its module '0', not"):
            AdapterModel(wrapped, modified_modules=["0.0"])
        inner.detach()
        outer = AdapterModel(wrapped, modified_modules=["0.2"])
        for where in (wrapped[0], wrapped[0][0]):
            with pytest.raises(
                opendelta.SiteError, match=r"through (a module|the Sequential) around"
            ):
                LoraModel(where, modified_modules=[""] if where is wrapped[0][0] else ["0"])
        outer.detach()


@pytest.mark.parametrize("options", [{"modified_modules": ["zz"]}, {"name": "a"}, {}])
def test_another_way_to_the_model_is_refused_before_all_else(options, tmp_path):
    wrapped = nn.Sequential(small())
    delta = LoraModel(wrapped[0], modified_modules=["0"], name="a")
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    torch.manual_seed(0)
    drawn = torch.get_rng_state()
    for attach in (LoraModel, opendelta.plan):
        config = opendelta.LoraConfig(**options)
        with pytest.raises(opendelta.SiteError, match=r"attached through its module '0', not"):
            attach(wrapped, **options) if attach is LoraModel else attach(wrapped, config)
    saved = r", saved from a Sequential, does not fit this Sequential: 'a' was attached through"
    with pytest.raises(opendelta.DeltaLoadError, match=saved):
        opendelta.load(tmp_path, wrapped)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_models_that_share_modules_with_deltas_are_kept_apart():
    shared = small()
    one, other = (nn.Sequential(OrderedDict(body=shared, head=nn.Linear(3, 3))) for _ in "ab")
    lora = LoraModel(one, modified_modules=["0", "head"])
    with (
        untouched(other.head),
        pytest.raises(opendelta.SiteError, match="another Sequential, which shares modules"),
    ):
        LoraModel(other, modified_modules=["head"])
    lora.detach()
    LoraModel(other, modified_modules=["head"])


def test_a_delta_returns_only_where_it_could_be_attached_anew():
    wrapped = nn.Sequential(small())
    with untouched(wrapped):
        inner = LoraModel(wrapped[0], modified_modules=["0"])
        inner.detach()
        outer = AdapterModel(wrapped, modified_modules=["0.2"])
        with pytest.raises(opendelta.SiteError, match="through a module around"):
            inner.attach()
        outer.detach()
        inner.attach()
        with pytest.raises(opendelta.SiteError, match=r"attached through its module '0', not"):
            outer.attach()
        inner.detach()


# -------------------------------------------------------------------- containers
def test_a_container_that_carries_a_delta_is_the_container_it_was():
    model = small()
    plain, items = model(X), list(model)
    with untouched(model):
        adapter = shake(AdapterModel(model, modified_modules=["root"], bottleneck_dim=2))
        assert not torch.allclose(model(X), plain)
        assert len(model) == 3
        assert list(model) == items
        assert model[-1] is items[-1]
        with adapter.disabled():
            assert torch.equal(model(X), plain)
        adapter.detach()
    assert torch.equal(model(X), plain)


@pytest.mark.covers("DeltaConfig.modules_to_save")
def test_a_container_can_be_owned_and_switched_off():
    whole = nn.Sequential()
    whole.add_module("body", nn.Linear(6, 6))
    whole.add_module("head", nn.Sequential(nn.Linear(6, 2)))
    plain = whole(X)
    delta = shake(LoraModel(whole, modified_modules=["body"], modules_to_save=["head"]))
    assert not torch.allclose(whole(X), plain)
    with delta.disabled():
        assert torch.equal(whole(X), plain)


@pytest.mark.parametrize("option", ["modified_modules", "modules_to_save"])
def test_a_list_that_is_never_called_is_refused(option):
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(6, 6)])
    model.other = nn.Linear(6, 6)
    options = {"modified_modules": ["other"], option: ["blocks"]}
    with untouched(model), pytest.raises(opendelta.SiteError, match=r"never called.*\[r\]blocks"):
        AdapterModel(model, **options)


@pytest.mark.covers("UnreachedWarning", "check")
def test_a_module_that_took_the_place_of_a_site_is_noticed():
    model = net()
    delta = LoraModel(model, modified_modules=["linear", "head"])
    model.head = nn.Linear(8, 3)
    with pytest.warns(opendelta.UnreachedWarning, match=r"head.deltas.lora"):
        model(IDS)
    assert opendelta.check(model, IDS).unreached == ["head.deltas.lora"]
    assert len(delta.layers) == 2


def test_a_second_delta_goes_on_a_model_whose_blocks_were_wrapped_meanwhile():
    model = small()
    LoraModel(model, modified_modules=["0"])
    model[0] = torch.compile(model[0], backend="eager")
    AdapterModel(model, modified_modules=["2"])
    assert opendelta.composition(model).names == ["lora", "adapter"]
    opendelta.composition(model)["lora"].detach()
    opendelta.composition(model)["adapter"].detach()
    opendelta.assert_pristine(model)
