"""`parallel`: several sets of deltas, their heads and losses, over one forward of the backbone."""

import functools
import threading

import pytest
import torch
import transformers
from support.nets import filled as filled_by
from torch import nn

from opendelta import (
    AdapterModel,
    AverageModel,
    DeltaError,
    FuseModel,
    LoraModel,
    LoReftModel,
    OptionError,
    PrefixModel,
    SiteError,
    assert_pristine,
    composition,
    parallel,
    route,
)

filled = functools.partial(filled_by, scale=0.2)
IDS = torch.randint(3, 99, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
LABELS = torch.tensor([0, 1, 1])
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def bert():
    torch.manual_seed(1)
    config = transformers.BertConfig(**SIZES, num_hidden_layers=2, vocab_size=99)
    return transformers.BertForSequenceClassification(config).eval()


@pytest.fixture
def heads(bert):
    deltas = [
        cls(bert, modules_to_save=["classifier"], num_labels=count, name=name)
        for cls, count, name in ((LoraModel, 3, "a"), (AdapterModel, 5, "b"), (LoReftModel, 4, "c"))
    ]
    filled(*deltas)
    return deltas


def alone(model, names, **batch):
    names = [] if names is None else [names] if isinstance(names, str) else names
    with composition(model).only(*names):
        return model(**batch)


@pytest.mark.covers("parallel")
def test_each_set_has_its_own_head_and_loss_over_one_forward_of_the_backbone(bert, heads):
    experts = [AdapterModel(bert, name="d"), LoraModel(bert, name="e")]
    fuse = FuseModel(bert, deltas=experts, name="fuse")
    filled(*experts, fuse)
    sets = ["a", ["b"], ["fuse", "a"], None, {"c": 0.5}]
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    with composition(bert).only("c"):
        heads[2].scale = 0.5
        last = bert(**batch)
        heads[2].scale = 1.0
    wanted = [*(alone(bert, names, **batch) for names in sets[:4]), last]
    rows = []
    hook = bert.bert.encoder.layer[0].register_forward_hook(
        lambda _, args, out: rows.append(args[0].size(0))
    )
    found = parallel(bert, sets, **batch)
    hook.remove()
    assert rows == [15]
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.logits, want.logits)
        torch.testing.assert_close(got.loss, want.loss)
    sum(got.loss for got in found).backward()
    every = (fuse, *experts, *heads)
    missing = [n for d in every for n, p in d.named_parameters() if p.grad is None]
    assert missing == []
    bert.zero_grad()
    for delta in every:
        delta.detach()
    assert "forward" not in vars(bert.bert)
    assert_pristine(bert)


def test_gradients_are_those_of_each_set_alone(bert, heads):
    batch = {"input_ids": IDS, "labels": LABELS}
    sum(out.loss for out in parallel(bert, ["a", "b"], **batch)).backward()
    found = {n: p.grad for n, p in bert.named_parameters() if p.grad is not None}
    bert.zero_grad()
    for name in ("a", "b"):
        alone(bert, name, **batch).loss.backward()
    for name, p in bert.named_parameters():
        if p.grad is not None and "deltas" in name:
            torch.testing.assert_close(found[name], p.grad)


def test_sets_may_have_inputs_and_labels_of_their_own(bert, heads):
    other = IDS.flip(1)
    found = parallel(
        bert,
        ["a", "b"],
        own={heads[1]: {"labels": LABELS + 3}, 0: {"input_ids": other}},
        input_ids=IDS,
        labels=LABELS,
    )
    wanted = [
        alone(bert, "a", input_ids=other, labels=LABELS),
        alone(bert, "b", input_ids=IDS, labels=LABELS + 3),
    ]
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.logits, want.logits)
        torch.testing.assert_close(got.loss, want.loss)


def test_prefixes_and_padding_on_the_left_are_as_alone():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        **SIZES, num_hidden_layers=2, vocab_size=99, pad_token_id=0, num_key_value_heads=1
    )
    model = transformers.LlamaForCausalLM(config).eval()
    deltas = [
        PrefixModel(model, prefix_token_num=3, reparameterize=False, name="p"),
        LoReftModel(model, first=1, last=2, name="r"),
        LoraModel(model, modified_modules=["q_proj"], name="a"),
    ]
    filled(*deltas)
    labels = IDS.masked_fill((MASK == 0) | (MASK.roll(1, 1) == 0), -100)  # none after padding
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    sets = ["p", "r", ["a", "p"], None]
    for got, names in zip(parallel(model, sets, **batch), sets, strict=True):
        want = alone(model, names, **batch)
        torch.testing.assert_close(got.logits[MASK == 1], want.logits[MASK == 1])
        torch.testing.assert_close(got.loss, want.loss, rtol=1e-4, atol=1e-5)
        assert got.past_key_values is None


def test_an_encoder_decoder_shifts_the_labels_of_all_sets():
    torch.manual_seed(1)
    config = transformers.BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=99,
        max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    deltas = [LoraModel(model, name=name) for name in ("a", "b")]
    filled(*deltas)
    batch = {"input_ids": IDS, "labels": IDS[:, :5].contiguous()}
    for got, name in zip(parallel(model, ["a", "b"], **batch), ("a", "b"), strict=True):
        want = alone(model, name, **batch)
        torch.testing.assert_close(got.logits, want.logits)
        torch.testing.assert_close(got.loss, want.loss)


def test_a_model_without_a_backbone_inside_runs_once_as_a_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.runs = nn.Linear(8, 8), 0

        def forward(self, x):
            self.runs += 1
            return self.inner(x)

    net = Net()
    deltas = [LoraModel(net, modified_modules=["inner"], name=name) for name in ("a", "b")]
    filled(*deltas)
    x = torch.randn(2, 8)
    found = parallel(net, ["a", "b", None], x=x)
    assert net.runs == 1
    for got, names in zip(found, ("a", "b", None), strict=True):
        torch.testing.assert_close(got, alone(net, names, x=x))
    with pytest.raises(OptionError, match="has no base_model, so it runs once as a whole"):
        parallel(net, ["a"], x=x, labels=x)


def test_other_threads_run_the_model_as_ever(bert, heads):
    wanted = alone(bert, None, input_ids=IDS).logits
    found, stop = [], threading.Event()

    def serve():
        with composition(bert).only():
            while not stop.is_set():
                found.append(bert(input_ids=IDS).logits)

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(20):
        parallel(bert, ["a", "b"], input_ids=IDS)
    stop.set()
    thread.join()
    assert found
    assert all(torch.equal(each, found[0]) for each in found)
    torch.testing.assert_close(found[0], wanted)


def test_what_fits_into_no_batch_is_refused(bert, heads):
    with pytest.raises(DeltaError, match="takes a list of sets"):
        parallel(bert, "a", input_ids=IDS)
    with pytest.raises(DeltaError, match="it has no tensor"):
        parallel(bert, ["a"])
    with pytest.raises(DeltaError, match=r"have input_ids= \[\[3, 7\], \[3, 5\]\]"):
        parallel(bert, ["a", "b"], own={1: {"input_ids": IDS[:, :5]}}, input_ids=IDS)
    with pytest.raises(DeltaError, match="the sets have different arguments"):
        parallel(bert, ["a", "b"], own={1: {"attention_mask": MASK}}, input_ids=IDS)
    with pytest.raises(OptionError, match="it names 2"):
        parallel(bert, ["a", ["a", "b"]], own={"a": {"input_ids": IDS}}, input_ids=IDS)
    with pytest.raises(OptionError, match=r"own=\{'a': ...\}\) must give .* by name.* a Tensor"):
        parallel(bert, ["a"], own={"a": IDS}, input_ids=IDS)
    with pytest.raises(DeltaError, match="no delta 'x' is attached"):
        parallel(bert, ["x"], input_ids=IDS)
    for name, value in (("use_cache", True), ("past_key_values", transformers.DynamicCache())):
        with pytest.raises(DeltaError, match=rf"parallel\({name}=...\) takes no KV cache"):
            parallel(bert, ["a"], input_ids=IDS, **{name: value})


def test_a_prefix_in_a_block_is_refused_with_the_block_s_name(bert):
    PrefixModel(bert, prefix_token_num=2, name="p")
    AverageModel(bert, deltas=["p"], name="mean")
    AdapterModel(bert, modified_modules=["attention.self"], name="x")
    with pytest.raises(SiteError, match=r"'p' on .* acts in the block 'mean', so that it acts"):
        parallel(bert, ["mean", None], input_ids=IDS)
    with pytest.raises(SiteError, match=r"'x' on .* acts beside 'p' in the block 'mean', so"):
        parallel(bert, ["mean", ["mean", "x"]], input_ids=IDS)


@pytest.mark.filterwarnings("ignore:.*did not run in the first forward")
def test_a_model_that_does_not_call_its_backbone_is_refused(bert, heads):
    bert.forward = lambda **_: None
    with pytest.raises(SiteError, match="does not call its base_model"):
        parallel(bert, ["a"], input_ids=IDS)


@pytest.mark.covers("route")
def test_rows_have_weights():
    net = nn.Sequential(nn.Linear(8, 8)).double()
    a, b = (LoraModel(net, modified_modules=["0"], name=name) for name in "ab")
    c = AdapterModel(net, modified_modules=["0"], name="c")
    filled(a, b, c)
    x = torch.randn(4, 8, dtype=torch.float64)
    h = nn.functional.linear(x, net[0].weight, net[0].bias)
    change = {name: alone(net, name, input=x) - h for name in "abc"}
    b.scale = 3.0
    with route(net, [{"a": 0.7, "b": -0.5}, ["b"], None, {"c": 2.0}]):
        found = net(x)
    wanted = h.clone()
    wanted[0] += 0.7 * change["a"][0] - 1.5 * change["b"][0]
    wanted[1] += 3 * change["b"][1]
    wanted[3] += 2 * change["c"][3]
    torch.testing.assert_close(found, wanted)
    bad = [({"a": "much"}, "must be a number"), ({"x": 1.0}, "no delta 'x'")]
    for row, match in bad:
        with pytest.raises(DeltaError, match=match), route(net, [row]):
            pass


@pytest.mark.parametrize("given", [("labels", "position_ids", "input_ids"), ("input_ids",)])
def test_the_main_input_says_how_many_rows_there_are_wherever_it_is_written(bert, given):
    filled(*(LoraModel(bert, modified_modules=["query"], name=name) for name in "ab"))
    every = {"input_ids": IDS[:2], "position_ids": torch.arange(7)[None], "labels": LABELS[:2]}
    batch = {key: every[key] for key in given}
    for name, out in zip("ab", parallel(bert, ["a", "b"], **batch), strict=True):
        torch.testing.assert_close(out.logits, alone(bert, name, **batch).logits)


def test_rows_of_one_set_alone_do_not_fit_what_all_share(bert):
    LoraModel(bert, modified_modules=["query"], name="a")
    batch = {"input_ids": IDS, "attention_mask": MASK}
    with pytest.raises(DeltaError, match=r"have attention_mask= .* for \[3, 2\] rows, which fit"):
        parallel(bert, ["a", None], own={1: {"input_ids": IDS[:2]}}, **batch)
    shared = torch.ones(1, 7, dtype=torch.long)
    outs = parallel(
        bert, ["a", None], own={1: {"input_ids": IDS[:2]}}, input_ids=IDS, attention_mask=shared
    )
    assert [len(out.logits) for out in outs] == [3, 2]


def test_images_and_their_positions_are_given_to_each_set():
    text = {
        **SIZES, "vocab_size": 60, "num_hidden_layers": 1, "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0
        },
    }  # fmt: skip
    vision = {
        "depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 2,
        "temporal_patch_size": 1, "spatial_merge_size": 2, "in_channels": 3,
    }  # fmt: skip
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    special = ends | {f"{name}_token_id": 55 + i for i, name in enumerate(("image", "video"))}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=57, **special
    )
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    filled(*(LoraModel(model, modified_modules=["q_proj"], name=name) for name in "ab"))
    ids = torch.tensor([[1, 57, 55, 55, 58, 2, 3, 4], [5, 57, 55, 55, 58, 6, 7, 8]])
    images = {
        "input_ids": ids, "mm_token_type_ids": (ids == 55).int(),
        "pixel_values": torch.randn(16, 12), "image_grid_thw": torch.tensor([[1, 2, 4]] * 2),
    }  # fmt: skip
    texts = {"input_ids": IDS % 50, "position_ids": torch.arange(7).expand(3, 3, 7)}
    for batch in (images, texts):
        for name, out in zip("ab", parallel(model, ["a", "b"], **batch), strict=True):
            torch.testing.assert_close(
                out.logits, alone(model, name, **batch).logits, atol=1e-4, rtol=1e-3
            )
