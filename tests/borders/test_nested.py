"""Nested tensors, which torch makes of padded batches: a row computes what it computes alone."""

import pytest
import torch
from support.nets import shake
from torch import nn

import opendelta

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning"
)
OPTIONS = {
    "LokrModel": {"r": 2},
    "VeraModel": {"r": 4},
    "LoReftModel": {"low_rank_dimension": 2},
    "OFTModel": {"oft_block_size": 4},
}
NO_ATTENTION = {"PrefixModel", "SoftPromptModel", "AutoDeltaModel"}
METHODS = sorted({n for n in opendelta.methods.__all__ if n.endswith("Model")} - NO_ATTENTION)
PLACES = [["linear2"], ["norm1"], ["self_attn"], ["layers.0"]]
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.zeros(2, 5, dtype=torch.bool)
PADDING[0, 3:] = True


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()


def put(model, method, places, **more):
    if method == "ParallelAdapterModel":
        places = {"linear2": ["linear1", "linear2"]}.get(places[0], places * 2)
    cls = getattr(opendelta, method)
    return shake(cls(model, modified_modules=places, **OPTIONS.get(method, {}), **more))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_padded_batch_computes_what_its_rows_compute(method, gate):
    tried = 0
    for places in PLACES:
        model = encoder()
        try:
            put(model, method, places, gate=gate)
        except opendelta.SiteError:
            continue
        tried += 1
        with torch.no_grad():
            out = model(X, src_key_padding_mask=PADDING)
            rows = [model(X[:1, :3])[0], model(X[1:])[0]]
        for row, alone in zip(out, rows, strict=True):
            assert torch.allclose(row[: len(alone)], alone, atol=1e-5)
    assert tried


@pytest.mark.parametrize("options", [{"use_dora": True}, {"first": 1}, {"last": 2}], ids=str)
def test_dora_and_positions_go_by_the_row(options):
    model = encoder()
    method = "LoraModel" if "use_dora" in options else "LoReftModel"
    put(model, method, ["linear2"], **options)
    with torch.no_grad():
        out = model(X, src_key_padding_mask=PADDING)
        assert torch.allclose(out[0, :3], model(X[:1, :3])[0], atol=1e-5)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_layouts_names_and_gradients(layout):
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(False)
    delta = shake(opendelta.LokrModel(model, modified_modules=["0"], r=2))
    rows = [torch.randn(2, 4), torch.randn(3, 4)]
    given = torch.nested.nested_tensor(rows, layout=layout)
    out = model(given)
    assert out.layout == layout
    for one, other in zip(out.unbind(), rows, strict=True):
        assert torch.allclose(one, model(other), atol=1e-6)
    sum(row.sum() for row in out.unbind()).backward()
    own = [p.grad.clone() for p in delta.parameters()]
    delta_grads = torch.autograd.grad(sum(model(r).sum() for r in rows), list(delta.parameters()))
    for one, other in zip(own, delta_grads, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    if layout is torch.jagged:
        given + model(given)  # jagged tensors of other offsets cannot be added


def test_without_acting_layers_torch_takes_its_own_way():
    model = encoder()
    with torch.no_grad():
        plain = model(X, src_key_padding_mask=PADDING)
        delta = put(model, "IA3Model", ["linear2"])
        delta.disable()
        assert torch.allclose(model(X, src_key_padding_mask=PADDING)[1], plain[1], atol=1e-6)


class WithMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.encoder = nn.Embedding(30, 16), encoder()

    def forward(self, input_ids, attention_mask):
        hidden = self.embed(input_ids)
        return self.encoder(hidden, src_key_padding_mask=attention_mask == 0)


@pytest.mark.parametrize("places", [["linear2"], [r"[r]encoder\.layers\.\d+$"], ["encoder"]])
@pytest.mark.parametrize("options", [{"first": 1, "last": 1}, {"first": 2}, {"last": 2}], ids=str)
def test_positions_inside_a_model_with_a_mask_are_those_of_the_row(places, options):
    torch.manual_seed(0)
    model = WithMask().eval()
    ids, mask = torch.randint(1, 30, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:], mask[2, 2:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    put(model, "LoReftModel", places, **options, sample_inputs=inputs)
    wanted = model(**inputs)  # with gradients no tensor is nested
    with torch.no_grad():
        out = model(**inputs)
    assert torch.allclose(out * mask[..., None], wanted * mask[..., None], atol=1e-5)


@pytest.mark.parametrize(
    ("method", "places"),
    [
        *(("LoraModel", [place]) for place in ("linear1", "linear2")),
        *(("AdapterModel", [place]) for place in ("norm1", "self_attn", "layers.0")),
        *(("BitFitModel", [place]) for place in ("linear1", "norm1")),
    ],
)
def test_each_row_takes_its_own_deltas(method, places):
    model = encoder()
    for n, name in enumerate("ab"):
        shake(put(model, method, places, name=name), n)
    only = opendelta.composition(model).only
    with torch.no_grad():
        with only("a"):
            first = model(X[:1, :3])[0]
        with only("b"):
            second = model(X[1:])[0]
        for rows in (["a", "b"], [["a"], "b"]):
            with opendelta.route(model, rows):
                out = model(X, src_key_padding_mask=PADDING)
            assert torch.allclose(out[0, :3], first, atol=1e-5)
            assert torch.allclose(out[1], second, atol=1e-5)
        both = opendelta.parallel(model, ["a", "b"], src=X, src_key_padding_mask=PADDING)
    assert torch.allclose(both[0][0, :3], first, atol=1e-5)
    assert torch.allclose(both[1][1], second, atol=1e-5)


def test_a_branch_over_two_modules_takes_its_own_rows():
    model = encoder()
    for n, name in enumerate("ab"):
        shake(put(model, "ParallelAdapterModel", ["linear2"], name=name), n)
    with torch.no_grad():
        with opendelta.composition(model).only("b"):
            alone = model(X[1:])[0]
        with opendelta.route(model, [None, "b"]):
            out = model(X, src_key_padding_mask=PADDING)
    assert torch.allclose(out[1], alone, atol=1e-5)
