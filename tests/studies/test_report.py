"""`opendelta.report`: its numbers by hand, its folders and models, and whom its page lets speak."""

import html
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.nets import net, put, shake, small, untouched
from torch import nn

import opendelta
from opendelta import (
    AdapterModel,
    BitFitModel,
    DeltaError,
    DeltaLoadError,
    GateModel,
    IA3Model,
    LNTuningModel,
    LoraModel,
    OptionError,
    composition,
    report,
)
from opendelta.interop import peft
from opendelta.studies.comparison import Comparison, Row

pytestmark = pytest.mark.covers("report", "CompositionReport")


def array(tensor):
    return tensor.detach().double().numpy()


def norm(tensor):
    return np.sqrt((array(tensor) ** 2).sum())


@pytest.fixture
def model():
    """Two LoRAs in a gate on one linear module, and an adapter on the other; frozen beneath."""
    made = small()
    shake(LoraModel(made, modified_modules=["0"], lora_r=2, name="law"), seed=1)
    shake(LoraModel(made, modified_modules=["0"], lora_r=3, name="news"), seed=2)
    GateModel(made, deltas=["law", "news"], name="mix")
    style = AdapterModel(made, modified_modules=["2"], bottleneck_dim=3, name="style")
    shake(style, seed=3).freeze_module()
    style.scale = 0.5
    return made


@pytest.fixture
def folder(model, tmp_path):
    composition(model).save(tmp_path / "run" / "deltas")
    return tmp_path / "run" / "deltas"


def plain():
    """The model beneath the deltas."""
    return small()


# -------------------------------------------------------------------------------------- the numbers
def test_the_norms_are_those_of_the_changes_and_of_the_parameters(model):
    found = {norm.delta: norm for norm in report(model).norms}
    c = composition(model)
    for name in ("law", "news"):
        layer = c[name].layers["0"]
        change = 16 / layer.lora_A.shape[0] * array(layer.lora_B) @ array(layer.lora_A)
        assert (found[name].module, found[name].of) == ("0", "weight")
        assert found[name].norm == pytest.approx(np.linalg.norm(change), rel=1e-5)
        assert found[name].relative == pytest.approx(
            np.linalg.norm(change) / norm(model[0].weight), rel=1e-5
        )
    for name, where in (("mix", "0"), ("style", "2")):
        squares = sum(norm(p) ** 2 for p in c[name].layers[where].parameters())
        assert (found[name].of, found[name].relative) == ("parameters", None)
        assert found[name].norm == pytest.approx(squares**0.5, rel=1e-5)


def test_a_scale_counts_and_a_bias_is_no_weight():
    model = net()
    scaled = shake(put(LoraModel, model, "conv1d", lora_r=2))
    shake(put(BitFitModel, model, "linear"))
    (before,) = (each.norm for each in report(model).norms if each.delta == "lora")
    scaled.scale = 0.25
    found = {each.delta: each for each in report(model).norms}
    assert found["lora"].norm == pytest.approx(before / 4, rel=1e-6)
    assert found["bitfit"].of == "parameters"


def test_a_change_that_is_no_product_is_measured_by_folding():
    model = net()
    ia3 = shake(put(IA3Model, model, "linear"))
    tuned = shake(put(LNTuningModel, model, "norm"))
    factors, scales = array(ia3.layers["linear"].ia3_l), array(tuned.layers["norm"].scale)
    wanted = {
        "ia3": array(model.linear.weight) * (factors[:, None] - 1),
        "ln_tuning": array(model.norm.weight) * (scales - 1),
    }
    for each in report(model).norms:
        assert each.of == "weight"
        assert each.norm == pytest.approx(np.linalg.norm(wanted[each.delta]), rel=1e-5)


def test_merged_deltas_are_measured_beside_the_weight_from_before():
    model = small()
    shake(LoraModel(model, modified_modules=["0"], lora_r=2))
    shake(IA3Model(model, modified_modules=["2"]))
    before = report(model)
    composition(model).merge()
    after = report(model)
    assert after.norms[0].relative == pytest.approx(before.norms[0].relative, rel=1e-6)
    assert after.norms[1].of == "parameters"
    assert "unmerge()" in after.not_measured[0]


# ------------------------------------------------------------------------------- folders and models
def test_a_folder_alone_tells_its_part_and_a_model_adds_the_rest(folder, model):
    alone, both, live = report(folder), report(folder, plain()), report(model)
    for found in (alone, both, live):
        assert [delta["name"] for delta in found.deltas] == ["law", "news", "mix", "style"]
        assert found.deltas[2]["options"] == {"deltas": ["law", "news"]}
        assert found.deltas[3]["scale"] == 0.5
        assert found.parameters == sum(
            p.numel() for d in composition(model) for p in d.parameters()
        )
    assert [{**each, "merged": False} for each in alone.deltas] == both.deltas == live.deltas
    assert (alone.sites, alone.tree, alone.backbone_check["status"]) == ([], None, "not compared")
    assert "With a model this page also shows" in alone.html
    own = composition(model)["law"].layers["0"].parameters()
    assert alone.norms[0].norm == pytest.approx(sum(norm(p) ** 2 for p in own) ** 0.5, rel=1e-5)
    assert [site.formula for site in both.sites] == [
        composition(model).explain(where).formula for where in ("0", "2")
    ]
    assert (both.norms, both.sites) == (live.norms, live.sites)
    assert str(both.tree) == str(opendelta.tree(model))
    assert both.backbone_check["status"] == "same"
    assert live.backbone_check == {}


def test_another_model_is_named_as_such_and_no_model_changes(folder):
    other = plain()
    nn.init.ones_(other[2].weight)
    with untouched(other):
        found = report(folder, other)
    assert found.backbone_check["status"] == "differing"
    assert list(found.backbone_check["differing"]) == ["2.weight"]
    assert "1 of 2 weights under the deltas differ" in found.html
    with pytest.raises(DeltaLoadError, match="does not fit this Sequential"):
        report(folder, nn.Sequential(nn.Linear(6, 6)))


def test_a_model_without_values_gives_tree_and_formulas(folder):
    with torch.device("meta"):
        found = report(folder, plain())
    assert found.backbone_check["status"] == "not compared"
    assert len(found.sites) == 2
    assert found.norms == report(folder).norms


def test_a_folder_of_another_library_is_told_as_it_names_its_parts(tmp_path):
    model = small()
    peft.save(shake(LoraModel(model, modified_modules=["0"], lora_r=2)), tmp_path)
    alone, both = report(tmp_path), report(tmp_path, plain())
    assert (alone.format, both.format) == ("PEFT", "PEFT")
    assert both.norms[0].of == "weight"
    assert both.backbone_check["why"] == "the folder knows no weights under the deltas"
    for found in (alone, both):
        assert "PEFT, saved from" in found.html


def test_what_has_no_deltas_is_refused(model, tmp_path):
    with pytest.raises(DeltaError, match="no delta is attached to Sequential"):
        report(plain())
    with pytest.raises(OptionError, match="takes no second model"):
        report(model, plain())
    with pytest.raises(OptionError, match="must be a path"):
        report(3)
    with pytest.raises(DeltaError, match="no such folder"):
        report(tmp_path / "nowhere")
    with pytest.raises(OptionError, match=r"must be a torch\.nn\.Module"):
        report(tmp_path, "model")


# ----------------------------------------------------------------------------------------- training
RUN = {"score": 0.5, "unit": "accuracy", "steps": 7, "rates": {"law": 0.25}, "baseline": None}
ROW = Row("law+news", [0.5, 0.75], 0.625, 0.125, 4, 0.5, 2.0, 8, 9, {"law": 0.25})
BAD = replace(ROW, deltas="style", scores=[math.nan, 0.5], score=math.nan, spread=None)
FACTS = {"train": 3, "test": 4, "epochs": 2, "max_steps": None, "batch_size": 2}
COMPARED = Comparison("trec", "accuracy", True, 0.25, FACTS, "here", [ROW, BAD], [])


def test_facts_of_the_training_are_found_and_unknown_ones_left_out(folder):
    (folder / "training.json").write_text(json.dumps({**RUN, "new": [1], "seed": "<b>"}))
    (folder.parent / "report.json").write_text(json.dumps(COMPARED.to_dict()))
    found = report(folder)
    known = {key: RUN[key] for key in ("score", "unit", "steps", "rates")}
    assert found.training == {**known, "seed": "<b>"}
    assert str(found.comparison) == str(COMPARED)
    assert found.to_dict()["comparison"] == COMPARED.to_dict()
    for told in ("0.625 ± 0.125", "diverged (1 of 2)", "law 0.25", "&lt;b&gt;"):
        assert told in found.html


@pytest.mark.parametrize(
    "text", ["{", "[1]", "{}", '{"rows": 3}', '{"score": true, "rows": [{"deltas": 3}]}', "null"]
)
def test_files_that_are_no_facts_do_not_matter(folder, text):
    for name in ("training.json", "report.json"):
        (folder.parent / name).write_text(text)
    found = report(folder)
    assert found.comparison is None
    assert found.training == ({"score": True} if "true" in text else {})
    assert found.html


# ----------------------------------------------------------------------------------------- the page
def test_hostile_names_are_text_in_the_page(tmp_path):
    evil = "<script>alert('x')</script>\u202e\"'&"
    model = nn.Sequential()
    model.add_module(evil, nn.Linear(4, 4))
    model.add_module("b", nn.Linear(4, 4))
    shake(LoraModel(model, modified_modules=[evil, "b"], lora_r=1)).freeze_module()
    composition(model).save(tmp_path / "d")
    (tmp_path / "training.json").write_text(json.dumps({**RUN, "unit": evil, "rates": {evil: 1}}))
    hostile = replace(COMPARED, task=f"[/]{evil}", rows=[replace(ROW, deltas=evil)])
    (tmp_path / "report.json").write_text(json.dumps(hostile.to_dict()))
    for found in (report(tmp_path / "d"), report(model), report(tmp_path / "d", model)):
        page = found.html
        assert "<script" not in page
        assert "\u202e" not in page
        assert "&lt;script&gt;alert(" in page
        assert ("[/]" in page) == bool(found.format)
        framed = found._repr_html_()
        assert html.unescape(re.search(r'srcdoc="([^"]*)"', framed)[1]) == page
        assert not re.search(r"\b(src|href)=|url\(|@import", page)


def test_a_number_in_a_name_may_have_thousands_of_digits():
    model = nn.Sequential()
    for digit in "12":
        model.add_module(digit * 5000, nn.Linear(4, 4))
    LoraModel(model, modified_modules=list(model._modules), lora_r=1)
    assert f"{'1' * 78}..." in report(model).html


def test_numbers_that_are_none_are_null_in_data_and_no_bars():
    model = small()
    for name, value in (("good", 1.0), ("bad", math.nan), ("worse", math.inf)):
        lora = LoraModel(model, modified_modules=["0"], lora_r=2, name=name)
        nn.init.constant_(lora.layers["0"].lora_B, value)
    found = report(model)
    told = json.dumps(found.to_dict(), allow_nan=False)
    assert [each["norm"] is None for each in json.loads(told)["norms"]] == [False, True, True]
    assert re.findall(r'd="([^"]+)"', found.html)[1:] == ["M0.1 40v0.0h.8v0.0"] * 2


def test_tensors_of_the_model_in_a_folder_are_told_apart_from_the_deltas(tmp_path):
    model = small()
    shake(LoraModel(model, modified_modules=["0"], unfrozen_modules=["2"])).freeze_module()
    composition(model).save(tmp_path)
    found = report(tmp_path)
    assert [(each.delta, each.module) for each in found.norms] == [("lora", "0"), ("", "2")]
    assert found.norms[1].norm == pytest.approx(
        math.hypot(norm(model[2].weight), norm(model[2].bias)), rel=1e-5
    )
    assert "tensors" in found.html


def test_a_thousand_layers_give_a_small_page():
    torch.manual_seed(0)
    pairs = [nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4)}) for _ in range(1000)]
    model = nn.ModuleList(pairs)
    shake(LoraModel(model, modified_modules=["up", "down"], lora_r=1))
    found = report(model)
    assert len(found.norms) == 2000
    assert len(found.html) < 1_000_000
    assert json.loads(json.dumps(found.to_dict()))["deltas"] == found.deltas


def test_the_page_is_written_over_another_report_only(folder, tmp_path):
    found, path = report(folder), tmp_path / "new" / "page.html"
    found.save(path)
    found.save(path)
    assert path.read_text() == found.html
    path.write_text("mine")
    with pytest.raises(DeltaError, match=r"page\.html exists and is no report"):
        found.save(path)
    assert path.read_text() == "mine"
    assert [each.name for each in path.parent.iterdir()] == ["page.html"]


def test_a_place_that_cannot_be_written_is_named(folder, tmp_path):
    found = report(folder)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.html").mkdir()
    for name, error, said in (
        ("page", OptionError, "must end in .html"),
        ("page.json", OptionError, "must end in .html"),
        ("folder.html", DeltaError, "folder.html cannot be read: it is no file"),
        ("file/page.html", DeltaError, "file"),
    ):
        with pytest.raises(error, match=re.escape(said)):
            found.save(tmp_path / name)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder.html", "run"]
