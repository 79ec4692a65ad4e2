"""A folder of many deltas loads at once, or its number is refused."""

import cProfile
import pstats

import pytest
import torch
from support.counting import cpu_seconds
from support.nets import shake
from torch import nn

import opendelta
from opendelta import DeltaError, DeltaLoadError, LoraModel, SiteError
from opendelta._backbone.backbone import Backbone
from opendelta._checkpoint import fingerprint
from opendelta._checkpoint.saving import save
from opendelta._files import folder as files


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def written(folder, count):
    """A folder of LoRAs on one module, d0 to d<count - 1>; the B of each holds its number."""
    facts = [
        {"delta_type": "lora", "name": f"d{n}", "active": n == 7, "frozen": [],
         "options": {"lora_r": 1, "lora_alpha": 1, "modified_modules": ["0"]}}
        for n in range(count)
    ]  # fmt: skip
    tensors = {}
    for n in range(count):
        tensors[f"0.deltas.d{n}.lora_A"] = torch.ones(1, 4)
        tensors[f"0.deltas.d{n}.lora_B"] = torch.full((4, 1), float(n))
    known = fingerprint.take(Backbone.of(net()), ["0"], ())
    rest = {"backbone_class": "Net", "backbone_tensors": [], "fingerprint": known}
    files.write(folder, {**rest, "deltas": facts}, tensors)
    return folder


def test_a_thousand_deltas_load_in_order_and_at_once(tmp_path):
    folder, model = written(tmp_path, 1_000), net()
    plain, x = net(), torch.ones(1, 4)
    opendelta.load(written(tmp_path / "warm", 2), net())
    with cpu_seconds() as taken:
        opendelta.load(folder, model)
    assert taken[0] < 3  # 0.7 s on a quiet machine
    composed = opendelta.composition(model)
    assert composed.names == [f"d{n}" for n in range(1_000)]
    torch.testing.assert_close(model[0](x), plain[0](x) + 7 * 4)


def calls(action):
    """The calls of functions that an action makes."""
    profile = cProfile.Profile()
    profile.runcall(action)
    return pstats.Stats(profile).total_calls


def test_saving_and_loading_walk_no_model_once_for_each_delta(tmp_path):
    counts = {}
    for count in (50, 200):
        composed = opendelta.load(
            written(tmp_path / f"{count}", count), net().requires_grad_(False)
        )
        other = nn.Sequential(*(nn.Linear(1, 1) for _ in range(1_000)))
        kept = LoraModel(other, modified_modules=["0"])
        saving = calls(lambda c=composed, n=count: c.save(tmp_path / f"again-{n}"))
        loading = calls(lambda n=count: opendelta.load(tmp_path / f"again-{n}", net()))
        counts[count] = saving, loading
        assert kept.attached
    each = [(many - few) / 150 for few, many in zip(*counts.values(), strict=True)]
    assert each[0] < 350  # 220 calls for each delta; 480 when each walked over all layers
    assert each[1] < 6_000  # 2,900; 10,000 when each walked over the other model


def test_a_copy_more_of_a_module_walks_through_no_copy_of_another_delta():
    model, counts = net(), []
    for n in range(24):
        place = {"modified_modules": ["0"], "modules_to_save": ["1"], "name": f"d{n}"}
        counts.append(calls(lambda place=place: LoraModel(model, **place)))
    assert counts[23] < 4 * counts[3]  # about 2; 25 when each walked through all layers


def test_more_deltas_are_refused_by_their_number(tmp_path):
    folder, model = written(tmp_path, 5_000), net()
    refused = pytest.raises(DeltaLoadError, match="holds 5,000 deltas, more than 1,000")
    with cpu_seconds() as taken, refused:
        opendelta.load(folder, model)
    assert taken[0] < 1
    opendelta.assert_pristine(model)
    delta = LoraModel(model, modified_modules=["0"])
    with pytest.raises(DeltaError, match="1,001 deltas are more than 1,000"):
        save([delta] * 1_001, tmp_path / "new")
    assert not (tmp_path / "new").exists()


MANY = {
    "lora": lambda model, n: opendelta.LoraModel(model, modified_modules=["0"], name=f"d{n}"),
    "bitfit": lambda model, n: opendelta.BitFitModel(model, modified_modules=["0"], name=f"d{n}"),
    "hra": lambda model, n: opendelta.HRAModel(model, modified_modules=["0"], r=2, name=f"d{n}"),
    "out": lambda model, n: opendelta.IA3Model(model, modified_modules=["0"], name=f"d{n}"),
    "ia3": lambda model, n: opendelta.IA3Model(
        model, modified_modules=["0"], feedforward_modules=["0"], name=f"d{n}"
    ),
}


@pytest.mark.parametrize("method", MANY)
def test_deltas_that_lie_too_deep_inside_each_other_are_refused_by_their_number(method):
    model, x = net(), torch.ones(1, 4)
    expected = model(x)
    for n in range(400):
        MANY[method](model, n)
    if method in ("hra", "ia3"):
        with pytest.raises(SiteError, match="400 deltas act on one Linear, the one around the oth"):
            model(x)
        with opendelta.composition(model).only(*(f"d{n}" for n in range(80))):
            torch.testing.assert_close(model(x), expected)
    else:
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("methods", "fullgraph"), [(("lora", "out"), True), (("lora", "out", "bitfit"), False)]
)
def test_many_deltas_of_several_methods_compile(methods, fullgraph):
    model, x = net(), torch.ones(1, 4)
    for n in range(150):
        shake(MANY[methods[n % len(methods)]](model, n), n, scale=0.01)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
        torch.testing.assert_close(compiled(x), expected)


def test_deltas_that_lie_too_deep_for_compiled_code_are_refused_by_their_number():
    model, x = net(), torch.ones(1, 4)
    expected = model(x)
    for n in range(100):
        MANY["hra"](model, n)
    torch._dynamo.reset()
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(SiteError, match=r"100 deltas act on one Linear, .* in compiled code: "):
        torch.compile(model, backend="eager")(x)
    torch._dynamo.reset()
    torch.testing.assert_close(model(x), expected)


def test_many_blocks_inside_each_other_are_refused_in_compiled_code():
    model, x = net(), torch.ones(1, 4)
    shake(LoraModel(model, modified_modules=["0"], name="l"))
    expected = model(x)
    for n in range(20):
        opendelta.AverageModel(model, deltas=[f"b{n - 1}" if n else "l"], name=f"b{n}")
    torch.testing.assert_close(model(x), expected)
    torch._dynamo.reset()
    with pytest.raises(SiteError, match=r"21 deltas act on one Linear, .* in compiled code"):
        torch.compile(model, backend="eager")(x)


def test_layers_between_those_that_nest_count_too():
    model, x = net(), torch.ones(1, 4)
    for n in range(26):
        MANY["lora"](model, n)
        MANY["ia3"](model, 100 + n)
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(SiteError, match=r"52 deltas .* in compiled code"):
        torch.compile(model, backend="eager")(x)
