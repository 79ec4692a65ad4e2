"""What a run tells of a module holds for all values of its weight, and for no other instance."""

import enum
from types import SimpleNamespace

import pytest
import torch
from support.nets import shake
from torch import nn
from torch.nn import functional as F

import opendelta
from opendelta import (
    AdapterModel,
    BitFitModel,
    LNTuningModel,
    LoraModel,
    LoReftModel,
    LowRankAdapterModel,
    OFTModel,
    ParallelAdapterModel,
    SiteError,
)
from opendelta import composition as composed
from opendelta._modules.kinds import TransposedLinear, kind_of

pytestmark = pytest.mark.covers("Composition.merge", "Delta.attach")


# ------------------------------------------------------------------- the layout of a square weight
class Turned(nn.Module):
    """y = x W + b."""

    def __init__(self, start=None, names=("in_features", "out_features")):
        super().__init__()
        for name in names:
            setattr(self, name, 6)
        self.weight = nn.Parameter(torch.randn(6, 6) if start is None else start)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x):
        return x @ self.weight + self.bias


class Gated(Turned):
    """A gate, or another weight, may be zero at first, too."""

    def __init__(self, start=None):
        super().__init__(start)
        self.gate, self.more = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6, 6))

    def forward(self, x):
        return super().forward(x) * self.gate + x @ self.more


class Masked(Turned):
    def __init__(self, start=None):
        super().__init__(start)
        self.register_buffer("mask", torch.ones(6, 6))

    def forward(self, x):
        return x @ (self.weight * self.mask) + self.bias


class Held(Turned):
    """Its forward has the weight from elsewhere."""

    def __init__(self, start=None):
        super().__init__(start)
        self.held = [self.weight]

    def forward(self, x):
        return x @ self.held[0] + self.bias


X = torch.randn(3, 6, dtype=torch.double, generator=torch.Generator().manual_seed(0))
STARTS = {
    "zeros": torch.zeros(6, 6),
    "identity": torch.eye(6),
    "symmetric": torch.ones(6, 6) + torch.eye(6),
    "meta": torch.empty(6, 6, device="meta"),
}


def loaded(start, cls=Turned):
    """Return a model that a checkpoint is loaded into after LoRA was made, and the trained one."""
    torch.manual_seed(0)
    trained = nn.Sequential(cls()).double()
    shake_all(trained)
    model = nn.Sequential(cls(STARTS[start].clone())).double()
    if start == "meta":
        model = model.to("meta")
    lora = LoraModel(model, modified_modules=["0"], lora_r=2)
    model.load_state_dict(trained.state_dict(), strict=False, assign=start == "meta")
    if start == "meta":
        state = {k: torch.randn(p.shape).double() for k, p in lora.state_dict().items()}
        model.load_state_dict(state, strict=False, assign=True)
    shake(lora)
    return model, lora, trained


def shake_all(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter)


@pytest.mark.parametrize("cls", [Turned, Gated, Masked])
@pytest.mark.parametrize("start", STARTS)
def test_a_turned_weight_is_found_whatever_its_values_are(start, cls):
    model, lora, trained = loaded(start, cls)
    layer = lora.layers["0"]
    D = layer.scaling * layer.lora_B @ layer.lora_A
    expected = trained(X) + X @ D.T
    torch.testing.assert_close(model(X), expected)
    if cls is Gated:
        return
    torch.testing.assert_close(composed(model).to_backbone()(X), expected)
    composed(model).merge()
    torch.testing.assert_close(model(X), expected)


AROUND = {
    "plain": lambda x, W, product: product(W),
    "masked": lambda x, W, product: product(W * torch.tril(torch.ones_like(W))),
    "gated": lambda x, W, product: x * torch.sigmoid(product(W)),
    "negative": lambda x, W, product: -product(W),
    "abs": lambda x, W, product: product(W).abs(),
    "relu": lambda x, W, product: product(W).relu(),
    "scaled": lambda x, W, product: product(W / W.abs().mean()),
    "residual": lambda x, W, product: x + product(W),
    "noisy": lambda x, W, product: product(W) + torch.randn_like(x),
    "softmax": lambda x, W, product: product(W).softmax(-1),
    "normalised": lambda x, W, product: F.layer_norm(product(W), x.shape[-1:]),
    "flipped": lambda x, W, product: product(W).flip(-1),
    "mixed": lambda x, W, product: product(W).cumsum(-1),
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("width", [2, 3, 4, 12, 64])
def test_a_layout_is_not_guessed(width, around):
    class Own(nn.Linear):
        turned = False

        def forward(self, x):
            product = (lambda W: x @ W) if self.turned else (lambda W: F.linear(x, W, self.bias))
            return AROUND[around](x, self.weight, product)

    for seed in range(6 if width < 64 else 2):
        torch.manual_seed(seed)
        module = Own(width, width)
        assert not isinstance(kind_of(module), TransposedLinear)
        module.turned = True
        elementwise = list(AROUND).index(around) < list(AROUND).index("softmax")
        assert not elementwise or isinstance(kind_of(module), TransposedLinear)


class Elsewhere(nn.Linear):
    def __init__(self, width, compute):
        super().__init__(width, width)
        self.held, self.compute = [self.weight], compute

    def forward(self, x):
        return self.compute(x, self.held[0])


@pytest.mark.parametrize("width", [1, 2, 3, 64])
def test_a_layout_of_a_weight_from_elsewhere_is_not_guessed(width):
    for seed in range(8):
        torch.manual_seed(seed)
        turned = Elsewhere(width, lambda x, W: x @ W)
        assert isinstance(kind_of(turned), TransposedLinear) == (width > 1)
        for compute in (F.linear, lambda x, W: x * torch.sigmoid(F.linear(x, W))):
            assert not isinstance(kind_of(Elsewhere(width, compute)), TransposedLinear)


@pytest.mark.parametrize("start", ["zeros", "identity", "symmetric"])
@pytest.mark.parametrize("cls", [Turned, Gated, Masked, Held])
def test_a_probe_leaves_the_parameters_and_the_random_numbers(start, cls):
    module = cls(STARTS[start].clone())
    own = dict(module.named_parameters())
    values = {key: p.clone() for key, p in module.state_dict().items()}
    state, versions = torch.get_rng_state(), {k: p._version for k, p in own.items()}
    kind_of(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p is own[k] and p._version == versions[k] for k, p in module.named_parameters())
    assert all(torch.equal(p, values[k]) for k, p in module.state_dict().items())


def test_a_weight_that_a_forward_has_from_elsewhere_is_looked_at_as_it_is():
    assert isinstance(kind_of(Held()), TransposedLinear)


@pytest.mark.parametrize("start", STARTS)
def test_the_norms_of_dora_are_those_of_the_rows(start):
    module = Turned(STARTS[start].clone() if start != "meta" else torch.randn(6, 6)).double()
    model = nn.Sequential(module)
    if start != "meta":
        weight = torch.randn(6, 6, dtype=torch.double)
        model.load_state_dict({"0.weight": weight}, strict=False)
    delta = shake(LoraModel(model, modified_modules=["0"], lora_r=2, use_dora=True))
    layer = delta.layers["0"]
    W = module.weight.T + layer.scaling * layer.lora_B @ layer.lora_A
    wanted = X @ (layer.lora_magnitude_vector / W.norm(dim=1) * W.T) + module.bias
    torch.testing.assert_close(model(X), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("start", ["zeros", "meta"])
def test_a_layout_is_found_in_every_dtype_and_inside_the_meta_device(start, dtype):
    module = Turned(STARTS[start].clone()).to(dtype)
    with torch.device("meta"):
        turned = isinstance(kind_of(module), TransposedLinear)
    assert turned == (dtype != torch.float8_e4m3fn)  # no forward runs in that


class Either(Turned):
    turned = True

    def forward(self, x):
        return x @ (self.weight if self.turned else self.weight.T) + self.bias


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("method", [LoraModel, OFTModel])
def test_a_module_that_has_another_layout_since_is_refused_by_name(verb, method):
    options = {"oft_block_size": 2} if method is OFTModel else {}
    model = nn.Sequential(Either())
    shake(method(model, modified_modules=["0"], **options))
    model[0].turned = False
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match=r"'0' \(Either\): .* another layout"):
        getattr(composed(model), verb)()
    assert opendelta.snapshot(model) == before


class Rows(Turned):
    """As torch's Linear has it; its sizes have GPT-2's names."""

    def __init__(self):
        super().__init__(names=("nx", "nf"))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Columns(Turned):
    def __init__(self):
        super().__init__(names=("nx", "nf"))


class Conv1D(Rows):
    """Its name is that of transformers' class."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


Conv1D.forward.__qualname__ = "Conv1D.forward"


@pytest.mark.parametrize("cls", [Rows, Columns, Conv1D])
@pytest.mark.parametrize("dora", [True, False])
def test_the_names_of_gpt_2_tell_no_layout(cls, dora):
    torch.manual_seed(0)
    model = nn.Sequential(cls()).double()
    delta = shake(LoraModel(model, modified_modules=["0"], lora_r=2, use_dora=dora))
    layer, own = delta.layers["0"], model[0].weight
    W = own.T if cls is Columns else own
    W = W + layer.scaling * layer.lora_B @ layer.lora_A
    scale = layer.lora_magnitude_vector / W.norm(dim=1) if dora else 1
    wanted = X @ (scale * W.T) + model[0].bias
    torch.testing.assert_close(model(X), wanted)
    composed(model).merge()
    torch.testing.assert_close(model(X), wanted)


def test_a_weight_is_shown_to_a_reader_only_if_its_module_computes_as_conv1d():
    with pytest.raises(SiteError, match="can be shown on Linear and Conv1D only"):
        LoraModel(nn.Sequential(Conv1D()), modified_modules=["0"], reads=True)


def test_sizes_with_the_names_of_gpt_2_make_no_linear_layer():
    class Grid(nn.Module):
        def __init__(self):
            super().__init__()
            self.nx, self.nf = 6, 5

        def forward(self, x):
            return x

    assert kind_of(Grid()) is None


# --------------------------------------------------------------------- the factor of an embedding
class Scaled(nn.Embedding):
    def __init__(self, scale=1.0):
        super().__init__(9, 6)
        self.register_buffer("embed_scale", torch.tensor(scale))

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


IDS = torch.arange(9)[None]


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("assign", [True, False])
def test_a_factor_that_a_checkpoint_brings_later_is_refused_by_name(assign, verb):
    model = nn.Sequential(Scaled())
    shake(LoraModel(model, modified_modules=["0"]))
    model.load_state_dict(nn.Sequential(Scaled(5.0)).state_dict(), strict=False, assign=assign)
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match=r"'0' \(Scaled\): lora .* scale 5.0 instead of 1.0"):
        getattr(composed(model), verb)()
    assert opendelta.snapshot(model) == before


def test_a_factor_without_a_value_is_refused_when_attaching():
    with torch.device("meta"):
        model = nn.Sequential(Scaled())
    with pytest.raises(SiteError, match=r"'0' \(Scaled\) .*embed_scale.* load the backbone"):
        LoraModel(model, modified_modules=["0"])
    AdapterModel(model, modified_modules=["0"], bottleneck_dim=2)


# ------------------------------------------------------------------------ instances of one class
class Layout(enum.Enum):
    LAST = 1
    FIRST = 2


class Norm(nn.LayerNorm):
    """Channels last, or first of all but the batch, however its instance says so."""

    def __init__(self, how):
        super().__init__(6)
        self.how = how if not isinstance(how, torch.Tensor) else None
        self.register_buffer("flag", how if isinstance(how, torch.Tensor) else None)

    def forward(self, x):
        how = self.flag if self.how is None else self.how
        if how in (Layout.LAST, torch.contiguous_format) or getattr(how, "last", False):
            return super().forward(x)
        if callable(how):
            return how(super().forward, x)
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def last(call, x):
    return call(x)


def first(call, x):
    return call(x.movedim(1, -1)).movedim(-1, 1)


PAIRS = {
    "enum": (Layout.LAST, Layout.FIRST),
    "config": (SimpleNamespace(last=True), SimpleNamespace(last=False)),
    "memory format": (torch.contiguous_format, torch.channels_last),
    "function": (last, first),
    "nested": (SimpleNamespace(last=[Layout.LAST]), SimpleNamespace(last=[])),
    "number": (SimpleNamespace(last=10**9), SimpleNamespace(last=0)),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("swapped", [True, False])
def test_the_axis_of_one_norm_is_not_that_of_another_instance(pair, swapped):
    model = nn.ModuleList(map(Norm, PAIRS[pair]))
    image = torch.randn(2, 6, 6, 6)
    plain = [part(image) for part in model]
    shapes = [(6,), (6, 1, 1)]
    for index in (1, 0) if swapped else (0, 1):
        delta = shake(BitFitModel(model, modified_modules=[str(index)], name=f"b{index}"))
        bias = delta.layers[str(index)].bias.detach().view(shapes[index])
        torch.testing.assert_close(model[index](image), plain[index] + bias)


def test_the_axis_of_a_norm_is_found_anew_when_its_config_changes():
    config = SimpleNamespace(last=True)
    assert kind_of(Norm(config)).axis == -1
    config.last = False
    assert kind_of(Norm(config)).axis == 1


@pytest.mark.parametrize("offsets", [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("make", [float, torch.tensor])
def test_whether_a_norm_scales_by_its_weight_is_asked_of_each_instance(offsets, make):
    class OwnNorm(nn.Module):
        def __init__(self, offset):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))
            if isinstance(offset, torch.Tensor):
                self.register_buffer("offset", offset)
            else:
                self.offset = offset

        def forward(self, x):
            return F.layer_norm(x, (6,)) * (self.weight + self.offset)

    for offset in offsets:
        assert kind_of(OwnNorm(make(offset))).scales_by_weight == (offset == 0)


class Skips(nn.Linear):
    """Megatron's: a tuple where its config, or the function of a child, says so."""

    def __init__(self, skips):
        super().__init__(6, 6)
        self.config = SimpleNamespace(deep=SimpleNamespace(skips=skips))

    def forward(self, x):
        out = super().forward(x)
        return (out, self.bias) if self.config.deep.skips else out


class Child(nn.Module):
    def __init__(self, wide):
        super().__init__()
        self.wide = wide

    def forward(self, x):
        return torch.cat([x, x], -1) if self.wide else x


class WithChild(nn.Linear):
    def __init__(self, wide):
        super().__init__(6, 6)
        self.act = Child(SimpleNamespace(wide=wide) if wide else None)

    def forward(self, x):
        return self.act(super().forward(x))


@pytest.mark.parametrize("cls", [Skips, WithChild])
@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_the_output_of_one_linear_is_not_that_of_another_instance(cls, order):
    for other in order:
        model = nn.Sequential(cls(other))
        if other:
            with pytest.raises(SiteError, match=r"'0' .* returns"):
                LoraModel(model, modified_modules=["0"])
        else:
            LoraModel(model, modified_modules=["0"])
            model(torch.randn(2, 6))


@pytest.mark.parametrize("count", [40, 4000])
def test_a_norm_that_holds_much_is_tried_too(count):
    norm = Norm(Layout.FIRST)
    norm.table, norm.itself = list(range(count)), SimpleNamespace()
    norm.itself.back = norm.itself
    norm.itself.module = norm
    assert kind_of(norm).axis == 1


# --------------------------------------------------------------------------- access to attributes
class ByGetattr(nn.Linear):
    def __getattr__(self, name):
        value = super().__getattr__(name)
        return value.clamp(-0.2, 0.2) if name == "weight" else value


class ByGetattribute(nn.Linear):
    def __getattribute__(self, name):
        own = super().__getattribute__("__dict__").get("_parameters", {})
        return own[name].clamp(-0.2, 0.2) if name in own else super().__getattribute__(name)


class Delegates(nn.Linear):
    """It looks elsewhere for what a module does not have."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(SimpleNamespace(other=1), name)


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("cls", [ByGetattr, ByGetattribute])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_weight_that_changes_where_it_is_read_is_refused_by_name(cls, options, verb):
    torch.manual_seed(0)
    module = cls(6, 6)
    for parameter in module._parameters.values():
        nn.init.normal_(parameter)
    model = nn.Sequential(module)
    shake(LoraModel(model, modified_modules=["0"], **options))
    with pytest.raises(SiteError, match=rf"'0' \({cls.__name__}\): lora cannot be merged"):
        getattr(composed(model), verb)()
    with pytest.raises(SiteError, match="can be shown on Linear and Conv1D only"):
        LoraModel(nn.Sequential(cls(6, 6)), modified_modules=["0"], reads=True)


def test_access_that_changes_nothing_folds():
    model, x = nn.Sequential(Delegates(6, 6)), X.float()
    shake(LoraModel(model, modified_modules=["0"]))
    expected = model(x)
    composed(model).merge()
    torch.testing.assert_close(model(x), expected)


class Clamping(nn.Linear):
    def __call__(self, x):
        self.weight.data.clamp_(-0.5, 0.5)
        return super().__call__(x)


class Exchanging(nn.Linear):
    """Another weight is in the place of its own while it is called."""

    def _call_impl(self, x):
        own = self._parameters["weight"]
        self._parameters["weight"] = nn.Parameter(own.clamp(-0.5, 0.5))
        try:
            return super()._call_impl(x)
        finally:
            self._parameters["weight"] = own

    __call__ = _call_impl


class Around(nn.Linear):
    """What comes before and after the forward is before and after the deltas."""

    def __call__(self, x):
        return 2 * super().__call__(x.tanh())


class ClampingNorm(nn.LayerNorm):
    def __call__(self, x):
        self.weight.data.clamp_(-0.5, 0.5)
        return super().__call__(x)


@pytest.mark.parametrize("cls", [Clamping, Exchanging, ClampingNorm])
def test_a_call_that_changes_the_weight_is_refused_by_name(cls):
    norm = cls is ClampingNorm
    model = nn.Sequential(cls(6) if norm else cls(6, 6))
    shake((LNTuningModel if norm else LoraModel)(model, modified_modules=["0"]))
    model(X.float())
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match=rf"'0' \({cls.__name__}\)"):
        composed(model).merge()
    assert opendelta.snapshot(model) == before


def test_a_call_around_the_forward_folds():
    model, x = nn.Sequential(Around(6, 6)), X.float()
    shake(LoraModel(model, modified_modules=["0"]))
    expected = model(x)
    torch.testing.assert_close(composed(model).to_backbone()(x), expected)
    composed(model).merge()
    torch.testing.assert_close(model(x), expected)


# ------------------------------------------------------------------------- a norm with one scale
class ScaleNorm(nn.Module):
    def __init__(self, axes=1):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,) * axes, 2.0))

    def forward(self, x):
        return self.weight * F.normalize(x, dim=-1)


@pytest.mark.parametrize("axes", [0, 1])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (AdapterModel, {"bottleneck_dim": 2}),
        (LowRankAdapterModel, {}),
        (ParallelAdapterModel, {"bottleneck_dim": 2}),
        (LoReftModel, {"low_rank_dimension": 2}),
    ],
)
def test_a_norm_with_one_scale_has_the_width_of_its_output(method, options, axes):
    model, x = nn.Sequential(nn.Linear(4, 4), ScaleNorm(axes)), torch.randn(2, 4)
    names = ["1", "1"] if method is ParallelAdapterModel else ["1"]
    before = model(x)
    shake(method(model, modified_modules=names, **options))
    assert model(x).shape == (2, 4)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("method", [BitFitModel, LNTuningModel])
def test_a_norm_with_one_scale_takes_no_values_of_channels(method):
    with pytest.raises(SiteError, match=r"'1' \(ScaleNorm\) cannot carry"):
        method(nn.Sequential(nn.Linear(4, 4), ScaleNorm()), modified_modules=["1"])
