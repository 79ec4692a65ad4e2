"""`route`: rows of one batch take different deltas, each as if it were alone with its own."""

import copy
import threading

import hypothesis
import hypothesis.strategies as st
import peft
import pytest
import torch
import torch.utils._pytree as pytree
import transformers
from support.counting import Counted
from support.models import build, inputs, put_default, token_ids, tower, vectors
from support.nets import COPIES, IDS, copied, net, places_of, put, shake
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import opendelta
from opendelta import (
    AdapterModel,
    DeltaLayer,
    IA3Model,
    LoraModel,
    ParallelAdapterModel,
    PrefixModel,
    composition,
)
from opendelta._deltas.registry import METHODS
from opendelta.author import Acts
from opendelta.errors import DeltaError, SiteError

pytestmark = pytest.mark.covers("route")

ROUTABLE = [name for name in METHODS if name != "soft_prompt"]
MIXED = [["a"], [], ["b", "a"], "b", None, ["a"]]


def each_alone(model, rows, batch, forward):
    """What `forward` gives for each row by itself, with just its deltas on, put together."""
    parts = []
    for index, row in enumerate(rows):
        names = [] if row is None else [row] if isinstance(row, str) else row
        one = {k: v[index : index + 1] for k, v in batch.items()}
        with composition(model).only(*names):
            parts.append(forward(model, one))
    return torch.cat(parts)


def last(model, batch):
    return model(**batch).logits


def gradients(model, out):
    """The gradients of all deltas' parameters, by name, for a loss that weighs the rows alike."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, out[0].numel(), dtype=out.dtype).view_as(out[0])
    (out * weights).sum().backward()
    return {
        f"{delta.name} {name}": None if p.grad is None else p.grad.clone()
        for delta in composition(model)
        for name, p in delta.named_parameters()
    }


def assert_as_alone(model, rows, batch, atol=1e-5, forward=last):
    """Outputs and gradients of a routed batch are those of its rows."""
    with torch.no_grad():
        expected = each_alone(model, rows, batch, forward)
        with opendelta.route(model, rows):
            found = forward(model, batch)
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-5)
    by_row = gradients(model, each_alone(model, rows, batch, forward))
    with opendelta.route(model, rows):
        out = forward(model, batch)
        torch.testing.assert_close(out, expected, atol=atol, rtol=1e-5)
        together = gradients(model, out)
    for name, expected in by_row.items():
        if expected is None:
            assert together[name] is None or not together[name].any(), name
        else:
            scale = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(together[name], expected, atol=2e-5 * scale, rtol=1e-3)
    return found


# ------------------------------------------------------------------------------------- every method
@pytest.mark.parametrize("method", ROUTABLE)
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_rows_are_as_if_each_were_alone_with_its_deltas(family, method):
    model = build(family)
    put_default(method, model, name="a")
    put_default(method, model, seed=9, name="b")
    batch = {name: token_ids(len(MIXED)) for name in inputs(model)}
    found = assert_as_alone(model, MIXED, batch)
    plain = each_alone(model, [None] * len(MIXED), batch, last)
    changed = (found - plain).abs().amax(dim=(1, 2)) > 1e-4
    assert changed.tolist() == [row not in (None, []) for row in MIXED]


@pytest.mark.parametrize("method", ROUTABLE)
@pytest.mark.parametrize("gate", [False, True])
def test_rows_are_as_if_alone_on_every_kind_of_module(method, gate):
    cls = METHODS[method]
    model = net().double()
    for name in ("a", "b"):
        options = {"oft_block_size": 4} if method == "oft" else {}
        scale = 0.02 if method == "fourierft" else 0.3
        delta = put(cls, model, *places_of(cls), name=name, gate=gate, **options)
        shake(delta, seed=ord(name), scale=scale)
    rows = ["a", None, "b", ["a", "b"], "a"]
    batch = {"input_ids": IDS[[0, 1, 1, 0, 1]]}
    assert_as_alone(model, rows, batch, atol=1e-9, forward=lambda model, batch: model(**batch))


def test_soft_prompts_act_on_all_rows_or_none():
    model = build("llama")
    prompt = put_default("soft_prompt", model, name="prompt")
    put_default("lora", model, name="a")
    batch = {"input_ids": token_ids(3)}
    assert_as_alone(model, [["prompt", "a"], ["prompt"], ["a", "prompt"]], batch)
    with pytest.raises(SiteError, match=r"'prompt' on 'model' changes the length .* of their own"):
        opendelta.route(model, ["prompt", "a", None]).__enter__()
    assert prompt.active
    assert all(site.deltas.routed is None for site in model.modules() if hasattr(site, "deltas"))


# ----------------------------------------------------------------------- any rows, any compositions
POOL = {
    "lora": {"lora_r": 2},
    "lora_alike": {"lora_r": 2},
    "lora_wide": {"lora_r": 5, "lora_alpha": 3},
    "dora": {"use_dora": True, "lora_r": 2},
    "adapter": {"bottleneck_dim": 4, "gate": True},
    "ia3": {},
    "vera": {"r": 8},
    "prefix": {"prefix_token_num": 2, "embed_dim": 8, "mid_dim": 8},
    "parallel_adapter": {"bottleneck_dim": 4},
    "loreft": {"first": 2, "last": 1},
    "oft": {"oft_block_size": 8},
    "compacter": {},
}


def with_pool(family, chosen):
    """A model with these of the deltas above, in this order."""
    model = build(family)
    for seed, name in enumerate(chosen):
        method = name if name in METHODS else "lora"
        torch.manual_seed(seed)
        delta = METHODS[method](model, name=name, **POOL[name])
        shake(delta, seed=seed, scale=0.05)
    return model


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(data=st.data())
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_any_rows_of_any_composition(family, data):
    chosen = data.draw(st.lists(st.sampled_from(list(POOL)), min_size=1, max_size=5, unique=True))
    row = st.lists(st.sampled_from(chosen), unique=True)
    rows = data.draw(st.lists(row, min_size=1, max_size=6))
    model = with_pool(family, chosen)
    composition(model).reorder(data.draw(st.permutations(chosen)))
    ids = token_ids(len(rows))
    assert_as_alone(model, rows, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(data=st.data())
def test_any_rows_over_loras(data):
    """In float64 on one module: batched products, loops over groups, several of a row as one."""
    names = ["a", "b", "c", "d"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    for seed, name in enumerate(names):
        rank = data.draw(st.sampled_from([1, 2]))
        alpha = data.draw(st.sampled_from([1, 2]))
        options = {"lora_r": rank, "lora_alpha": alpha, "modified_modules": ["0"]}
        shake(LoraModel(model, name=name, **options), seed=seed)
    row = st.lists(st.sampled_from(names), max_size=2, unique=True)
    rows = data.draw(st.lists(row, min_size=1, max_size=6))
    times = data.draw(st.integers(1, 2))
    tokens = data.draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    x = vectors(len(rows) * times, *tokens, 6).double()
    weight, expected = model[0].weight, []
    for index, chosen in enumerate(row for row in rows for _ in range(times)):
        layers = [composition(model)[name].layers["0"] for name in chosen]
        W = weight + sum(ly.scaling * ly.lora_B @ ly.lora_A for ly in layers)
        expected.append(x[index] @ W.T + model[0].bias)
    with opendelta.route(model, rows, repeats=times):
        found = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), found)
    torch.testing.assert_close(found, torch.stack(expected))


# -------------------------------------------------------------------------------------------- PEFT
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    "rows", [["a", "b", None, "c"], ["c", "a", "c", "c", "a", None, "a"], ["b", "b", "a", "a"]]
)
def test_rows_over_loras_are_those_of_peft(rows, tokens):
    ours, base = build("llama"), build("llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    theirs = peft.get_peft_model(base, config, adapter_name="0")
    for name in ("1", "2"):
        theirs.add_adapter(name, config)
    for seed, name in enumerate("abc"):
        delta = LoraModel(ours, 4, 8, modified_modules=["q_proj", "down_proj"], name=name)
        shake(delta, seed=seed, scale=0.2)
        for where, layer in delta.layers.items():
            module = base.get_submodule(where)
            with torch.no_grad():
                module.lora_A[str(seed)].weight.copy_(layer.lora_A)
                module.lora_B[str(seed)].weight.copy_(layer.lora_B)
    ids = token_ids(len(rows), tokens)
    with torch.no_grad(), opendelta.route(ours, rows):
        found = ours(ids).logits
    names = ["__base__" if row is None else str("abc".index(row)) for row in rows]
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids, adapter_names=names).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]
)
def test_generate_takes_rows_with_their_beams(family, options):
    model = build(family)
    for seed, name in enumerate(("lora", "adapter", "prefix")):
        shake(put_default(name, model, seed=seed, name=name), scale=0.2)
    rows, ids = ["lora", ["adapter", "prefix"], None, ["prefix", "lora"]], token_ids(4)

    def scores(model, batch):
        """Of all tokens for each row and beam [rows, new tokens, vocabulary]."""
        out = model.generate(
            batch["ids"], max_new_tokens=4, min_new_tokens=4, do_sample=False,
            output_scores=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        return torch.stack(out.scores, 1)

    with opendelta.route(model, rows, repeats=options.get("num_beams", 1)):
        found = scores(model, {"ids": ids})
    expected = each_alone(model, rows, {"ids": ids}, scores)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, each_alone(model, [None] * 4, {"ids": ids}, scores), atol=0.01)


# ----------------------------------------------------------------------------------------- training
def test_a_batch_trains_each_delta_on_its_rows_alone():
    model, batch = build("bert"), {"input_ids": token_ids(4)}
    for name in ("a", "b", "c"):
        put_default("lora", model, name=name, seed=ord(name))
    alone = put_default("adapter", model, name="d")
    deltas = [composition(model)[name] for name in "abc"]
    deltas[0].freeze_module()
    with opendelta.route(model, ["a", "b", "b", "d"]):
        model(**batch).logits[:3].pow(2).sum().backward()
    assert all(p.grad.any() for delta in deltas[:2] for p in delta.parameters())
    assert all(p.grad is None for p in deltas[2].parameters())
    assert all(p.grad is None or not p.grad.any() for p in alone.parameters())
    assert all(p.grad is None for n, p in model.named_parameters() if ".deltas." not in n)


def test_dropout_and_checkpointing_inside_the_block():
    model, ids = build("llama"), token_ids(3)
    for name in ("a", "b"):
        delta = LoraModel(model, lora_dropout=0.5, name=name)
        shake(delta, seed=ord(name), scale=0.2)
    model.train()

    def run():
        torch.manual_seed(3)
        model.zero_grad()
        with opendelta.route(model, ["a", None, "b"]):
            out = model(ids, use_cache=False).logits
            out.pow(2).sum().backward()
        return [out.detach(), *(p.grad for n, p in model.named_parameters() if "deltas" in n)]

    expected = run()
    assert torch.equal(run()[0], expected[0])
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(run(), expected)
    plain = build("llama")(ids[1:2], use_cache=False).logits
    torch.testing.assert_close(expected[0][1:2], plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_deltas_on_rows_of_a_half_precision_model(dtype):
    model = nn.Sequential(nn.Linear(16, 16)).to(dtype)
    for name in ("a", "b"):
        shake(LoraModel(model, modified_modules=["0"], name=name, dtype="float32"), seed=ord(name))
    x, rows = vectors(3, 16).to(dtype), ["a", None, "b"]
    forward = lambda model, batch: model(batch["x"])  # noqa: E731
    expected = each_alone(model, rows, {"x": x}, forward)
    with opendelta.route(model, rows):
        torch.testing.assert_close(model(x), expected)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16


# ------------------------------------------------------------------------------- names and switches
@pytest.fixture
def two():
    """A tower with two LoRAs and an adapter, its input, and what each row gives by itself."""
    model, x = tower(), vectors(3, 8)
    for name in ("fr", "de"):
        shake(LoraModel(model, modified_modules=["fc", "out"], name=name), seed=ord(name[0]))
    shake(AdapterModel(model, modified_modules=["out"], bottleneck_dim=3, name="legal"))
    return model, x


def rows_alone(model, rows, x):
    return each_alone(model, rows, {"x": x}, lambda model, batch: model(batch["x"]))


def test_names_handles_short_and_long_forms(two):
    model, x = two
    fr, de = (composition(model)[name] for name in ("fr", "de"))
    expected = rows_alone(model, ["fr", ["de", "legal"], None], x)
    for rows in (
        [["fr"], ["de", "legal"], []],
        ["fr", ("legal", "de"), None],
        (fr, {de, "legal"}, ()),
    ):
        with opendelta.route(model, rows) as composed:
            torch.testing.assert_close(model(x), expected)
            assert composed.names == ["fr", "de", "legal"]


def test_a_disabled_delta_acts_on_the_rows_that_name_it(two):
    model, x = two
    fr = composition(model)["fr"]
    expected = rows_alone(model, ["fr", None, "de"], x)
    fr.disable()
    with opendelta.route(model, ["fr", None, "de"]):
        torch.testing.assert_close(model(x), expected)
        assert [delta.active for delta in composition(model)] == [True, True, False]
    assert [delta.active for delta in composition(model)] == [False, True, True]


def test_switching_off_and_only_inside_take_deltas_from_all_rows(two):
    model, x = two
    rows = [["fr", "legal"], "de", "legal"]
    with opendelta.route(model, rows):
        with composition(model).only("legal"):
            inside = model(x)
        composition(model)["de"].disable()
        without = model(x)
    assert composition(model)["de"].active
    torch.testing.assert_close(inside, rows_alone(model, ["legal", None, "legal"], x))
    torch.testing.assert_close(without, rows_alone(model, [["fr", "legal"], None, "legal"], x))


def test_a_route_inside_another_takes_its_place(two):
    model, x = two
    first, second = ["fr", "de", None], [None, "legal", "fr"]
    with opendelta.route(model, first):
        with composition(model).only("de"), opendelta.route(model, second):
            torch.testing.assert_close(model(x), rows_alone_outside(model, second, x))
        torch.testing.assert_close(model(x), rows_alone_outside(model, first, x))


def rows_alone_outside(model, rows, x):
    """The same of a copy, which is not routed."""
    return rows_alone(copy.deepcopy(model), rows, x)


def test_reordering_and_detaching_inside(two):
    model, x = two
    rows = [["fr", "legal"], "de", ["de", "legal"]]
    with opendelta.route(model, rows):
        composition(model).reorder(["legal", "fr", "de"])
        torch.testing.assert_close(model(x), rows_alone_outside(model, rows, x))
        composition(model)["fr"].detach()
        without = ["legal", "de", ["de", "legal"]]
        torch.testing.assert_close(model(x), rows_alone_outside(model, without, x))
        with pytest.raises(DeltaError, match=r"cannot attach 'new' inside opendelta\.route\(\)"):
            LoraModel(model, modified_modules=["head"], name="new")
        with pytest.raises(DeltaError, match=r"cannot merge inside opendelta\.route\(\)"):
            composition(model).merge()
    assert composition(model).names == ["legal", "de"]


def test_frozen_inside_route_and_the_other_way_round(two):
    model, x = two
    rows = [["fr", "de"], "de", ["fr", "legal"]]
    expected = rows_alone(model, rows, x).detach()
    with torch.no_grad():
        with opendelta.route(model, rows), composition(model).frozen():
            torch.testing.assert_close([model(x), model(x)], [expected] * 2)
        with composition(model).frozen(), opendelta.route(model, rows):
            torch.testing.assert_close([model(x), model(x)], [expected] * 2)
        with composition(model).frozen():
            for rows in (["fr", "de", None], [None, "fr", "de"]):
                for scale in (1, 0.5):
                    composition(model)["fr"].scale = scale
                    expected = rows_alone(model, rows, x)
                    with opendelta.route(model, rows):
                        torch.testing.assert_close([model(x), model(x)], [expected] * 2)
    with pytest.raises(DeltaError, match="no_grad"), composition(model).frozen():  # noqa: SIM117
        with opendelta.route(model, rows):
            model(x)


def test_an_exception_ends_the_route(two):
    model, x = two
    expected = model(x)
    with pytest.raises(ZeroDivisionError), opendelta.route(model, ["fr", None, None]):
        raise ZeroDivisionError
    assert torch.equal(model(x), expected)
    assert all(delta.active for delta in composition(model))


def test_a_branch_that_did_not_end_leaves_nothing_for_the_next_forward():
    model, rows = build("llama"), ["a", "b", None]
    for name in ("a", "b"):
        places = ["mlp.gate_proj", "mlp.down_proj"]
        shake(ParallelAdapterModel(model, modified_modules=places, name=name))
    batch = {"input_ids": token_ids(3)}

    def refuse(*_):
        raise ZeroDivisionError

    with torch.no_grad(), opendelta.route(model, rows):
        expected = model(**batch).logits
        hook = model.model.layers[0].mlp.up_proj.register_forward_pre_hook(refuse)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        hook.remove()
        assert torch.equal(model(**batch).logits, expected)
    model.train().activation_checkpointing_enable()  # it ends each block's second run early
    for _ in range(2):
        with opendelta.route(model, rows):
            out = model(**batch).logits
            torch.testing.assert_close(out, expected)
            out.sum().backward()


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_inside_is_not_routed(two, how):
    model, x = two
    with opendelta.route(model, [["fr", "de", "legal"]] * 2 + ["fr"]):
        twin = copied(model, how)
        assert not torch.allclose(twin(x), model(x))
    torch.testing.assert_close(twin(x), model(x))


def test_routes_of_shared_copies_run_in_threads():
    model, x = tower(), vectors(2, 8)
    rows = {"one": ["a", None], "two": [None, "a"]}
    found, expected = {}, {}
    for name in rows:
        twin = opendelta.shared_copy(model)
        shake(LoraModel(twin, modified_modules=["fc"], name="a"))
        expected[name] = rows_alone(twin, rows[name], x)

        def work(name=name, twin=twin):
            with opendelta.route(twin, rows[name]):
                found[name] = [twin(x) for _ in range(20)]

        threading.Thread(target=work, name=name).start()
    for thread in threading.enumerate():
        if thread.name in rows:
            thread.join()
    for name in rows:
        torch.testing.assert_close(found[name], [expected[name]] * 20)


# ------------------------------------------------------------------------------------------- errors
def test_the_number_of_rows_is_that_of_the_batch_or_of_repeated_rows(two):
    model, x = two
    with opendelta.route(model, ["fr", "de"]):
        with pytest.raises(SiteError, match=r"given 2 rows, .*'blocks\.0\.fc' has 3 on its first"):
            model(x)
        with pytest.raises(SiteError, match=r"given 2 rows, .* has 1 on"):
            model(x[:1])
        with pytest.raises(SiteError, match=r"given 2 rows, .* has 4 on .*repeats="):
            model(x[[0, 1, 2, 0]])
    with opendelta.route(model, ["fr", "de"], repeats=2):
        with pytest.raises(SiteError, match=r"given 2 rows x 2, .* has 6 on"):
            model(x[[0, 1, 2, 0, 1, 2]])
        assert model(x[:2]).shape[0] == 2
        found = model(x[[0, 1, 2, 0]])
    with pytest.raises(DeltaError, match="repeats=0"), opendelta.route(model, ["fr"], repeats=0):
        pass
    torch.testing.assert_close(
        found, rows_alone(model, ["fr", "fr", "de", "de"], x[[0, 1, 2, 0]]), atol=1e-6, rtol=1e-5
    )


def test_nothing_is_saved_or_made_plain_inside(two, tmp_path):
    model, _ = two
    composed = composition(model)
    composed["fr"].freeze_module()
    with opendelta.route(model, ["fr", "de"]):
        for action in (
            lambda: composed.save(tmp_path / "all"),
            lambda: composed["fr"].save_finetuned(tmp_path / "one"),
            composed.to_backbone,
        ):
            with pytest.raises(DeltaError, match=r"^cannot .* inside opendelta\.route\(\)"):
                action()
    assert not any(tmp_path.iterdir())
    composed.save(tmp_path / "all")


def test_blocks_that_end_in_another_order_leave_the_others_as_they_are(two):
    model, x = two
    composed, rows = composition(model), ["de"] * 3
    composed["de"].disable()
    expected, inside = model(x), rows_alone(model, rows, x)
    outer, inner = opendelta.route(model, ["fr", "de", None]), opendelta.route(model, rows)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    torch.testing.assert_close(model(x), inside)
    inner.__exit__(None, None, None)
    assert torch.equal(model(x), expected)
    assert [delta.active for delta in composed] == [d.name != "de" for d in composed]
    LoraModel(model, modified_modules=["fc"], name="later")


def test_names_that_do_not_fit_change_nothing(two):
    model, x = two
    expected = model(x)
    for rows, message in {
        ("fr", "ed", None): r"no delta 'ed' is attached to Tower; .* nearest: 'de'",
        ("fr", 3, None): "3 must be a delta or the name of one",
        "fr": r"takes one entry for each row of the batch, .* not 'fr'",
        (): "one entry for each row",
    }.items():
        with pytest.raises(DeltaError, match=message), opendelta.route(model, rows):
            pass
    assert torch.equal(model(x), expected)


def test_a_merged_delta_goes_with_all_rows_or_is_refused(two):
    model, x = two
    rows = [["fr", "de"], ["fr"], ["fr", "legal"]]
    expected = rows_alone(model, rows, x)
    composition(model).merge("fr")
    with opendelta.route(model, rows):
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(DeltaError, match=r"cannot route rows around 'fr': it is merged into .* 4"):
        opendelta.route(model, ["fr", "de", "legal"]).__enter__()
    assert all(delta.active for delta in composition(model))


def test_heads_for_the_same_labels_are_routed_and_others_refused():
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(num_hidden_layers=1, vocab_size=96, num_labels=3, **sizes)
    model = transformers.BertForSequenceClassification(config).eval()
    for name, labels in {"a": 3, "b": None, "five": 5}.items():
        options = {"modules_to_save": ["classifier"], "num_labels": labels, "name": name}
        shake(LoraModel(model, **options), seed=ord(name[0]))
    batch = {"input_ids": token_ids(4)}
    assert_as_alone(model, ["a", "b", None, ["b", "a"]], batch)
    assert_as_alone(model, ["five", "five"], {"input_ids": token_ids(2)})
    with opendelta.route(model, ["a", "b", None, "a"]):
        loss = model(**batch, labels=torch.tensor([0, 1, 2, 0])).loss
    losses = [
        each_alone(
            model, [name], {"input_ids": batch["input_ids"][i : i + 1], "labels": labels},
            lambda model, batch: model(**batch).loss[None],
        )
        for i, (name, labels) in enumerate(
            zip(["a", "b", None, "a"], torch.tensor([[0], [1], [2], [0]]), strict=True)
        )
    ]  # fmt: skip
    torch.testing.assert_close(loss, torch.cat(losses).mean())
    with pytest.raises(SiteError, match=r"heads for \[3, 5, 3\] labels, which fit into no one"):
        opendelta.route(model, ["a", "five", None]).__enter__()


def test_owned_modules_of_other_shapes_and_those_that_fill_a_cache_are_refused():
    model = tower()
    wide = LoraModel(model, modified_modules=["fc"], modules_to_save=["head"], name="wide")
    wide.layers["head"].module = nn.Linear(8, 7)
    with (
        opendelta.route(model, ["wide", None]),
        pytest.raises(SiteError, match=r"\[\['wide'\], \[\]\] get outputs of 'head' .* \(1, 7\)"),
    ):
        model(vectors(2, 8))
    llama = build("llama")
    LoraModel(
        llama,
        modified_modules=["layers.1.self_attn.q_proj"],
        modules_to_save=["layers.0"],
        name="own",
    )
    with opendelta.route(llama, ["own", None]):
        assert_same_without_cache(llama)
        with pytest.raises(SiteError, match=r"'own' .*'model\.layers\.0' .* fills a KV cache"):
            llama.generate(token_ids(2), max_new_tokens=2)


def test_hooks_that_renew_the_input_of_layers_let_a_module_that_fills_a_cache_run_once():
    """As those of FSDP2 do."""

    def renew(layer, args, kwargs):
        return pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))

    llama, ids = build("llama"), token_ids(3)
    layers = []
    for name in "ab":
        delta = shake(AdapterModel(llama, modified_modules=["self_attn"], name=name))
        layers += delta.layers.values()
    with opendelta.route(llama, ["a", "b", None]):
        wanted = llama(ids).logits
        for layer in layers:
            layer.register_forward_pre_hook(renew, with_kwargs=True)
        torch.testing.assert_close(llama(ids, use_cache=True).logits, wanted)


def assert_same_without_cache(model):
    ids = token_ids(2)
    out = model(ids, use_cache=False).logits
    torch.testing.assert_close(out, build("llama")(ids).logits)


class Halved(DeltaLayer):
    """A layer of somebody else, which changes what goes into its module."""

    acts = Acts.BEFORE

    def __init__(self, site, config):
        super().__init__()

    def forward(self, call, hidden_states, *args, **kwargs):
        return call(hidden_states / 2, *args, **kwargs)


@pytest.fixture
def halving():
    class HalvedModel(opendelta.Delta):
        delta_type = "halved"
        config_class = type("HalvedConfig", (opendelta.DeltaConfig,), {})
        layer_class = Halved
        default_modified_modules = ("mlp",)

    yield HalvedModel
    METHODS.pop("halved")


def test_layers_that_change_the_input_run_their_module_on_their_rows(halving):
    model, ids = build("llama"), token_ids(3)
    halving(model, modified_modules=["mlp"], name="halve")
    rows = ["halve", None, "halve"]
    assert_as_alone(model, rows, {"input_ids": ids})
    put_default("lora", model, name="q")
    assert_as_alone(model, rows, {"input_ids": ids})
    LoraModel(model, modified_modules=["up_proj"], name="up")
    with (
        opendelta.route(model, rows),
        pytest.raises(SiteError, match=r"'halve' lets '.*mlp' run .* has other deltas inside"),
    ):
        model(ids)


class PerToken(nn.Module):
    """Two modules; the first is told how much each of a row's tokens counts."""

    def __init__(self):
        super().__init__()
        self.mlp, self.head = Weighing(), nn.Linear(8, 8)

    def forward(self, x, weights):
        return self.head(self.mlp(x, weights))


class Weighing(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, hidden_states, weights):
        return self.inner(hidden_states) * weights[:, None]


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("rows", [["a", None, None], ["a", "a", None], [None, "a", "a"]])
@pytest.mark.parametrize("kind", ["copy", "halved"])
def test_a_tensor_as_long_as_the_batch_is_not_taken_for_its_rows(kind, rows, length, halving):
    torch.manual_seed(0)
    model, x = PerToken(), vectors(3, length, 8)
    if kind == "copy":
        LoraModel(model, modified_modules=["head"], modules_to_save=["mlp"], name="a")
    else:
        halving(model, modified_modules=["mlp"], name="a")
    shake(composition(model)["a"])
    weights = torch.arange(length) + 1.0
    forward = lambda model, batch: model(batch["x"], weights)  # noqa: E731
    assert_as_alone(model, rows, {"x": x}, forward=forward)


def test_prefixes_act_inside_modules_that_run_on_all_rows(halving):
    model, ids = build("llama"), token_ids(3)
    LoraModel(model, modified_modules=["self_attn.o_proj"])
    IA3Model(model, modified_modules=["up_proj"], name="ia3")
    PrefixModel(model, prefix_token_num=2, reparameterize=False, name="prefix")
    assert_as_alone(model, ["prefix", "ia3", ["prefix", "ia3"]], {"input_ids": ids})


def test_experts_that_see_tokens_of_all_rows_are_refused():
    model = nn.Module()
    model.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    LoraModel(model, modified_modules=["0"], name="a")
    with pytest.raises(SiteError, match=r"'a' on 'experts\.0' sees some tokens of all rows, mixed"):
        opendelta.route(model, ["a", None]).__enter__()
    with opendelta.route(model, ["a", "a"]):
        pass


def test_weights_that_are_read_are_those_of_all_rows():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    shake(LoraModel(attention, modified_modules=["out_proj"], name="a"))
    x = vectors(2, 3, 8)
    expected = attention(x, x, x)[0]
    with opendelta.route(attention, ["a", "a"]):
        torch.testing.assert_close(attention(x, x, x)[0], expected)
    with (
        opendelta.route(attention, ["a", None]),
        pytest.raises(SiteError, match=r"'a' on 'out_proj' acts on the weight .* reads"),
    ):
        attention(x, x, x)


# ----------------------------------------------------------------------------------------- compiled
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_routed_model_compiles_into_one_graph_and_knows_a_route_again(method):
    torch._dynamo.reset()
    model, ids = build("llama"), token_ids(4)
    for name in ("a", "b"):
        put_default(method, model, name=name, seed=ord(name))
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    first, second = ["a", None, ["a", "b"], "a"], ["b", "b", None, "a"]
    with torch.no_grad():
        for rows in (first, second, first):
            with opendelta.route(model, rows):
                found, expected = fast(ids, use_cache=False), model(ids, use_cache=False)
            torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2


# -------------------------------------------------------------------------------------------- speed
def test_rows_over_many_loras_are_two_batched_products():
    model, x = nn.Sequential(nn.Linear(16, 20)).double(), vectors(16, 1, 16).double()
    names = [f"lora_{index}" for index in range(16)]
    for name in names:
        LoraModel(model, modified_modules=["0"], lora_r=2, name=name)
    with torch.no_grad(), opendelta.route(model, names):
        model(x)
        with Counted() as ops:
            model(x)
    assert (ops.of("bmm"), ops.of("baddbmm_"), ops.of("mm", "addmm", "addmm_")) == (1, 1, 1)
    with opendelta.route(model, names), Counted() as ops:
        model(x).sum().backward()
    assert ops.of("bmm", "baddbmm") == 2 + 3  # and the gradients of A, of B, and of A x
    with torch.no_grad(), opendelta.route(model, names), composition(model).frozen():
        model(x)
        with Counted() as ops:
            model(x)
    assert ops.of("stack", "cat") == 0
    with torch.no_grad(), opendelta.route(model, ["lora_0"] * 8 + ["lora_1"] * 8):
        model(x)
        with Counted() as ops:
            model(x)
    assert (ops.of("bmm", "baddbmm_"), ops.of("addmm_"), ops.of("mm")) == (0, 2, 2)


def test_a_module_runs_once_for_all_rows():
    model, x = tower(), vectors(4, 8)
    calls = []
    for name in "abc":
        AdapterModel(model, modified_modules=["blocks.0"], bottleneck_dim=2, name=name)
    model.blocks[0].out.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    with opendelta.route(model, ["a", "b", ["a", "c"], None]):
        model(x)
    assert calls == [4]
