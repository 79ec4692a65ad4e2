"""`explain`: what a module with deltas computes, as a formula and step by step."""

import pytest
from support.nets import net, small
from torch import nn

import opendelta
from opendelta import AdapterModel, IA3Model, LoraModel

pytestmark = pytest.mark.covers("Composition.explain")


def test_explain_shows_the_flow_as_a_formula_and_as_a_list():
    model = net()
    for name in ("lora", "style"):
        kind = LoraModel if name == "lora" else AdapterModel
        kind(model, modified_modules=["linear"], name=name)
    IA3Model(model, modified_modules=["linear"], feedforward_modules=["linear"])
    explanation = opendelta.composition(model).explain("linear")
    assert explanation.formula == "y = style(linear(ia3(x)) + lora(ia3(x)))"
    assert [step.partition(":")[0] for step in explanation.steps] == [
        "linear",
        "lora",
        "style",
        "ia3",
    ]
    assert str(explanation).splitlines()[0] == f"linear:  {explanation.formula}"
    opendelta.composition(model)["style"].disable()
    assert (
        opendelta.composition(model).explain("linear").formula
        == "y = linear(ia3(x)) + lora(ia3(x))"
    )
    assert opendelta.composition(model).explain("bare").formula == "y = bare(x)"
    with pytest.raises(opendelta.AddressError, match=r"nearest: 'linear'"):
        opendelta.composition(model).explain("linaer")


def test_numbered_modules_are_explained_with_their_list():
    model = nn.Sequential(small())
    LoraModel(model, modified_modules=["0.0"])
    assert opendelta.composition(model).explain("0.0").formula == "y = 0.0(x) + lora(x)"
