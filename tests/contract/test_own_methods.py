"""Methods and layers of users: the forms of a layer, options, and what is checked at definition."""

from dataclasses import dataclass

import pytest
import torch
from support.nets import X, put, shake, small, untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, Delta, DeltaConfig, OptionError, optimizer_groups
from opendelta._deltas.registry import METHODS
from opendelta.author import (
    Acts,
    BranchLayer,
    DeltaLayer,
    InputLayer,
    OutputLayer,
    WeightLayer,
    option,
)


# ---------------------------------------------------------------------------- the forms of a layer
class Moved(OutputLayer):
    """y = f(x) + b."""

    def __init__(self, site, config):
        super().__init__()
        self.width = site.out_features
        self.b = nn.init.zeros_(site.parameter(site.out_features))

    def change(self, h):
        return h + self.b


class Shifted(InputLayer):
    """y = f(x + b)."""

    def __init__(self, site, config):
        super().__init__()
        self.b = nn.init.zeros_(site.parameter(site.in_features))

    def change(self, x):
        return x + self.b


class Dense(WeightLayer):
    """y = f(x) + D x."""

    def __init__(self, site, config):
        super().__init__(site)
        self.b = nn.init.zeros_(site.parameter(site.out_features, site.in_features))

    def delta_weight(self):
        return self.b


class Beside(BranchLayer):
    """y = f(x) + D x, around one module or several."""

    def __init__(self, site, config):
        super().__init__()
        self.width = site.end.out_features
        self.b = nn.init.zeros_(site.parameter(self.width, site.in_features))

    def branch(self, x):
        return x @ self.b.T


FORMS = {  # a layer, and what the module f gives with its tensor b on an input x
    Moved: lambda f, x, b: f(x) + b,
    Shifted: lambda f, x, b: f(x + b),
    Dense: lambda f, x, b: f(x) + x @ b.T,
    Beside: lambda f, x, b: f(x) + x @ b.T,
}


@pytest.fixture
def define():
    """A function: {a layer} -> a method with this layer; the test's methods are forgotten."""
    known = set(METHODS)

    def method(layer, **more):
        whole = {
            "delta_type": "mine",
            "config_class": DeltaConfig,
            "layer_class": layer,
            "default_modified_modules": ("ff.w2",),
        }
        return type("Mine", (Delta,), {**whole, **more})

    yield method
    for name in METHODS.keys() - known:
        del METHODS[name]


@pytest.mark.covers("OutputLayer", "InputLayer", "WeightLayer", "BranchLayer", "Delta")
@pytest.mark.parametrize("layer", FORMS, ids=lambda layer: layer.__name__)
@pytest.mark.parametrize("scale", [1, 0.5])
def test_a_layer_of_each_form_computes_its_formula_and_heeds_the_scale(define, layer, scale):
    model = small()
    plain, first = model(X), nn.Linear(6, 6)
    first.load_state_dict(model[0].state_dict())
    with untouched(model):
        delta = put(define(layer), model, "0")
        assert torch.equal(model(X), plain)
        (b,) = shake(delta).parameters()
        delta.scale = scale
        expected = model[2](torch.tanh(FORMS[layer](first, X, scale * b)))
        torch.testing.assert_close(model(X), expected)
        delta.detach()


@pytest.mark.covers("Delta.layer_for", "Delta.shared_for")
def test_a_method_may_choose_its_layer_and_share_tensors_between_its_layers(define):
    @dataclass
    class MineConfig(DeltaConfig):
        together: bool = False

    class Common(nn.Module):
        def __init__(self, sites, config):
            super().__init__()
            self.factor = nn.init.ones_(sites[0].parameter(1))

    class Rescaled(OutputLayer):
        def __init__(self, site, config):
            super().__init__()
            self.width = site.out_features

        def change(self, h):
            return h * self.shared.factor

    method = define(
        Moved,
        config_class=MineConfig,
        layer_for=classmethod(lambda cls, config: Rescaled if config.together else Moved),
        shared_for=classmethod(lambda cls, config: Common if config.together else None),
    )
    model = small()
    plain = model(X)
    with untouched(model):
        apart = method(model, modified_modules=["0", "2"])
        assert {type(layer) for layer in apart.layers.values()} == {Moved}
        assert [p.numel() for p in apart.parameters()] == [6, 2]
        together = method(model, modified_modules=["0", "2"], together=True)
        assert type(together.layers["0"]) is type(together.layers["2"]) is Rescaled
        (factor,) = together.parameters()
        assert torch.equal(model(X), plain)
        nn.init.zeros_(factor)
        assert not model[0](X).any()
        assert not model(X).any()
        together.detach()
        apart.detach()


@pytest.mark.covers("option", "DeltaConfig")
def test_an_option_refuses_what_its_limits_exclude():
    @dataclass
    class MineConfig(DeltaConfig):
        size: int = option(4, minimum=2, below=9, multiple_of=2)
        word: str = option("a", choices=["a", "b"])

    assert (MineConfig().size, MineConfig(8, "b").word) == (4, "b")
    for wrong, message in (
        ({"size": 0}, r"size=0 must be at least 2"),
        ({"size": 10}, r"size=10 must be below 9"),
        ({"size": 5}, r"size=5 must be a multiple of 2"),
        ({"size": "4"}, r"size='4' must be int, not str"),
        ({"word": "c"}, r"word='c' must be one of \['a', 'b'\]"),
    ):
        with pytest.raises(OptionError, match=message):
            MineConfig(**wrong)


# ---------------------------------------------------------------------------------- at definition


@pytest.mark.covers("Delta")
def test_a_method_is_checked_when_it_is_defined():
    from opendelta import AdapterConfig, Delta
    from opendelta.methods.adapter import AdapterLayer

    whole = {
        "delta_type": "mine",
        "config_class": AdapterConfig,
        "layer_class": AdapterLayer,
        "default_modified_modules": ("ff.w2",),
    }
    for name in whole:
        with pytest.raises(opendelta.OptionError, match=rf"Mine.{name} must be a "):
            type("Mine", (Delta,), {k: v for k, v in whole.items() if k != name})
    with pytest.raises(opendelta.OptionError, match=r"layer_class a DeltaLayer"):
        type("Mine", (Delta,), {**whole, "layer_class": nn.Linear})
    with pytest.raises(opendelta.OptionError, match=r"'lora' is that of opendelta.methods.lora"):
        type("Mine", (Delta,), {**whole, "delta_type": "lora"})


@pytest.mark.covers("DeltaConfig")
@pytest.mark.covers("optimizer_groups", "Delta.default_learning_rate")
@pytest.mark.parametrize(("given", "rate"), [({}, 1e-3), ({"default_learning_rate": 0.5}, 0.5)])
def test_a_method_has_a_learning_rate_and_need_not_say_it(define, given, rate):
    model = small()
    put(define(Moved, **given), model, "0").freeze_module()
    (group,) = optimizer_groups(model)
    assert group["lr"] == rate
    with pytest.raises(OptionError, match=r"Mine.default_learning_rate must be a float, not '1'"):
        define(Moved, default_learning_rate="1")


@pytest.mark.parametrize(
    ("decorated", "name", "message"),
    [
        (False, "width", "write @dataclass above Mine"),
        (True, "positional", "Mine.positional hides"),
    ],
)
def test_the_options_of_a_method_are_checked_when_it_is_defined(decorated, name, message):
    Mine = type("Mine", (DeltaConfig,), {"__annotations__": {name: "int"}, name: 3})
    options = {"config_class": dataclass(Mine) if decorated else Mine, "layer_class": Moved}
    with pytest.raises(OptionError, match=message):
        type("M", (Delta,), {"delta_type": "m", "default_modified_modules": (), **options})
    assert "m" not in METHODS


@pytest.mark.covers("DeltaLayer")
def test_a_layer_class_says_how_it_acts_in_one_of_the_words():
    with pytest.raises(OptionError, match=r"Bad.acts='beside' must be one of Acts.AFTER, .*SERVES"):

        class Bad(OutputLayer):
            acts = "beside"


@pytest.mark.covers("OutputLayer", "InputLayer", "WeightLayer", "BranchLayer", "DeltaLayer")
@pytest.mark.parametrize(
    ("form", "method"),
    [
        (OutputLayer, "change"),
        (InputLayer, "change"),
        (WeightLayer, "delta_weight"),
        (BranchLayer, "branch"),
        (DeltaLayer, "forward"),
    ],
)
def test_a_method_whose_layer_lacks_what_its_form_calls_is_refused_when_it_is_defined(form, method):
    names = {"delta_type": "m", "config_class": opendelta.LoraConfig}
    names |= {"layer_class": type("Bare", (form,), {}), "default_modified_modules": ()}
    with pytest.raises(OptionError, match=f"Bare must write the method {method}: the forward of"):
        type("M", (Delta,), names)
    assert "m" not in METHODS


@pytest.mark.covers("Delta")
def test_a_layer_that_a_method_chooses_is_checked_before_it_is_made(define):
    chosen = type("Chosen", (OutputLayer,), {})
    method = define(Moved, layer_for=classmethod(lambda cls, config: chosen))
    with untouched(model := small()), pytest.raises(OptionError, match="must write the method"):
        method(model, modified_modules=["0"])


@pytest.mark.covers("OutputLayer")
def test_a_layer_that_does_not_set_its_width_is_refused_when_it_is_made(define):
    class Narrow(Moved):
        def __init__(self, site, config):
            super().__init__(site, config)
            del self.width

    method = define(Narrow)
    with untouched(model := small()), pytest.raises(OptionError, match=r"must set self\.width"):
        method(model, modified_modules=["0"])


@pytest.mark.covers("Delta.scale")
def test_a_layer_that_heeds_the_scale_says_so():
    def forward(self, call, x):
        return call(x) + (lambda h: self.strength() * h)(x)

    with pytest.raises(OptionError, match="Heeding calls strength"):
        type("Heeding", (DeltaLayer,), {"forward": forward})
    for scales in (True, False):
        assert (
            type("Heeding", (DeltaLayer,), {"forward": forward, "scales": scales}).scales == scales
        )


@pytest.mark.covers("DeltaLayer")
def test_a_layer_in_the_place_of_a_module_has_a_stand_in():
    with pytest.raises(OptionError, match="acts INSTEAD of a module, so it needs a `stand_in`"):

        class Bad(DeltaLayer):
            acts = Acts.INSTEAD


@pytest.mark.covers("Delta.scale")
def test_a_layer_that_computes_by_itself_has_no_scale_unless_it_says_so():
    class Twice(AdapterModel.layer_class):
        def forward(self, call, *args, **kwargs):
            return 2 * call(*args, **kwargs)

    class Heeding(Twice):
        scales = True

    class More(Heeding):
        pass

    assert AdapterModel.layer_class.scales
    assert not Twice.scales
    assert Heeding.scales
    assert More.scales
