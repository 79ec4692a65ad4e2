"""What the page is told: the tree, places as one writes them, what fits, plans, formulas."""

import json
import random
import re
import shlex
import time

import pytest
import torch
import transformers
from support.nets import net, untouched
from support.picking import wire
from torch import nn

import opendelta
from opendelta import AdapterModel, LoraConfig, LoraModel
from opendelta._backbone.backbone import Backbone
from opendelta._deltas import requests
from opendelta._modules.kinds import kind_of
from opendelta._picker import writing
from opendelta._picker.desk import Desk
from opendelta.cli.requests import gathered

pytestmark = pytest.mark.covers("pick")


def bert(blocks=12):
    """A BERT without values."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=96, num_hidden_layers=blocks, **sizes)
    with torch.device("meta"):
        return transformers.BertForMaskedLM(config)


def desk(model=None, *start):
    return Desk(bert() if model is None else model, start)


def query(*blocks):
    return [f"bert.encoder.layer.{block}.attention.self.query" for block in blocks]


# ------------------------------------------------------------------------------------- the tree
def lines(line, steps=()):
    yield steps, line
    for child in line["children"]:
        yield from lines(child, (*steps, tuple(child["names"])))


def test_repeated_blocks_are_one_line_and_named_modules_are_lines_of_their_own():
    opened = desk().answer("open", {})
    found = dict(lines(opened["tree"]))
    blocks = ("bert",), ("encoder",), ("layer",), tuple(map(str, range(12)))
    for name, role in (("query", "attn.q"), ("key", "attn.k"), ("value", "attn.v")):
        line = found[(*blocks, ("attention",), ("self",), (name,))]
        assert (line["type"], line["kind"], line["sizes"]) == ("Linear", "linear", [32, 32])
        assert (line["role"], line["parameters"]) == (role, 32 * 32 + 32)
    assert found[blocks]["type"] == "BertLayer"
    names = {".".join(step[0] for step in steps) for steps in found}
    assert "bert.encoder.layer.0.attention.self.dropout" in names
    assert opened["parameters"] == sum(p.numel() for p in bert().parameters())


def test_deltas_that_are_on_the_model_are_told_and_are_no_modules():
    model = net()
    LoraModel(model, modified_modules=["linear"])
    AdapterModel(model, modified_modules=["linear"], name="style")
    opened = desk(model).answer("open", {})
    (line,) = (ln for steps, ln in lines(opened["tree"]) if steps == (("linear",),))
    assert (line["carries"], line["children"]) == (["lora", "style"], [])
    assert opened["carries"] == ["lora", "style"]


def test_a_form_has_each_option_with_its_meaning_kind_and_limits():
    forms = {form["type"]: form for form in desk().answer("open", {})["methods"]}
    assert forms.keys() == opendelta._deltas.registry.METHODS.keys()
    for form in forms.values():
        assert form["about"], form["type"]
        for option in form["options"]:
            assert option["meaning"], (form["type"], option["name"])
    options = {option["name"]: option for option in forms["lora"]["options"]}
    rank = options["lora_r"]
    assert rank["meaning"] == "rank of the change."
    assert (rank["kind"], rank["default"], rank["minimum"], rank["own"]) == ("whole", "8", 1, True)
    kinds = {name: option["kind"] for name, option in options.items()}
    assert {kinds[n] for n in ("lora_alpha", "lora_dropout")} == {"number"}
    assert (kinds["use_dora"], kinds["init"], kinds["name"]) == ("flag", "choice", "text")
    assert (kinds["modules_to_save"], kinds["rank_pattern"]) == ("lines", "json")
    assert "modified_modules" not in options
    assert json.dumps(forms)


# ----------------------------------------------------------------------- places as one writes them
@pytest.mark.parametrize(
    ("places", "written"),
    [
        (query(*range(12)), {"modified_modules": ["query"]}),
        (query(3), {"modified_modules": ["layer.3.attention.self.query"]}),
        (
            query(0, 1, 2, 3),
            {"modified_modules": [r"[r]layer\.[0-3]\.attention\.self\.query"]},
        ),
        (
            query(2, 3, 11),
            {"modified_modules": [r"[r]layer\.(?:[23]|11)\.attention\.self\.query"]},
        ),
        (["bert.embeddings.LayerNorm"], {"modified_modules": ["embeddings.LayerNorm"]}),
        ([""], {"modified_modules": ["root"]}),
    ],
)
def test_places_are_written_in_short(places, written):
    config = desk().writer.config(opendelta.AdapterConfig(), places)
    assert {k: v for k, v in vars(config).items() if k in written} == written


def test_default_places_need_no_words_and_roles_stand_for_many_names():
    told = desk().answer("plan", {"deltas": [wire("lora")]})
    again = desk().answer("plan", {"deltas": [wire("lora", told["deltas"][0]["places"])]})
    assert again["python"].splitlines()[-1] == "LoraModel(model)"
    model = nn.ModuleDict(
        {name: nn.TransformerEncoderLayer(8, 2, 16) for name in ("left", "right")}
    )
    sites = [f"{n}.linear{i}" for n in ("left", "right") for i in (1, 2)]
    config = desk(model).writer.config(LoraConfig(), sites)
    assert config.modified_modules == ["linear1", "linear2"]


@pytest.mark.parametrize("method", ["lora", "bitfit", "ia3", "parallel_adapter"])
def test_any_places_come_back_from_the_written_ones_in_python_and_at_the_prompt(method):
    rng = random.Random(method)
    backbone = Backbone.of(bert(13))
    model = backbone.model
    linear = [n for n, m in backbone.modules.items() if isinstance(m, nn.Linear)]
    linear = [name for name in linear if "decoder" not in name]  # it is tied
    asked = Desk(model, [])
    for _ in range(5):
        places = rng.sample(linear, rng.choice([1, 2, 5, 40]))
        if rng.random() < 0.5:  # the same in some of the blocks
            places = [n for n in linear if n.split(".")[-2:] in [p.split(".")[-2:] for p in places]]
            places = [n for n in places if rng.random() < 0.7] or linear[:1]
        if method == "parallel_adapter":
            places = [name for name in places for _ in range(2)]
        told = asked.answer("plan", {"deltas": [wire(method, places)]})
        (delta,) = told["deltas"]
        assert sorted(delta["places"]) == sorted(places), told["python"]
        words = shlex.split(told["words"])[3:]
        (text,) = [w for w in gathered(words) if w != "--delta"]
        config = requests.config_for(model, requests.parse(text))
        plan = opendelta.plan(model, config)
        assert sorted(plan.deltas[0].options["modified_modules"]) == sorted(places), told["words"]


@pytest.mark.parametrize("method", sorted(opendelta._deltas.registry.METHODS))
@pytest.mark.parametrize("of_class", [False, True])
def test_the_lines_of_python_have_the_defaults_of_the_class(method, of_class):
    cls = opendelta._deltas.registry.METHODS[method]
    if not cls.__module__.startswith("opendelta."):
        return
    config = cls.config_class.from_options({}) if of_class else cls.config_class()
    made = []
    names = {"model": None, cls.__name__: lambda _, **given: made.append(given)}
    exec(writing.python([config]).partition("\n\n")[2], names)
    assert cls.config_class.from_options(made[0]) == config


def test_the_lines_of_python_have_the_sample_inputs_that_the_page_was_given():
    model = net()
    asked = Desk(model, [], samples=torch.zeros(1, 3, dtype=torch.long))
    told = asked.answer("plan", {"deltas": [wire("lora", ["linear"])]})
    assert told["python"].endswith("sample_inputs=sample_inputs)")


def test_the_words_name_a_class_that_the_command_would_not_take_by_itself():
    model = bert(1)
    model.name_or_path, model.config.architectures = "some/bert", ["BertForMaskedLM"]
    words = desk(model).answer("plan", {"deltas": [wire("lora")]})["words"]
    assert words == "opendelta plan some/bert --delta lora"
    model.config.architectures = ["BertModel"]
    words = desk(model).answer("plan", {"deltas": [wire("lora")]})["words"]
    assert words == "opendelta plan some/bert --class BertForMaskedLM --delta lora"


@pytest.mark.parametrize(
    "config",
    [
        opendelta.FourierFTConfig(random_loc_seed=2**63 - 1),
        opendelta.VeraConfig(projection_prng_key=2**53 + 1),
        LoraConfig(rank_pattern={"query": 2}, lora_alpha=1e-05),
        opendelta.SoftPromptConfig(token_init="a text"),
    ],
)
def test_a_page_that_is_submitted_untouched_brings_back_each_value(config):
    asked = desk(None, config)
    text = json.dumps(asked.answer("open", {})["deltas"])
    numbers = [float(n) for n in re.findall(r"(?<![\w.\"])-?\d+(?=[,}\]])", text)]
    assert all(abs(number) < 2**53 for number in numbers)  # which JavaScript has exactly
    assert asked.configs({"deltas": json.loads(text)}) == [config]


@pytest.mark.parametrize(
    ("option", "typed", "error"),
    [
        ("rank_pattern", "{query: 2}", "rank_pattern='{query: 2}' is no JSON: Expecting property"),
        ("rank_pattern", "[" * 100_000, "is no JSON"),
        ("lora_r", "1e", "lora_r='1e' is no number"),
        ("lora_r", "1.5", "lora_r=1.5 must be int, not float"),
        ("lora_alpha", "nan", "lora_alpha=nan must be"),
        ("modified_modules", ["query"], "modified_modules=['query']: the form has no such option"),
        ("interactive_modify", True, "interactive_modify=True: the form has no such option"),
    ],
)
def test_a_value_that_cannot_be_read_is_refused_by_the_plan_and_by_submit(option, typed, error):
    given = {"deltas": [wire("lora", **{option: typed})]}
    asked = desk()
    assert error in asked.answer("plan", given)["deltas"][0]["error"]
    with pytest.raises(opendelta.OptionError, match=re.escape(error)):
        asked.configs(given)


def test_the_lines_of_python_attach_the_deltas():
    deltas = [
        wire("lora", query(1, 2), lora_r=4, rank_pattern={"layer.1.attention.self.query": 2}),
        wire("adapter", None, non_linearity='"quoted"'),
        wire("parallel_adapter", [n for b in (0, 1) for n in query(b) * 2], scaled=2.5),
    ]
    deltas[1]["options"] = {"non_linearity": "relu", "name": "style"}
    model = bert()
    told = Desk(model, []).answer("plan", {"deltas": deltas})
    names = {"model": model}
    exec(told["python"], names)
    assert opendelta.composition(model).names == ["lora", "style", "parallel_adapter"]
    made = {delta.name: delta for delta in opendelta.composition(model)}
    assert made["lora"].modified_modules == query(1, 2)
    assert made["lora"].config.rank_pattern == {query(1)[0]: 2}
    assert made["parallel_adapter"].modified_modules == deltas[2]["places"]
    assert made["parallel_adapter"].config.scaled == 2.5


@pytest.mark.parametrize("value", ["plain", "True", "5", "a,b", "line\nbreak", 'a"b', "ü", ""])
def test_every_text_comes_back_from_the_words_of_the_command_line(value):
    config = opendelta.AdapterConfig(non_linearity=value)
    line = shlex.split(writing.words(Backbone.of(net()), ["a b"], [config]))
    assert line[:3] == ["opendelta", "plan", "a b"]
    (text,) = [w for w in gathered(line[3:]) if w != "--delta"]
    assert requests.parse(text).options == {"non_linearity": value}
    names = {}
    exec(writing.python([config]).replace("AdapterModel(model, ", "made = dict("), names)
    assert names["made"] == {"non_linearity": value}


def test_a_name_that_is_a_role_elsewhere_is_no_place_at_the_prompt():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings = nn.Embedding(9, 8)
            self.blocks = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    told = desk(Odd()).answer("plan", {"deltas": [wire("lora", ["embeddings"])]})
    assert "--at" not in told["words"]
    assert 'modified_modules=["embeddings"]' in told["words"]


# --------------------------------------------------------------------------------- the search
@pytest.mark.parametrize(
    ("text", "how", "place", "count"),
    [
        ("query", "name", "query", 12),
        ("attn.q", "role", "attn.q", 12),
        ("self.value", "name", "self.value", 12),
        (r"[r]layer\.\d\.output", "pattern", r"[r]layer\.\d\.output", 10),
        ("uer", "part of a name", "[r][^.]*uer[^.]*", 12),
    ],
)
def test_a_search_follows_the_rules_of_addressing(text, how, place, count):
    model = bert()
    ways = Desk(model, []).answer("search", {"text": text})["ways"]
    assert (ways[0]["how"], ways[0]["place"], len(ways[0]["names"])) == (how, place, count)
    config = LoraConfig(modified_modules=[place], common_structure=how == "role" or None)
    if how != "pattern":
        chosen = opendelta.plan(model, config).deltas[0].options["modified_modules"]
        assert chosen == ways[0]["names"]


def test_a_search_that_finds_nothing_says_what_is_near():
    answer = desk().answer("search", {"text": "qeury"})
    assert answer["ways"] == []
    assert "nearest: 'query' (12 modules)" in answer["reason"]
    assert "no regular expression" in desk().answer("search", {"text": "[r](("})["reason"]


def test_the_same_in_all_blocks():
    given = {"delta": wire("lora"), "names": query(3)}
    assert desk().answer("alike", given)["names"] == query(*range(12))
    parts = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
    alike = lambda d, n: desk(nn.Sequential(*parts)).answer("alike", {"delta": d, "names": [n]})  # noqa: E731
    assert alike(wire("lora"), "0")["names"] == ["0", "2", "4"]
    assert alike(wire("bitfit"), "3")["names"] == ["3"]
    assert alike(wire("lora"), "1")["names"] == []


# ---------------------------------------------------------------------------------- what fits
def test_what_fits_is_what_attaching_says():
    model = net()
    asked = desk(model)
    names = [name for name, _ in model.named_modules()]
    for method, cls in opendelta._deltas.registry.METHODS.items():
        if not cls.__module__.startswith("opendelta."):
            continue
        reasons = asked.answer("fits", {"delta": wire(method), "names": names})["reasons"]
        for name, reason in reasons.items():
            places = [name or "root"] * (2 if cls.layer_class.paired else 1)
            try:
                opendelta.plan(model, cls.config_class(modified_modules=places))
                refused = False
            except opendelta.DeltaError:
                refused = True
            if kind_of(model.get_submodule(name)) is not None and not cls.layer_class.inside:
                assert (reason is not None) == refused, (method, name, reason)
            assert reason is None or refused or cls.layer_class.inside, (method, name, reason)


def test_what_does_not_fit_says_why_and_options_count():
    model = net()
    asked = desk(model)
    ask = lambda d, n: asked.answer("fits", {"delta": d, "names": [n]})["reasons"][n]  # noqa: E731
    assert "cannot carry 'lora', which takes: Linear" in ask(wire("lora"), "norm")
    assert ask(wire("adapter"), "linear") is None
    assert "which takes: LayerNorm" in ask(wire("adapter", residual="input"), "linear")
    assert "must divide" in ask(wire("compacter", hypercomplex_division=3), "linear")
    attention = nn.MultiheadAttention(8, 2)
    reason = Desk(attention, []).answer("fits", {"delta": wire("adapter"), "names": ["out_proj"]})
    assert "reads .weight instead of calling it" in reason["reasons"]["out_proj"]


# ---------------------------------------------------------------------------------- the plan
def test_the_plan_is_that_of_the_library_and_the_formula_shows_the_order():
    model = bert()
    asked = Desk(model, [])
    deltas = [wire("lora", query(0)), wire("adapter", query(0), bottleneck_dim=3)]
    told = asked.answer("plan", {"deltas": deltas})
    configs = [
        LoraConfig(modified_modules=query(0)),
        opendelta.AdapterConfig(modified_modules=query(0), bottleneck_dim=3),
    ]
    plan = opendelta.plan(model, configs)
    assert [d["parameters"] for d in told["deltas"]] == [d.parameters for d in plan.deltas]
    assert told["figures"][0]["figure"] == f"{plan.added_parameters:,}"
    assert told["figures"][2]["figure"] == f"{plan.flops.per_token:,}"
    assert " ".join(told["costs"]) in " ".join(str(plan).split())
    ask = lambda given: asked.answer("explain", {"name": query(0)[0], "deltas": given})  # noqa: E731
    assert ask(deltas)["formula"] == "y = adapter(query(x) + lora(x))"
    asked.answer("plan", {"deltas": []})  # of another page
    assert ask(deltas[::-1])["formula"] == "y = adapter(query(x)) + lora(x)"


def test_an_error_of_one_delta_leaves_the_plan_of_the_others():
    told = desk().answer(
        "plan", {"deltas": [wire("lora", []), wire("lora", lora_r=0), wire("ia3")]}
    )
    first, second, third = told["deltas"]
    assert first["error"].startswith("no module is selected: select some in the tree")
    assert "lora_r=0 must be at least 1" in second["error"]
    assert third["modules"] == 36
    assert "IA3Model" in told["python"]
    none = desk().answer("plan", {"deltas": [wire("lora", [])]})
    assert [each["figure"] for each in none["figures"]] == ["0", "0 B", "0"]
    assert none["python"] == none["words"] == ""
    assert "LoraModel" not in told["python"]


def test_nothing_of_the_model_changes():
    model = net()
    with untouched(model):
        asked = desk(model, LoraConfig(modified_modules=["linear"]))
        asked.answer("plan", {"deltas": asked.answer("open", {})["deltas"]})
        asked.answer("plan", {"deltas": [wire("adapter", ["attention", "pair"])]})
        asked.answer("fits", {"delta": wire("prefix"), "names": ["attention"]})
        asked.answer("explain", {"name": "attention", "deltas": [wire("adapter", ["attention"])]})
    opendelta.assert_pristine(model)


def test_the_page_starts_with_what_is_given():
    given = LoraConfig(
        modified_modules=["attn.q"], common_structure=True, exclude_modules=["layer.0"], lora_r=2
    )
    (delta,) = desk(None, given).answer("open", {})["deltas"]
    assert delta["places"] == query(*range(1, 12))
    assert delta["options"]["lora_r"] == "2"
    told = desk().answer("plan", {"deltas": [delta]})
    assert told["deltas"][0]["places"] == query(*range(1, 12))
    assert "common_structure" not in told["python"]


# ------------------------------------------------------------------------------------ large models
@pytest.mark.slow
def test_a_model_of_ten_thousand_modules_is_answered_in_time():
    with torch.device("meta"):
        block = lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))  # noqa: E731
        model = nn.ModuleDict({f"b{i}": block() for i in range(2500)})
    started = time.monotonic()
    asked = Desk(model, [])
    assert len(asked.answer("open", {})["tree"]["children"]) == 2500
    assert time.monotonic() - started < 20
    started = time.monotonic()
    told = asked.answer("plan", {"deltas": [wire("lora", [f"b{i}.0" for i in range(2500)])]})
    assert told["deltas"][0]["modules"] == 2500
    assert time.monotonic() - started < 40
