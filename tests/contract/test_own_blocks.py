"""Blocks of users: a rule that writes `weights`, one that writes `combine`, and wrong ones."""

from dataclasses import KW_ONLY, dataclass

import pytest
import torch
from support.nets import IDS, net, shake, untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, AverageModel, LoraModel, composition
from opendelta._deltas.registry import BLOCKS, METHODS
from opendelta.author import (
    Block,
    BlockConfig,
    BlockLayer,
    Delta,
    DeltaConfig,
    InputLayer,
    OptionError,
    SiteError,
    linear,
    option,
)

pytestmark = pytest.mark.covers("Block", "BlockLayer")


class Sigmoids(BlockLayer):
    """y = h + sum_i sigmoid(w_i . x) z_i."""

    reads = "input"

    def __init__(self, site, config):
        super().__init__()
        self.w = nn.init.zeros_(site.parameter(len(config.deltas), site.input_width))

    def weights(self, u, chosen):
        return linear(u, chosen.of(self.w)).sigmoid()


class Strongest(BlockLayer):
    """y = h + p max_i z_i."""

    def __init__(self, site, config):
        super().__init__()
        self.factor = config.factor

    def combine(self, x, h, z, chosen):
        return self.factor * torch.stack(list(z)).amax(0)


@dataclass
class StrongestConfig(BlockConfig):
    _: KW_ONLY
    factor: float = option(1.0, minimum=0.0)


@pytest.fixture
def define():
    """A function: {a layer} -> a block with this rule; the test's blocks are forgotten."""
    known, methods = set(BLOCKS), set(METHODS)

    def block(layer, config=BlockConfig, name="mine"):
        whole = {"delta_type": name, "config_class": config, "layer_class": layer}
        return type("Mine", (Block,), whole)

    yield block
    for registry, before in ((BLOCKS, known), (METHODS, methods)):
        for name in registry.keys() - before:
            del registry[name]


@pytest.fixture
def model():
    return net().double().requires_grad_(False)


def children(model, mixed=True):
    for index, name in enumerate("ab"):
        shake(LoraModel(model, modified_modules=["linear"], lora_r=2, name=name), index)
    if mixed:
        shake(AdapterModel(model, modified_modules=["linear", "norm"], name="c"))
    return ["a", "b", "c"][: 2 + mixed]


def parts(model, names, x):
    """What `linear` gives without deltas, and the change that each makes."""
    with composition(model).only():
        h = model.linear(x)
    z = []
    for name in names:
        with composition(model).only(name):
            z.append(model.linear(x) - h)
    return h, z


X = torch.randn(2, 3, 8, dtype=torch.float64)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_rule_of_weights_computes_its_sum(define, model, mixed, scale):
    names = children(model, mixed)
    h, z = parts(model, names, X)
    block = shake(define(Sigmoids)(model, deltas=names))
    block.scale = scale
    g = (X @ block.layers["linear"].w.T).sigmoid()
    expected = h + scale * sum(g[..., i, None] * each for i, each in enumerate(z))
    torch.testing.assert_close(model.linear(X), expected)
    composition(model)["a"].disable()
    expected = h + scale * sum(g[..., i, None] * z[i] for i in range(1, len(z)))
    torch.testing.assert_close(model.linear(X), expected)


def test_a_rule_of_another_form_writes_combine(define, model):
    names = children(model)
    h, z = parts(model, names, X)
    define(Strongest, StrongestConfig)(model, deltas=names, factor=0.5)
    torch.testing.assert_close(model.linear(X), h + 0.5 * torch.stack(z).amax(0))


@pytest.mark.parametrize(
    ("layer", "config"), [(Sigmoids, BlockConfig), (Strongest, StrongestConfig)]
)
def test_it_keeps_what_every_block_promises(define, model, layer, config, tmp_path):
    method = define(layer, config)
    with untouched(model):
        names = children(model)
        block = shake(method(model, deltas=names))
        with composition(model).only("mine"):
            expected = model(IDS)
        inner = AverageModel(model, deltas=["mine"], weights=[1.0], name="outer")
        torch.testing.assert_close(model(IDS), expected)
        inner.detach()
        with opendelta.route(model, ["mine", None]):
            torch.testing.assert_close(model(IDS)[:1], expected[:1])
        with pytest.raises(SiteError, match="does not fold"):
            composition(model).merge("mine")
        assert composition(model).explain("linear").formula.startswith("y = mine(")
        assert opendelta.plan(model, config(deltas=names)).added_parameters == sum(
            p.numel() for p in block.parameters()
        )
        block.save_finetuned(tmp_path)
        handles = [block, *(composition(model)[name] for name in names)]
        for delta in handles:
            delta.detach()
    del block, handles, delta, inner
    method.from_finetuned(tmp_path, model)
    assert torch.equal(model(IDS), expected)


def ones(layer, u, chosen):
    return [1.0] * len(chosen.numbers)


def first(layer, x, h, z, chosen):
    return z[0]


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ({}, "must write the method weights"),
        ({"weights": ones, "combine": first}, "`weights`, which only a weighted sum uses"),
        ({"constant": True, "combine": first}, "`constant = True`, which only a weighted sum uses"),
        ({"constant": True, "weights": ones, "reads": "input"}, "depend on no input"),
        ({"weights": ones, "reads": "inputs"}, 'reads=\'inputs\' must be "input", "output" or ""'),
    ],
)
def test_a_rule_that_contradicts_itself_is_refused_when_it_is_defined(define, body, match):
    with pytest.raises(OptionError, match=match):
        define(type("Wrong", (BlockLayer,), body))


def test_a_block_is_made_of_the_classes_of_blocks(define):
    with pytest.raises(OptionError, match="Mine is a Block, so its DeltaConfig must be a BlockC"):
        define(Sigmoids, DeltaConfig)
    with pytest.raises(OptionError, match="so its Shift must be a BlockLayer"):
        define(Shift)


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (lambda layer: None, r"Wrong.__init__ must call super\(\).__init__\(\) first"),
        (lambda layer: setattr(layer, "w", nn.Parameter(torch.ones(2))), "must call super"),
        (lambda layer: nn.Module.__init__(layer), "must call super"),
        (lambda layer: (BlockLayer.__init__(layer), setattr(layer, "reads", "x")), "reads='x'"),
    ],
)
def test_a_layer_that_is_made_wrong_is_refused_by_name(define, model, body, match):
    class Wrong(BlockLayer):
        weights = ones

        def __init__(self, site, config):
            body(self)

    with untouched(model):
        children(model)
        before = model(IDS)
        with pytest.raises(OptionError, match=match):
            define(Wrong)(model, deltas=["a", "b"])
        assert torch.equal(model(IDS), before)
        for name in composition(model).names:
            composition(model)[name].detach()


@pytest.mark.parametrize(
    "given",
    [
        lambda u: [1.0],
        lambda u: [1.0] * 5,
        lambda u: u.new_ones(4),
        lambda u: u.new_ones(2, 3, 4),
        lambda u: u.new_ones(7, 3, 2),
        lambda u: u.new_ones(3, 2),
        lambda u: 0.5,
        lambda u: None,
        lambda u: ["1", "2"],
        lambda u: [u.mean(-1)] * 2,
        lambda u: u.new_ones(2).numpy(),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_weights_of_a_wrong_number_or_shape_are_refused_by_name(define, model, given, mixed):
    class Wrong(BlockLayer):
        reads = "input"

        def __init__(self, site, config):
            super().__init__()

        def weights(self, u, chosen):
            return given(u)

    children(model, mixed)
    define(Wrong)(model, deltas=["a", "c" if mixed else "b"], name="wrong")
    with pytest.raises(SiteError, match="'wrong'"):
        model.linear(X)


def test_constants_of_a_wrong_number_are_refused_before_they_are_merged(define, model):
    class Wrong(BlockLayer):
        constant = True

        def __init__(self, site, config):
            super().__init__()

        def weights(self, u, chosen):
            return [0.5] * 3

    children(model, mixed=False)
    define(Wrong)(model, deltas=["a", "b"], name="wrong")
    before = model.linear.weight.clone()
    with pytest.raises(SiteError, match=r"'wrong': Wrong.weights returned .* for 2 deltas"):
        composition(model).merge()
    assert torch.equal(model.linear.weight, before)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (lambda layer, z, chosen: z[0][..., :3], r"combine returned \[2, 3, 3\]"),
        (lambda layer, z, chosen: None, "combine returned None"),
        (lambda layer, z, chosen: layer.weigh([1.0] * 2, z, chosen), "combine gave to weigh"),
    ],
)
def test_a_change_of_a_wrong_form_is_refused_by_name(define, model, given, match):
    class Wrong(BlockLayer):
        def __init__(self, site, config):
            super().__init__()

        def combine(self, x, h, z, chosen):
            return given(self, z, chosen)

    define(Wrong)(model, deltas=children(model), name="wrong")
    with pytest.raises(SiteError, match=f"'wrong': Wrong.{match}"):
        model.linear(X)


def test_what_has_no_weights_says_so(define, model):
    define(Strongest, StrongestConfig)(model, deltas=children(model, mixed=False))
    with opendelta.watching(model) as seen:
        model.linear(X)
    with pytest.raises(opendelta.DeltaError, match="it acted, but the rule is no weighted sum"):
        seen["mine"]
    with pytest.raises(SiteError, match="its rule is no weighted sum"):
        composition(model).merge()


class Switches(Sigmoids):
    """Reads an embedding's output, as its input are token ids."""

    def __init__(self, site, config):
        BlockLayer.__init__(self)
        self.reads = "output" if site.takes_ids else "input"
        width = site.out_features if site.takes_ids else site.input_width
        self.w = nn.init.zeros_(site.parameter(len(config.deltas), width))


def test_a_rule_stands_on_embeddings_too(define, model):
    for name in "ab":
        shake(LoraModel(model, modified_modules=["embedding"], lora_r=2, name=name))
    with composition(model).only():
        h = model.embedding(IDS)
    z = []
    for name in "ab":
        with composition(model).only(name):
            z.append(model.embedding(IDS) - h)
    block = shake(define(Switches)(model, deltas=["a", "b"]))
    g = (h @ block.layers["embedding"].w.T).sigmoid()
    wanted = h + g[..., :1] * z[0] + g[..., 1:] * z[1]
    torch.testing.assert_close(model.embedding(IDS), wanted)


class Shift(InputLayer):
    """y = f(x + b)."""

    kinds = ("other",)

    def __init__(self, site, config):
        super().__init__()
        self.b = nn.init.ones_(site.parameter(site.input_width))

    def change(self, x):
        return x + self.b


class Keeps(nn.Module):
    """Fills a cache that looks like transformers'."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, cache=None):
        if cache is not None:
            cache.seen.append(x)
        return self.inner(x)


class Cache:
    def __init__(self):
        self.seen = []

    def get_seq_length(self):
        return len(self.seen)


def test_a_child_that_changes_the_input_of_what_fills_a_cache_is_refused(define):
    whole = {"delta_type": "shift", "config_class": DeltaConfig, "layer_class": Shift,
             "default_modified_modules": ("attn.q",)}  # fmt: skip
    method = type("ShiftModel", (Delta,), whole)
    model, x = nn.Sequential(Keeps()), torch.randn(2, 3, 8)
    method(model, modified_modules=["0"], name="s", sample_inputs=x)
    AverageModel(model, deltas=["s"], weights=[0.5], name="m", sample_inputs=x)
    inner = model[0].inner
    torch.testing.assert_close(model(x), (inner(x) + inner(x + 1)) / 2)
    with pytest.raises(SiteError, match="'m' changes the input of a Keeps that fills a KV cache"):
        model[0](x, cache=Cache())
