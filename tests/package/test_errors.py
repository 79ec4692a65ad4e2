"""Errors carry fields beside their text, and warnings point at the line of the user."""

import json
import pickle
import runpy
import textwrap
import warnings

import pytest
import torch
from support.models import by_hand
from torch import nn

import opendelta
from opendelta import AddressError, DeltaError, DeltaLoadError, LoraModel, SiteError
from opendelta.errors import listed, quoted, warn


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def tied_net():
    model = net()
    model[2].weight = model[0].weight
    return model


# ------------------------------------------------------------------------------------------ fields
@pytest.mark.covers("AddressError")
def test_an_address_error_carries_the_pattern_and_the_nearest_names():
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(AddressError) as caught:
        LoraModel(model, modified_modules=["linear3"])
    assert caught.value.pattern == "linear3"
    assert caught.value.nearest == ["linear2", "linear1"]
    with pytest.raises(AddressError) as caught:
        LoraModel(model, modified_modules=["attn.k2"], common_structure=True)
    assert caught.value.pattern == "attn.k2"
    assert "attn.proj" in caught.value.nearest or caught.value.nearest


def test_a_role_that_is_taken_for_a_pattern_keeps_its_fields():
    with pytest.raises(AddressError, match="common_structure=True") as caught:
        LoraModel(net(), modified_modules=["attn.q"])
    assert caught.value.pattern == "attn.q"


@pytest.mark.covers("SiteError")
@pytest.mark.parametrize(
    ("attach", "where"),
    [
        (lambda m: LoraModel(m, modified_modules=["1"]), "1"),
        (lambda m: LoraModel(m, modified_modules=["0"], name="one"), "0"),
        (lambda m: LoraModel(m, modified_modules=["0"], init="pissa", lora_r=5), "0"),
        (lambda m: opendelta.AdapterModel(m, modified_modules=["0"], reads=True), "0"),
    ],
)
def test_a_site_error_says_which_module(attach, where):
    model = net()
    model[0].deltas = None
    with pytest.raises(SiteError) as caught:
        attach(model)
    assert caught.value.where == where


@pytest.mark.covers("SiteError")
@pytest.mark.parametrize(
    "attach",
    [
        lambda m: opendelta.AdapterModel(m, modified_modules=["0"], reads=True),
        lambda m: LoraModel(m, modified_modules=["0"], reads=True),
    ],
)
def test_a_site_error_of_a_weight_that_is_read_says_which_module(attach):
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4))
    with pytest.raises(SiteError, match=r"folded weights can be|layers that fold") as caught:
        attach(model)
    assert caught.value.where == "0"


@pytest.mark.covers("AddressError")
def test_an_address_error_of_a_pattern_carries_it_wherever_it_is_found():
    model = net()
    LoraModel(model, modified_modules=["0", "2"])
    wrong = {
        "[r](": lambda given: LoraModel(model, modified_modules=[given]),
        "[r].": opendelta.composition(model).explain,
        "0": lambda given: LoraModel(model, modified_modules=[given], modules_to_save=[given]),
    }
    for pattern, verb in wrong.items():
        with pytest.raises(AddressError) as caught:
            verb(pattern)
        assert caught.value.pattern == pattern


@pytest.mark.covers("DeltaLoadError")
def test_a_load_error_names_tensors_that_are_none_of_the_model(tmp_path):
    saved(net(), tmp_path)
    path = tmp_path / "config.json"
    facts = json.loads(path.read_text())
    frozen = [facts["deltas"][0] | {"frozen": ["0"]}]
    for changes in ({"backbone_tensors": ["0"]}, {"deltas": frozen}):
        path.write_text(json.dumps(facts | changes))
        with pytest.raises(DeltaLoadError) as caught:
            opendelta.load(tmp_path, net())
        assert caught.value.details == {"unexpected": ["0"]}


@pytest.mark.covers("DeltaLoadError")
def test_a_load_error_says_which_tensors(tmp_path):
    saved(net(), tmp_path)
    wider = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(DeltaLoadError) as caught:
        opendelta.load(tmp_path, wider)
    details = caught.value.details
    assert details.misshaped == {"0.deltas.lora.lora_A": ([8, 4], [8, 5])}
    assert not details.missing
    assert bool(details)
    report = opendelta.load(tmp_path, wider, strict=False)
    assert report.misshaped == details.misshaped
    assert not DeltaLoadError("no folder").details


@pytest.mark.covers("DeltaLoadError")
def test_the_details_of_a_load_error_are_a_mapping_too():
    error = DeltaLoadError("no", missing=["a"])
    assert (error.details["missing"], error.details.missing) == (["a"], ["a"])
    assert dict(error.details) == {"missing": ["a"]}
    assert error.details == {"missing": ["a"]}
    assert "unexpected" not in error.details
    with pytest.raises(KeyError):
        error.details["unexpected"]
    assert dict(DeltaLoadError("no").details) == {}
    again = pickle.loads(pickle.dumps(error))
    assert (again.details, str(again)) == (error.details, "no")


@pytest.mark.covers("AddressError", "SiteError")
def test_errors_keep_all_their_arguments():
    for kind in (AddressError, SiteError, DeltaLoadError):
        assert (kind().args, kind("a", "b").args) == ((), ("a", "b"))
    again = pickle.loads(pickle.dumps(AddressError("a", pattern="b", nearest="c")))
    assert (again.args, again.pattern, again.nearest) == (("a",), "b", ["c"])


@pytest.mark.covers("LoadReport")
def test_a_report_is_made_and_shown_in_the_order_of_its_fields():
    report = opendelta.LoadReport(["a"], None, None, {}, ["missing"])
    assert report.missing == ["missing"]
    assert repr(report).startswith("LoadReport(names=['a'], problem=None, saved_from=None, other_c")


def test_an_error_and_a_warning_are_one_line_whatever_a_name_holds():
    for text in ("\x1b[31mred\n\u202e\udcff", "k" * 400_000, "\x1b" * 5_000):
        error = str(DeltaError(f"before {text} after"))
        assert len(error) <= 2_000
        assert error.isprintable()
        assert (error[:7], error[-6:]) == ("before ", " after")
        with pytest.warns(opendelta.DeltaWarning) as caught:
            warn(f"before {text} after", opendelta.DeltaWarning)
        assert str(caught[0].message) == error
    assert str(DeltaError("a\nb")) == r"a\nb"


def test_lists_and_names_for_messages():
    assert listed("abc") == "a, b, c"
    assert listed("abcd") == "a, b, c, ..."
    assert listed([], 2) == ""
    assert (quoted("a.b"), quoted("")) == ("'a.b'", "the root")


# ---------------------------------------------------------------------------------------- warnings
def warned_at(script, tmp_path, **names):
    """The file and the line that the first warning of a script points at."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(script))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runpy.run_path(str(path), init_globals=names, run_name="__main__")
    first = next(w for w in caught if issubclass(w.category, opendelta.DeltaWarning))
    return first.filename == str(path), first.lineno


WAYS_IN = {
    "a method": "opendelta.LoraModel(model, modified_modules=['0'])",
    "a config": "opendelta.LoraModel.from_config(config, model)",
    "any method": "opendelta.AutoDeltaModel.from_config(config, model)",
    "a folder": "opendelta.load(folder, model)",
    "a folder of a method": "opendelta.LoraModel.from_finetuned(folder, model)",
    "a folder of any method": "opendelta.AutoDeltaModel.from_finetuned(folder, model)",
}


@pytest.mark.covers("DeltaWarning", "TiedWeightWarning")
@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("inside", [False, True], ids=["script", "function"])
def test_a_warning_points_at_the_users_line(way, inside, tmp_path):
    call, model = WAYS_IN[way], tied_net()
    script = f"def attach():\n    {call}\n\n\nattach()\n" if inside else f"\n{call}\n"
    with warnings.catch_warnings(action="ignore"):
        folder = saved(opendelta.shared_copy(model), tmp_path / "delta")
    config = opendelta.LoraConfig(modified_modules=["0"])
    names = {"opendelta": opendelta, "model": model, "folder": folder, "config": config}
    assert warned_at(script, tmp_path, **names) == (True, 2)


def saved(model, folder):
    """A folder of a delta that was on `model`."""
    delta = LoraModel(model, modified_modules=["0"])
    delta.freeze_module()
    delta.save_finetuned(folder)
    return folder


@pytest.mark.covers("UnsavedWarning")
def test_a_warning_of_saving_points_at_the_users_line(tmp_path):
    model = net()
    script = "\n\ndelta.save_finetuned(folder)\n"
    names = {"delta": LoraModel(model, modified_modules=["0"]), "folder": tmp_path / "delta"}
    assert warned_at(script, tmp_path, **names) == (True, 3)
    script = "\nopendelta.composition(model).save(folder)\n"
    names = {"opendelta": opendelta, "model": model, "folder": tmp_path / "all"}
    assert warned_at(script, tmp_path, **names) == (True, 2)


@pytest.mark.covers("UnreachedWarning")
def test_a_warning_of_the_first_forward_points_at_the_users_line(tmp_path):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return by_hand(self.inner, x)

    model = Reader()
    LoraModel(model, modified_modules=["inner"])
    names = {"model": model, "x": torch.ones(1, 4)}
    assert warned_at("\n\n\nmodel(x)\n", tmp_path, **names) == (True, 4)


@pytest.mark.covers("UnusedWarning")
def test_a_block_that_nobody_entered_points_at_the_users_line(tmp_path):
    model = net()
    delta = LoraModel(model, modified_modules=["0"])
    assert warned_at("\ndelta.disabled()\n", tmp_path, delta=delta) == (True, 2)


def test_without_a_line_of_a_user_the_outermost_stands_for_it(monkeypatch):
    own = (*opendelta.errors.library_folders(), __file__)
    monkeypatch.setattr(opendelta.errors, "library_folders", lambda: own)
    with pytest.warns(opendelta.TiedWeightWarning):
        LoraModel(tied_net(), modified_modules=["0"])


def test_a_block_that_dies_elsewhere_points_at_the_line_that_made_it(tmp_path):
    delta = LoraModel(net(), modified_modules=["0"])
    script = "def forget():\n    block = delta.disabled()\n\n\nforget()\n"
    assert warned_at(script, tmp_path, delta=delta) == (True, 2)


def test_a_warning_in_a_thread_points_at_the_users_line(tmp_path):
    script = """
    from threading import Thread


    def attach():
        opendelta.LoraModel(model, modified_modules=["0"])


    thread = Thread(target=attach)
    thread.start()
    thread.join()
    """
    names = {"opendelta": opendelta, "model": tied_net()}
    assert warned_at(script, tmp_path, **names) == (True, 6)
