"""Sparse inputs run; lazy and complex modules are refused by name, before anything has changed."""

import pytest
import torch
from support.nets import shake
from torch import nn

import opendelta
from opendelta import AdapterModel, IA3Model, LoraModel, ParallelAdapterModel, SiteError

SPARSE = "ignore:Sparse .* tensor support is in beta state:UserWarning"
OPTIONS = {
    "LokrModel": {"r": 2},
    "VeraModel": {"r": 4},
    "LoReftModel": {"low_rank_dimension": 2},
    "OFTModel": {"oft_block_size": 4},
    "CompacterModel": {"hypercomplex_division": 2},
}
OTHERS = {"PrefixModel", "SoftPromptModel", "AutoDeltaModel", "LNTuningModel"}
METHODS = sorted({n for n in opendelta.methods.__all__ if n.endswith("Model")} - OTHERS)
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).relu()


def put(model, method, **more):
    places = ["0", "0"] if method == "ParallelAdapterModel" else ["0"]
    options = OPTIONS.get(method, {})
    return getattr(opendelta, method)(model, modified_modules=places, **options, **more)


@pytest.mark.filterwarnings(SPARSE)
@pytest.mark.parametrize("more", [{}, {"gate": True}], ids=["", "gate"])
@pytest.mark.parametrize("method", METHODS)
def test_a_sparse_input_computes_what_the_dense_one_does(method, more):
    model = nn.Sequential(nn.Linear(8, 8))
    delta = shake(put(model, method, **more))
    wanted = model(X)
    for sparse in (X.to_sparse(), X.to_sparse_csr()):
        out = model(sparse)
        assert torch.allclose(out, wanted, atol=1e-5)
        out.sum().backward()
    assert all(p.grad is not None for p in delta.parameters())


@pytest.mark.filterwarnings(SPARSE)
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("LoraModel", {"lora_dropout": 0.5}),
        ("LoraModel", {"lora_dropout": 0.5, "use_dora": True}),
        ("VeraModel", {"vera_dropout": 0.5}),
    ],
    ids=["lora", "dora", "vera"],
)
def test_what_is_dropped_of_a_sparse_input_is_that_of_the_dense_one(method, more):
    model = nn.Sequential(nn.Linear(8, 8))
    shake(put(model, method, **more))
    outputs = []
    for x in (X, X.to_sparse(), X.to_sparse_csr()):
        torch.manual_seed(0)
        outputs.append(model(x))
        outputs[-1].sum().backward()
    assert not torch.allclose(outputs[0], model.eval()(X))
    assert all(torch.allclose(out, outputs[0], atol=1e-5) for out in outputs)


@pytest.mark.filterwarnings(SPARSE)
def test_a_sparse_input_is_rescaled_and_routed_like_the_dense_one():
    model = nn.Sequential(nn.Linear(8, 8))
    shake(IA3Model(model, modified_modules=["0"], feedforward_modules=["0"]))
    shake(LoraModel(model, modified_modules=["0"]))
    whole = model(X)
    with opendelta.route(model, ["ia3", None, "lora"]):
        rows = model(X)
    for sparse in (X.to_sparse(), X.to_sparse_csr()):
        assert torch.allclose(model(sparse), whole, atol=1e-5)
        with opendelta.route(model, ["ia3", None, "lora"]):
            assert torch.allclose(model(sparse), rows, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.LazyLinear(8), r"'0' \(LazyLinear\) gets its sizes in its first forward: run"),
        (lambda: nn.Linear(8, 8, dtype=torch.complex64), r"'0' \(Linear\) has complex weights"),
    ],
    ids=["lazy", "complex"],
)
def test_weights_without_a_delta_are_refused_by_name(make, says, method):
    model = nn.Sequential(make())
    own = dict(model.named_modules())
    with pytest.raises(SiteError, match=says) as caught:
        put(model, method)
    assert caught.value.where == "0"
    assert dict(model.named_modules()) == own
    assert not opendelta.composition(model).names


def test_lazy_modules_keep_their_state_when_others_are_measured():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.LazyLinear(2))
    with pytest.raises(SiteError, match=r"'1' \(LazyLinear\) gets its sizes"):
        AdapterModel(model, modified_modules=["0"])
    assert isinstance(model[1], nn.LazyLinear)
    LoraModel(model, modified_modules=["0.0"])  # its size is known
    with pytest.raises(SiteError, match=r"'1' \(LazyLinear\) gets its sizes"):
        opendelta.check(model)
    model(X)
    AdapterModel(model, modified_modules=["0"])


class First(nn.Module):
    """A linear module on the first token of each row."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x):
        return self.dense(x[:, 0])


@pytest.mark.parametrize("pair", [["1", "1"], ["0", "1"]])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_branch_is_not_stretched_over_rows_or_tokens(batch, pair):
    model = nn.Sequential(nn.Linear(8, 8), First())
    if pair[0] == pair[1]:
        with pytest.raises(SiteError, match="a branch needs the same rows and tokens"):
            ParallelAdapterModel(model, modified_modules=pair, bottleneck_dim=2)
        return
    ParallelAdapterModel(model, modified_modules=pair, bottleneck_dim=2)
    says = rf"its branch gives \[{batch}, 3, 8\], and the output .* is \[{batch}, 8\]"
    with pytest.raises(SiteError, match=says):
        model(torch.randn(batch, 3, 8))


@pytest.mark.parametrize("more", [{}, {"gate": True}], ids=["", "gate"])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_without_a_batch_computes_what_it_does_in_one(method, more):
    model = nn.Sequential(nn.Linear(8, 8))
    shake(put(model, method, **more))
    wanted = model(X)
    for x, row in zip(X, wanted, strict=True):
        torch.testing.assert_close(model(x), row)
    torch.testing.assert_close(torch.func.vmap(model)(X), wanted)
