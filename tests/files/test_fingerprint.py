"""Is it the backbone that a delta was trained on? What passes, is refused, or is unchecked."""

import json
import time
import warnings

import pytest
import torch
import transformers
from support.nets import IDS, Net, net, shake, untouched
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import opendelta
from opendelta import AutoDeltaModel, DeltaLoadError, LoraModel, UncheckedWarning
from opendelta._backbone.backbone import Backbone
from opendelta._checkpoint import fingerprint

pytestmark = pytest.mark.covers("load", "Delta.from_finetuned")

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}


def bert(labels=2, seed=0, kind=transformers.BertForSequenceClassification):
    torch.manual_seed(seed)
    model = kind(
        transformers.BertConfig(vocab_size=99, num_hidden_layers=2, num_labels=labels, **SIZES)
    )
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """A LoRA on the queries and values of a small BERT, in a folder."""
    delta = shake(LoraModel(bert()))
    delta.freeze_module()
    delta.save_finetuned(tmp_path / "delta")
    return tmp_path / "delta"


def perturbed(model, size):
    """The model with each weight changed by noise of this relative norm."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * p.norm() / p.numel() ** 0.5 * size)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_to_half_precision_passes_and_so_does_one_back(saved, dtype):
    half = bert().to(dtype)
    AutoDeltaModel.from_finetuned(saved, half)
    AutoDeltaModel.from_finetuned(saved, bert().to(dtype).float())


def test_one_percent_of_noise_is_refused_and_a_tenth_of_rounding_is_not(saved):
    for model in (perturbed(bert(), 1e-2), bert(seed=1)):
        with untouched(model), pytest.raises(DeltaLoadError, match="saved from another backbone"):
            opendelta.load(saved, model)
    opendelta.load(saved, perturbed(bert(), 1e-4))


@pytest.mark.covers("DeltaLoadError", "LoadReport")
def test_the_error_names_what_differs_and_by_how_much(saved):
    model = bert()
    query = "bert.encoder.layer.1.attention.self.query.weight"
    with torch.no_grad():
        model.get_parameter(query).mul_(1.5)
    message = rf"of 4 weights under its deltas 1 differ in this .*: {query} differs by 0.33"
    with pytest.raises(DeltaLoadError, match=message):
        opendelta.load(saved, model)
    report = opendelta.load(saved, model, strict=False)
    assert report.differing == {query: "differs by 0.33"}
    report = opendelta.load(saved, bert(seed=1), strict=False)
    assert len(report.differing) == 4
    distances = [float(how.split()[-1]) for how in report.differing.values()]
    assert all(0.5 < distance < 2.0 for distance in distances)


def test_a_fresh_head_and_another_class_pass_and_the_class_is_reported(saved):
    model = bert(labels=5)
    report = opendelta.load(saved, model, strict=False)
    assert (report.names, report.saved_from) == (["lora"], "BertForSequenceClassification")
    other = bert(kind=transformers.BertForMaskedLM)
    with torch.no_grad():
        other.bert.load_state_dict(model.bert.state_dict(), strict=False)
    assert opendelta.load(saved, other, strict=False).saved_from == "BertForSequenceClassification"


@pytest.mark.parametrize("override", ["check_backbone", "check_hash"])
def test_the_check_can_be_left_out(saved, override):
    model = bert(seed=1)
    with pytest.raises(DeltaLoadError, match="pass check_backbone=False"):
        AutoDeltaModel.from_finetuned(saved, model)
    AutoDeltaModel.from_finetuned(saved, model, **{override: False})
    if override == "check_backbone":
        opendelta.load(saved, bert(seed=1), check_backbone=False)


@pytest.mark.covers("UncheckedWarning")
@pytest.mark.filterwarnings("ignore:the values of lora in:opendelta.UncheckedWarning")
def test_weights_without_values_are_unchecked_with_a_warning(saved):
    with torch.device("meta"):
        model = bert()
    with pytest.warns(UncheckedWarning, match=r"4 of 4 weights .* without values: bert\.encoder"):
        AutoDeltaModel.from_finetuned(saved, model)


@pytest.mark.covers("UncheckedWarning")
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_weights_that_the_fingerprint_lacks_are_unchecked_with_a_warning(saved, kept):
    facts = json.loads((saved / "config.json").read_text())
    facts["fingerprint"] = dict([*facts["fingerprint"].items()][:kept])
    (saved / "config.json").write_text(json.dumps(facts))
    with pytest.warns(UncheckedWarning, match=rf"{4 - kept} of 4 weights under the deltas"):
        report = opendelta.load(saved, bert(), strict=False)
    assert (len(report.same), len(report.unread)) == (kept, 4 - kept)


@pytest.mark.covers("LoadReport")
def test_a_fingerprint_without_values_has_shapes_which_are_compared(tmp_path):
    wide, narrow = (nn.Sequential(nn.Embedding(rows, 8)) for rows in (9, 7))
    delta = opendelta.AdapterModel(wide, modified_modules=["0"])
    wide[0].weight = nn.Parameter(torch.empty(9, 8, device="meta"))
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["fingerprint"] == {"0.weight": {"shape": [9, 8], "values": None}}
    with pytest.raises(DeltaLoadError, match=r"0\.weight is \[7, 8\] instead of \[9, 8\]"):
        opendelta.load(tmp_path, narrow)
    with pytest.warns(UncheckedWarning, match=r"1 of 1 weights .* without values: 0\.weight"):
        report = opendelta.load(tmp_path, nn.Sequential(nn.Embedding(9, 8)), strict=False)
    assert (report.same, report.unread) == ([], ["0.weight"])
    assert str(report).endswith("; the values of 1 of 1 weights under them were not compared")


@pytest.mark.covers("UncheckedWarning")
def test_quantised_weights_are_unchecked_with_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes

        model = nn.Sequential(nn.Linear(64, 64), bitsandbytes.nn.Linear4bit(64, 64))
        model[1].load_state_dict(model[0].state_dict())
    delta = LoraModel(model, modified_modules=["0", "1"])
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    delta.detach()
    with pytest.warns(UncheckedWarning, match=r"1 of 2 weights .* quantised .*: 1.weight"):
        report = opendelta.load(tmp_path, model, strict=False)
    assert (report.same, report.unread) == (["0.weight"], ["1.weight"])
    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))  # its second weight is not packed
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k[0] == "0"}, strict=False
    )
    with pytest.warns(UncheckedWarning, match=r"1 of 2 weights .* quantised .*: 1.weight"):
        opendelta.load(tmp_path, plain)


def test_deltas_and_merging_do_not_change_it(saved, tmp_path):
    model = bert()
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    before = fingerprint.take(Backbone.of(model), names, ())
    delta = opendelta.load(saved, model)["lora"]
    assert fingerprint.take(Backbone.of(model), names, ()) == before
    opendelta.composition(model).merge()
    assert fingerprint.take(Backbone.of(model), names, ()) == before
    second = opendelta.load(saved, model)  # its backbone is that beneath what is merged
    assert second.names == ["lora", "lora_1"]
    delta.freeze_module()
    second["lora_1"].save_finetuned(tmp_path / "again")
    assert opendelta.load(tmp_path / "again", bert()).names == ["lora_1"]


def test_a_module_without_a_weight_of_its_own_is_known_by_those_inside(tmp_path):
    delta = opendelta.AdapterModel(net(), modified_modules=["pair"])
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    with pytest.raises(DeltaLoadError, match=r"pair\.inner\.weight differs by"):
        opendelta.load(tmp_path, net(seed=1))


def test_what_the_file_brings_is_not_compared(tmp_path):
    model = net()
    delta = shake(LoraModel(model, modified_modules=["linear", "head"], unfrozen_modules=["head"]))
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    fresh = net()
    with torch.no_grad():
        fresh.head.weight.add_(1)
    opendelta.load(tmp_path, fresh)
    assert torch.equal(fresh(IDS), model(IDS))


def test_infinities_and_nothing_at_all_are_compared_too():
    model = Net()
    with torch.no_grad():
        model.linear.weight.fill_(float("inf"))
    model.bare.weight = nn.Parameter(torch.empty(8, 0))
    found = Backbone.of(model)
    given = fingerprint.take(found, ["linear", "bare"], ())
    compared = fingerprint.compare(found, given, (), ())
    assert (compared.differing, compared.same) == ({}, ["linear.weight", "bare.weight"])
    with torch.no_grad():
        model.linear.weight.fill_(float("nan"))
    assert list(fingerprint.compare(found, given, (), ()).differing) == ["linear.weight"]


# -------------------------------------------------------------------------------- what it costs
class Reads(TorchDispatchMode):
    """Counts the values that operations give."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.returns[0].alias_info is None:  # no view
            self.values += out.numel()
        return out


def test_it_reads_a_few_values_of_each_weight_of_a_model_of_a_billion():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(3000, 3000, bias=False) for _ in range(112)))
    model.to(torch.bfloat16).to_empty(device="cpu")  # pages that nobody touches are free
    for module in model[::2]:
        module.weight.data = module.weight.data.T  # not contiguous
    names, found = [str(place) for place in range(112)], Backbone.of(model)
    assert sum(p.numel() for p in model.parameters()) > 1e9
    with Reads() as reads:
        given = fingerprint.take(found, names, ())
    assert reads.values <= 112 * fingerprint.SAMPLES * 6
    times = []
    for _ in range(3):
        start = time.process_time()
        fingerprint.compare(found, fingerprint.take(found, names, ()), names, ())
        times.append(time.process_time() - start)
    assert len(given) == 112
    assert min(times) < 0.05
