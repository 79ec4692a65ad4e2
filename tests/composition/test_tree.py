"""The picture of a model: its text, its folding, its colours, and every way to show it."""

import builtins
import colorsys
import io
import itertools
import os
import re
import subprocess
import sys
import types
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import transformers
from rich.console import Console
from rich.panel import Panel
from support.counting import cpu_seconds
from torch import nn

import opendelta
from opendelta import AdapterModel, IA3Model, LoraModel, OptionError, Visualization, tree
from opendelta._show.tree import log
from opendelta.author import Acts

pytestmark = pytest.mark.covers("tree", "Visualization")

ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dropout = nn.Dropout()
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        attended = self.query(x) * self.key(x).softmax(-1) + self.value(x)
        return self.norm(x + self.dropout(attended))


class Net(nn.Module):
    def __init__(self, layers=4):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.classifier = nn.Linear(8, 2)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


@pytest.fixture
def composed():
    """A network with every kind of delta line: beside, two in order, disabled, owned."""
    model = Net()
    LoraModel(model, modified_modules=["query", "value"], lora_r=1, modules_to_save=["classifier"])
    extra = LoraModel(model, modified_modules=["0.query", "1.query"], lora_r=2, name="extra")
    AdapterModel(model, modified_modules=["0.norm", "1.norm"], bottleneck_dim=3)
    second = AdapterModel(
        model, modified_modules=["0.norm", "1.norm"], bottleneck_dim=4, name="second"
    )
    IA3Model(model, modified_modules=["3.key"])
    extra.disable()
    second.disable()
    return model


# fmt: off
COMPOSED = """\
root
├── embed (Embedding) weight:[11, 8]
├── layers (ModuleList)
│   ├── 0-1 (Block)
│   │   ├── query (Linear) weight:[8, 8] bias:[8] lora_A:[1, 8] lora_B:[8, 1] extra.lora_A:[2, 8] extra.lora_B:[8, 2] extra disabled
│   │   ├── key (Linear) weight:[8, 8] bias:[8]
│   │   ├── value (Linear) weight:[8, 8] bias:[8] lora_A:[1, 8] lora_B:[8, 1]
│   │   └── norm (LayerNorm) weight:[8] bias:[8]
│   │       ├── adapter (AdapterLayer)
│   │       │   ├── down_proj (Linear) weight:[3, 8] bias:[3]
│   │       │   └── up_proj (Linear) weight:[8, 3] bias:[8]
│   │       └── second (AdapterLayer) disabled
│   │           ├── down_proj (Linear) weight:[4, 8] bias:[4]
│   │           └── up_proj (Linear) weight:[8, 4] bias:[8]
│   ├── 2 (Block)
│   │   ├── query,value (Linear) weight:[8, 8] bias:[8] lora_A:[1, 8] lora_B:[8, 1]
│   │   ├── key (Linear) weight:[8, 8] bias:[8]
│   │   └── norm (LayerNorm) weight:[8] bias:[8]
│   └── 3 (Block)
│       ├── query,value (Linear) weight:[8, 8] bias:[8] lora_A:[1, 8] lora_B:[8, 1]
│       ├── key (Linear) weight:[8, 8] bias:[8]
│       │   └── ia3 (IA3Layer) ia3_l:[8]
│       └── norm (LayerNorm) weight:[8] bias:[8]
└── classifier (Linear) weight:[2, 8] bias:[2]
    └── lora (Linear) in place of classifier weight:[2, 8] bias:[2]"""  # noqa: E501
# fmt: on


def linears(count):
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


def lines(model):
    """The text without the root's line and without the guides of its children."""
    return [line[4:] for line in tree(model, to="text").splitlines()[1:]]


def heads(model):
    """The names of the root's children."""
    return [line.split(" ")[0] for line in lines(model) if line[0] not in "│├└ "]


# --------------------------------------------------------------------------------------- the text
def test_text_of_a_composition(composed):
    assert tree(composed, to="text") == COMPOSED


@pytest.mark.parametrize("show", [str, repr, "{}".format])
def test_the_object_is_its_text(composed, show):
    assert show(tree(composed)) == COMPOSED


def test_text_of_a_detached_delta_is_the_bare_model():
    bare = tree(Net(), to="text")
    model = Net()
    delta = LoraModel(model, modified_modules=["query"])
    assert tree(model, to="text") != bare
    delta.detach()
    assert tree(model, to="text") == bare


def test_stacked_deltas_stand_in_the_order_in_which_they_act():
    model = nn.Sequential(nn.Linear(4, 4))
    first = AdapterModel(model, modified_modules=["0"], name="first")
    second = AdapterModel(model, modified_modules=["0"], name="second")
    assert [heads(model[0]), lines(model)[1][:9]] == [["first", "second"], "├── first"]
    second.attach(before=first)
    assert [heads(model[0]), lines(model)[1][:10]] == [["second", "first"], "├── second"]


def test_a_delta_beside_a_module_shows_the_parameters_of_its_parts_in_the_line():
    model = nn.Sequential(nn.Linear(4, 4))
    delta = AdapterModel(model, modified_modules=["0"], bottleneck_dim=1)
    delta.layers["0"].acts = Acts.BESIDE
    assert lines(model) == [
        "0 (Linear) weight:[4, 4] bias:[4] down_proj.weight:[1, 4] down_proj.bias:[1]"
        " up_proj.weight:[4, 1] up_proj.bias:[4]"
    ]


def test_an_owned_module_shows_its_parts():
    head = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": head})
    LoraModel(model, modified_modules=["body"], lora_r=1, modules_to_save=["head"]).disable()
    assert lines(model) == [
        "body (Linear) weight:[4, 4] bias:[4] lora_A:[1, 4] lora_B:[4, 1] lora disabled",
        "head (Sequential)",
        "├── 0 (Linear) weight:[4, 4] bias:[4]",
        "└── lora (Sequential) in place of head disabled",
        "    └── 0 (Linear) weight:[4, 4] bias:[4]",
    ]


def test_root_shows_its_own_parameters_and_deltas():
    model = nn.Linear(4, 2)
    LoraModel(model, modified_modules=["root"], lora_r=1)
    assert tree(model, to="text") == "root weight:[2, 4] bias:[2] lora_A:[1, 4] lora_B:[2, 1]"


def test_modules_without_parameters_are_left_out_unless_asked_for_or_changed(capsys):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Dropout()))
    assert heads(model) == ["0"]
    Visualization(model).structure_graph(keep_non_params=True)
    assert capsys.readouterr().out.splitlines() == [
        "root",
        "├── 0 (Linear) weight:[4, 4] bias:[4]",
        "├── 1 (ReLU)",
        "└── 2 (Sequential)",
        "    └── 0 (Dropout)",
    ]
    LoraModel(model, modified_modules=["0"], exclude_modules=["2"], modules_to_save=["1"])
    assert lines(model)[1:] == ["1 (ReLU)", "└── lora (ReLU) in place of 1"]


# ------------------------------------------------------------------------------------ the folding
def test_successive_numbers_fold_to_ranges():
    model = linears(12)
    assert heads(model) == ["0-11"]
    LoraModel(model, modified_modules=["6", "7"])
    assert heads(model) == ["0-5,8-11", "6-7"]
    AdapterModel(model, modified_modules=["3"])
    assert heads(model) == ["0-2,4-5,8-11", "3", "6-7"]


def test_other_names_fold_to_a_list():
    parts = {name: nn.Linear(2, 2) for name in ("b", "a", "7", "8", "08", "09", "10", "x1", "x2")}
    assert heads(nn.ModuleDict(parts)) == ["b,a,7-8,08,09,10,x1,x2"]


def _frozen():
    layer = nn.Linear(4, 4)
    layer.bias.requires_grad_(False)
    return layer


@pytest.mark.parametrize(
    "other",
    [
        nn.Linear(4, 5),
        nn.Linear(4, 4, bias=False),
        type("Linear", (nn.Linear,), {})(4, 4),
        nn.Sequential(nn.Linear(4, 4)),
        _frozen(),
    ],
    ids=["shape", "names", "class", "nesting", "requires_grad"],
)
def test_what_differs_is_not_folded(other):
    model = nn.Sequential(nn.Linear(4, 4), other, nn.Linear(4, 4))
    assert heads(model) == ["0,2", "1"]
    assert heads(nn.Sequential(nn.Sequential(*model[:2]), nn.Sequential(model[0]))) == ["0", "1"]


def test_deltas_of_other_names_are_not_folded():
    model = linears(4)
    AdapterModel(model, modified_modules=["0", "1"])
    second = AdapterModel(model, modified_modules=["2", "3"], name="second")
    assert heads(model) == ["0-1", "2-3"]
    second.detach()
    assert heads(model) == ["0-1", "2-3"]


def test_deltas_that_act_and_deltas_that_do_not_are_not_folded():
    pair = nn.Sequential(linears(1), linears(1))
    one, two = (AdapterModel(part, modified_modules=["0"]) for part in pair)
    assert heads(pair) == ["0-1"]
    two.disable()
    assert heads(pair) == ["0", "1"]
    one.disable()
    assert heads(pair) == ["0-1"]
    one.requires_grad_(False)
    assert heads(pair) == ["0", "1"]


def test_equal_deltas_of_one_module_stay_apart():
    model = nn.Sequential(nn.Linear(4, 4))
    AdapterModel(model, modified_modules=["0"], name="one")
    AdapterModel(model, modified_modules=["0"], name="two")
    assert heads(model[0]) == ["one", "two"]


def test_folded_modules_with_owned_copies():
    model = linears(3)
    LoraModel(model, modified_modules=["2"], lora_r=1, modules_to_save=["0", "1"])
    assert lines(model)[:2] == [
        "0-1 (Linear) weight:[4, 4] bias:[4]",
        "└── lora (Linear) in place of 0-1 weight:[4, 4] bias:[4]",
    ]


# ---------------------------------------------------------------------------------- unusual models
def _tied():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model.append(model[2])
    return model


def _on_container():
    model = nn.Sequential(nn.Linear(2, 2))
    model.scale = nn.Parameter(torch.ones(()))
    model.register_parameter("none", None)
    model.add_module("nothing", None)
    return model


def _packed():
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Module(), "root"),
        (nn.Sequential(nn.ReLU()), "root"),
        (
            _tied(),
            "root\n├── 0 (Embedding) weight:[5, 4]\n├── 1 (Linear) weight:[5, 4]\n"
            "└── 2-3 (Linear) weight:[2, 2] bias:[2]",
        ),
        (_on_container(), "root scale:[]\n└── 0 (Linear) weight:[2, 2] bias:[2]"),
        (_packed(), "root weight:[8, 1] bias:[2]"),
        (nn.Sequential(nn.LazyLinear(3)), "root\n└── 0 (LazyLinear) weight:[?] bias:[?]"),
        (nn.ParameterList([torch.ones(2), torch.ones(3, 1)]), "root 0:[2] 1:[3, 1]"),
        (nn.ParameterDict({"a": torch.ones(2)}), "root a:[2]"),
    ],
    ids=["empty", "bare", "tied", "container", "packed", "lazy", "list", "dict"],
)
def test_unusual_models(model, expected):
    assert tree(model, to="text") == expected
    assert tree(model, to="svg")
    assert tree(model, to="html")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_scripted_module():
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Sequential(nn.Linear(2, 2))))
    assert lines(model)[-1] == "└── 0 (RecursiveScriptModule) weight:[2, 2] bias:[2]"


def test_names_are_not_read_as_markup_and_stay_in_one_line():
    names = ["[bold]b[/bold]", "[", ":smile:", "<b>&amp;", "line\nbreak", "\x1b[31mred"]
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in names})
    shown = tree(model, to="text")
    assert lines(model) == [
        r"[bold]b[/bold],[,:smile:,<b>&amp;,line\nbreak,\x1b[31mred (Linear)"
        " weight:[2, 2] bias:[2]"
    ]
    assert svg_text(tree(model, to="svg")) == shown
    assert "&lt;b&gt;&amp;amp;" in tree(model, to="html")


def test_a_thousand_different_modules_are_quick():
    model = nn.ModuleList(nn.Sequential(nn.Linear(1, i + 1), nn.ReLU()) for i in range(500))
    LoraModel(model, modified_modules=["7.0"], lora_r=1)
    with cpu_seconds() as taken:
        shown = tree(model, to="text")
    assert taken[0] < 1
    assert shown.count("\n") == 1000


# ------------------------------------------------------------------------------------- the colours
STYLES = {
    "root": "white",
    "0-1": "red",
    "(Linear)": "green",
    "weight:[4, 4]": "grey50",
    "bias:[4]": "blue",
    "lora_A:[1, 4]": "magenta",
    "lora_B:[4, 1]": "dim magenta",
    "lora disabled": "yellow",
    "ia3": "white",
    "(IA3Layer)": "green",
    "ia3_l:[4]": "magenta",
}
HUES = {"red": 0, "yellow": 1 / 8, "green": 1 / 3, "blue": 3 / 5, "magenta": 5 / 6}


@pytest.fixture
def colourful():
    """A model whose tree has every documented colour."""
    model = linears(2)
    lora = LoraModel(model, modified_modules=["0", "1"], lora_r=1)
    IA3Model(model, modified_modules=["0", "1"])
    for layer in model:
        layer.weight.requires_grad_(False)
    for name, parameter in lora.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    lora.disable()
    return model


def styles(model):
    """{text: style} of the pieces that rich prints in a colour."""
    console = Console()
    segments = console.render(tree(model), console.options.update(no_wrap=True))
    return {s.text: str(s.style) for s in segments if s.style and s.style.color}


def named(colour):
    """What people call the colour #rrggbb."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(c / 255 for c in bytes.fromhex(colour[1:])))
    if saturation < 0.1:
        return "white" if value > 0.9 else "grey"
    nearest = min(HUES, key=lambda name: min(abs(HUES[name] - hue), 1 - abs(HUES[name] - hue)))
    return nearest if value > 0.7 else f"dim {nearest}"


def svg_text(svg):
    """The text of a picture, from the top to the bottom."""
    rows = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    rows = sorted(rows, key=lambda row: float(row.attrib["y"]))
    return "\n".join("".join(row.itertext()).replace("\u00a0", " ") for row in rows)


def test_rich_prints_the_documented_styles(colourful):
    assert styles(colourful) == STYLES


def test_all_that_belongs_to_a_delta_is_magenta():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 2))})
    delta = AdapterModel(
        model, modified_modules=["body"], bottleneck_dim=3, modules_to_save=["head"]
    )
    delta.freeze_module()
    found = styles(model)
    assert [found[name] for name in ("body", "adapter", "head", "up_proj")] == ["white"] * 4
    assert [found[f"weight:{shape}"] for shape in ([3, 4], [4, 3], [2, 4])] == ["magenta"] * 3
    assert [found["weight:[4, 4]"], found["bias:[4]"]] == ["grey50", "magenta"]
    delta.requires_grad_(False)
    assert styles(model)["weight:[2, 4]"] == "dim magenta"


def test_html_has_the_documented_colours(colourful):
    html = tree(colourful, to="html")
    found = {text: named(c) for c, text in re.findall(r'color: (#\w{6})">([^<]+)</span>', html)}
    assert found == {text: style.replace("grey50", "grey") for text, style in STYLES.items()}
    plain = re.sub(r"<[^>]*>", "", html).strip("\n")
    assert plain == tree(colourful, to="text")
    background = re.search(r"<pre[^>]*background: (#\w{6})", html)[1]
    assert max(bytes.fromhex(background[1:])) < 40  # white names need a dark ground


def test_svg_has_the_documented_colours_and_the_size_of_its_content(colourful):
    svg = tree(colourful, to="svg")
    root = ElementTree.fromstring(svg)
    spans = root.iter("{http://www.w3.org/2000/svg}tspan")
    found = {s.text.replace("\u00a0", " "): named(s.attrib["fill"]) for s in spans}
    assert found == {text: style.replace("grey50", "grey") for text, style in STYLES.items()}
    text = tree(colourful, to="text")
    assert svg_text(svg) == text
    assert "  " not in re.sub(r">\s+<", "><", svg)  # a viewer would join the spaces
    ground = root.find("{http://www.w3.org/2000/svg}rect").attrib
    assert max(bytes.fromhex(ground["fill"][1:])) < 40
    columns, rows = max(map(len, text.splitlines())), text.count("\n") + 1
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    bottoms = [float(row.attrib["y"]) for row in root.iter("{http://www.w3.org/2000/svg}text")]
    assert all(14 <= after - before < 20 for before, after in itertools.pairwise(bottoms))
    assert (bottoms[0] >= 14, 5 <= height - bottoms[-1] < 30) == (True, True)
    assert (ground["width"], ground["height"]) == (root.attrib["width"], root.attrib["height"])
    assert 0 <= width - columns * 14 * 0.6 < 60  # 14 px letters that are 0.6 as wide as high
    assert len(bottoms) == rows


# ---------------------------------------------------------------------------------- ways to show it
@pytest.mark.parametrize("to", ["pdf", "", "SVG", 3, ["text"]])
def test_unknown_form(to):
    with pytest.raises(OptionError, match=r"'text', 'svg', 'html'") as caught:
        tree(nn.Linear(2, 2), to=to)
    assert repr(to) in str(caught.value)


def test_only_modules_have_a_tree():
    model = nn.Sequential(nn.Linear(2, 2))
    delta = LoraModel(model, modified_modules=["0"])
    for show in (tree, log, lambda given: Visualization(given).structure_graph()):
        with pytest.raises(OptionError, match="not LoraModel"):
            show(delta)


SCRIPT = """
import opendelta
from torch import nn
model = nn.Sequential(nn.Sequential(nn.Linear(1000, 1000, device="meta")))
delta = opendelta.LoraModel(model, modified_modules=["0.0"], lora_r=100)
print(opendelta.tree(model))
print(opendelta.tree(model, to="text"))
opendelta.Visualization(model).structure_graph()
delta.log(delta_ratio=False, trainable_ratio=False, cuda_memory=False)
"""
LONG = """\
root
└── 0 (Sequential)
    └── 0 (Linear) weight:[1000, 1000] bias:[1000] lora_A:[100, 1000] lora_B:[1000, 100]
"""


def test_piped_output_is_plain_and_whole_however_narrow_the_terminal():
    plain = {name: value for name, value in os.environ.items() if "COLOR" not in name}
    env = plain | {"COLUMNS": "40", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, check=True)
    assert done.stdout.decode() == LONG * 4


def wide_model():
    inner = nn.Linear(1000, 1000, device="meta")
    LoraModel(inner, modified_modules=["root"], lora_r=100)
    return nn.Sequential(nn.Sequential(inner))


def test_terminal_output_is_coloured_and_whole_however_narrow(monkeypatch, capsys):
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "40"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    Visualization(wide_model()).structure_graph()
    shown = capsys.readouterr().out
    assert "\x1b[37mroot\x1b[0m" in shown
    assert "\x1b[35mlora_A:[100, 1000]\x1b[0m" in shown
    assert ANSI.sub("", shown) == LONG


def test_text_svg_and_html_depend_on_no_environment(monkeypatch):
    model = wide_model()
    forms = [tree(model, to=to) for to in ("text", "svg", "html")]
    assert forms[0] + "\n" == LONG
    for env in ({"FORCE_COLOR": "1", "TERM": "dumb", "COLUMNS": "9"}, {"NO_COLOR": "1"}):
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
            assert [tree(model, to=to) for to in ("text", "svg", "html")] == forms
    assert not any("\x1b" in form for form in forms)


def test_an_output_without_box_characters_gets_ascii(monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii", write_through=True))
    Visualization(linears(1)).structure_graph()
    assert shown.getvalue().decode().split("\n")[1] == "`-- 0 (Linear) weight:[4, 4] bias:[4]"


@pytest.mark.parametrize("width", [1, 10, 40, 200])
def test_no_console_of_rich_loses_anything(width):
    shown = io.StringIO()
    Console(file=shown, width=width).print(tree(wide_model()), soft_wrap=True)
    assert shown.getvalue() == LONG
    wrapped = io.StringIO()
    Console(file=wrapped, width=width).print(tree(wide_model()))
    if width >= 40:
        assert re.sub(r"[\s│]+", "", wrapped.getvalue()) == re.sub(r"\s+", "", LONG)


def test_it_fits_a_panel():
    shown = io.StringIO()
    Console(file=shown, width=100).print(Panel.fit(tree(nn.Linear(2, 2))))
    assert shown.getvalue().splitlines()[1] == "│ root weight:[2, 2] bias:[2] │"


@pytest.fixture
def notebook(monkeypatch):
    """What a notebook with IPython displays, as the objects that it is given."""
    displayed = []
    module = types.ModuleType("IPython.display")
    module.display = displayed.append
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return displayed


def test_a_notebook_shows_html(composed, notebook, capsys):
    assert tree(composed)._repr_html_() == tree(composed, to="html")
    assert str(tree(composed)) == COMPOSED
    log(composed, delta_ratio=False, trainable_ratio=False, cuda_memory=False)
    assert [shown._repr_html_() for shown in notebook] == [tree(composed, to="html")]
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------------------------- log, Visualization
@pytest.mark.covers("Delta.log")
def test_log_prints_tree_and_shares(capsys):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8))  # 60 parameters
    delta = LoraModel(model, modified_modules=["0"], lora_r=1)  # 8 more
    delta.freeze_module(exclude=["deltas", "0.bias"])
    delta.log(cuda_memory=False)
    assert capsys.readouterr().out.splitlines() == [
        *tree(model, to="text").splitlines(),
        "Trainable Ratio: 17.647059%",
        "Delta Parameter Ratio: 11.764706%",
    ]


@pytest.mark.parametrize(
    ("flag", "start"),
    [
        ("visualization", "root"),
        ("trainable_ratio", "Trainable Ratio: 100.000000%"),
        ("delta_ratio", "Delta Parameter Ratio: 0.000000%"),
        ("cuda_memory", "Static Memory 1.25 GB, Max Memory 2.50 GB"),
    ],
)
def test_each_part_of_log_has_its_flag(flag, start, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * 2**28)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**29)
    flags = ["delta_ratio", "trainable_ratio", "visualization", "cuda_memory"]
    log(nn.Linear(2, 2), **{name: name == flag for name in flags})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(start)
    log(nn.Linear(2, 2), **{name: name != flag for name in flags})
    rest = capsys.readouterr().out.splitlines()
    assert len(rest) == 3
    assert not any(line.startswith(start) for line in rest)


def test_log_without_cuda_prints_no_memory(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    log(nn.Linear(2, 2))
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_structure_graph(composed, capsys):
    assert Visualization(composed).structure_graph() is None
    assert capsys.readouterr().out == COMPOSED + "\n"
    Visualization(composed).structure_graph(printTree=False)
    assert capsys.readouterr().out == ""


def test_the_attribute_of_the_package_is_the_function():
    assert opendelta.tree(nn.Linear(2, 2), to="text") == "root weight:[2, 2] bias:[2]"


@pytest.mark.covers("Delta.log")
def test_the_documented_roberta_example(capsys):
    config = transformers.RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        num_labels=2,
    )
    with torch.device("meta"):
        model = transformers.RobertaForSequenceClassification(config)
    LoraModel(model, modified_modules=["key"], lora_r=1)
    delta = AdapterModel(model, modified_modules=["output"], bottleneck_dim=12)
    delta.log()
    shown = capsys.readouterr().out
    assert "Delta Parameter Ratio: 0.383228%\n" in shown
    layers = shown[shown.index("│       └── layer") : shown.index("├── intermediate")]
    assert [line[8:] for line in layers.splitlines()] == [
        "└── layer (ModuleList)",
        "    └── 0-11 (RobertaLayer)",
        "        ├── attention (RobertaAttention)",
        "        │   ├── self (RobertaSelfAttention)",
        "        │   │   ├── query,value (Linear) weight:[768, 768] bias:[768]",
        "        │   │   └── key (Linear) weight:[768, 768] bias:[768]"
        " lora_A:[1, 768] lora_B:[768, 1]",
        "        │   └── output (RobertaSelfOutput)",
        "        │       ├── dense (Linear) weight:[768, 768] bias:[768]",
        "        │       ├── LayerNorm (LayerNorm) weight:[768] bias:[768]",
        "        │       └── adapter (AdapterLayer)",
        "        │           ├── down_proj (Linear) weight:[12, 768] bias:[12]",
        "        │           └── up_proj (Linear) weight:[768, 12] bias:[768]",
        "        ",
    ]
