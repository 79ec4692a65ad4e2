"""Many layers on one module, DoRA on top of others, copies of modules, rows that do not train."""

import copy

import pytest
import torch
from support.nets import shake
from torch import nn

import opendelta
from opendelta import AdapterModel, LoraModel, VeraModel

pytestmark = [pytest.mark.covers("Composition.explain", "LoraConfig.use_dora")]
X = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BENEATH = {
    "lora": (LoraModel, {}),
    "lora dropout": (LoraModel, {"lora_dropout": 0.1}),
    "ia3": (opendelta.IA3Model, {}),
    "loha": (opendelta.LohaModel, {}),
    "lokr": (opendelta.LokrModel, {}),
    "fourierft": (opendelta.FourierFTModel, {}),
    "vera": (VeraModel, {}),
    "oft": (opendelta.OFTModel, {"oft_block_size": 4}),
    "bitfit": (opendelta.BitFitModel, {}),
    "adapter": (AdapterModel, {}),
    "dora": (LoraModel, {"use_dora": True}),
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).double().eval()


@pytest.mark.parametrize("name", BENEATH)
def test_dora_starts_as_the_identity_on_top_of_every_trained_delta(name):
    model = net()
    cls, options = BENEATH[name]
    shake(cls(model, modified_modules=["0"], name="beneath", **options))
    before = model(X)
    dora = LoraModel(model, modified_modules=["0"], use_dora=True)
    torch.testing.assert_close(model(X), before, rtol=1e-12, atol=1e-12)
    shake(dora)
    assert not torch.allclose(model(X), before)


def test_dora_on_top_of_a_disabled_delta_starts_from_what_acts():
    model = net()
    delta = shake(LoraModel(model, modified_modules=["0"], name="off"))
    delta.disable()
    before = model(X)
    LoraModel(model, modified_modules=["0"], use_dora=True)
    torch.testing.assert_close(model(X), before, rtol=1e-12, atol=1e-12)


def owned(model):
    """A delta that owns a changed copy of the first module."""
    delta = LoraModel(model, modified_modules=["2"], modules_to_save=["0"], name="owner")
    return shake(delta)


def test_dora_takes_weight_and_bias_of_the_copy_that_acts():
    model = net()
    owned(model)
    before = model(X)
    dora = shake(LoraModel(model, modified_modules=["0"], use_dora=True))
    layer = dora.layers["0"]
    copied = model[0].deltas["owner"].module
    with torch.no_grad():
        D = layer.delta_weight()
        norm = (copied.weight + D).norm(dim=1)
        n = layer.lora_magnitude_vector / norm
        inner = n * (X @ (copied.weight + D).T) + copied.bias
    hidden = model[0](X)
    torch.testing.assert_close(hidden, inner)
    dora.detach()
    torch.testing.assert_close(model(X), before)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_plain_model_has_the_deltas_on_a_copy_that_acts(options):
    model = net()
    owned(model)
    shake(LoraModel(model, modified_modules=["0"], **options))
    changed = model(X)
    plain = opendelta.composition(model).to_backbone()
    torch.testing.assert_close(plain(X), changed)
    opendelta.assert_pristine(plain)


# ------------------------------------------------------------------------------------- many layers
def test_three_hundred_adapters_act_on_one_module():
    model = net()
    for index in range(300):
        AdapterModel(model, modified_modules=["0"], bottleneck_dim=1, name=f"n{index}")
    model(X).sum().backward()
    assert not opendelta.unreached(model)


def test_layers_in_turn_compute_what_nested_ones_do():
    model = net()
    deltas = [
        shake(AdapterModel(model, modified_modules=["0"], name="a")),
        shake(opendelta.BitFitModel(model, modified_modules=["0"], name="b")),
        shake(opendelta.IA3Model(model, modified_modules=["0"], feedforward_modules=["0"])),
        shake(AdapterModel(model, modified_modules=["0"], name="c", gate=True)),
        shake(opendelta.LohaModel(model, modified_modules=["0"], name="d")),
        shake(opendelta.LoReftModel(model, modified_modules=["0"], name="e", last=0)),
    ]
    x = X[:, None]
    call = model[0].forward.__wrapped__.__get__(model[0])  # nn.Linear's own
    for delta in deltas:
        call = delta.layers["0"].around(call, model[0], ())
    torch.testing.assert_close(model[0](x), call(x), rtol=1e-12, atol=1e-12)


def test_a_thousand_loras_are_explained():
    model = net()
    for index in range(1000):
        LoraModel(model, modified_modules=["0"], lora_r=1, name=f"n{index}")
    formula = opendelta.composition(model).explain("0").formula
    assert formula.startswith("y = 0(x) + n0(x) + n1(x)")
    assert formula.endswith("n999(x)")


# ------------------------------------------------------------------------------------- padding rows
@pytest.mark.parametrize("method", [LoraModel])
def test_the_row_of_padding_does_not_train(method):
    model = nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Linear(4, 2))
    before = copy.deepcopy(model)
    delta = method(model, modified_modules=["0"])
    delta.freeze_module()
    ids = torch.tensor([[0, 3, 5, 0]])
    optimizer = torch.optim.SGD(list(delta.parameters()), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(model[0](torch.tensor([0])), before[0](torch.tensor([0])))
        assert not torch.equal(model[0](torch.tensor([3])), before[0](torch.tensor([3])))


# ---------------------------------------------------------------------------------- files of others
def test_saving_leaves_the_users_own_files(tmp_path):
    own = tmp_path / "delta-of-my-thesis.safetensors"
    own.write_bytes(b"precious")
    model = net()
    delta = LoraModel(model, modified_modules=["0"])
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    shake(delta)
    delta.save_finetuned(tmp_path)
    assert own.read_bytes() == b"precious"
    assert len(list(tmp_path.glob("delta-*.safetensors"))) == 2
