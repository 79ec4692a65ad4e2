"""A module with two names takes each layer once, by whichever name, and no copy beside a layer."""

import pytest
import torch
from support.nets import shake
from torch import nn

import opendelta
from opendelta import (
    AddressError,
    AverageModel,
    DeltaLoadError,
    LoraModel,
    ParallelAdapterModel,
    composition,
)

pytestmark = pytest.mark.covers("DeltaConfig.modified_modules", "AddressError")

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """One block, run twice, as in ALBERT."""

    def __init__(self, second=None):
        super().__init__()
        block = nn.Sequential()
        block.up, block.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList([block, block if second is None else second])

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def made():
    torch.manual_seed(0)
    return Net().eval()


PAIRS = {
    "one name": ["blocks.0", "blocks.0"],
    "the other": ["blocks.1", "blocks.1"],
    "both": ["blocks.0", "blocks.0", "blocks.1", "blocks.1"],
    "from one to the other": ["blocks.0", "blocks.1"],
    "by a pattern": [r"[r]blocks\.\d", r"[r]blocks\.\d"],
}


@pytest.mark.parametrize("names", PAIRS.values(), ids=PAIRS)
def test_a_branch_around_it_is_put_once(names, tmp_path):
    model = made()
    delta = ParallelAdapterModel(model, modified_modules=names, bottleneck_dim=4)
    (layer,) = delta.layers.values()
    delta.freeze_module()
    shake(delta)

    def block(x):
        inner = model.blocks[0]
        plain = nn.functional.linear(x, inner.up.weight, inner.up.bias)
        return nn.functional.linear(plain, inner.down.weight, inner.down.bias) + layer.branch(x)

    out = model(X)
    torch.testing.assert_close(out, torch.tanh(block(torch.tanh(block(X)))))
    in_model = {n for n, _ in model.named_parameters() if "deltas" in n}
    assert len(in_model) == len(list(delta.parameters()))
    assert not opendelta.unreached(model)
    composition(model).save(tmp_path)
    fresh = made()
    opendelta.load(tmp_path, fresh)
    assert torch.equal(fresh(X), out)
    delta.detach()
    opendelta.assert_pristine(model)


def test_branches_inside_it_are_put_once():
    model = made()
    delta = ParallelAdapterModel(model, modified_modules=["up", "down"], bottleneck_dim=4)
    assert list(delta.layers) == ["blocks.0.up", "blocks.0.down"]
    shake(delta)
    model(X)
    assert not opendelta.unreached(model)


def test_a_module_in_two_branches_by_two_names_is_refused():
    names = ["blocks.0.up", "blocks.0.down", "blocks.1.down", "blocks.1.down"]
    model = made()
    with pytest.raises(AddressError, match=r"'blocks\.0\.down' is in two pairs"):
        ParallelAdapterModel(model, modified_modules=names, bottleneck_dim=4)
    opendelta.assert_pristine(model)


@pytest.mark.parametrize("saved", ["blocks.0", "blocks.1"])
@pytest.mark.parametrize("modified", ["blocks.0.up", "blocks.1.up", "blocks.0", "blocks.1"])
def test_a_copy_in_the_place_of_a_module_with_a_layer_is_refused(modified, saved):
    model = made()
    method, given = (
        (LoraModel, [modified]) if "up" in modified else (opendelta.AdapterModel, [modified])
    )
    with pytest.raises(AddressError, match=r"modules_to_save='blocks\.[01]'.* puts a copy"):
        method(model, modified_modules=given, modules_to_save=[saved])
    opendelta.assert_pristine(model)


def test_a_block_is_put_there_by_either_name():
    model = made()
    for name in ("a", "b"):
        shake(LoraModel(model, modified_modules=["blocks.0.up"], name=name))
    mean = AverageModel(model, deltas=["a", "b"], modified_modules=["blocks.1.up"])
    assert list(mean.layers) == ["blocks.0.up"]


def test_a_file_with_a_layer_for_each_name_is_refused(tmp_path):
    torch.manual_seed(0)
    model = Net(nn.Sequential())
    model.blocks[1].up, model.blocks[1].down = nn.Linear(8, 8), nn.Linear(8, 8)
    shake(LoraModel(model, modified_modules=["up"])).freeze_module()
    composition(model).save(tmp_path)
    fresh = made()
    with pytest.raises(DeltaLoadError, match=r"'blocks\.0\.up' and 'blocks\.1\.up' are one Linear"):
        opendelta.load(tmp_path, fresh)
    opendelta.assert_pristine(fresh)


def test_default_places_of_a_shared_block_are_put_once():
    import transformers

    config = transformers.AlbertConfig(
        vocab_size=20, embedding_size=8, hidden_size=8, num_hidden_layers=3,
        num_attention_heads=2, intermediate_size=16, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AlbertModel(config).eval()
    group = model.encoder.albert_layer_groups
    group.append(group[0])
    delta = ParallelAdapterModel(model, bottleneck_dim=4)
    shake(delta)
    in_model = {n for n, _ in model.named_parameters() if "deltas" in n}
    assert len(in_model) == len(list(delta.parameters()))
    model(torch.arange(5)[None])
    assert not opendelta.unreached(model)
