"""Functions of others that make new modules of sites refuse, or leave the deltas as they are."""

import peft
import pytest
import torch
from support.nets import shake
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

import opendelta
from opendelta import AdapterModel, DeltaError, LoraModel, SiteError

pytestmark = pytest.mark.covers("Delta.attach")
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn, self.fc = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.last = nn.BatchNorm1d(4)
        for norm in (self.bn, self.last):
            norm.running_mean.uniform_()
            norm.running_var.uniform_(1, 2)

    def forward(self, x):
        return self.last(self.fc(self.bn(self.conv(x)).relu().mean((2, 3))))


def copied(model, **options):
    return LoraModel(model, modified_modules=["fc"], modules_to_save=["bn", "last"], **options)


ATTACH = {
    "a copy": copied,
    "a copy that shows": lambda model: copied(model, reads=True),
}


@pytest.mark.parametrize("way", ATTACH)
def test_a_conversion_to_synchronous_norms_is_refused_over_deltas(way):
    model = Net().eval()
    delta = shake(ATTACH[way](model))
    output = model(X)
    with pytest.raises(SiteError, match=r"BatchNorm2d, without its deltas: convert the mo"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert torch.equal(model(X), output)
    delta.detach()
    plain = model(X)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert torch.allclose(converted(X), plain, atol=1e-6)
    shake(ATTACH[way](converted))
    assert not torch.allclose(converted(X), plain, atol=1e-3)


def test_a_conversion_beside_deltas_on_other_modules_keeps_them():
    model = Net().eval()
    shake(LoraModel(model, modified_modules=["conv", "fc"]))
    output = model(X)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted.bn) is nn.SyncBatchNorm
    assert torch.allclose(converted(X), output, atol=1e-6)


@pytest.mark.parametrize("way", ATTACH)
def test_fusing_with_a_norm_that_has_deltas_is_refused(way):
    model = Net().eval()
    shake(ATTACH[way](model))
    plain_linear = nn.Linear(8, 4).eval()
    for first, norm, fuse in (
        (model.conv, model.bn, fuse_conv_bn_eval),
        (plain_linear, model.last, fuse_linear_bn_eval),
    ):
        with pytest.raises(SiteError, match=r"fuse a plain model, composition\(model\)"):
            fuse(first, norm)
    plain = opendelta.composition(model).to_backbone()
    fused = fuse_conv_bn_eval(plain.conv, plain.bn)
    assert torch.allclose(fused(X), plain.bn(plain.conv(X)), atol=1e-5)


@pytest.mark.parametrize("way", ATTACH)
def test_statistics_are_read_written_and_compiled_as_without_a_delta(way):
    torch._dynamo.reset()
    model, other = Net(), Net()
    ATTACH[way](model)
    assert model.bn.num_features == 8
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(X), other(X), atol=1e-5)
    ones = torch.ones(8)
    model.bn.running_mean = ones
    assert model.bn.running_mean is ones or way == "a copy that shows"
    assert "running_mean" in dict(model.bn.named_buffers())


@pytest.mark.filterwarnings("ignore:torch.* deprecated")
def test_a_copy_that_was_quantised_is_not_saved(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).eval()
    shake(LoraModel(model, modified_modules=["0"], modules_to_save=["1"])).freeze_module()
    x = torch.randn(2, 6)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert torch.allclose(small(x), model(x), atol=0.1)
    for save in (
        lambda: opendelta.composition(small).save(tmp_path / "a"),
        lambda: opendelta.composition(small)["lora"].save_finetuned(tmp_path / "b"),
    ):
        with pytest.raises(DeltaError, match=r"'1.*' of 'lora' is no tensor but a dtype"):
            save()
    assert not [*tmp_path.iterdir()]
    opendelta.composition(model).save(tmp_path / "c")


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("where", ["head", "head.0"])
def test_a_sequential_with_a_delta_is_converted(where, norm):
    torch.manual_seed(0)
    inner = [nn.Linear(8, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Linear(8, 8)]
    model = nn.ModuleDict({"head": nn.Sequential(*inner)}).eval()
    shake(AdapterModel(model, modified_modules=[where]))
    x = torch.randn(4, 8)
    output = model["head"](x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted["head"][1]) is (nn.SyncBatchNorm if norm else nn.Linear)
    torch.testing.assert_close(converted["head"](x), output)
    assert "deltas" not in dict(converted["head"].named_children()) or where == "head"


@pytest.mark.parametrize("verb", ["add_module", "register_module"])
def test_a_loop_may_give_a_list_its_children_back(verb):
    for layer in (nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.ModuleList([nn.Linear(4, 4)])):
        model = nn.ModuleDict({"layer": layer})
        delta = shake(LoraModel(model, modified_modules=["layer.0"]))
        if isinstance(layer, nn.Sequential):
            shake(AdapterModel(model, modified_modules=["layer"]))
        x = torch.randn(2, 4)
        run = model["layer"][0] if isinstance(layer, nn.ModuleList) else model["layer"]
        output = run(x)
        for name, child in model["layer"].named_children():
            getattr(model["layer"], verb)(name, child)
        assert torch.equal(run(x), output)
        delta.detach()


def test_tracing_by_fx_around_a_block_names_what_can():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    delta = AdapterModel(model, modified_modules=["0"])
    with pytest.raises(SiteError, match=r"torch.fx cannot trace .* torch.export.export can"):
        torch.fx.symbolic_trace(model)
    delta.detach()
    shake(LoraModel(model, modified_modules=["0.0"]))
    x = torch.randn(3, 4)
    assert torch.allclose(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("head", [nn.Linear, nn.Sequential], ids=lambda head: head.__name__)
def test_peft_s_copy_of_a_module_with_a_delta_is_refused(head):
    def model():
        torch.manual_seed(0)
        last = nn.Linear(8, 3)
        return nn.ModuleDict(
            {"a": nn.Linear(8, 8), "head": last if head is nn.Linear else head(last)}
        )

    config = peft.LoraConfig(target_modules=["a"], modules_to_save=["head"])
    site = "head" if head is nn.Linear else "head.0"
    carrying = model()
    shake(LoraModel(carrying, modified_modules=[site]))
    with pytest.raises(SiteError, match=r"peft.utils.other would copy this Linear .* attach"):
        peft.get_peft_model(carrying, config)
    beside = model()
    shake(LoraModel(beside, modified_modules=["a"]))
    peft.get_peft_model(beside, config)
    wrapped = peft.get_peft_model(model(), config)
    x, inner = torch.randn(2, 8), wrapped.base_model.model["head"]
    plain = inner(x)
    where = next(n for n, m in wrapped.named_modules() if m is inner.modules_to_save["default"])
    name = where if head is nn.Linear else f"{where}.0"
    delta = shake(LoraModel(wrapped, modified_modules=[name]))
    assert not torch.allclose(inner(x), plain)
    delta.detach()
    assert torch.equal(inner(x), plain)
