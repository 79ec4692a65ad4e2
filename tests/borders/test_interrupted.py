"""Merged weights that change are noticed; a verb that Ctrl-C stops leaves all or nothing."""

import sys
from pathlib import Path

import pytest
import torch
from support.nets import shake
from torch import nn

import opendelta
from opendelta import LoraModel, composition

pytestmark = pytest.mark.covers("Composition.merge", "Composition.unmerge")

CHANGES = {
    "rows reversed": lambda w: w.flip(0),
    "columns reversed": lambda w: w.flip(1),
    "rows rolled": lambda w: w.roll(1, 0),
    "columns rolled": lambda w: w.roll(2, 1),
    "all rolled": lambda w: w.flatten().roll(8).view_as(w),
    "rows shuffled": lambda w: w[torch.randperm(len(w))],
    "transposed": lambda w: w.t().clone(),
    "all signs": lambda w: -w,
    "signs of every other value": lambda w: w * torch.tensor([1, -1]).repeat(w.size(1) // 2).to(w),
    "signs of a row": lambda w: torch.cat([-w[:1], w[1:]]),
    "two values swapped": lambda w: w.flatten()[torch.tensor([3, 1, 2, 0])],
    "last bit": lambda w: torch.nextafter(w[0, 0], w[0, 0] + 1),
    "to zero": torch.zeros_like,
}


@pytest.fixture(autouse=True)
def gradients_are_on_after_it():
    """Ctrl-C at the line that leaves a `with torch.no_grad()` leaves the gradients off."""
    with torch.enable_grad():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("size", [6, 192])
@pytest.mark.parametrize("change", CHANGES)
def test_a_merged_weight_that_changed_is_not_overwritten(change, size, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size)).to(dtype)
    shake(LoraModel(model, modified_modules=["0"]))
    c = composition(model)
    before = model[0].weight.detach().clone()
    c.merge()
    weight = model[0].weight.data
    merged, new = weight.clone(), CHANGES[change](weight)
    weight.view(-1)[: new.numel()] = new.flatten()
    with pytest.raises(opendelta.DeltaError, match=r"0.weight was changed after the merge"):
        c.unmerge()
    weight.copy_(merged)
    c.unmerge()
    assert torch.equal(model[0].weight, before)


LOOKING = ("_backbone", "_modules", "_show")  # rooms that only look at a model


def stopped_at(number, verb):
    """Call `verb`, with Ctrl-C at its `number`-th line in the library; False: it ended."""
    left = number

    def at_line(frame, event, _):
        nonlocal left
        parts = Path(frame.f_code.co_filename).parts
        if "opendelta" not in parts or {*LOOKING} & {*parts}:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return at_line

    sys.settrace(at_line)
    try:
        verb()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def two_sites():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    shake(LoraModel(model, modified_modules=["0"]))
    shake(opendelta.LNTuningModel(model, modified_modules=["1"]))
    return model, [p.detach().clone() for p in own(model)]


def own(model):
    return [p for name, p in model.named_parameters() if "deltas" not in name]


def is_plain_again(model, before):
    return all(torch.equal(p, b) for p, b in zip(own(model), before, strict=True))


def unmerged_and_taken_off(model, before, number):
    c = composition(model)
    c.unmerge()
    assert is_plain_again(model, before), number
    for delta in list(c):
        delta.detach()
    opendelta.assert_pristine(model)


def test_a_merge_that_is_stopped_anywhere_can_be_undone():
    x, number, stopped = torch.randn(3, 4), 0, True
    while stopped:
        number += 1 if number < 200 else 3
        model, before = two_sites()
        expected, c = model(x), composition(model)
        stopped = stopped_at(number, c.merge)
        assert torch.allclose(model(x), expected, atol=1e-6), number
        if not any(delta.record.merged for delta in c):
            assert is_plain_again(model, before), number
            c.merge()
        unmerged_and_taken_off(model, before, number)
    assert number > 100


def test_an_unmerge_that_is_stopped_anywhere_can_be_called_again():
    number, stopped = 0, True
    while stopped:
        number += 1
        model, before = two_sites()
        c = composition(model)
        c.merge()
        stopped = stopped_at(number, c.unmerge)
        unmerged_and_taken_off(model, before, number)
    assert number > 40


@pytest.mark.covers("Delta.attach", "Delta.detach")
@pytest.mark.parametrize("verb", ["attach", "detach"])
def test_an_attach_or_detach_that_is_stopped_anywhere_leaves_all_or_nothing(verb):
    number, stopped = 0, True
    while stopped:
        number += 3
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        delta = LoraModel(model, modified_modules=["0"], modules_to_save=["1"])
        delta.freeze_module()
        if verb == "attach":
            delta.detach()
        stopped = stopped_at(number, getattr(delta, verb))
        assert len(list(composition(model))) == delta.attached, number
        if delta.attached:
            delta.detach()
        opendelta.assert_pristine(model)
        assert all(p.requires_grad for p in model.parameters()), number
        delta.attach()
        assert sorted(delta.layers) == ["0", "1"]
    assert number > 100


def states(model):
    """What a user sees of a composition, apart from outputs."""
    own = {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()}
    c = composition(model)
    return (
        c.names,
        [delta.active for delta in c],
        own,
        [*model.state_dict()],
        c.explain("0").formula,
    )


def freezing(model, folder):
    return composition(model)["a"].freeze_module


def reordering(model, folder):
    return lambda: composition(model).reorder(["b", "ad", "a"])


def moving(model, folder):
    return lambda: composition(model)["b"].attach(before="a")


def converting(model, folder):
    return lambda: composition(model)["a"].to("float64")


def combining(model, folder):
    return lambda: opendelta.combine(model, {"a": 1.0, "b": 0.5}, name="mix")


def loading(model, folder):
    twin = three()
    composition(twin)["a"].freeze_module()
    composition(twin).save(folder)
    return lambda: opendelta.load(folder, model)


def three():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    for name in "ab":
        shake(LoraModel(model, modified_modules=["0", "2"], name=name))
    shake(opendelta.AdapterModel(model, modified_modules=["0", "2"], name="ad"))
    return model


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # open files
@pytest.mark.covers("Composition.reorder", "combine", "load", "Delta.to", "Delta.freeze_module")
@pytest.mark.parametrize("verb", [freezing, reordering, moving, converting, combining, loading])
def test_a_verb_that_is_stopped_anywhere_has_done_all_or_nothing(verb, tmp_path):
    x = torch.randn(2, 4)
    model = three()
    before = states(model), model(x)
    verb(model, tmp_path / "whole")()
    after = states(model), model(x)
    number, stopped, step = 0, True, 1
    while stopped:
        number, step = number + step, max(1, number // 30)
        model = three()
        stopped = stopped_at(number, verb(model, tmp_path / "again"))
        now = states(model), model(x)
        expected = before if now[0] == before[0] else after
        assert now[0] == expected[0], number
        torch.testing.assert_close(now[1], expected[1])
    assert number > 40
