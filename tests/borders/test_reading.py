"""Weights that the module around reads, and modules that it calls, are told apart by its code."""

import functools
import operator
import weakref
from typing import ClassVar

import pytest
import torch
import transformers
from support import nets
from support.nets import shake
from torch import nn
from torch.nn import functional as F

import opendelta
from opendelta import (
    AdapterModel,
    BitFitModel,
    CompacterModel,
    LoraModel,
    LowRankAdapterModel,
    ParallelAdapterModel,
    SiteError,
)

pytestmark = [pytest.mark.covers("DeltaConfig.reads")]


class Reads(nn.Module):
    """As torchvision's Swin: the projections are never called."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x):
        return self.attend(x) + x

    def attend(self, x):
        q, k, v = F.linear(x, self.qkv.weight, self.qkv.bias).chunk(3, -1)
        mixed = (q @ k.mT).softmax(-1) @ v
        return F.linear(mixed, self.proj.weight, bias=self.proj.bias)


class Looks(nn.Module):
    """As T5: the weight is looked at, and the module called."""

    def __init__(self):
        super().__init__()
        self.wo = nn.Linear(6, 6)

    def forward(self, x):
        if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))


def is_reading(module):
    return getattr(type(module), "_site_reads", False)


def test_a_delta_acts_on_a_weight_that_is_read():
    model = Reads()
    plain = model(X)
    before = opendelta.snapshot(model)
    delta = LoraModel(model, modified_modules=["qkv", "proj"])
    assert torch.allclose(model(X), plain)
    shake(delta)
    changed = model(X)
    assert not torch.allclose(changed, plain)
    assert not opendelta.unreached(model)
    assert torch.allclose(opendelta.composition(model).to_backbone()(X), changed, atol=1e-6)
    opendelta.composition(model).merge()
    assert torch.allclose(model(X), changed, atol=1e-6)
    opendelta.composition(model).unmerge()
    delta.detach()
    opendelta.assert_pristine(model, like=before)


def test_a_layer_that_does_not_fold_is_refused_there():
    with pytest.raises(SiteError, match=r"'proj' \(.*\): its parent reads .weight"):
        AdapterModel(Reads(), modified_modules=["proj"])


def test_a_module_that_is_called_is_not_taken_for_read():
    model = Looks()
    LoraModel(model, modified_modules=["wo"])
    AdapterModel(model, modified_modules=["wo"])
    assert not is_reading(model.wo)
    model(X)
    assert not opendelta.unreached(model)


def wavlm():
    config = transformers.WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.WavLMModel(config).eval()


def test_the_default_places_of_wavlm_act():
    model = wavlm()
    x = torch.randn(1, 800)
    with torch.no_grad():
        plain = model(x).last_hidden_state
        shake(LoraModel(model))
        changed = model(x).last_hidden_state
        merged = opendelta.composition(model).to_backbone()(x).last_hidden_state
    assert not torch.allclose(changed, plain)
    assert torch.allclose(merged, changed, atol=1e-4)


def test_a_plan_says_what_is_read():
    plan = opendelta.plan(Reads(), opendelta.LoraConfig(modified_modules=["qkv"]))
    assert [module.reads for module in plan.deltas[0].modules] == [True]


@pytest.mark.parametrize("cls", [AdapterModel, CompacterModel, LowRankAdapterModel])
def test_adapters_at_the_default_places_of_wavlm_act(cls):
    model = wavlm()
    x = torch.randn(1, 800)
    with torch.no_grad():
        plain = model(x).last_hidden_state
        delta = shake(cls(model))
        assert "encoder.layers.0.attention" in delta.layers
        assert not torch.allclose(model(x).last_hidden_state, plain)
    assert not opendelta.unreached(model)


def test_a_bias_that_nothing_adds_is_left_out_of_default_places():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 32}
    config = transformers.LongcatFlashConfig(num_layers=1, **sizes)
    with torch.device("meta"):
        model = transformers.LongcatFlashModel(config)
    plan = opendelta.plan(model, opendelta.BitFitConfig())
    names = [module.name for module in plan.deltas[0].modules]
    assert names
    assert "layers.0.mlp.router.classifier" not in names


def test_roles_whose_modules_cannot_act_are_refused_together():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return F.linear(x, self.classifier.weight)

    with pytest.raises(opendelta.AddressError, match=r"are never called"):
        opendelta.BitFitModel(
            Router(), modified_modules=["attn.q"], common_structure={"classifier": "attn.q"}
        )


class ByAFlag(nn.Module):
    """As timm's BEiT: a flag decides; a table of positions takes one length alone."""

    def __init__(self, apart):
        super().__init__()
        self.apart = apart
        self.qkv, self.bias = nn.Linear(6, 18, bias=False), nn.Parameter(torch.ones(18))
        self.table = nn.Parameter(torch.zeros(5))

    def forward(self, x):
        if self.apart:
            y = self.qkv(x) + self.bias
        else:
            y = F.linear(x, self.qkv.weight, self.bias)
        q, k, v = y.chunk(3, -1)
        return (q @ k.mT + self.table).softmax(-1) @ v


@pytest.mark.parametrize("apart", [True, False])
def test_a_flag_and_the_inputs_of_a_user_tell_what_is_read(apart):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), ByAFlag(apart)), torch.randn(2, 5, 6)
    plain = model(x)
    shake(LoraModel(model, modified_modules=["qkv"], sample_inputs=x))
    assert is_reading(model[1].qkv) is not apart
    changed = model(x)
    assert not torch.allclose(changed, plain)
    assert not opendelta.unreached(model)


class BySize(nn.Module):
    """The number of its factors tells if it reads the weight."""

    def __init__(self, factors):
        super().__init__()
        self.fc, self.factors = nn.Linear(6, 6), nn.Parameter(torch.ones(factors, 1))

    def forward(self, x):
        if len(self.factors) > 1:
            return F.linear(x, self.fc.weight * self.factors, self.fc.bias)
        return self.fc(x)


@pytest.mark.parametrize("sizes", [(1, 6), (6, 1)])
def test_the_size_of_a_parameter_may_tell_what_is_read(sizes):
    model = nn.Sequential(*map(BySize, sizes))
    before = model(X)
    delta = shake(LoraModel(model, modified_modules=["fc"]))
    expected = X
    for part, layer in zip(model, delta.layers.values(), strict=True):
        weight = dict(part.fc._parameters)["weight"]
        weight = weight + layer.scaling * layer.lora_B @ layer.lora_A
        expected = F.linear(expected, weight, dict(part.fc._parameters)["bias"])
    assert torch.allclose(model(X), expected, atol=1e-4)
    assert not torch.allclose(model(X), before)


def test_where_a_part_does_not_run_the_whole_model_tells():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.attn = nn.Linear(4, 6), ByAFlag(False)

        def forward(self, x):
            return self.attn(self.inp(x).repeat(1, 5, 1)[:, :5])

    model = Net()
    LoraModel(model, modified_modules=["qkv"])
    assert is_reading(model.attn.qkv)


class Conv1D(nn.Module):
    """A linear layer of a user's own, with the names of transformers' Conv1D."""

    def __init__(self):
        super().__init__()
        self.nf = self.nx = 6
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, 6), self.weight).view(x.shape)


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
def test_a_module_whose_forward_reads_the_shown_weight_is_merged(verb):
    model = nn.Sequential(Conv1D())
    shake(LoraModel(model, modified_modules=["0"], reads=True))
    before = model(X)
    done = getattr(opendelta.composition(model), verb)()
    after = model if verb == "merge" else done
    assert torch.allclose(after(X), before, atol=1e-4)


def test_a_parallel_adapter_goes_around_attention_that_reads_its_projection():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    delta = shake(ParallelAdapterModel(model))
    assert list(delta.layers) == ["layers.0.self_attn", "layers.0.linear1", "layers.0.linear2"]
    model.eval()(torch.randn(2, 3, 8))
    assert not opendelta.unreached(model)


def test_a_parallel_adapter_reads_the_width_of_the_input():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 10)

        def forward(self, x):
            return self.fc(x)

    model = nn.Sequential(Inner())
    delta = shake(ParallelAdapterModel(model, modified_modules=["0", "0"], gate=True))
    layer = delta.layers["0"]
    assert (layer.down_proj.in_features, layer.up_proj.out_features) == (6, 10)
    gate = layer.gate(X)
    branch = layer.up_proj(layer.non_linearity(layer.down_proj(X)))
    assert torch.allclose(model(X), model[0].fc(X) + gate * branch, atol=1e-6)


def test_a_parallel_adapter_on_a_module_that_takes_ids_is_refused():
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)

        def forward(self, ids):
            return self.embed(ids)

    with pytest.raises(SiteError, match=r"'0' \(Ids\) takes no hidden states"):
        ParallelAdapterModel(nn.Sequential(Ids()), modified_modules=["0", "0"])


class InAList(nn.Module):
    """The weights of a list's items are read."""

    def __init__(self):
        super().__init__()
        self.projs = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        for proj in self.projs:
            x = F.linear(x, proj.weight, proj.bias)
        return x


def by_hand(module, x):
    return F.linear(x, module.weight, module.bias)


class HandsOn(nn.Module):
    """A function reads the weight."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(6, 6)

    def forward(self, x):
        return by_hand(self.proj, x)


class ByName(HandsOn):
    def forward(self, x):
        return F.linear(x, getattr(self.proj, "weight"))  # noqa: B009


class Experts(nn.Module):
    """One expert of two runs; the code reads no weights."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        return self.experts[0](x)


class Both(InAList):
    """The code could read, and calls."""

    def forward(self, x):
        if x.size(0) == 100:
            return super().forward(x)
        for proj in self.projs:
            x = proj(x) + proj.weight.new_zeros(())
        return x


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize(
    ("net", "names"), [(InAList, "projs.1"), (HandsOn, "proj"), (ByName, "proj")]
)
@pytest.mark.filterwarnings("ignore::opendelta.UnreachedWarning")
def test_a_layer_that_never_acts_is_not_merged(net, names, ran, verb):
    model = net()
    delta = shake(LoraModel(model, modified_modules=[names]))
    if ran:
        model(X)
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match=rf"'{names}' \(Linear\): 'lora' has not run, .*reads=True"):
        getattr(opendelta.composition(model), verb)()
    assert opendelta.snapshot(model) == before
    delta.disable()
    opendelta.composition(model).to_backbone()
    delta.detach()
    shake(LoraModel(model, modified_modules=[names], reads=True))
    before = model(X)
    opendelta.composition(model).merge()
    assert torch.allclose(model(X), before, atol=1e-5)


@pytest.mark.filterwarnings("ignore::opendelta.UnreachedWarning")
@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize(
    ("net", "names"), [(Experts, "experts.1"), (Both, "projs.1"), (Looks, "wo")]
)
def test_a_layer_that_acts_or_may_act_is_merged_unseen(net, names, ran):
    model = net()
    shake(LoraModel(model, modified_modules=[names]))
    if ran:
        model(X)
    before = model(X) if ran else None
    opendelta.composition(model).merge()
    assert before is None or torch.allclose(model(X), before, atol=1e-5)


class CalledAndRead(nn.Module):
    """The layer is called, and its weight is read for something else."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x) + self.other(2 * x)

    def other(self, x):
        return F.linear(x, self.fc.weight)


class ThroughAFunction(CalledAndRead):
    def other(self, x):
        return by_hand(self.fc, x)


class ByAView(CalledAndRead):
    def other(self, x):
        return x @ self.fc.weight.detach().t()[:, :6]


class BiasToo(CalledAndRead):
    def other(self, x):
        return x * self.fc.bias + self.fc.weight[0]


class HoldsAside(CalledAndRead):
    """A list that is no ModuleList."""

    def __init__(self):
        super().__init__()
        self.kept = [self.fc.weight]

    def other(self, x):
        return x @ self.kept[0]


class UnderAnotherName(CalledAndRead):
    def __init__(self):
        super().__init__()
        self.second = Second(self.fc)

    def other(self, x):
        return self.second(x)


class Second(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.__dict__["mate"] = other

    def forward(self, x):
        return x @ self.mate.weight


class FromAll(CalledAndRead):
    def other(self, x):
        return x @ dict(self.named_parameters())["fc.weight"]


class NeedsMore(CalledAndRead):
    """No inputs for it are known."""

    def forward(self, x, scale):
        if scale.shape != (7, 1):
            raise ValueError("a scale must be [7, 1]")
        return self.fc(x) + self.other(x) * scale[0]


class FromAbove(nn.Module):
    """As a head that is tied by hand: a module further up reads the weight of an embedding."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"fc": nn.Embedding(9, 6)})

    def forward(self, ids):
        return self.body.fc(ids) @ self.body["fc"].weight.T


class OnlyLooks(CalledAndRead):
    """All that it asks the weight for is the same after a merge."""

    def other(self, x):
        weight = self.fc.weight
        zeros = torch.zeros_like(weight).sum() + weight.detach().new_zeros(())
        return x.to(weight.dtype) * weight.size(0) + zeros


class Bloom(CalledAndRead):
    """Another branch computes the same by hand."""

    slow = False

    def forward(self, x):
        return F.linear(x, self.fc.weight, self.fc.bias) if self.slow else self.fc(x)


class ThroughItsParent(CalledAndRead):
    """A child points to the module around it."""

    def __init__(self):
        super().__init__()
        self.second = Pointing(self)

    def other(self, x):
        return self.second(x)


class Pointing(nn.Module):
    def __init__(self, around):
        super().__init__()
        self.__dict__["around"] = around

    def forward(self, x):
        return F.linear(x, self.around.fc.weight)


class InAClosure(CalledAndRead):
    def __init__(self):
        super().__init__()
        self.inner = lambda x: x @ self.fc.weight

    def other(self, x):
        return self.inner(x)


class InADefault(InAClosure):
    def __init__(self):
        super().__init__()
        self.inner = lambda x, fc=self.fc: x @ fc.weight


class InAPartial(InAClosure):
    def __init__(self):
        super().__init__()
        self.inner = functools.partial(times_weight, self)


class InSlots(InAClosure):
    def __init__(self):
        super().__init__()
        self.inner = Slotted(self)


class InAWeakReference(InAClosure):
    def __init__(self):
        super().__init__()
        around = weakref.ref(self)
        self.inner = lambda x: x @ around().fc.weight


class InAHook(CalledAndRead):
    def __init__(self):
        super().__init__()
        self.second = nn.Identity()
        self.second.register_forward_hook(lambda module, given, out: out @ self.fc.weight)

    def other(self, x):
        return self.second(x)


def times_weight(module, x):
    return x @ module.fc.weight


class Slotted:
    __slots__ = ("around",)

    def __init__(self, around):
        self.around = around

    def __call__(self, x):
        return x @ self.around.fc.weight


class InAMethodThatOthersCall(nn.Module):
    """As an embedding that decodes, too."""

    def __init__(self):
        super().__init__()
        self.inner = Decoding()

    def forward(self, x):
        return self.inner.decode(torch.tanh(self.inner(x)))


class Decoding(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x)

    def decode(self, x):
        return x @ self.fc.weight


class InAProperty(CalledAndRead):
    @property
    def table(self):
        return self.fc.weight

    def other(self, x):
        return x @ self.table


class Table:
    def __get__(self, owner, cls):
        return owner.fc.weight


class InADescriptor(InAProperty):
    table = Table()


class InAnAttributeThatIsMade(CalledAndRead):
    def __getattr__(self, name):
        return self.fc.weight if name == "table" else super().__getattr__(name)

    def other(self, x):
        return x @ self.table


class InAPartialMethod(CalledAndRead):
    def _times(self, factor, x):
        return factor * x @ self.fc.weight

    other = functools.partialmethod(_times, 2)


class InTheCall(CalledAndRead):
    def __call__(self, x):
        return super().__call__(x) @ self.fc.weight

    def forward(self, x):
        return self.fc(x)


class OfAnArgument(nn.Module):
    def forward(self, x, inner):
        return x @ inner.weight


class GivenToAnother(CalledAndRead):
    def __init__(self):
        super().__init__()
        self.decoder = OfAnArgument()

    def other(self, x):
        return self.decoder(x, self.fc)


class OfItsCaller(nn.Module):
    def forward(self, x, caller):
        return x @ caller.fc.weight


class GivenWhole(GivenToAnother):
    def __init__(self):
        super().__init__()
        self.decoder = OfItsCaller()

    def other(self, x):
        return self.decoder(x, self)


class InAFunctionOfTheClass(CalledAndRead):
    ways: ClassVar = {"times": times_weight}

    def other(self, x):
        return self.ways["times"](self, x)


class InAFunctionOfTheModule(CalledAndRead):
    def __init__(self):
        super().__init__()
        self.ways = [times_weight]

    def other(self, x):
        return self.ways[0](self, x)


class Way:
    def run(self, module, x):
        return times_weight(module, x)


class InAStrategy(CalledAndRead):
    way = Way()

    def other(self, x):
        return self.way.run(self, x)


class InAClassOfStrategies(CalledAndRead):
    def __init__(self):
        super().__init__()
        self.way = Way

    def other(self, x):
        return self.way().run(self, x)


def one_more(module, x):
    return times_weight(module, x)


class TwoFunctionsDeep(CalledAndRead):
    def other(self, x):
        return one_more(self, x)


class InAnotherFile(CalledAndRead):
    def other(self, x):
        return nets.times_weight(self, x)


class ByAPath(CalledAndRead):
    def other(self, x):
        return x @ operator.attrgetter("fc.weight")(self)


class ByAPathOfTheClass(CalledAndRead):
    table = staticmethod(operator.attrgetter("fc.weight"))

    def other(self, x):
        return x @ self.table(self)


class NeverCalled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Decoding()

    def forward(self, x):
        return self.inner.decode(x)


class OnlyBesideTheForward(CalledAndRead):
    """What no forward reaches hinders no merge."""

    def __init__(self):
        super().__init__()
        self.reset(), self.penalty()

    def reset(self):
        nn.init.zeros_(self.fc.bias)

    def penalty(self):
        return self.fc.weight.square().sum()

    def other(self, x):
        return x


READ = [ThroughItsParent, InAClosure, InADefault, InAPartial, InSlots, InAHook, InAWeakReference]
READ += [CalledAndRead, ThroughAFunction, ByAView, BiasToo, FromAbove]
READ += [HoldsAside, UnderAnotherName, FromAll]
READ += [InAMethodThatOthersCall, InAProperty, InADescriptor, InAnAttributeThatIsMade]
READ += [InAPartialMethod, InTheCall, GivenToAnother, GivenWhole, InAFunctionOfTheClass]
READ += [InAFunctionOfTheModule, InAStrategy, InAClassOfStrategies, TwoFunctionsDeep]
READ += [InAnotherFile, ByAPath, ByAPathOfTheClass]


def input_of(net):
    return torch.tensor([[1, 4, 2]]) if net is FromAbove else X


@pytest.mark.filterwarnings("ignore::opendelta.TiedWeightWarning")
@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("net", READ)
def test_a_merge_that_would_change_what_others_read_is_refused(net, ran, verb):
    model = net()
    shake(LoraModel(model, modified_modules=["fc"]))
    output = model(input_of(net)) if ran else None
    before = opendelta.snapshot(model)
    told = "may read" if net is InTheCall else "reads"  # a run is watched inside of the call
    with pytest.raises(SiteError, match=rf"fc' \(\w+\): lora cannot be merged: other code {told}"):
        getattr(opendelta.composition(model), verb)()
    assert opendelta.snapshot(model) == before
    assert not ran or torch.equal(model(input_of(net)), output)


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
def test_a_module_that_is_read_and_never_called_is_not_merged(verb):
    model = NeverCalled()
    shake(LoraModel(model, modified_modules=["fc"]))
    with pytest.raises(SiteError, match=r"'inner.fc' \(Linear\): lora cannot be merged"):
        getattr(opendelta.composition(model), verb)()
    with pytest.warns(opendelta.UnreachedWarning):
        model(X)
    with pytest.raises(SiteError, match=r"'inner.fc' \(Linear\): "):
        getattr(opendelta.composition(model), verb)()


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
def test_what_no_run_tells_is_refused_too(verb):
    model = NeedsMore()
    shake(LoraModel(model, modified_modules=["fc"]))
    with pytest.raises(SiteError, match=r"'fc' \(Linear\): .*no run on shapes tells"):
        getattr(opendelta.composition(model), verb)()


@pytest.mark.parametrize("net", [CalledAndRead, ByAView, BiasToo])
def test_a_delta_that_acts_on_both_uses_is_merged(net):
    model = net()
    shake(LoraModel(model, modified_modules=["fc"], reads=True))
    output = model(X)
    opendelta.composition(model).merge()
    assert torch.allclose(model(X), output, atol=1e-5)


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("net", [OnlyLooks, Bloom, Looks, OnlyBesideTheForward])
def test_a_weight_whose_values_nobody_else_uses_is_merged(net, verb):
    model = net()
    name = "wo" if net is Looks else "fc"
    shake(LoraModel(model, modified_modules=[name]))
    output = model(X)
    done = getattr(opendelta.composition(model), verb)()
    assert torch.allclose((model if verb == "merge" else done)(X), output, atol=1e-5)


class Branches(nn.Module):
    """One branch calls the layer, the other reads its weight."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x, fast=False):
        if fast or x.size(1) > 6:
            return F.linear(x, self.fc.weight, self.fc.bias)
        return self.fc(x)


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("reading", [{"x": X, "fast": True}, {"x": X.repeat(1, 3, 1)}])
def test_a_branch_that_missed_the_layer_is_remembered(reading, verb):
    model = Branches()
    delta = shake(LoraModel(model, modified_modules=["fc"]))
    with pytest.warns(opendelta.UnreachedWarning):
        model(**reading)
    model(X)
    with pytest.raises(
        SiteError, match=r"'fc' \(Linear\): 'lora' ran in some forwards, not in all"
    ):
        getattr(opendelta.composition(model), verb)()
    delta.detach()
    shake(LoraModel(model, modified_modules=["fc"], reads=True))
    outputs = model(**reading), model(X)
    opendelta.composition(model).merge()
    for given, output in zip((reading, {"x": X}), outputs, strict=True):
        assert torch.allclose(model(**given), output, atol=1e-5)


class WithLoss(nn.Module):
    """A head whose weight a fused loss reads."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x, labels=None):
        if labels is None:
            return self.fc(x)
        return F.cross_entropy(F.linear(x, self.fc.weight, self.fc.bias).flatten(0, 1), labels)


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("net", [Branches, WithLoss])
def test_a_branch_that_no_run_took_is_seen_in_the_code(net, ran, verb):
    model = net()
    shake(LoraModel(model, modified_modules=["fc"]))
    if ran:
        model(X)
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match=r"'fc' \(Linear\): lora cannot be merged: other code may"):
        getattr(opendelta.composition(model), verb)()
    assert opendelta.snapshot(model) == before


def test_inputs_that_take_the_branch_let_the_delta_act_there():
    model, labels = WithLoss(), torch.zeros(X.shape[:2].numel(), dtype=torch.long)
    inputs = {"x": X, "labels": labels}
    delta = shake(LoraModel(model, modified_modules=["fc"], reads=True, sample_inputs=inputs))
    loss, logits = model(X, labels), model(X)
    opendelta.composition(model).merge()
    assert torch.allclose(model(X, labels), loss)
    assert torch.allclose(model(X), logits, atol=1e-5)
    assert delta.attached


@pytest.mark.filterwarnings("ignore::opendelta.UnreachedWarning")
def test_an_expert_that_a_forward_missed_is_merged():
    class Chosen(Experts):
        def forward(self, x, number=0):
            return self.experts[number](x)

    model = Chosen()
    shake(LoraModel(model, modified_modules=["experts.1"]))
    model(X)
    output = model(X, 1)
    opendelta.composition(model).merge()
    assert torch.allclose(model(X, 1), output, atol=1e-5)


def test_a_raw_weight_that_code_finds_in_the_tables_is_no_shown_one():
    class Vars(CalledAndRead):
        def forward(self, x):
            return self.fc(x) + x @ vars(self.fc)["_parameters"]["weight"]

    model = Vars()
    shake(LoraModel(model, modified_modules=["fc"], reads=True))
    model(X)
    with pytest.raises(SiteError, match=r"fc' \(Linear\): lora cannot be merged"):
        opendelta.composition(model).merge()


def first_of(module):
    return next(module.parameters())


def first_beneath(module):
    return first_of(module)


def all_in_one(module):
    return nn.utils.parameters_to_vector(module.parameters())[:36].view(6, 6)


RAWS = {
    "helper": lambda self, x: x @ first_of(self.fc),
    "two deep": lambda self, x: x @ first_beneath(self.fc),
    "another file": lambda self, x: x @ nets.first_parameter(self.fc),
    "vector": lambda self, x: x @ all_in_one(self.fc),
    "by attribute": lambda self, x: x @ self.fc.__getattr__("weight"),
    "by the class": lambda self, x: x @ nn.Module.__getattr__(self.fc, "weight"),
}


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("way", RAWS)
def test_a_merge_is_refused_where_a_function_takes_parameters_out_of_a_module(way, reads, verb):
    model = CalledAndRead()
    model.__class__ = type("Net", (CalledAndRead,), {"other": RAWS[way]})
    shake(LoraModel(model, modified_modules=["fc"], reads=reads))
    model(X)
    with pytest.raises(SiteError, match=r"fc' \(Linear\): lora cannot be merged: other code"):
        getattr(opendelta.composition(model), verb)()


@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("net", [net for net in READ if net is not FromAbove])
def test_with_reads_a_merge_computes_the_same_or_is_refused(net, ran):
    model = net()
    shake(LoraModel(model, modified_modules=["fc"], reads=True))
    output = model(X) if ran else None
    try:
        opendelta.composition(model).merge()
    except SiteError:
        return
    merged = model(X)
    if output is None:
        opendelta.composition(model).unmerge()
        output = model(X)
    torch.testing.assert_close(merged, output, atol=1e-5, rtol=1e-5)


class Halting(nn.Module):
    """A loop that stops by a value, so that no run on shapes goes through."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        for _ in range(3):
            x = self.layer(x)
            if x.abs().mean() > 100:
                break
        return x


@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("two", [True, False])
def test_what_torch_s_fast_path_reads_hinders_no_merge(two, verb):
    model = nn.Transformer(8, 2, 1, 1, 16, batch_first=True) if two else Halting()
    x = torch.randn(2, 4, 8)
    batch = (x, x) if two else (x,)
    shake(LoraModel(model.eval(), modified_modules=["linear1", "linear2"]))
    with torch.no_grad():
        output = model(*batch)
        done = getattr(opendelta.composition(model), verb)()
        merged = (model if verb == "merge" else done)(*batch)
    torch.testing.assert_close(merged, output, atol=1e-5, rtol=1e-5)


def test_get_parameter_takes_no_weight_that_shows_deltas():
    class Gets(CalledAndRead):
        def forward(self, x):
            return self.fc(x) + F.linear(x, self.get_parameter("fc.weight"))

    model = Gets()
    with pytest.raises(SiteError, match=r"'fc' \(Linear\): the code around it calls get_parameter"):
        LoraModel(model, modified_modules=["fc"], reads=True)
    opendelta.assert_pristine(model)
    shake(LoraModel(model, modified_modules=["fc"]))
    model(X)


def test_only_the_parameters_that_change_count():
    model = CalledAndRead()  # others read its weight, and BitFit changes its bias
    shake(BitFitModel(model, modified_modules=["fc"]))
    output = model(X)
    opendelta.composition(model).merge()
    assert torch.allclose(model(X), output, atol=1e-6)
    model = BiasToo()
    shake(BitFitModel(model, modified_modules=["fc"]))
    with pytest.raises(SiteError, match=r"other code reads its bias"):
        opendelta.composition(model).merge()


def test_a_bias_alone_is_seen_to_be_read():
    class OnlyBias(CalledAndRead):
        def other(self, x):
            return x * self.fc.bias

    model = OnlyBias()
    shake(BitFitModel(model, modified_modules=["fc"]))
    with pytest.raises(SiteError, match=r"other code reads its bias"):
        opendelta.composition(model).merge()
    delta = opendelta.composition(model)["bitfit"]
    delta.detach()
    shake(LoraModel(model, modified_modules=["fc"]))
    output = model(X)
    opendelta.composition(model).merge()
    assert torch.allclose(model(X), output, atol=1e-5)


def mixers():
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
    small = {"state_size": 4, "time_step_rank": 4}
    yield transformers.MambaModel(transformers.MambaConfig(**sizes, **small))
    yield transformers.FalconMambaModel(transformers.FalconMambaConfig(**sizes, **small))
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
    periods = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 4}
    own = {"mamba_d_state": 4, "mamba_dt_rank": 4}
    yield transformers.JambaModel(transformers.JambaConfig(**sizes, **heads, **periods, **own))


def test_biases_that_a_mixer_reads_act_at_the_default_places():
    ids = torch.tensor([[1, 4, 2]])
    for model in mixers():
        torch.manual_seed(0)
        plain = model.eval()(ids, use_cache=False).last_hidden_state
        delta = BitFitModel(model)
        steps = [layer for name, layer in delta.layers.items() if name.endswith("dt_proj")]
        assert steps
        for layer in steps:
            layer.bias.data.fill_(1.0)
        changed = model(ids, use_cache=False).last_hidden_state
        assert not torch.allclose(changed, plain, atol=1e-6)
        assert not opendelta.unreached(model)
        opendelta.composition(model).merge()
        merged = model(ids, use_cache=False).last_hidden_state
        assert torch.allclose(merged, changed, atol=1e-5)
