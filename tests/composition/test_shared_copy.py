"""Several compositions on one backbone in memory, each on a copy that shares its tensors."""

import threading

import pytest
import torch
import transformers
from support.nets import IDS, net, shake, untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, DeltaError, LoraModel, PrefixModel, SiteError

pytestmark = pytest.mark.covers("shared_copy")

METHODS = [(LoraModel, ["linear", "bare"]), (AdapterModel, ["pair"]), (PrefixModel, ["attention"])]


def put(model, place):
    """A delta on `model`, of another method for each `place`."""
    method, names = METHODS[place % len(METHODS)]
    delta = method(model, modified_modules=names, name=f"own_{place}")
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.zero_()
    return shake(delta, seed=place)


def test_the_tensors_are_shared_and_the_trees_are_not():
    model = net()
    model.register_buffer("table", torch.arange(3.0))
    copy = opendelta.shared_copy(model)
    assert type(copy) is type(model)
    assert copy.table is model.table
    for (name, own), (other, shared) in zip(
        model.named_parameters(), copy.named_parameters(), strict=True
    ):
        assert name == other
        assert own.data_ptr() == shared.data_ptr()
        assert own is not shared
    assert not {id(m) for m in model.modules()} & {id(m) for m in copy.modules()}
    assert torch.equal(copy(IDS), model(IDS))


def test_compositions_on_copies_are_independent():
    model = net()
    plain = model(IDS)
    with untouched(model):
        copies = [opendelta.shared_copy(model) for _ in range(3)]
        for place, copy in enumerate(copies):
            put(copy, place)
        outs = [copy(IDS) for copy in copies]
        assert torch.equal(model(IDS), plain)
        for place, copy in enumerate(copies):
            alone = net()
            put(alone, place)
            assert torch.equal(outs[place], alone(IDS))
            assert opendelta.composition(copy).names == [f"own_{place}"]
        opendelta.composition(copies[0])["own_0"].detach()
        assert torch.equal(copies[0](IDS), plain)
        assert torch.equal(copies[1](IDS), outs[1])


def test_a_copy_of_a_model_with_deltas_has_none_of_them():
    model = net()
    delta = shake(LoraModel(model, modified_modules=["linear"]))
    delta.freeze_module()
    acting = model(IDS)
    copy = opendelta.shared_copy(model)
    opendelta.assert_pristine(copy)
    assert torch.equal(copy(IDS), net()(IDS))
    assert torch.equal(model(IDS), acting)
    opendelta.composition(model).merge()
    with pytest.raises(DeltaError, match="cannot share the weights under"):
        opendelta.shared_copy(model)


def test_flags_and_merging_are_each_copys_own():
    model = net()
    copy, other = opendelta.shared_copy(model), opendelta.shared_copy(model)
    with untouched(model):
        shake(LoraModel(copy, modified_modules=["linear"])).freeze_module()
        assert not copy.linear.weight.requires_grad
        assert other.linear.weight.requires_grad
        acting = copy(IDS)
        opendelta.composition(copy).merge()
        assert copy.linear.weight.data_ptr() != model.linear.weight.data_ptr()
        assert torch.allclose(copy(IDS), acting, atol=1e-6)
        assert torch.equal(other(IDS), model(IDS))
        opendelta.composition(copy).unmerge()
    assert torch.equal(copy(IDS), acting)


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 31, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    copy = opendelta.shared_copy(model)
    assert copy.lm_head.weight is copy.transformer.wte.weight
    assert copy.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    assert torch.equal(copy(IDS).logits, model(IDS).logits)


def test_what_is_written_in_place_is_seen_by_all():
    model = net()
    copy = opendelta.shared_copy(model)
    with torch.no_grad():
        model.head.bias.add_(1)
    assert torch.equal(copy(IDS), model(IDS))


def test_compositions_attach_run_train_and_leave_in_threads_of_their_own():
    model = net()
    plain = model(IDS)
    expected = []
    for place in range(4):
        alone = net()
        put(alone, place)
        expected.append(trained(alone))
    problems, start = [], threading.Barrier(4)

    def work(place):
        try:
            copy = opendelta.shared_copy(model)
            start.wait()
            for _ in range(5):
                delta = put(copy, place)
                out, grads = trained(copy)
                assert torch.equal(out, expected[place][0])
                assert all(map(torch.equal, grads, expected[place][1]))
                delta.detach()
                assert torch.equal(copy(IDS), plain)
                copy.zero_grad()
                del delta  # and with it its name
        except BaseException as error:
            problems.append(error)
            start.abort()

    with untouched(model):
        threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == []


def trained(model):
    """The output, and the gradients of the deltas."""
    out = model(IDS)
    out.square().sum().backward()
    deltas = list(opendelta.composition(model))
    return out.detach(), [p.grad.clone() for d in deltas for p in d.parameters()]


@pytest.mark.covers("Composition.to_backbone")
def test_to_backbone_shares_what_no_delta_changed():
    model = net()
    shake(LoraModel(model, modified_modules=["linear"]))
    plain = opendelta.composition(model).to_backbone()
    assert plain.head.weight.data_ptr() == model.head.weight.data_ptr()
    assert plain.linear.weight.data_ptr() != model.linear.weight.data_ptr()
    assert isinstance(plain.linear, nn.Linear)


@pytest.mark.covers("Composition.to_backbone", "DeltaConfig.modules_to_save")
@pytest.mark.parametrize("where", ["pair", "pair.inner"])
def test_a_module_whose_new_forward_keeps_it_is_not_copied(where):
    model = net()
    delta = shake(LoraModel(model, modified_modules=["pair.inner"]))
    module, name = model.get_submodule(where), "Pair" if where == "pair" else "Linear"
    first = module.forward
    module.forward = lambda x: first(2 * x)
    before = opendelta.snapshot(model)
    for verb in (opendelta.shared_copy, lambda m: opendelta.composition(m).to_backbone()):
        with pytest.raises(SiteError, match=rf"'{where}' \({name}\) had its forward replaced by"):
            verb(model)
    assert opendelta.snapshot(model) == before
    delta.detach()
    with pytest.raises(SiteError, match="had its forward replaced by"):
        LoraModel(model, modified_modules=["linear"], modules_to_save=["pair"])
    del module.forward
    assert torch.equal(opendelta.shared_copy(model)(IDS), model(IDS))
