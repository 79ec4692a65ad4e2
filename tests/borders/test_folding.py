"""Layers fold only where the module's forward is known, or found to be t (W x) + b."""

import pytest
import torch
from support.nets import Scaled, shake
from torch import nn

import opendelta
from opendelta import BitFitModel, IA3Model, LNTuningModel, LoraModel, OFTModel, SiteError
from opendelta import composition as composed
from opendelta._modules.kinds import kind_of
from opendelta._modules.probing import factor_of, is_known

pytestmark = [pytest.mark.covers("Composition.merge", "Composition.to_backbone")]


class Same(nn.Linear):
    def forward(self, x):
        return super().forward(x)


class Activated(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class Damped(nn.Linear):
    def forward(self, x):
        return 0.1 * super().forward(x)


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-100, 100))


class Saturates(nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x) / 5e4) * 5e4


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x) + torch.randn_like(x)


class OverRows(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class Fails(nn.Linear):
    def forward(self, x):
        return super().forward(x.view(7, 6))


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x) - self.bias[:, None, None]


class Tripled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


class OfNormOne(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias)


class OfSpectralNormOne(nn.Linear):
    def forward(self, x):
        norm = torch.linalg.matrix_norm(self.weight, 2)
        return nn.functional.linear(x, self.weight / norm, self.bias)


class Masked(nn.Linear):
    """It writes to its own weight, as MADE's layers do."""

    def forward(self, x):
        self.weight.data *= torch.ones_like(self.weight).tril()
        return super().forward(x)


class Normalises(nn.Linear):
    def forward(self, x):
        with torch.no_grad():
            self.weight.div_(self.weight.norm(dim=1, keepdim=True))
        return super().forward(x)


class Alias(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.held = [self.weight]

    def forward(self, x):
        for weight in self.held:
            weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class Sets(nn.Linear):
    def forward(self, x):
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


class OtherBias(nn.Linear):
    """Its bias is zero at first, as StyleGAN's."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return nn.functional.linear(x, self.weight / 4, self.bias / 100)


class GatedByBias(OtherBias):
    def forward(self, x):
        return nn.functional.linear(x, self.weight) * (1 + self.bias)


class Standardised(nn.Conv2d):
    """Its forward is torch's, and the method that this one calls is not."""

    def _conv_forward(self, x, weight, bias):
        wide = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(x, wide / wide.std((1, 2, 3), keepdim=True), bias)


class Equalised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 0.3 * weight, bias)


class PlusOne(nn.RMSNorm):
    """Gemma's: the weight is what is added to 1."""

    def forward(self, x):
        return nn.functional.rms_norm(x, self.normalized_shape) * (1 + self.weight)


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def merged_and_plain(module, cls, x, **options):
    """How far the outputs are off after merging, after unmerging, and in a plain model."""
    model = nn.Sequential(module).eval()
    delta = shake(cls(model, modified_modules=["0"], **options))
    with torch.no_grad():
        before = model(x)
        plain = composed(model).to_backbone()(x)
        bits = [p.clone() for p in module.parameters()]
        composed(model).merge()
        merged = model(x)
        composed(model).unmerge()
        assert all(torch.equal(a, b) for a, b in zip(bits, module.parameters(), strict=True))
        assert torch.equal(model(x), before)
    delta.detach()
    return [float((out - before).abs().max()) for out in (merged, plain)]


@pytest.mark.parametrize("cls", [LoraModel, IA3Model, OFTModel, opendelta.LokrModel])
@pytest.mark.parametrize("module", [Scaled(6, 6), Same(6, 6)], ids=["scaled", "same"])
def test_a_linear_with_a_factor_folds_exactly(module, cls):
    options = {"oft_block_size": 3} if cls is OFTModel else {}
    for off in merged_and_plain(module, cls, X, **options):
        assert off < 1e-4


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (Doubled(3, 5, 3), torch.randn(2, 3, 8, 8)),
        (Equalised(3, 5, 3), torch.randn(2, 3, 8, 8)),
        (Tripled(7, 4), torch.tensor([[1, 2, 6]])),
    ],
    ids=["conv2d", "a part of conv2d", "embedding"],
)
def test_other_kinds_with_a_factor_fold_exactly(module, x):
    for off in merged_and_plain(module, LoraModel, x):
        assert off < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_factor_is_found_in_every_dtype(dtype):
    module = Scaled(16, 16).to(dtype)
    assert factor_of(module) == pytest.approx(0.25, rel=1e-2)


class InFloat32(nn.Linear):
    def forward(self, x):
        own = self.weight.float(), self.bias.float()
        return nn.functional.linear(x.float(), *own).to(x.dtype)


def test_a_linear_that_computes_in_float32_inside_a_float64_model_folds():
    for off in merged_and_plain(InFloat32(6, 6).double(), LoraModel, X.double()):
        assert off < 1e-4


OWN = [
    Activated, Damped, Clamped, Saturates, Noisy, OverRows, Fails, OfNormOne, OfSpectralNormOne,
    OtherBias, GatedByBias,
]  # fmt: skip
WRITING = [Masked, Normalises, Sets, Alias]


@pytest.mark.parametrize("own", [*OWN, *WRITING])
@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
def test_a_module_that_computes_something_else_is_refused_by_name(own, verb):
    model = nn.Sequential(nn.Linear(6, 6), own(6, 6))
    delta = LoraModel(model, modified_modules=["0", "1"])
    if own in WRITING:
        model(X)
    before = opendelta.snapshot(model)
    state = torch.get_rng_state()
    weights = [p.clone() for p in model.parameters()]
    with pytest.raises(
        SiteError, match=rf"'1' \({own.__name__}\): lora cannot be merged"
    ) as caught:
        getattr(composed(model), verb)()
    assert caught.value.where == "1"
    assert opendelta.snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, model.parameters(), weights))
    delta.detach()


@pytest.mark.parametrize("cls", [LoraModel, BitFitModel])
@pytest.mark.parametrize("patched", [True, False])
def test_a_convolution_that_changes_its_weight_is_refused_by_name(cls, patched):
    own = nn.Conv2d(3, 5, 3) if patched else Standardised(3, 5, 3)
    if patched:
        own._conv_forward = Standardised._conv_forward.__get__(Standardised(3, 5, 3))
    model = nn.Sequential(own)
    shake(cls(model, modified_modules=["0"]))
    with pytest.raises(SiteError, match=f"'0' .{type(own).__name__}.: .* cannot be merged"):
        composed(model).merge()


class Reversed(nn.LayerNorm):
    """Its parameters act on the channels from the last to the first."""

    def forward(self, x):
        return super().forward(x.flip(-1)).flip(-1)


class Clipped(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).clamp(-20, 20)


class Rectified(nn.LayerNorm):
    """As timm's LayerNormAct."""

    def forward(self, x):
        return super().forward(x).relu()


class Soft(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.silu(super().forward(x))


class Adaptive(nn.LayerNorm):
    def forward(self, x, scale=None):
        out = super().forward(x)
        return out if scale is None else out * (1 + scale)


class OfRows(nn.LayerNorm):
    """Rows of zeros, as padding is, stay zeros."""

    def forward(self, x):
        return super().forward(x) * x.ne(0).any(-1, keepdim=True)


class InEval(nn.LayerNorm):
    def forward(self, x):
        out = super().forward(x)
        return out if self.training else out.relu()


class OfLength(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).relu() if x.size(-2) > 3 else super().forward(x)


class OfTwoAxes(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).relu() if x.ndim == 2 else super().forward(x)


class OfOneRow(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x).relu() if x.size(0) == 1 else super().forward(x)


class Shifts(nn.LayerNorm):
    """It writes to its own parameters."""

    def forward(self, x):
        for parameter in self.parameters():
            parameter.data.clamp_(max=1.5)
        return super().forward(x)


NORMS = [
    Reversed, Clipped, Rectified, Soft, Shifts, Adaptive, OfRows, InEval, OfLength, OfTwoAxes,
    OfOneRow,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", NORMS)
@pytest.mark.parametrize("cls", [BitFitModel, LNTuningModel])
def test_a_norm_whose_parameters_act_otherwise_is_refused_by_name(cls, own, dtype):
    model = nn.Sequential(own(6)).to(dtype).train(own is InEval)
    shake(cls(model, modified_modules=["0"]))
    with pytest.raises(SiteError, match="does not act on each channel"):
        composed(model).merge()


def test_a_norm_whose_bias_acts_as_usual_folds():
    class Own(nn.LayerNorm):
        def forward(self, x, gate=None):
            return super().forward(x if gate is None else x * gate.sigmoid())

    for cls in (BitFitModel, LNTuningModel):
        for off in merged_and_plain(Own(6), cls, X):
            assert off < 1e-5


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("own", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_without_a_weight_is_refused_by_name(own, verb):
    model = nn.Sequential(own(6, elementwise_affine=False))
    shake(LNTuningModel(model, modified_modules=["0"]))
    with pytest.raises(SiteError, match=r"'0': 'ln_tuning' .*does not scale by its weight"):
        getattr(composed(model), verb)()


@pytest.mark.parametrize(
    "module",
    [nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv2d(2, 2, 1), nn.LayerNorm(4), nn.RMSNorm(4)],
)
def test_modules_of_torch_are_known_without_a_run(module):
    assert is_known(type(module))
    assert factor_of(module) == 1.0
    assert kind_of(module) is not None


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
def test_dora_beside_a_factor_is_refused_by_name(verb):
    model = nn.Sequential(Scaled(6, 4))
    shake(LoraModel(model, modified_modules=["0"], use_dora=True))
    with pytest.raises(SiteError, match=r"'0' \(Scaled\): lora cannot .* its weight by 0.408"):
        getattr(composed(model), verb)()


class ByMode(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if self.training else 1)


class ByLength(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (1 if x.size(-2) < 9 else 2)


class ByRows(nn.Linear):
    def forward(self, x):
        return super().forward(x) * x.size(0)


class WithNeighbour(nn.Linear):
    """A row of the batch adds to another."""

    def forward(self, x):
        y = super().forward(x)
        return y + y.flip(0)


class ByGradient(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if torch.is_grad_enabled() else 1)


class ByAxes(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if x.ndim == 2 else 1)


class ForThreeAxes(nn.Linear):
    def forward(self, x):
        batch, length, _ = x.shape
        return super().forward(x).view(batch, length, -1)


class KeepsZeros(nn.Linear):
    def forward(self, x):
        return super().forward(x).masked_fill(x.eq(0).all(-1, keepdim=True), 0)


class WithoutOne(nn.Embedding):
    """One index has no embedding, whatever the weight is."""

    def forward(self, ids):
        return super().forward(ids) * (ids != 777)[..., None]


@pytest.mark.parametrize("padding", [None, 777])
@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
def test_an_embedding_that_treats_one_index_otherwise_is_refused_by_name(verb, padding):
    model = nn.Sequential(WithoutOne(5000, 4, padding_idx=padding))
    shake(LoraModel(model, modified_modules=["0"]))
    with pytest.raises(SiteError, match=r"'0' \(WithoutOne\): lora cannot be merged"):
        getattr(composed(model), verb)()


@pytest.mark.parametrize("cls", [ByMode, ByLength, ByRows, WithNeighbour, ByGradient, ByAxes])
def test_a_factor_that_changes_is_none(cls):
    model = nn.Sequential(cls(6, 4, bias=False)).train()
    shake(LoraModel(model, modified_modules=["0"]))
    with pytest.raises(SiteError, match=r"'0' .*: lora cannot be merged or combined: .*own"):
        composed(model).merge()


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("cls", [BitFitModel, LoraModel])
def test_a_forward_that_keeps_rows_of_zeros_is_refused_where_there_is_a_bias(cls, verb):
    model = nn.Sequential(KeepsZeros(6, 4))
    shake(cls(model, modified_modules=["0"]))
    with pytest.raises(SiteError, match=r"'0' \(KeepsZeros\): .* cannot be merged or combined"):
        getattr(composed(model), verb)()


def test_a_forward_for_inputs_of_three_axes_alone_folds():
    model, x = nn.Sequential(ForThreeAxes(6, 4)), torch.randn(2, 3, 6)
    shake(LoraModel(model, modified_modules=["0"]))
    expected = model(x)
    composed(model).merge()
    torch.testing.assert_close(model(x), expected)


class Shrinks(nn.Linear):
    """As a linear layer with LayerScale behind it."""

    def forward(self, x):
        return super().forward(x) * 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dora_starts_as_the_identity_however_small_the_output_is_beside_the_bias(dtype):
    torch.manual_seed(0)
    model, x = nn.Sequential(Shrinks(6, 6)).to(dtype), X.to(dtype)
    before = model(x)
    LoraModel(model, modified_modules=["0"], use_dora=True)
    assert torch.equal(model(x), before)
