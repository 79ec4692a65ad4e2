"""Deltas on 16-bit backbones: float32 by default, what a step changes, heads, products, files."""

import copy
import json

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, safe_open, save_file
from support.counting import Counted
from support.models import build, inputs, logits
from support.nets import IDS, WIDTH, net, places_of, put, shake
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import opendelta
from opendelta import AdapterModel, DeltaError, IA3Model, LoraModel, OptionError
from opendelta._deltas.registry import METHODS

HALVES = [torch.bfloat16, torch.float16]


def dtypes(delta):
    return {parameter.dtype for parameter in delta.parameters()}


def head_of(delta):
    return delta.layers["head"].module


# ------------------------------------------------------------------------------------- training
def moved(model, given):
    """The relative change of all lora_A by some small steps."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().double().clone() for n, p in trained.items() if "lora_A" in n}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-5, weight_decay=0.0)
    for _ in range(20):
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changes = [(trained[n].double() - old).norm() / old.norm() for n, old in before.items()]
    return torch.stack(changes).mean().item()


@pytest.mark.covers("DeltaConfig.dtype", "Delta.freeze_module")
def test_small_steps_change_a_lora_on_a_bfloat16_model_as_they_change_peft_s():
    found = {}
    for kind in ("default", "backbone", "peft"):
        torch.manual_seed(0)
        model = build("llama").to(torch.bfloat16).train()
        if kind == "peft":
            config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
            model = peft.get_peft_model(model, config)
        else:
            options = {} if kind == "default" else {"dtype": kind}
            LoraModel(model, lora_r=4, lora_alpha=8, **options).freeze_module()
        given = inputs(model)
        found[kind] = moved(model, given | {"labels": given["input_ids"]})
    assert found["default"] == pytest.approx(found["peft"], rel=0.05)
    assert found["backbone"] < 0.5 * found["default"]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.covers("DeltaConfig.modules_to_save")
def test_a_grad_scaler_steps_a_delta_and_its_head_on_a_float16_model(autocast):
    model = net().half()
    delta = LoraModel(model, modified_modules=["linear", "embedding"], modules_to_save=["head"])
    delta.freeze_module()
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = {name: tensor.clone() for name, tensor in delta.state_dict().items()}
    for _ in range(2):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = model(IDS).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all(not torch.equal(delta.state_dict()[name], old) for name, old in before.items())


def test_trainer_in_bfloat16_trains_float32_deltas_on_a_bfloat16_model(tmp_path):
    model = build("bert").to(torch.bfloat16)
    delta = LoraModel(model)
    delta.freeze_module()
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 50, (8, 6)).tolist()]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, bf16=True, use_cpu=True,
        save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in delta.state_dict().items()}
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    assert dtypes(delta) == {torch.float32}
    assert all(not torch.equal(delta.state_dict()[name], old) for name, old in before.items())
    assert {p.dtype for n, p in model.named_parameters() if ".deltas." not in n} == {torch.bfloat16}


# ---------------------------------------------------------------------------------- delta.to, check
@pytest.mark.covers("Delta.to")
@pytest.mark.parametrize("attached", [True, False])
def test_a_delta_is_converted_in_place_and_stays_so(attached):
    model = net().to(torch.bfloat16)
    delta = shake(LoraModel(model, modified_modules=["linear"], modules_to_save=["head"]))
    exact = {name: tensor.clone() for name, tensor in delta.state_dict().items()}
    parameters = list(delta.parameters())
    model(IDS).sum().backward()
    if not attached:
        delta.detach()
    assert delta.to(torch.float16) is delta
    assert dtypes(delta) == {torch.float16} == {p.grad.dtype for p in delta.parameters()}
    assert all(a is b for a, b in zip(parameters, delta.parameters(), strict=True))
    for name, tensor in delta.state_dict().items():
        assert torch.equal(tensor, exact[name].half())
    delta.detach() if attached else None
    delta.attach()
    assert delta.config.dtype == "float16"
    assert dtypes(delta) == {torch.float16}
    assert model(IDS).dtype == torch.bfloat16
    assert dtypes(delta.to("backbone")) == {torch.bfloat16}
    assert dtypes(delta.to("float64")) == {torch.float64}
    model(IDS).sum().backward()


@pytest.mark.covers("Delta.to")
def test_what_a_delta_cannot_be_converted_to_is_refused_and_changes_nothing():
    model = net()
    delta = shake(LoraModel(model, modified_modules=["linear"]))
    before = delta.config
    for wrong in (torch.int8, "half", None, torch.float8_e4m3fn):
        with pytest.raises(OptionError, match=r"dtype|to\(None\)"):
            delta.to(wrong)
    with torch.no_grad():
        delta.layers["linear"].lora_B[1, 2] = 1e5
    with pytest.raises(DeltaError, match=r"lora_B holds .* too large for torch\.float16"):
        delta.to(torch.float16)
    opendelta.composition(model).merge()
    with pytest.raises(DeltaError, match="cannot convert 'lora': it is merged"):
        delta.to("bfloat16")
    assert delta.config is before
    assert dtypes(delta) == {torch.float32}


@pytest.mark.covers("check", "CheckReport")
def test_casting_the_model_casts_deltas_along_and_check_says_so():
    model = net()
    delta = LoraModel(model, modified_modules=["linear"], modules_to_save=["head"])
    delta.freeze_module()
    assert opendelta.check(model, IDS).narrow == []
    model.to(torch.bfloat16)
    assert dtypes(delta) == {torch.bfloat16}
    report = opendelta.check(model, IDS)
    assert report.narrow == list(delta.state_dict())
    assert "4 trainable delta tensors have 16 bits" in str(report)
    assert "delta.to('float32')" in str(report)
    delta.requires_grad_(False)
    assert not opendelta.check(model, IDS).narrow
    delta.requires_grad_(True).to("float32")
    assert not opendelta.check(model, IDS).narrow
    delta.to("backbone")
    assert not opendelta.check(model, IDS).narrow


# ----------------------------------------------------------------- modules of the delta's own
@pytest.mark.covers("DeltaConfig.modules_to_save")
@pytest.mark.parametrize("dtype", HALVES)
def test_a_head_computes_in_float32_between_16_bits(dtype):
    model = net().to(dtype)
    delta = shake(LoraModel(model, modified_modules=["linear"], modules_to_save=["head"]))
    given = []
    hook = model.head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    out = model(IDS)
    hook.remove()
    head, x = head_of(delta), given[0]
    assert (x.dtype, out.dtype) == (dtype, dtype)
    assert torch.equal(out, F.linear(x.float(), head.weight, head.bias).to(dtype))
    out.float().sum().backward()
    assert head.weight.grad.dtype == torch.float32
    expected = x.float().flatten(0, 1).sum(0).expand(3, -1)
    torch.testing.assert_close(head.weight.grad, expected)


class Mixed(nn.Module):
    """A block whose normalisation is in float32; it takes keywords and returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH).bfloat16()

    def forward(self, *, states, mask):
        h = self.norm(states.float())
        return {"hidden": self.fc(h.to(states.dtype)) * mask, "parts": (h, [mask, None])}


class Around(nn.Module):
    """A bfloat16 model around a mixed block and an embedding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, WIDTH).bfloat16()
        self.block, self.out = Mixed(), nn.Linear(WIDTH, WIDTH).bfloat16()

    def forward(self, ids):
        found = self.block(states=self.words(ids), mask=torch.ones(1, dtype=torch.bfloat16))
        return self.out(found["hidden"]), found


@pytest.mark.covers("DeltaConfig.modules_to_save")
@pytest.mark.parametrize("dtype", [None, "backbone"])
def test_a_copy_of_any_module_gets_and_gives_what_the_module_would(dtype):
    torch.manual_seed(0)
    model = Around()
    plain, parts = model(IDS)
    owned = ["words", "block"]
    delta = LoraModel(model, modified_modules=["out"], modules_to_save=owned, dtype=dtype)
    found, others = model(IDS)
    assert found.dtype == torch.bfloat16
    assert others["hidden"].dtype == parts["hidden"].dtype == torch.bfloat16
    torch.testing.assert_close(found, plain, atol=0.02, rtol=0.02)
    assert dtypes(delta) == {torch.float32} | ({torch.bfloat16} if dtype else set())
    found.float().sum().backward()
    assert all(p.grad is not None for layer in delta.layers.values() for p in layer.parameters())
    fresh = Around()
    delta.detach()
    assert [p.dtype for p in model.parameters()] == [p.dtype for p in fresh.parameters()]


@pytest.mark.covers("Composition.to_backbone")
def test_a_plain_model_has_the_copies_in_the_backbone_s_dtype():
    model = net().to(torch.bfloat16)
    delta = shake(LoraModel(model, modified_modules=["linear"], modules_to_save=["head"]))
    on_top = shake(LoraModel(model, modified_modules=["head"], name="top", lora_r=2), scale=0.1)
    plain = opendelta.composition(model).to_backbone()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    head, top = head_of(delta), on_top.layers["head"]
    exact = head.weight + top.scaling * top.lora_B @ top.lora_A  # rounded once
    assert torch.equal(plain.head.weight, exact.bfloat16())
    torch.testing.assert_close(plain(IDS), model(IDS), atol=0.05, rtol=0.05)
    assert dtypes(delta) == {torch.float32}


@pytest.mark.covers("DeltaConfig.num_labels")
def test_a_head_for_other_labels_is_float32_too():
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=2,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).to(torch.bfloat16)
    delta = LoraModel(model, modules_to_save=["classifier"], num_labels=5)
    out = model(input_ids=torch.ones(3, 4, dtype=torch.long), labels=torch.tensor([0, 4, 2]))
    assert dtypes(delta) == {torch.float32}
    assert (out.logits.shape, out.logits.dtype) == ((3, 5), torch.bfloat16)
    out.loss.backward()
    assert delta.layers["classifier"].module.weight.grad.dtype == torch.float32


@pytest.mark.covers("DeltaConfig.modules_to_save")
def test_a_float32_head_compiles_into_one_graph():
    model = net().to(torch.bfloat16)
    shake(LoraModel(model, modified_modules=["linear"], modules_to_save=["head", "embedding"]))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS), atol=0.05, rtol=0.05)


@pytest.mark.covers("DeltaConfig.modules_to_save")
def test_autocast_runs_a_float32_head_as_it_runs_any_linear():
    model = net().to(torch.bfloat16)
    shake(LoraModel(model, modified_modules=["linear"], modules_to_save=["head"]))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(IDS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, model(IDS), atol=0.05, rtol=0.05)


# ------------------------------------------------------------------------------------- the products
class Products(TorchDispatchMode):
    """Collects the dtypes of the factors of each matrix product."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
            self.found.append({t.dtype for t in args if isinstance(t, torch.Tensor)})
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_neighbours_of_any_dtypes_are_one_product_in_the_dtype_of_the_backbone(dtype, grad):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 20)).to(dtype).requires_grad_(False)
    x = torch.randn(5, 16).to(dtype)
    counts, asked = [], [None, "backbone", "float64", "bfloat16"]
    for number in range(len(asked) + 1):
        with torch.set_grad_enabled(grad), Products() as products:
            model(x)
        assert all(each == {dtype} for each in products.found)
        counts.append(len(products.found))
        if number < len(asked):
            options = {"lora_r": 2, "dtype": asked[number], "name": f"d{number}"}
            shake(LoraModel(model, modified_modules=["0"], **options), seed=number)
    assert counts == [1, 3, 3, 3, 3]
    layers = [model[0].deltas[f"d{number}"] for number in range(len(asked))]
    wanted = model[0].weight.double()
    for layer in layers:
        wanted = wanted + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    expected = F.linear(x.double(), wanted, model[0].bias.double())
    error = (model(x).double() - expected).norm() / expected.norm()
    assert error < 4 * torch.finfo(dtype).eps
    with torch.no_grad(), opendelta.composition(model).frozen():
        error = (model(x).double() - expected).norm() / expected.norm()
        with Products() as products, Counted() as counted:
            model(x)
    assert error < 4 * torch.finfo(dtype).eps
    assert [each == {dtype} for each in products.found] == [True] * 3
    assert counted.of("_to_copy", "cat") == 0  # the factors are kept in the backbone's dtype


def test_the_backward_of_a_float32_lora_multiplies_in_the_dtype_of_the_backbone():
    model = nn.Sequential(nn.Linear(16, 20), nn.Linear(20, 16)).to(torch.bfloat16)
    shake(LoraModel(model, modified_modules=["0", "1"], lora_r=2)).freeze_module()
    out = model(torch.randn(5, 16).to(torch.bfloat16)).sum()
    with Products() as products:
        out.backward()
    assert products.found
    assert all(each == {torch.bfloat16} for each in products.found)


@pytest.mark.covers("route")
def test_rows_take_deltas_of_several_dtypes():
    model = nn.Sequential(nn.Linear(16, 16)).to(torch.bfloat16)
    for name, dtype in {"a": None, "b": "backbone", "c": "float16"}.items():
        shake(LoraModel(model, modified_modules=["0"], name=name, dtype=dtype), seed=ord(name))
    x, names = torch.randn(4, 16).bfloat16(), ["a", "b", None, "c"]
    with opendelta.route(model, names):
        rows = model(x)
    for row, name, one in zip(rows, names, x, strict=True):
        with opendelta.composition(model).only(*[name] if name else []):
            torch.testing.assert_close(model(one[None])[0], row, atol=0.02, rtol=0.02)


# ------------------------------------------------------------------------------------------ merging
@pytest.mark.covers("Composition.merge", "Composition.unmerge")
@pytest.mark.parametrize("dtype", HALVES)
def test_merging_rounds_the_float32_sum_once_and_unmerging_restores_every_bit(dtype):
    model = net().to(dtype)
    lora = shake(LoraModel(model, modified_modules=["linear"], lora_r=2), scale=0.1)
    ia3 = shake(IA3Model(model, modified_modules=["linear"], feedforward_modules=[]), scale=0.1)
    before = opendelta.snapshot(model)
    own = copy.deepcopy(model.linear)
    opendelta.composition(model).merge()
    layer, row = lora.layers["linear"], ia3.layers["linear"].ia3_l
    sum_of = own.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    exact = sum_of * row.double()[:, None]
    spacing = torch.finfo(dtype).eps * exact.abs()
    assert ((model.linear.weight.double() - exact).abs() <= 0.51 * spacing).all()
    opendelta.composition(model).unmerge()
    assert opendelta.snapshot(model) == before
    assert dtypes(lora) == {torch.float32}


@pytest.mark.covers("combine")
def test_deltas_of_several_dtypes_combine_to_the_sum_in_float32():
    model = net().to(torch.bfloat16)
    parts = [
        shake(LoraModel(model, modified_modules=["linear"], name=n, dtype=d, lora_r=2), seed=i)
        for i, (n, d) in enumerate([("a", None), ("b", "backbone")])
    ]
    both = opendelta.combine(model, {"a": 0.7, "b": -0.3})
    assert dtypes(both) == {torch.float32}
    assert max(both.combination.errors.values()) < 1e-5
    pairs = [part.layers["linear"] for part in parts]
    wanted = sum(
        weight * p.scaling * p.lora_B.double() @ p.lora_A.double()
        for weight, p in zip((0.7, -0.3), pairs, strict=True)
    )
    made = both.layers["linear"]
    torch.testing.assert_close(
        made.scaling * made.lora_B.double() @ made.lora_A.double(), wanted, atol=1e-5, rtol=1e-4
    )


# -------------------------------------------------------------------------------------------- files
def held(folder):
    """The dtypes in a folder's tensors."""
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        return {str(file.get_tensor(key).dtype).removeprefix("torch.") for key in file.keys()}  # noqa: SIM118


SAVED = [  # the option, what the model or the delta is cast to, what the file holds
    (None, None, "float32"),
    ("backbone", None, "bfloat16"),
    ("float64", None, "float64"),
    (None, "delta", "bfloat16"),
    (None, "model", "bfloat16"),
]


@pytest.mark.covers("Delta.save_finetuned", "load")
@pytest.mark.parametrize(("dtype", "cast", "expected"), SAVED)
def test_a_file_holds_what_the_delta_held_and_comes_back_so(tmp_path, dtype, cast, expected):
    model = net() if cast == "model" else net().to(torch.bfloat16)
    options = {"modified_modules": ["linear"], "modules_to_save": ["head"], "dtype": dtype}
    delta = shake(LoraModel(model, **options))
    delta.freeze_module()
    delta = delta.to(torch.bfloat16) if cast == "delta" else delta
    if cast == "model":
        model.to(torch.bfloat16)
    delta.save_finetuned(tmp_path / "one")
    assert held(tmp_path / "one") == {expected}
    other = net().to(torch.bfloat16).requires_grad_(False)
    again = opendelta.load(tmp_path / "one", other)["lora"]
    assert {str(d).removeprefix("torch.") for d in dtypes(again)} == {expected}
    assert torch.equal(other(IDS), model(IDS))
    again.save_finetuned(tmp_path / "two")
    files = [next((tmp_path / n).glob("*.safetensors")).read_bytes() for n in ("one", "two")]
    assert files[0] == files[1]


@pytest.mark.covers("load")
@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        (torch.bfloat16, torch.bfloat16),  # as it was
        (torch.float16, torch.float32),  # no value of bfloat16 is lost
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_an_old_file_of_16_bits_loads_on_any_backbone_without_loss(tmp_path, backbone, expected):
    model = net().to(torch.bfloat16).requires_grad_(False)
    shake(LoraModel(model, modified_modules=["linear"])).to("bfloat16").save_finetuned(tmp_path)
    path = tmp_path / "config.json"
    path = path if path.exists() else next(tmp_path.glob("*.json"))
    facts = json.loads(path.read_text())
    assert facts["deltas"][0]["options"].pop("dtype") == "bfloat16"  # OpenDelta before: no option
    path.write_text(json.dumps(facts))
    delta = opendelta.load(tmp_path, net().to(backbone))["lora"]
    assert dtypes(delta) == {expected}
    stored = load_file(next(tmp_path.glob("*.safetensors")))
    for name, tensor in delta.state_dict().items():
        assert torch.equal(tensor.double(), stored[name].double())
    delta.requires_grad_(True)
    narrow = opendelta.check(delta.backbone_model, IDS).narrow
    assert bool(narrow) == (expected == torch.bfloat16)


@pytest.mark.covers("AutoDeltaModel")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_folder_of_peft_s_comes_in_the_dtype_that_it_holds(tmp_path, dtype):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(build("llama"), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: t.to(dtype) for key, t in load_file(path).items()}, path)
    model = build("llama").to(torch.float16 if dtype == torch.float16 else torch.bfloat16)
    delta = opendelta.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=model)
    assert dtypes(delta) == {dtype}
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(build("llama")).to(model.dtype), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs.eval()), atol=0.02, rtol=0.05)


# ------------------------------------------------------------------------------- what reads states
def outputs(model, given):
    """{name of a module: the dtypes of the tensors that it returns}, without the deltas'."""
    seen, hooks = {}, []

    def look(name, out):
        parts = [out] if isinstance(out, torch.Tensor) else [*out]
        seen[name] = [part.dtype for part in parts if isinstance(part, torch.Tensor)]

    for name, module in model.named_modules():
        if "deltas" not in name:
            hooks.append(module.register_forward_hook(lambda _m, _a, out, n=name: look(n, out)))
    model(**given, use_cache=False, return_dict=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("dtype", HALVES)
def test_float32_deltas_change_no_dtype_on_the_way_through_the_model(dtype):
    model = build("llama").to(dtype)
    given = inputs(model)
    plain = outputs(model, given)
    for method in (
        LoraModel, AdapterModel, IA3Model, opendelta.PrefixModel, opendelta.LoReftModel,
        opendelta.SoftPromptModel, opendelta.ParallelAdapterModel, opendelta.BitFitModel,
        opendelta.LNTuningModel, opendelta.OFTModel,
    ):  # fmt: skip
        shake(method(model), scale=0.02)
    assert outputs(model, given) == plain
    generated = model.generate(given["input_ids"], max_new_tokens=3, do_sample=False)
    assert generated.shape[1] == given["input_ids"].shape[1] + 3


# ------------------------------------------------------------------- 16 bits on wider backbones
WIDER = [(name, place) for name in sorted(METHODS) for place in places_of(METHODS[name])]


@pytest.mark.covers("*Model", "Delta.to", "Composition.to_backbone", "combine")
@pytest.mark.parametrize(("name", "place"), WIDER)
def test_a_16_bit_delta_on_a_wider_backbone_loses_nothing_beyond_its_values(name, place):
    model = net()
    plain = model(IDS).double()
    delta = shake(put(METHODS[name], model, place))
    delta.to(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    expected = exact(IDS)
    largest = (expected - plain).abs().max()
    assert (model(IDS) - expected).abs().max() < 1e-4 * largest
    if delta.layers[place].folds:
        for merged in (opendelta.composition(model).to_backbone(), merge_of(model)):
            assert (merged(IDS) - expected).abs().max() < 1e-4 * largest


def merge_of(model):
    opendelta.composition(model).merge()
    return model


@pytest.mark.covers("Delta.scale")
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("scales", [(1, 0.3125), (0.6875, 0.6875), (1, 1e6)])
def test_neighbours_with_different_scales_are_scaled_in_the_backbone_s_dtype(dtypes, scales):
    held, computes = dtypes
    model, x = nn.Sequential(nn.Linear(8, 8)).to(computes), torch.rand(3, 8, dtype=computes)
    for index, scale in enumerate(scales):
        delta = LoraModel(model, modified_modules=["0"], name=f"l{index}")
        shake(delta).to(held)
        delta.scale = scale
    names = opendelta.composition(model).names
    expected = copy.deepcopy(model).double()(x.double()).detach()
    tolerance = torch.finfo(computes).eps * 100
    with torch.no_grad(), opendelta.composition(model).frozen():
        found = {"frozen": model(x)}
    with torch.no_grad(), opendelta.route(model, [names] * 3):
        found["routed"] = model(x)
    with torch.no_grad():
        found |= {"alone": model(x), "compiled": torch.compile(model, backend="eager")(x)}
    found["trained"] = model(x)
    for how, out in found.items():
        error = (out.double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance, how
