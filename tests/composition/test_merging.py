"""Merging into the weights, and back: the same outputs, then the same bits."""

import contextlib
import copy
import warnings

import accelerate
import numpy as np
import pytest
import torch
import transformers
from support.models import build, inputs, logits
from support.nets import IDS, Conv1D, net, places_of, put, shake
from support.quantised import BACKBONES, X
from torch import nn
from torch.nn.utils import prune

import opendelta
from opendelta import (
    AdapterModel,
    BitFitModel,
    IA3Model,
    LoraModel,
    OFTModel,
    VeraModel,
)
from opendelta._deltas.registry import METHODS
from opendelta._layers import low_rank as products
from opendelta._layers.base import DeltaLayer
from opendelta._sites import marks

pytestmark = pytest.mark.covers(
    "Composition.merge", "Composition.unmerge", "MergeReport", "SiteError"
)


@contextlib.contextmanager
def same_bits(model):
    """All modules, deltas included, are the same after the block as before, bit for bit."""
    before = opendelta.snapshot(model)
    yield
    assert opendelta.snapshot(model) == before


FOLDING = [n for n, m in sorted(METHODS.items()) if m.layer_class.fold is not DeltaLayer.fold]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FOLDING)
def test_merging_keeps_the_output_and_unmerging_restores_every_bit(name, dtype):
    method = METHODS[name]
    model = net().to(dtype)
    delta = shake(put(method, model, *places_of(method)), scale=0.05)
    c = opendelta.composition(model)
    expected = model(IDS)
    with same_bits(model):
        for _ in range(3):
            report = c.merge()
            assert report.merged
            tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 0.1)
            assert torch.allclose(model(IDS), expected, atol=tolerance, rtol=tolerance)
            c.unmerge()
            assert torch.equal(model(IDS), expected)
    delta.detach()


@pytest.mark.parametrize("seed", range(8))
def test_a_random_stack_merges_from_the_bottom_and_the_rest_acts_on_top(seed):
    random = np.random.default_rng(seed)
    model = net()
    others = random.choice([*FOLDING, "adapter", "loreft"], 4)
    for index, name in enumerate([random.choice(FOLDING), *others]):
        places = [p for p in places_of(METHODS[name]) if p in ("linear", "conv1d", "norm")]
        shake(put(METHODS[name], model, *places), seed=index, scale=0.1)
    c = opendelta.composition(model)
    expected, explained = model(IDS), c.explain("linear").formula
    with same_bits(model):
        report = c.merge()
        assert torch.allclose(model(IDS), expected, atol=1e-4)
        for where, names in report.merged.items():
            assert [*names, *report.left.get(where, [])] == [
                name for name in c.names if where in c[name].layers
            ]
        c.unmerge()
        assert torch.equal(model(IDS), expected)
    assert c.explain("linear").formula == explained


def test_what_is_asked_for_and_does_not_fold_is_refused_by_name():
    model = net()
    AdapterModel(model, modified_modules=["linear"])
    LoraModel(model, modified_modules=["linear", "bare"])
    IA3Model(model, modified_modules=["bare"], feedforward_modules=[])
    c = opendelta.composition(model)
    with same_bits(model):
        message = r"'linear': 'lora' stands on 'adapter', which \(AdapterLayer\) does not fold"
        with pytest.raises(opendelta.SiteError, match=message):
            c.merge("lora")
        with pytest.raises(opendelta.SiteError, match=r"'adapter' \(AdapterLayer\) does not fold"):
            c.merge("adapter")
        message = r"'bare': 'lora' acts beneath 'ia3' and would no longer; merge it too"
        with pytest.raises(opendelta.SiteError, match=message):
            c.merge("ia3")
        assert c.merge().merged == {"bare": ["lora", "ia3"]}
        c.unmerge()


def test_what_of_a_module_keeps_a_delta_from_folding_is_said():
    model = net()
    BitFitModel(model, modified_modules=["bare"])
    LoraModel(model, modified_modules=["linear"], gate=True)
    c = opendelta.composition(model)
    bias, gate = r"'bitfit' \(BitFitLayer\) .* \(the module has no bias\)", r"\(its gate goes by"
    for names, message in (
        (["bitfit"], bias),
        (["lora"], gate),
        ([], "nothing to merge: no delta"),
    ):
        with same_bits(model), pytest.raises(opendelta.SiteError, match=message):
            c.merge(*names)
    with pytest.raises(opendelta.SiteError, match=r"fold into a weight \(.*\), so no plain model"):
        c.to_backbone()


def test_a_disabled_delta_is_neither_merged_nor_passed_over():
    model = net()
    first = LoraModel(model, modified_modules=["linear"])
    second = LoraModel(model, modified_modules=["linear"])
    c = opendelta.composition(model)
    first.disable()
    with pytest.raises(opendelta.SiteError, match=r"stands on 'lora', which is disabled"):
        c.merge(second)
    with pytest.raises(opendelta.SiteError, match=r"nothing to merge"):
        c.merge()
    first.enable()
    assert c.merge(first).left == {"linear": ["lora_1"]}
    second.disable()
    assert opendelta.AdapterModel(model, modified_modules=["norm"], name="aside").attached
    c.unmerge()
    report = c.merge(first)
    assert report.left == {"norm": ["aside"]}
    assert str(report) == "merged into 1 modules: lora\nstill acting on 1 modules: aside"
    second.enable()
    assert c.merge(second).merged == {"linear": ["lora", "lora_1"]}
    with pytest.raises(opendelta.SiteError, match=r"nothing to merge: all of it is merged"):
        c.merge()


def test_a_parametrized_weight_is_not_merged_into_and_its_bias_is():
    model = nn.ModuleDict({"fc": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    c = opendelta.composition(model)
    bias = shake(opendelta.BitFitModel(model, modified_modules=["fc"]))
    assert c.merge().merged == {"fc": ["bitfit"]}
    c.unmerge()
    bias.detach()
    LoraModel(model, modified_modules=["fc"])
    with pytest.raises(opendelta.SiteError, match=r"its weight is no parameter of its own"):
        c.merge()


def test_a_merged_delta_is_not_switched_moved_or_taken_off():
    model = net()
    lora = shake(LoraModel(model, modified_modules=["linear"]))
    top = shake(AdapterModel(model, modified_modules=["linear"]))
    c = opendelta.composition(model)
    c.merge()
    before = model(IDS)
    verbs = [
        lora.detach,
        lora.disable,
        lambda: lora.load_state_dict(lora.state_dict()),
        lambda: c.reorder(["adapter", "lora"]),
        lambda: lora.attach(after=top),
        lambda: c.only("adapter").__enter__(),
        lambda: lora.disabled().__enter__(),
    ]
    for verb in verbs:
        with pytest.raises(opendelta.DeltaError, match=r"'lora': it is merged into .*unmerge"):
            verb()
    assert torch.equal(model(IDS), before)
    lora.enable()
    with c.only("lora"):
        assert not torch.equal(model(IDS), before)
    c.reorder(["lora", "adapter"])
    top.detach()
    assert "merged" in str(c.explain("linear"))
    c.unmerge()
    lora.detach()
    opendelta.assert_pristine(model)


def test_weights_that_were_changed_after_merging_are_not_overwritten():
    model = net()
    shake(LoraModel(model, modified_modules=["linear"]))
    c = opendelta.composition(model)
    c.merge()
    with torch.no_grad():
        model.linear.weight[0, 0] += 1
    with pytest.raises(opendelta.DeltaError, match=r"linear.weight was changed after the merge"):
        c.unmerge()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_of_merged_weights_is_named(dtype):
    model = net()
    shake(LoraModel(model, modified_modules=["linear"]))
    c = opendelta.composition(model)
    c.merge()
    model.to(dtype)
    says = rf"linear.weight was changed .* \(it was cast from torch.float32 to {dtype}; unmerge"
    with pytest.raises(opendelta.DeltaError, match=says):
        c.unmerge()
    with torch.no_grad():
        model.float().linear.weight[0, 0] += 1
    with pytest.raises(opendelta.DeltaError, match="changed after the merge, and unmerging"):
        c.unmerge()


@pytest.mark.parametrize(
    "change",
    [
        lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
        nn.utils.parametrizations.weight_norm,
        nn.utils.weight_norm,
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_no_parameter_any_more_is_named_when_it_is_to_be_unmerged(change):
    model = net()
    shake(LoraModel(model, modified_modules=["linear"]))
    c = opendelta.composition(model)
    c.merge()
    change(model.linear)
    with pytest.raises(opendelta.DeltaError, match=r"linear.weight is no parameter of its own any"):
        c.unmerge()


def test_a_merged_weight_without_values_is_named_when_it_is_to_be_unmerged():
    model, before = net(), net().linear.weight.detach().clone()
    model.linear.weight.data.copy_(before)
    shake(LoraModel(model, modified_modules=["linear"]))
    c = opendelta.composition(model)
    c.merge()
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(opendelta.DeltaError, match=r"on the meta device.*remove_hook_from_submod"):
        c.unmerge()
    accelerate.hooks.remove_hook_from_submodules(model)
    c.unmerge()
    assert torch.equal(model.linear.weight, before)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_that_are_not_finite_are_refused_and_nothing_is_changed(value):
    model = net()
    delta = LoraModel(model, modified_modules=["bare", "linear"])
    with torch.no_grad():
        delta.layers["linear"].lora_B[0, 0] = value
    with (
        same_bits(model),
        pytest.raises(opendelta.SiteError, match=r"weight with values .* finite"),
    ):
        opendelta.composition(model).merge()


@pytest.mark.covers("TiedWeightWarning")
def test_tied_weights_are_refused_with_the_other_use():
    model = build("gpt2")
    with pytest.warns(opendelta.TiedWeightWarning):
        LoraModel(model, modified_modules=["wte"])
    message = r"its weight is tied to that of 'lm_head', which would change too"
    with same_bits(model), pytest.raises(opendelta.SiteError, match=message):
        opendelta.composition(model).merge()


def test_a_weight_that_its_module_shortens_is_refused():
    model = nn.Sequential(nn.Embedding(11, 8, max_norm=1.0))
    shake(LoraModel(model, modified_modules=["0"]))
    with same_bits(model), pytest.raises(opendelta.SiteError, match=r"max_norm.*set it to None"):
        opendelta.composition(model).merge()
    plain = model(torch.arange(11))
    model[0].max_norm = None
    opendelta.composition(model).merge()
    torch.testing.assert_close(model(torch.arange(11)), plain)


def test_a_merged_model_is_copied_and_pickled_whole():
    model = net()
    shake(LoraModel(model, modified_modules=["linear"]))
    plain_weight = model.linear.weight.detach().clone()
    opendelta.composition(model).merge()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), model(IDS))
    opendelta.composition(twin).unmerge()
    assert torch.equal(twin.linear.weight, plain_weight)
    assert not torch.equal(model.linear.weight, plain_weight)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
def test_several_deltas_merge_on_transformers_models(name):
    model = build(name)
    for method in (LoraModel, VeraModel, IA3Model, OFTModel):
        shake(method(model), scale=0.1)
    expected = logits(model)
    c = opendelta.composition(model)
    with same_bits(model):
        c.merge()
        assert torch.allclose(logits(model), expected, atol=1e-4)
        c.unmerge()
        assert torch.equal(logits(model), expected)


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes")
@pytest.mark.parametrize("kind", sorted(BACKBONES))
@pytest.mark.parametrize("used", [False, True])
def test_quantised_weights_are_requantised_with_their_error(kind, used):
    model = BACKBONES[kind]()
    plain = model(X) if used else BACKBONES[kind]()(X)
    delta = shake(LoraModel(model, modified_modules=["up", "down"]), scale=0.1)
    expected = model(X)
    c = opendelta.composition(model)
    report = c.merge()
    assert set(report.errors) == {"up", "down"}
    assert all(0 < error < 1 for error in report.errors.values())
    assert (model(X) - expected).norm() < 0.5 * (plain - expected).norm()
    assert "relative error" in str(report)
    c.unmerge()
    assert torch.equal(model(X), expected)
    delta.detach()
    assert torch.equal(model(X), plain)


@pytest.mark.covers("Composition.to_backbone")
def test_the_backbone_alone_is_a_plain_model(tmp_path):
    model = build("llama")
    shake(LoraModel(model), scale=0.1)
    shake(IA3Model(model), scale=0.1)
    expected, before = logits(model), opendelta.composition(model).names
    plain = opendelta.composition(model).to_backbone()
    opendelta.assert_pristine(plain)
    assert torch.allclose(logits(plain), expected, atol=1e-5)
    assert torch.equal(logits(model), expected)
    assert opendelta.composition(model).names == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs(model)).logits, logits(plain))
    untied = model.model.embed_tokens.weight
    assert plain.model.embed_tokens.weight.data_ptr() == untied.data_ptr()


@pytest.mark.covers("Composition.to_backbone")
def test_the_backbone_alone_needs_all_that_acts_to_fold():
    model = build("llama")
    LoraModel(model)
    AdapterModel(model)
    with same_bits(model), pytest.raises(opendelta.SiteError, match=r"'adapter' .* does not fold"):
        opendelta.composition(model).to_backbone()


# ------------------------------------------------------------------------------- block by block
BLOCKWISE = {
    "linear": lambda: nn.Linear(5, 23),
    "Conv1D": lambda: Conv1D(23, 21),  # [in, out]
    "embedding": lambda: nn.Embedding(37, 5),
    "conv2d": lambda: nn.Conv2d(3, 19, (3, 1)),
    "channels last": lambda: nn.Conv2d(3, 19, (3, 2)).to(memory_format=torch.channels_last),
    "one row": lambda: nn.Linear(7, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", sorted(BLOCKWISE))
def test_blocks_hold_the_sum_of_all_loras_rounded_once(monkeypatch, kind, dtype):
    monkeypatch.setattr(products, "CHUNK", 40)
    torch.manual_seed(0)
    model = nn.Sequential(BLOCKWISE[kind]()).to(dtype)
    for i, options in enumerate([{}, {"lora_alpha": 3.0}, {"dtype": "float32"}, {"lora_r": 2}]):
        shake(LoraModel(model, modified_modules=["0"], name=f"lora_{i}", **options), seed=i)
    opendelta.composition(model)["lora_1"].scale = -0.5
    before = model[0].weight.detach().clone()
    matrix = before.double().flatten(1)
    for delta, scale in zip(opendelta.composition(model), [2, -0.5 * 3 / 8, 2, 8], strict=True):
        A, B = (t.detach().double() for t in delta.layers["0"].parameters())
        change = scale * B @ A
        matrix = matrix + (change.T if kind in ("Conv1D", "embedding") else change)
    expected = matrix.view(before.shape)
    opendelta.composition(model).merge()
    found = model[0].weight.detach()
    assert kind == "channels last" or found.stride() == before.stride()
    rounding = {torch.float64: 1e-14, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps / 2)
    if kind == "channels last":  # folded layer by layer, where each computes in its own dtype
        rounding = max(rounding, 1e-6)
    assert (found.double() - expected).abs().max() <= 1.01 * rounding * expected.abs().max()
    if dtype in (torch.bfloat16, torch.float16) and kind != "channels last":
        assert (found == expected.to(dtype)).double().mean() > 0.98  # but where float32 is halfway
    opendelta.composition(model).unmerge()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("row", [0, 11, 22])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38])
def test_what_is_not_finite_in_any_block_is_refused(monkeypatch, row, value):
    monkeypatch.setattr(products, "CHUNK", 40)
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 23))
    delta = shake(LoraModel(model, modified_modules=["0", "1"]))
    with torch.no_grad():
        delta.layers["1"].lora_B[row] = value
    with same_bits(model), pytest.raises(opendelta.SiteError, match=r"'1': merging lora gives a w"):
        opendelta.composition(model).merge()


@pytest.mark.parametrize("place", [0, 57, 114])
def test_a_change_in_any_block_is_seen(monkeypatch, place):
    model = nn.Sequential(nn.Linear(5, 23)).half()  # 115 values: not a multiple of 8 bytes
    shake(LoraModel(model, modified_modules=["0"]))
    c = opendelta.composition(model)
    monkeypatch.setattr(products, "CHUNK", 40)
    c.merge()
    monkeypatch.undo()
    model[0].weight.data.view(-1).view(torch.int16)[place] += 1
    with pytest.raises(opendelta.DeltaError, match=r"0.weight was changed after the merge"):
        c.unmerge()
    model[0].weight.data.view(-1).view(torch.int16)[place] -= 1
    c.unmerge()


def mark_of(values):
    module = nn.Module()
    module.weight = nn.Parameter(values)
    return marks.mark_of(module, "weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1024, 64), (64, 2042), (2100, 128), (768, 768), (6200, 16)])
def test_rows_and_columns_that_change_places_are_seen_at_any_distance(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    mark = mark_of(weight)
    steps = [1, 2, 8, 127, 509, 512, 1018, *(marks.WIDTH * k for k in range(1, 7))]
    for axis in (0, 1):
        size = shape[axis]
        moved = [torch.randperm(size), torch.arange(size).flip(0), torch.arange(size).roll(1)]
        for step in (each for each in steps if each < size):
            for first in {0, (size - step) // 2, size - step - 1}:
                order = torch.arange(size)
                order[[first, first + step]] = order[[first + step, first]]
                moved.append(order)
        for order in moved:
            changed = weight.index_select(axis, order)
            assert torch.equal(changed, weight) or mark_of(changed) != mark


def test_two_words_never_change_places_unseen():
    words = torch.randint(-(2**62), 2**62, (3 * marks.WIDTH + 40,))
    mark = mark_of(words.view(torch.float64))
    for first in (0, 7, marks.WIDTH - 1, 3 * marks.WIDTH):
        for last in {first + 1, first + marks.WIDTH, first + 2 * marks.WIDTH, len(words) - 1}:
            if last < len(words):
                for change in (1, 2**40, -(2**63)):
                    old, new = words.clone(), words.clone()
                    old[last] = new[first] = words[first] ^ change
                    new[last] = old[first]
                    found = (mark_of(w.view(torch.float64)) for w in (old, new))
                    assert len({mark, *found}) == 3, (first, last, change)


def test_rows_that_change_places_after_a_merge_are_seen():
    model = nn.Sequential(nn.Linear(64, 1024))
    shake(LoraModel(model, modified_modules=["0"]))
    c = opendelta.composition(model)
    c.merge()
    rows = model[0].weight.data[[0, 509]]
    model[0].weight.data[[509, 0]] = rows
    with pytest.raises(opendelta.DeltaError, match=r"0.weight was changed after the merge"):
        c.unmerge()
    model[0].weight.data[[0, 509]] = rows
    c.unmerge()


def test_nothing_comes_to_act_beneath_what_is_merged():
    model = net()
    style = shake(AdapterModel(model, modified_modules=["linear"], name="style"))
    first = shake(LoraModel(model, modified_modules=["linear"], name="first"))
    lora = shake(LoraModel(model, modified_modules=["linear"], name="lora"))
    composed, expected = opendelta.composition(model), model(IDS)
    style.detach(), first.detach()
    composed.merge()
    beneath = "cannot put '{}' beneath 'lora': it is merged into the weights of 1 modules"
    with same_bits(model), pytest.raises(opendelta.DeltaError, match=beneath.format("style")):
        style.attach()
    with same_bits(model), pytest.raises(opendelta.DeltaError, match=beneath.format("head")):
        LoraModel(model, modified_modules=["bare"], modules_to_save=["linear"], name="head")
    first.attach()  # sums have no order
    style.attach(after=lora)
    composed.unmerge()
    composed.reorder(["style", "first", "lora"])
    torch.testing.assert_close(model(IDS), expected)


def test_what_is_saved_of_the_backbone_is_what_it_was_before_merging(tmp_path):
    model = net()
    shake(BitFitModel(model, modified_modules=["linear"]))
    shake(LoraModel(model, modified_modules=["linear"], unfrozen_modules=["linear"]))
    composed = opendelta.composition(model)
    composed.merge("bitfit")
    composed.merge("lora")
    composed["bitfit"].freeze_module()
    composed.save(tmp_path)
    fresh = net()
    opendelta.load(tmp_path, fresh)
    composed.unmerge()
    assert torch.equal(fresh(IDS), model(IDS))


def test_the_backbone_is_known_again_after_merging_step_by_step(tmp_path):
    model = net()
    shake(BitFitModel(model, modified_modules=["linear"]))
    shake(LoraModel(model, modified_modules=["linear"])).freeze_module()
    composed = opendelta.composition(model)
    composed.merge("bitfit")
    composed.merge("lora")
    composed["lora"].save_finetuned(tmp_path)
    assert LoraModel.from_finetuned(tmp_path, net()).attached


def test_what_was_trained_after_a_merge_is_not_saved_as_before_it(tmp_path):
    model = net()
    LoraModel(model, modified_modules=["linear"], unfrozen_modules=["linear"]).freeze_module()
    c = opendelta.composition(model)
    c.merge()
    with torch.no_grad():
        model.linear.weight += 1
    with pytest.raises(opendelta.DeltaError, match="changed after the merge, and saving would"):
        c.save(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_disabled_delta_on_an_embedding_with_max_norm_is_left_out_of_a_plain_model():
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0))
    delta = LoraModel(model, modified_modules=["0"])
    delta.disable()
    assert type(opendelta.composition(model).to_backbone()[0]) is nn.Embedding


def test_what_is_merged_inside_only_acts_until_it_is_unmerged():
    model = net()
    lora = shake(LoraModel(model, modified_modules=["linear"]))
    lora.disable()
    composition = opendelta.composition(model)
    with composition.only("lora"):
        expected = model(IDS)
        composition.merge("lora")
    torch.testing.assert_close(model(IDS), expected)
    assert lora.active
    assert composition.explain("linear").formula == "y = linear(x) + lora(x)"
    composition.unmerge()
    assert torch.equal(model(IDS), expected)
