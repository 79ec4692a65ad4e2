"""What a notebook shows of compositions and reports: their words, escaped, on any page."""

import re
from html import unescape

import pytest
from support.nets import X, net, shake, small
from torch import nn

import opendelta
from opendelta import AdapterModel, LoraConfig, LoraModel, OFTModel, composition
from opendelta._show.notebooks import COLOURS

pytestmark = pytest.mark.covers("composition", "plan", "check", "Composition.explain", "LoadReport")


def words(shown):
    """The text that a page shows, without the tags around it."""
    html = shown._repr_html_()
    assert html.startswith("<pre")
    assert html.endswith("</pre>")
    text = re.sub(r"<[^<>]*>", "", html)
    assert not re.search("[<>]", text)
    return unescape(text)


def test_a_notebook_shows_what_print_shows(tmp_path):
    model = small()
    LoraModel(model, modified_modules=["0"], name="a").freeze_module()
    shake(LoraModel(model, modified_modules=["0"], name="b"))
    c = composition(model)
    c.save(tmp_path)
    for shown in (
        opendelta.plan(model, LoraConfig(modified_modules=["2"])),
        c.explain("0"),
        opendelta.check(model, X),
        opendelta.load(tmp_path, small(), strict=False),
        opendelta.combine(model, {"a": 1.0, "b": 1.0}).combination,
        c.merge("a", "b"),
    ):
        assert words(shown).split() == str(shown).split()


def test_a_composition_is_a_table_of_its_deltas():
    model = net()
    lora = LoraModel(model, modified_modules=["linear", "bare"], lora_r=2, name="law")
    AdapterModel(model, modified_modules=["linear"], bottleneck_dim=3, name="style").disable()
    OFTModel(model, modified_modules=["conv1d"], oft_block_size=4, name="turn")
    lora.scale = 0.5
    lora.requires_grad_(False)
    c = composition(model)
    c.merge("turn")
    title, head, _, law, more, style, turn = words(c).splitlines()
    assert title.strip() == "deltas of Net"
    assert head.split() == ["delta", "method", "where", "parameters", "state"]
    assert law.split() == ["law", "lora", "linear", "64", "active,", "scale", "0.5,", "frozen"]
    assert more.split() == ["bare"]
    assert style.split() == ["style", "adapter", "linear", "59", "disabled,", "trains"]
    assert turn.split()[-3:] == ["active,", "merged,", "trains"]
    assert repr(c) == "composition of Net: ['law', 'style', 'turn']"
    assert words(composition(nn.Sequential(nn.Linear(2, 2)))).startswith("deltas of Sequential")


def test_names_of_modules_are_text_and_no_tags():
    model = nn.Sequential()
    model.add_module("<img src=x onerror=alert(1)>[red]&amp;", nn.Linear(4, 4))
    (name,) = model._modules
    LoraModel(model, modified_modules=[name], name="a")
    c = composition(model)
    for shown in (c, c.explain(name), opendelta.plan(model, LoraConfig(modified_modules=[name]))):
        assert "<img" not in shown._repr_html_()
        assert name.split("&")[0] in words(shown)


@pytest.mark.parametrize("colour", COLOURS.values())
def test_colours_can_be_read_on_white_and_on_black(colour):
    def linear(value):
        return value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4

    parts = [linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5)]
    light = sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
    assert 1.05 / (light + 0.05) >= 4.5  # the contrast that WCAG asks for
    assert (light + 0.05) / 0.05 >= 4.5
