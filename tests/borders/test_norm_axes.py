"""A normalisation's kind knows which axis its channels are on; deltas act there."""

import copy

import pytest
import torch
import transformers as T
from support.nets import shake
from torch import nn
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

import opendelta
from opendelta import (
    AdapterModel,
    BitFitModel,
    CompacterModel,
    LNTuningModel,
    LoReftModel,
    LowRankAdapterModel,
    ParallelAdapterModel,
    SiteError,
)
from opendelta._modules.kinds import kind_of

WIDTH = 8
NETWORKS = [AdapterModel, CompacterModel, LowRankAdapterModel, LoReftModel]


class Permutes(nn.LayerNorm):
    """As torchvision's LayerNorm2d."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ByHand(nn.Module):
    """As ConvNeXt's first code; its class is no LayerNorm."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        scaled = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return self.weight[:, None, None] * scaled + self.bias[:, None, None]


class ByHandNorm(ByHand):
    """Its name says that it is a normalisation."""


class OfSequences(nn.LayerNorm):
    """Channels before the length, as in audio models."""

    def forward(self, x):
        return super().forward(x.transpose(-2, -1)).transpose(-2, -1)


def convnext(width):
    return ConvNextLayerNorm(width, data_format="channels_first")


IMAGE = [Permutes, ByHandNorm, convnext]
X = torch.randn(2, WIDTH, WIDTH, WIDTH, dtype=torch.double)  # the width hides no wrong axis
ONE = torch.randn(2, WIDTH, 1, 1, dtype=torch.double)


def site(make, width=WIDTH):
    torch.manual_seed(0)
    module = make(width).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return nn.Sequential(module)


@pytest.mark.parametrize("make", IMAGE)
@pytest.mark.parametrize("x", [X, ONE], ids=["image", "pooled"])
def test_bitfit_adds_to_the_channels(make, x):
    model = site(make)
    expected = copy.deepcopy(model)
    delta = shake(BitFitModel(model, modified_modules=["0"]))
    b = next(iter(delta.parameters()))
    expected[0].bias.data += b.data
    assert torch.allclose(model(x), expected(x))
    plain = opendelta.composition(model).to_backbone()
    opendelta.composition(model).merge()
    for merged in (model, plain):
        assert torch.allclose(merged(x), expected(x))


@pytest.mark.parametrize("make", IMAGE)
def test_ln_tuning_scales_and_shifts_the_channels(make):
    model = site(make)
    plain = model(X)
    delta = shake(LNTuningModel(model, modified_modules=["0"]))
    s, b = (delta.state_dict()[f"0.deltas.ln_tuning.{key}"] for key in ("scale", "bias"))
    wanted = plain * s[:, None, None] + b[:, None, None]
    assert torch.allclose(model(X), wanted)


@pytest.mark.parametrize("cls", NETWORKS)
def test_networks_act_on_the_channels(cls):
    options = {"low_rank_dimension": 2} if cls is LoReftModel else {}
    model, last = site(Permutes), nn.Sequential(nn.LayerNorm(WIDTH).double())
    last.load_state_dict(model.state_dict())
    if cls is LoReftModel:
        with pytest.raises(SiteError, match=r"'0' \(Permutes\) normalises axis -3"):
            cls(model, modified_modules=["0"], **options)
        return
    delta = shake(cls(model, modified_modules=["0"], gate=True, **options))
    like = cls(last, modified_modules=["0"], gate=True, **options)
    state = {name: value.clone() for name, value in delta.state_dict().items()}
    for name, value in like.state_dict().items():
        value.copy_(state[name])
    assert torch.allclose(model(X), last(X.movedim(1, -1)).movedim(-1, 1))


def test_a_layer_of_the_last_axis_is_refused_by_name():
    for cls, names in ((ParallelAdapterModel, ["0", "0"]), (AdapterModel, ["0"])):
        options = {"residual": "input"} if cls is AdapterModel else {}
        model = site(Permutes)
        before = opendelta.snapshot(model)
        with pytest.raises(SiteError, match=r"normalises axis -3 of its input, .* last axis"):
            cls(model, modified_modules=names, **options)
        opendelta.assert_pristine(model, like=before)


@pytest.mark.parametrize(
    ("module", "axis"),
    [
        (nn.LayerNorm(3), -1),
        (Permutes(3), -3),
        (Permutes(1), -3),
        (OfSequences(5), -2),
        (ConvNextLayerNorm(4), -1),
        (ConvNextLayerNorm(4, data_format="channels_first"), -3),
        (T.models.llama.modeling_llama.LlamaRMSNorm(4), -1),
        (nn.RMSNorm(4), -1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_kind_knows_the_axis(module, axis, device):
    kind = kind_of(copy.deepcopy(module).to(device))
    assert (kind.axis, kind.out_features) == (axis, module.weight.numel())


def test_a_plan_counts_the_operations():
    model = site(Permutes)
    plan = opendelta.plan(model, opendelta.AdapterConfig(modified_modules=["0"]))
    assert plan.flops.per_token == 2 * 2 * WIDTH * 24


@pytest.mark.parametrize("cls", [BitFitModel, LNTuningModel])
def test_a_norm_over_several_axes_trains_all_of_its_channels(cls):
    model = nn.Sequential(nn.LayerNorm((4, WIDTH))).double()
    x, expected = torch.randn(2, 3, 4, WIDTH).double(), copy.deepcopy(model)
    delta = shake(cls(model, modified_modules=["0"]))
    assert {tuple(p.shape) for p in delta.parameters()} == {(4, WIDTH)}
    own = {name.rpartition(".")[2]: value for name, value in delta.state_dict().items()}
    expected[0].weight.data *= own.get("scale", 1)
    expected[0].bias.data = expected[0].bias.data * own.get("scale", 1) + own["bias"]
    assert torch.allclose(model(x), expected(x))
    opendelta.composition(model).merge()
    assert torch.allclose(model(x), expected(x))


def sam():
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
              "patch_size": 8, "output_channels": 8, "mlp_dim": 16, "window_size": 2,
              "num_pos_feats": 4,
              "global_attn_indexes": []}  # fmt: skip
    prompt = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    mask = {"hidden_size": 8, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "iou_head_hidden_dim": 8}  # fmt: skip
    config = T.SamConfig(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask
    )
    return T.SamModel(config), {
        "pixel_values": torch.randn(1, 3, 32, 32),
        "input_points": torch.ones(1, 1, 2, 2),
        "input_masks": torch.randn(1, 1, 16, 16),
    }


def nets():
    sizes = {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
    image = {"pixel_values": torch.randn(1, 3, 64, 64)}
    return {
        "convnext": lambda: (T.ConvNextModel(T.ConvNextConfig(**sizes)), image),
        "dinov3": lambda: (T.DINOv3ConvNextModel(T.DINOv3ConvNextConfig(**sizes)), image),
        "sam": sam,
    }


@pytest.mark.parametrize(
    ("name", "cls"),
    [(name, cls) for name in nets() for cls in (BitFitModel, LNTuningModel)]
    + [("sam", cls) for cls in (opendelta.LoraModel, AdapterModel, ParallelAdapterModel)],
)
def test_the_default_places_of_image_models_run_and_act(name, cls):
    torch.manual_seed(0)
    model, inputs = nets()[name]()
    model.eval()
    with torch.no_grad():
        plain = model(**inputs)[0]
        shake(cls(model))
        changed = model(**inputs)[0]
    assert changed.shape == plain.shape
    assert not torch.allclose(changed, plain)


class AtDim(nn.LayerNorm):
    """As ESPnet's: the axis counts from the front, or from the end."""

    def __init__(self, width, dim=-1):
        super().__init__(width)
        self.dim = dim

    def forward(self, x):
        if self.dim == -1:
            return super().forward(x)
        return super().forward(x.transpose(self.dim, -1)).transpose(self.dim, -1)


class AtFront(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(0, -1)).movedim(-1, 0)


class ByRank(nn.LayerNorm):
    """Sequences [batch, length, width] and images [batch, channels, height, width]."""

    def forward(self, x):
        if x.ndim == 4:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)
        return super().forward(x)


@pytest.mark.parametrize("cls", [BitFitModel, LNTuningModel, AdapterModel])
@pytest.mark.parametrize(
    ("dim", "shape"),
    [
        *[(1, shape) for shape in ((2, 6, 5), (6, 6, 5), (3, 6), (2, 6, 3, 4))],
        *[(2, shape) for shape in ((2, 5, 6), (2, 6, 6, 6))],
        *[(0, shape) for shape in ((6, 5), (6, 6), (6, 6, 6))],
        *[(dim, shape) for dim in (-1, -2) for shape in ((6, 6), (2, 6, 6))],
        *[(None, shape) for shape in ((6, 4), (6, 6, 6))],
    ],
)
def test_an_axis_counted_from_the_front_is_that_of_inputs_of_any_rank(cls, dim, shape):
    options = {"bottleneck_dim": 2} if cls is AdapterModel else {}
    like = nn.Sequential(nn.LayerNorm(6).double())
    model = nn.Sequential((AtFront(6) if dim is None else AtDim(6, dim)).double())
    delta = shake(cls(model, modified_modules=["0"], **options))
    twin = cls(like, modified_modules=["0"], **options)
    state = {name: value.clone() for name, value in delta.state_dict().items()}
    for name, value in twin.state_dict().items():
        value.copy_(state[name])
    x = torch.randn(shape, dtype=torch.double)
    at = 0 if dim is None else dim
    assert torch.allclose(model(x), like(x.movedim(at, -1)).movedim(-1, at))
    if cls is not AdapterModel:
        wanted = model(x)
        opendelta.composition(model).merge()
        assert torch.allclose(model(x), wanted)


class BySize(nn.LayerNorm):
    """Channels last, or else at axis 1."""

    def forward(self, x):
        if x.shape[-1] == self.normalized_shape[0]:
            return super().forward(x)
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize("cls", [BitFitModel, LNTuningModel, AdapterModel])
@pytest.mark.parametrize("norm", [ByRank, BySize])
def test_an_axis_that_depends_on_the_input_is_refused_by_name(cls, norm):
    says = (
        rf"'0' \({norm.__name__}\) normalises an axis that depends on how many .*or on their sizes"
    )
    with pytest.raises(SiteError, match=says):
        cls(nn.Sequential(norm(6)), modified_modules=["0"])


class OfTime(nn.LayerNorm):
    """After a Conv1d: [batch, channels, length]."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 8, 3), OfTime(8)
        self.last, self.fc = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.last(self.norm(self.conv(x)).mean(-1)))


@pytest.mark.parametrize("cls", [BitFitModel, LNTuningModel])
def test_a_norm_on_an_axis_that_no_delta_knows_is_none_of_the_default_places(cls):
    model, x = Net(), torch.randn(2, 3, 12)
    plain = model(x)
    delta = cls(model)
    assert "norm" not in delta.layers
    assert "last" in delta.layers
    shake(delta)
    assert not torch.allclose(model(x), plain)
    says = r"'norm' \(OfTime\) normalises an axis .* exclude_modules=\['norm'\]"
    with pytest.raises(SiteError, match=says):
        cls(Net(), modified_modules=["last", "norm"])
    cls(Net(), modified_modules=["last", "norm"], exclude_modules=["norm"])


def test_default_places_that_are_all_on_such_axes_say_so():
    model = nn.Sequential(nn.Conv1d(3, 8, 3), OfTime(8))
    with pytest.raises(opendelta.AddressError, match="one that depends on their input"):
        LNTuningModel(model)


class OnePlus(nn.Module):
    """As Gemma's: its weight is no factor."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return torch.nn.functional.rms_norm(x, (x.size(-1),)) * (1 + self.weight)


OnePlus.__name__ = "OnePlusNorm"
FAMILIES = {
    "llama": (T.LlamaModel, T.LlamaConfig, True),
    "qwen3": (T.Qwen3Model, T.Qwen3Config, True),
    "gemma": (T.GemmaModel, T.GemmaConfig, False),
    "t5": (T.T5EncoderModel, T.T5Config, True),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_norm_of_transformers_folds_where_its_weight_is_a_factor(name):
    cls, config, folds = FAMILIES[name]
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_layers": 1, "num_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    model = cls(config(vocab_size=50, hidden_size=16, intermediate_size=24, **sizes)).eval()
    ids = torch.tensor([[5, 6, 7]])
    shake(LNTuningModel(model))
    expected = model(ids).last_hidden_state
    composed = opendelta.composition(model)
    if not folds:
        with pytest.raises(SiteError, match="does not scale by its weight"):
            composed.merge()
        return
    torch.testing.assert_close(composed.to_backbone()(ids).last_hidden_state, expected)
    composed.merge()
    torch.testing.assert_close(model(ids).last_hidden_state, expected)


def test_a_norm_whose_weight_is_no_factor_does_not_fold():
    model = nn.Sequential(OnePlus(6))
    shake(LNTuningModel(model, modified_modules=["0"]))
    with pytest.raises(SiteError, match="does not scale by its weight"):
        opendelta.composition(model).merge()


class NormOverAxes(nn.Module):
    """A normalisation whose axis is in a tuple."""

    def __init__(self, axes):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6))
        self.axes = axes

    def forward(self, x):
        (axis,) = self.axes
        x = (x - x.mean(axis, True)) / x.std(axis, keepdim=True)
        shape = [1] * x.ndim
        shape[axis] = -1
        return x * self.weight.view(shape) + self.bias.view(shape)


@pytest.mark.parametrize("order", [((1,), (-1,)), ((-1,), (1,))])
@pytest.mark.parametrize("cls", [opendelta.BitFitModel, opendelta.LNTuningModel])
def test_two_norms_of_one_class_may_work_on_different_axes(cls, order):
    torch.manual_seed(0)
    model = nn.Sequential()
    for number, axes in enumerate(order):
        model.add_module(f"norm{number}", NormOverAxes(axes))
    x = torch.randn(2, 6, 6, 6)
    delta = cls(model, modified_modules=["norm0", "norm1"])
    values = {name: torch.randn(6) for name in ("norm0", "norm1")}
    for name, parameter in delta.named_parameters():
        if "bias" in name.rpartition(".")[2]:
            parameter.data.copy_(values[name.partition(".")[0]])
    plain = nn.Sequential()
    for number, axes in enumerate(order):
        plain.add_module(f"norm{number}", NormOverAxes(axes))
        plain[number].bias.data.copy_(values[f"norm{number}"])
    torch.testing.assert_close(model(x), plain(x))


class OwnNames(nn.Module):
    """As in VITS and Glow-TTS: [batch, channels, time], with parameters of other names."""

    def __init__(self, width, shape=(-1,)):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width).view(shape))
        self.beta = nn.Parameter(torch.zeros(width).view(shape))

    def forward(self, x):
        x = x.transpose(1, -1)
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], self.gamma.view(-1), self.beta.view(-1))
        return x.transpose(1, -1)


class Scale(nn.Module):
    """As a layer scale, or a global one, over channels."""

    def __init__(self, *shape):
        super().__init__()
        self.scale, self.factor = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale * self.factor


class Sound(nn.Module):
    def __init__(self, inner, width=6):
        super().__init__()
        self.conv, self.inner, self.head = nn.Conv1d(1, width, 5, padding=2), inner, nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.inner(self.conv(x)).mean(-1))


ON_CHANNELS = {
    "names of its own": lambda: OwnNames(6),
    "three axes": lambda: OwnNames(6, (1, -1, 1)),
    "scale": lambda: Scale(6, 1),
    "prelu": lambda: nn.PReLU(6),
    "inside": lambda: nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()),
    "two": lambda: nn.Sequential(OwnNames(6), Scale(6, 1), nn.Dropout(0.1)),
}


@pytest.mark.parametrize("time", [40, 6])
@pytest.mark.parametrize("make", ON_CHANNELS.values(), ids=ON_CHANNELS)
@pytest.mark.parametrize("cls", [*NETWORKS, ParallelAdapterModel])
def test_a_module_of_unknown_kind_whose_parameters_are_on_another_axis_is_refused(cls, make, time):
    model = Sound(make())
    before = opendelta.snapshot(model)
    names = ["inner"] * (2 if cls is ParallelAdapterModel else 1)
    with pytest.raises(SiteError, match=r"'inner' .* has its width, 6, on axis 1 of .*\[2, 6, "):
        cls(model, modified_modules=names, sample_inputs=torch.randn(2, 1, time))
    opendelta.assert_pristine(model, like=before)


class OnTokens(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(9, 6), inner, nn.Linear(6, 3)

    def forward(self, ids):
        return self.head(self.inner(self.table(ids)))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(2))  # of each head

    def forward(self, x):
        heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
        scores = heads @ heads.mT * self.temperature[:, None, None]
        return (scores.softmax(-1) @ heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("time", [2, 6, 4])
@pytest.mark.parametrize(
    "make",
    [lambda: Scale(6), lambda: Scale(1, 1, 6), lambda: nn.Sequential(nn.LayerNorm(6), nn.ReLU()),
     lambda: nn.PReLU(), Attends],
)  # fmt: skip
def test_a_module_of_unknown_kind_with_its_width_last_is_taken(make, time):
    model, ids = OnTokens(make()), torch.randint(9, (2, time))
    delta = AdapterModel(model, modified_modules=["inner"], sample_inputs=ids)
    assert {6} < {size for p in delta.parameters() for size in p.shape}
    assert model(torch.randint(9, (3, 5))).shape == (3, 5, 3)
