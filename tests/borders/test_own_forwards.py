"""Subclasses of known modules whose output has another form are refused by name when attaching."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from support.nets import shake
from torch import nn
from torch.nn import functional as F

import opendelta
from opendelta import (
    AdapterModel,
    BitFitModel,
    FourierFTModel,
    HRAModel,
    IA3Model,
    LNTuningModel,
    LohaModel,
    LokrModel,
    LoraModel,
    OFTModel,
    SiteError,
    VeraModel,
)
from opendelta._modules.faking import on_shapes
from opendelta._modules.kinds import TransposedLinear, kind_of

pytestmark = pytest.mark.covers("DeltaConfig.modified_modules", "SiteError")

X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[4, 2, 4]])
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Router(nn.Linear):
    """As Llama 4's: scores and logits."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.sigmoid(), logits


class Named(nn.Linear):
    def forward(self, x):
        return {"scores": super().forward(x)}


class Wider(nn.Linear):
    def forward(self, x):
        return torch.cat([super().forward(x)] * 2, -1)


class Grouped(nn.Linear):
    """As DeepSeek 4's: each of two groups has rows of its own."""

    def __init__(self, *sizes):
        super().__init__(*sizes, bias=False)
        self.n_groups = 2

    def forward(self, x):
        rows = self.weight.view(self.n_groups, -1, x.size(-1)).mT
        return torch.einsum("...gi,gio->...go", x, rows)


class WithMore(nn.Linear):
    """As Idefics': a child computes further outputs."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.more = nn.Linear(sizes[0], 2)

    def forward(self, x):
        return torch.cat([super().forward(x), self.more(x)], -1)


class SamePadding(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Positions(nn.Embedding):
    """As BART's: the indices only say how many there are."""

    def forward(self, ids):
        return super().forward(torch.arange(ids.size(-1)).expand_as(ids))


class OfMasks(nn.Embedding):
    """As OPT's: the positions of what a mask leaves."""

    def forward(self, mask):
        return super().forward((mask.cumsum(1) * mask - 1).long() + 2)


class OfShapes(nn.Embedding):
    """As Marian's: it takes a shape."""

    def forward(self, shape):
        rows, length = shape[:2]
        return super().forward(torch.arange(length)).expand(rows, -1, -1)


class WithOffset(nn.Embedding):
    def forward(self, ids, offset):
        return super().forward(ids + offset)


class Both(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x), x


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Tasks(nn.Linear):
    """It takes more than its input, so no run of it alone tells."""

    def forward(self, x, task):
        return super().forward(x) + task


class Normed(nn.Embedding):
    def forward(self, ids):
        return F.layer_norm(super().forward(ids), (self.embedding_dim,))


class Net(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        more = (1,) if isinstance(self.part, Tasks | WithOffset) else ()
        return self.part(x, *more)


METHODS = {
    LoraModel: {}, LohaModel: {}, LokrModel: {"r": 1}, VeraModel: {}, FourierFTModel: {},
    IA3Model: {}, BitFitModel: {},
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("part", "says"),
    [
        (lambda: Router(6, 4), r"'part' \(Router\): .* returns a tuple"),
        (lambda: Named(6, 4), r"'part' \(Named\): .* returns a dict"),
        (lambda: Wider(6, 4), r"'part' \(Wider\): .* returns \[1, 3, 8\] .* \[1, 3, 4\]"),
        (lambda: WithMore(6, 4), r"'part' \(WithMore\): .* returns \[1, 3, 6\]"),
        (lambda: Grouped(6, 4), r"'part' \(Grouped\): .* returns \[1, 2, 2\] .* \[1, 2, 4\]"),
    ],
)
def test_a_linear_layer_with_another_output_is_refused(part, says, method, device):
    model = Net(part().to(device))
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match=says):
        method(model, modified_modules=["part"], **METHODS[method])
    opendelta.assert_pristine(model, like=before)
    config = method.config_class(modified_modules=["part"], **METHODS[method])
    with pytest.raises(SiteError, match=says):
        opendelta.plan(model, config)


@pytest.mark.parametrize("method", [LoraModel, LohaModel])
def test_a_convolution_that_pads_its_input_is_refused(method):
    model = Net(SamePadding(3, 4, 3))
    with pytest.raises(SiteError, match=r"returns \[3, 4, 24, 24\] .* \[3, 4, 22, 22\]"):
        method(model, modified_modules=["part"])
    same = model(IMAGE)
    delta = BitFitModel(model, modified_modules=["part"])  # it adds to whatever comes out
    delta.layers["part"].bias.data.fill_(2.0)
    assert torch.allclose(model(IMAGE), same + 2.0)


@pytest.mark.parametrize("cls", [Positions, OfMasks, OfShapes])
def test_an_embedding_that_goes_by_positions_is_refused(cls):
    with pytest.raises(SiteError, match=rf"'part' \({cls.__name__}\): .* does not look its input"):
        LoraModel(Net(cls(99, 6)), modified_modules=["part"])
    AdapterModel(Net(Positions(9, 6)), modified_modules=["part"], bottleneck_dim=2)


@pytest.mark.parametrize("method", [BitFitModel, LNTuningModel])
def test_a_normalisation_that_returns_two_is_refused(method):
    with pytest.raises(SiteError, match=r"'part' \(Both\): .* returns a tuple"):
        method(Net(Both(6)), modified_modules=["part"])


@pytest.mark.parametrize(
    ("part", "method", "x"),
    [
        (lambda: Router(6, 4), AdapterModel, X),  # it changes the scores
        (lambda: Router(6, 4), HRAModel, X),  # it changes the input
        (lambda: Scaled(6, 4), LoraModel, X),
        (lambda: Tasks(6, 4), LoraModel, X),
        (lambda: Normed(9, 6), LoraModel, IDS),
        (lambda: WithOffset(9, 6), LoraModel, IDS),
    ],
)
def test_what_can_act_goes_on(part, method, x):
    model = Net(part())
    method(model, modified_modules=["part"])
    model(x)
    assert not opendelta.unreached(model)


def test_a_forward_is_tried_without_a_trace():
    class Counts(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.calls = 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen += 1
            return super().forward(x)

    model = Net(Counts(6, 4))
    before = opendelta.snapshot(model)
    LoraModel(model, modified_modules=["part"]).detach()
    opendelta.assert_pristine(model, like=before)
    assert (model.part.calls, float(model.part.seen)) == (0, 0.0)


def test_bitfit_leaves_the_router_of_llama_4_out_of_its_default_places():
    config = transformers.Llama4TextConfig(
        hidden_size=16, intermediate_size=24, intermediate_size_mlp=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=32,
        num_local_experts=2, moe_layers=[0],
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config).eval()
    delta = BitFitModel(model)
    model(IDS)
    assert not opendelta.unreached(model)
    assert "model.layers.0.feed_forward.router" not in delta.layers
    assert "model.layers.0.feed_forward.shared_expert.up_proj" in delta.layers
    with pytest.raises(SiteError, match=r"router' \(Llama4Router\): .* returns a tuple"):
        LoraModel(model, modified_modules=["router"])


@pytest.mark.covers("Delta.attach")
def test_a_class_from_code_that_has_no_module_takes_deltas():
    names = {"nn": nn}
    code = "class Own(nn.Module):\n    def forward(self, x):\n        return x.tanh()\n"
    exec(code, names)
    assert names["Own"].forward.__module__ is None
    model = nn.Sequential(nn.Linear(4, 4), names["Own"]())
    AdapterModel(model, modified_modules=["1"], sample_inputs=torch.ones(2, 3, 4))
    assert model(torch.ones(2, 3, 4)).shape == (2, 3, 4)


class Linear2d(nn.Linear):
    """As VMamba's: a linear layer over the channels of an image."""

    def forward(self, x):
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class Linear1d(nn.Linear):
    def forward(self, x):
        return F.conv1d(x, self.weight[:, :, None], self.bias)


class ChannelsFirst(nn.Linear):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ChannelsLast(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class OfTime(nn.Linear):
    """As a convolution with a kernel of 1, after a Conv1d: [batch, channels, length]."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Linear3d(nn.Linear):
    def forward(self, x):
        return F.conv3d(x, self.weight[:, :, None, None, None], self.bias)


class TwoOfTime(OfTime):
    def forward(self, x):
        out = super().forward(x)
        return out.sigmoid(), out


class ByCount(nn.Linear):
    """Tokens [batch, length, channels] and images [batch, channels, height, width]."""

    def forward(self, x):
        if x.ndim == 4:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)
        return super().forward(x)


class AtFrontOf(nn.Linear):
    """A matrix times columns."""

    def forward(self, x):
        return self.weight @ x + self.bias[:, None]


class OfImages(nn.Linear):
    """It takes images [batch, height, width, channels] alone."""

    def forward(self, x):
        batch, height, width, channels = x.shape
        return super().forward(x.reshape(batch, -1, channels)).view(batch, height, width, -1)


AXES = [
    Linear2d(6, 6), Linear2d(6, 4), Linear1d(6, 6), ChannelsFirst(6, 6), ChannelsLast(6, 4, 1),
    Linear3d(6, 6), AtFrontOf(6, 6),
]  # fmt: skip
BY_COUNT = [
    OfTime(6, 6), OfTime(3, 3), OfTime(6, 4), TwoOfTime(6, 6), ByCount(6, 6), ByCount(3, 5),
]  # fmt: skip
EVERY = [
    LoraModel, LohaModel, VeraModel, FourierFTModel, BitFitModel, IA3Model, AdapterModel, OFTModel,
    HRAModel,
]  # fmt: skip


@pytest.mark.parametrize("module", AXES, ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("method", EVERY)
def test_a_width_on_another_axis_is_refused(module, method):
    model = nn.Sequential(module)
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match=r"takes its width on another axis|cannot carry"):
        method(model, modified_modules=["0"])
    opendelta.assert_pristine(model, like=before)


@pytest.mark.parametrize("module", BY_COUNT, ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("method", EVERY)
def test_a_width_whose_axis_depends_on_the_number_of_axes_is_refused(module, method):
    model = nn.Sequential(module)
    before = opendelta.snapshot(model)
    says = r"'0' .*its width on an axis that depends on how many axes .* exclude_modules=\['0'\]"
    with pytest.raises(SiteError, match=says):
        method(model, modified_modules=["0"])
    opendelta.assert_pristine(model, like=before)


class ByRows(nn.Linear):
    """As mT5's and others': it takes any input for rows of its width."""

    def forward(self, x):
        rows = super().forward(x.reshape(-1, self.in_features))
        return rows.view(*x.shape[:-1], self.out_features)


class OfTokens(nn.Linear):
    """It takes inputs of three axes alone, and keeps what it saw."""

    def forward(self, x):
        batch, length, _ = x.shape
        return super().forward(x.flatten(0, 1)).unflatten(0, (batch, length))


class Gathered(nn.Linear):
    """It moves its last axis there and back."""

    def forward(self, x):
        return super().forward(x.movedim(-1, 0).movedim(0, -1))


@pytest.mark.parametrize("cls", [ByRows, OfTokens, Gathered])
@pytest.mark.parametrize("sizes", [(6, 6), (3, 6), (15, 4)])
def test_a_forward_of_one_s_own_over_the_last_axis_takes_deltas(cls, sizes):
    model, x = nn.Sequential(cls(*sizes)), torch.randn(2, 4, sizes[0])
    plain = model(x)
    (bias,) = shake(BitFitModel(model, modified_modules=["0"])).parameters()
    torch.testing.assert_close(model(x), plain + bias)


class Channels(nn.Embedding):
    """As for convolutions: [batch, channels, length]."""

    def forward(self, ids):
        return super().forward(ids).transpose(1, 2)


@pytest.mark.parametrize("width", [3, 5])
def test_an_embedding_with_its_width_on_another_axis_is_refused(width):
    with pytest.raises(SiteError, match=r"'0' .*returns \["):
        LoraModel(nn.Sequential(Channels(9, width)), modified_modules=["0"])


def test_a_linear_over_the_last_axis_of_images_takes_deltas():
    model, x = nn.Sequential(OfImages(6, 4)), torch.randn(2, 6, 6, 6)
    delta = LoraModel(model, modified_modules=["0"], lora_r=2)
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    A, B = (delta.layers["0"].get_parameter(f"lora_{key}") for key in "AB")
    wanted = F.linear(x, model[0].weight + delta.config.lora_alpha / 2 * B @ A, model[0].bias)
    torch.testing.assert_close(model(x), wanted)


class WithScale(nn.Embedding):
    """The attribute is that of BART's class, and this forward does nothing with it."""

    def __init__(self, *sizes, embed_scale):
        super().__init__(*sizes)
        self.embed_scale = embed_scale


class OwnScale(WithScale):
    def forward(self, ids):
        return super().forward(ids) * (self.embed_scale if self.embed_scale is not None else 1)


@pytest.mark.parametrize("cls", [WithScale, OwnScale])
@pytest.mark.parametrize("scale", [3.0, None, torch.tensor(2.0), torch.full((6,), 2.0)], ids=str)
def test_a_scale_that_an_embedding_does_not_use_changes_nothing(cls, scale):
    model = nn.Sequential(cls(9, 6, embed_scale=scale), nn.Linear(6, 6))
    opendelta.plan(model, opendelta.LoraConfig(modified_modules=["1"]))
    opendelta.roles(model)
    delta = LoraModel(model, modified_modules=["0"])
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    acting = model(IDS)
    try:
        opendelta.composition(model).merge()
    except SiteError:  # as for a scale of each channel
        assert isinstance(scale, torch.Tensor)
        assert scale.ndim
    torch.testing.assert_close(model(IDS), acting, rtol=1e-4, atol=1e-3)


class Experts(nn.Module):
    """It has the two sizes of a linear layer, and several matrices."""

    def __init__(self):
        super().__init__()
        self.in_features = self.out_features = 6
        self.weight = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x):
        return torch.einsum("noi,...i->...o", self.weight, x)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init": "pissa"}], ids=str)
def test_sizes_beside_a_weight_of_other_axes_make_no_linear_layer(options):
    with pytest.raises(SiteError, match=r"'0' \(Experts\) cannot carry 'lora'"):
        LoraModel(nn.Sequential(Experts()), modified_modules=["0"], **options)


class Turned(nn.Module):
    """A linear layer that stores its weight as (in, out)."""

    def __init__(self, inputs, outputs, bias=True):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.3)
        self.bias = nn.Parameter(torch.randn(outputs)) if bias else None

    def forward(self, x):
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class TurnedLinear(nn.Linear):
    def forward(self, x):
        return x @ self.weight + self.bias


WEIGHTED = {
    "lora": (LoraModel, {}),
    "dora": (LoraModel, {"use_dora": True}),
    "pissa": (LoraModel, {"init": "pissa", "lora_r": 2}),
    "olora": (LoraModel, {"init": "olora", "lora_r": 2}),
    "loha": (opendelta.LohaModel, {}),
    "vera": (opendelta.VeraModel, {}),
    "oft": (opendelta.OFTModel, {"oft_block_size": 2}),
    "bitfit": (opendelta.BitFitModel, {}),
}


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize(
    "make",
    [lambda: Turned(6, 4), lambda: Turned(6, 6), lambda: TurnedLinear(6, 6)],
    ids=["wide", "square", "subclass"],
)
def test_a_linear_that_stores_its_weight_turned_is_as_torch_s(make, name):
    torch.manual_seed(0)
    cls, options = WEIGHTED[name]
    own = nn.Sequential(make())
    plain = nn.Sequential(nn.Linear(own[0].in_features, own[0].out_features))
    plain[0].weight.data = own[0].weight.data.T.clone()
    plain[0].bias.data = own[0].bias.data.clone()
    made = []
    for model in (own, plain):
        torch.manual_seed(1)
        made.append(shake(cls(model, modified_modules=["0"], **options)))
    values = [list(delta.parameters()) for delta in made]
    if name in ("pissa", "olora"):  # the signs of singular vectors are free
        made[1].load_state_dict(made[0].state_dict())
    else:
        torch.testing.assert_close(*values)
    x = torch.randn(3, 5, own[0].in_features)
    expected = plain(x)
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(own(x), expected, **near)
    composed = opendelta.composition(own)
    torch.testing.assert_close(composed.to_backbone()(x), expected, **near)
    composed.merge()
    torch.testing.assert_close(own(x), expected, **near)
    composed.unmerge()
    if made[0].delta_type == "lora" and name != "dora":
        both = opendelta.combine(own, {"lora": 1.0}, name="both")
        with composed.only(both):
            torch.testing.assert_close(own(x), expected, **near)


class Flat(nn.Linear):
    """For inputs of three axes alone."""

    def forward(self, x):
        batch, length, _ = x.shape
        return (x.reshape(batch * length, -1) @ self.weight + self.bias).view(batch, length, -1)


class WithMask(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer("mask", torch.ones(inputs, outputs))

    def forward(self, x):
        return x @ (self.weight * self.mask) + self.bias


class Dims(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.dim_in, self.dim_out = inputs, outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Either(nn.Linear):
    def __init__(self, inputs, outputs, config):
        super().__init__(inputs, outputs)
        self.config = config

    def forward(self, x):
        return x @ (self.weight if self.config["turned"] else self.weight.T) + self.bias


@pytest.mark.parametrize(
    "make",
    [
        lambda: Flat(6, 6), lambda: WithMask(6, 6), lambda: Dims(6, 6), lambda: Dims(6, 4),
        lambda: Either(6, 6, {"turned": False}), lambda: Either(6, 6, {"turned": True}),
    ],
)  # fmt: skip
def test_a_turned_weight_is_found_however_the_forward_is_written(make):
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), torch.randn(2, 5, 6)
    delta = LoraModel(model, modified_modules=["0"], lora_r=2, use_dora=True)
    own, layer = model[0], delta.layers["0"]
    weight = own.weight.detach()
    if not (isinstance(own, Either) and not own.config["turned"]):
        weight = weight.T
    with torch.no_grad():
        layer.lora_B.normal_()
    changed = weight + layer.scaling * layer.lora_B @ layer.lora_A
    expected = x @ (weight.norm(dim=1) / changed.norm(dim=1) * changed.T) + own.bias
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(opendelta.composition(model).to_backbone()(x), expected)


class ByItsClass(nn.Linear):
    turned = False

    def forward(self, x):
        return x @ self.oriented().T + self.bias

    def oriented(self):
        return self.weight.T if self.turned else self.weight


class Slotted:
    __slots__ = ("turned",)


class ByASlot(nn.Linear):
    def __init__(self, turned, held=()):
        super().__init__(6, 6)
        self.settings, self.held = Slotted(), held
        self.settings.turned = turned

    def forward(self, x):
        return x @ (self.weight if self.settings.turned else self.weight.T) + self.bias


class ByATensor(nn.Linear):
    def __init__(self, flag):
        super().__init__(6, 6)
        self.flag = flag  # a parameter
        self.register_buffer("kept", flag.detach().clone())

    def forward(self, x):
        return x @ (self.weight if self.flag + self.kept > 0 else self.weight.T) + self.bias


class Mixing(nn.Linear):
    def __init__(self, share):
        super().__init__(6, 6)
        self.share = nn.Parameter(torch.tensor(share))

    def forward(self, x):
        return self.share * (x @ self.weight) + self.bias


def is_turned(module):
    """True if DoRA on `module` takes its weight for [in, out]."""
    delta = LoraModel(nn.Sequential(module), modified_modules=["0"], lora_r=2, use_dora=True)
    found = next(p.detach().flatten() for p in delta.parameters() if p.numel() == 6)
    delta.detach()
    turned, plain = (module.weight.detach().norm(dim=axis) for axis in (0, 1))
    assert torch.allclose(found, turned) or torch.allclose(found, plain)
    return torch.allclose(found, turned)


def mended(self, x):
    return x @ self.weight + self.bias


@pytest.mark.parametrize(
    ("key", "value"),
    [("turned", True), ("forward", mended), ("oriented", lambda self: self.weight.T)],
)
def test_what_changes_on_a_class_is_seen(key, value, monkeypatch):
    assert not is_turned(ByItsClass(6, 6))
    monkeypatch.setattr(ByItsClass, key, value)
    assert is_turned(ByItsClass(6, 6))


@pytest.mark.parametrize("held", [(), tuple(range(30_000))], ids=["little", "much"])
def test_a_layout_that_changes_is_seen_however_much_a_module_holds(held):
    module = ByASlot(False, held)
    assert not is_turned(module)
    module.settings.turned = True
    assert is_turned(module)
    assert is_turned(ByASlot(True, held))


def test_an_object_that_holds_itself_is_compared_by_its_values():
    settings = SimpleNamespace(turned=False)
    settings.around = {"own": settings, "many": [settings] * 50}
    for turned in (False, True):
        settings.turned = turned
        module = ByASlot(turned)
        module.settings = settings
        assert is_turned(module) is turned


@pytest.mark.parametrize("flag", [0.0, 1.0, -1.0])
def test_a_number_in_a_tensor_may_be_a_flag(flag):
    assert is_turned(ByATensor(nn.Parameter(torch.tensor(flag)))) is (flag > 0)


def test_a_factor_of_zero_hides_no_layout():
    assert is_turned(Mixing(0.0))
    assert is_turned(Mixing(0.5))


def test_a_layout_that_is_asked_for_in_a_run_on_shapes_is_found_with_values():
    module = ByATensor(nn.Parameter(torch.tensor(1.0)))
    with on_shapes():
        assert isinstance(kind_of(module), TransposedLinear)
    assert is_turned(module)
