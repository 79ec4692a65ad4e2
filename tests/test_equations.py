"""The equations of the papers, written out in float64 with numpy, against what the methods give."""

import copy

import numpy as np
import peft
import pytest
import torch
import transformers
from models import build, token_ids
from nets import WIDTH, put, shake
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN

import opendelta
from opendelta import (
    AdapterModel,
    CompacterModel,
    IA3Model,
    LohaModel,
    LokrModel,
    LoraModel,
    LoReftModel,
    LowRankAdapterModel,
    OFTModel,
    ParallelAdapterModel,
    SoftPromptModel,
    VeraModel,
)

X = torch.randn(3, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Two(nn.Module):
    """A feed-forward layer of two linear modules, on vectors of WIDTH."""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(WIDTH, 12)
        self.w2 = nn.Linear(12, WIDTH)

    def forward(self, x):
        return self.w2(torch.tanh(self.w1(x)))


def two():
    torch.manual_seed(0)
    return Two().double().eval()


def affine(x, module):
    """x W^T + b."""
    return x @ value(module.weight).T + value(module.bias)


def value(tensor):
    return tensor.detach().numpy()


def plain(model):
    """What `model` gives without its deltas."""
    with opendelta.composition(model).only():
        return value(model(X))


def near(model, expected):
    np.testing.assert_allclose(value(model(X)), expected, rtol=1e-10, atol=1e-10)


def tanh_gelu(x):
    """gelu_new: the approximation of arXiv:1606.08415."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("scaling", [1.0, 4.0])
@pytest.mark.parametrize("where", [None, "before", "after"])
def test_the_bottleneck_adapter_of_1902_00751(scaling, where):
    model = two()
    delta = shake(
        AdapterModel(
            model, modified_modules=["w2"], bottleneck_dim=3, scaling=scaling, layer_norm=where
        )
    )
    layer, h = delta.layers["w2"], plain(model)

    def norm(x):
        spread = np.sqrt(x.var(-1, keepdims=True) + layer.norm.eps)
        return (x - x.mean(-1, keepdims=True)) / spread * value(layer.norm.weight) + value(
            layer.norm.bias
        )

    x = norm(h) if where == "before" else h
    x = affine(tanh_gelu(affine(x, layer.down_proj)), layer.up_proj)
    near(model, h + scaling * (norm(x) if where == "after" else x))


@pytest.mark.parametrize("places", [["w2", "w2"], ["w1", "w2"]])
def test_the_scaled_parallel_adapter_of_2110_04366(places):
    model = two()
    delta = shake(
        ParallelAdapterModel(
            model, modified_modules=places, bottleneck_dim=3, non_linearity="relu", scaled=4.0
        )
    )
    layer, h = delta.layers[places[0]], plain(model)
    x = value(X) if places[0] == "w1" else np.tanh(affine(value(X), model.w1))
    near(model, h + 4 * affine(np.maximum(affine(x, layer.down_proj), 0), layer.up_proj))


@pytest.mark.parametrize("rank", [1, 2])
def test_the_low_rank_adapter_of_2106_04647(rank):
    model = two()
    delta = shake(
        LowRankAdapterModel(
            model, modified_modules=["w2"], reduction_factor=2, low_rank_rank=rank,
            non_linearity="relu",
        )
    )  # fmt: skip
    layer, h = delta.layers["w2"], plain(model)

    def sampler(x, part):
        return x @ (value(part.W_left) @ value(part.W_right)) + value(part.b)

    near(model, h + sampler(np.maximum(sampler(h, layer.down_sampler), 0), layer.up_sampler))


@pytest.mark.parametrize("factorized", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_the_sums_of_kronecker_products_of_compacter_2106_04647(factorized, shared):
    n = 2
    model = two()
    delta = CompacterModel(
        model, modified_modules=["w2"], reduction_factor=2, hypercomplex_division=n,
        non_linearity="relu", factorized_phm=factorized, factorized_phm_rule=factorized,
        shared_phm_rule=shared, shared_W_phm=shared,
    )  # fmt: skip
    shake(delta)
    layer, h = delta.layers["w2"], plain(model)

    def product(module, left, right, whole):
        """The n matrices of a module: stored whole, or as factors."""
        if factorized:
            return np.einsum("nij,njk->nik", value(left(module)), value(right(module)))
        return value(whole(module))

    def sampler(x, part):
        rule = layer.shared.rule if shared else part.rule
        blocks = layer.shared.blocks[part.key] if shared else part.blocks
        A = product(
            rule, lambda m: m.phm_rule_left, lambda m: m.phm_rule_right, lambda m: m.phm_rule
        )
        B = product(blocks, lambda m: m.W_left, lambda m: m.W_right, lambda m: m.W)
        return x @ sum(np.kron(A[i], B[i]) for i in range(n)) + value(part.b)

    near(model, h + sampler(np.maximum(sampler(h, layer.down_sampler), 0), layer.up_sampler))


@pytest.mark.parametrize(("first", "last"), [(None, None), (1, 2), (0, 1), (9, 9)])
def test_the_low_rank_change_of_loreft_2404_03592(first, last):
    model = two()
    delta = shake(put(LoReftModel, model, "w2", low_rank_dimension=2, first=first, last=last))
    layer, h = delta.layers["w2"], plain(model)
    Q, _ = np.linalg.qr(value(layer.rotate_layer))
    R = Q.T
    np.testing.assert_allclose(R @ R.T, np.eye(2), atol=1e-12)
    changed = h + (affine(h, layer.learned_source) - h @ R.T) @ R
    count = h.shape[1]
    place = np.arange(count)
    chosen = (place < (first or 0)) | (place >= count - (last or 0))
    if first is last is None:
        chosen[:] = True
    near(model, np.where(chosen[None, :, None], changed, h))


# --------------------------------------------------------------------------------------- the starts
LLAMA = transformers.LlamaConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=60,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_it_starts_from_the_weight_as_peft_does(init):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(LLAMA).eval()
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=init
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).base_model.model
    delta = LoraModel(
        base, modified_modules=["q_proj", "down_proj"], lora_r=4, lora_alpha=8, init=init
    )
    for name, layer in delta.layers.items():
        other = theirs.get_submodule(name)
        A, B = other.lora_A.default.weight, other.lora_B.default.weight
        assert torch.allclose(layer.lora_B @ layer.lora_A, B @ A, atol=1e-5)
        # what trains has the same directions, up to the sign of each that an SVD leaves open
        assert torch.allclose(layer.lora_A.abs(), A.abs(), atol=1e-4)
    ids = token_ids().remainder(60)
    assert torch.allclose(base(ids).logits, theirs(ids).logits, atol=1e-4)


def test_a_soft_prompt_starts_as_the_embeddings_of_a_text(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {word: number for number, word in enumerate(["[UNK]", "sort", "these", "films", "by"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    model = build("gpt2")
    delta = SoftPromptModel(
        model, soft_token_num=6, token_init="sort these films", tokenizer=str(tmp_path)
    )
    (layer,) = delta.layers.values()
    (prompt,) = layer.parameters()
    wanted = model.transformer.wte.weight[[1, 2, 3, 1, 2, 3]]
    assert torch.equal(prompt.reshape(6, -1), wanted)


# -------------------------------------------------------- activations, seeds, and what is not built
@pytest.mark.parametrize("name", sorted(ACT2FN))
def test_an_adapter_takes_each_activation_of_transformers(name):
    model = two()
    delta = shake(AdapterModel(model, modified_modules=["w2"], non_linearity=name))
    layer = delta.layers["w2"]
    with delta.disabled():
        h = model(X)
    activation = ACT2FN[name].to(X)
    activation.load_state_dict(layer.non_linearity.state_dict())  # some train a slope
    expected = h + layer.up_proj(activation(layer.down_proj(h)))
    assert torch.allclose(model(X), expected)


def test_the_matrices_that_vera_shares_are_a_seed_in_the_file(tmp_path):
    model = two()
    options = {"modified_modules": ["w1", "w2"], "r": 64}
    delta = shake(VeraModel(model, projection_prng_key=5, **options))
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    assert sum(t.numel() for t in delta.state_dict().values()) == 2 * 64 + 12 + WIDTH
    fresh, other = two(), two()
    opendelta.load(tmp_path, fresh)
    assert torch.equal(fresh(X), model(X))
    VeraModel(other, projection_prng_key=6, **options).load_state_dict(delta.state_dict())
    assert not torch.allclose(other(X), model(X))


class Made(TorchDispatchMode):
    """Collects the sizes of all tensors that operations make, without views of others."""

    def __init__(self):
        super().__init__()
        self.sizes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not out._is_view() and not function.is_view:
            self.sizes.add(out.numel())
        return out


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LoraModel, {"lora_r": 2}),
        (LohaModel, {"r": 2}),
        (LokrModel, {"r": 2, "decompose_factor": 8}),
        (VeraModel, {"r": 4}),
        (OFTModel, {"oft_block_size": 8}),
        (IA3Model, {}),
    ],
)
def test_a_forward_builds_no_change_of_the_weights_size(method, options):
    model = nn.Sequential(nn.Linear(64, 96))
    delta = shake(method(model, modified_modules=["0"], **options))
    with torch.no_grad(), Made() as made:
        model(torch.zeros(1, 64))
    assert max(made.sizes) < 64 * 96
    with torch.no_grad(), Made() as made:
        delta.layers["0"].fold(dict(model[0].named_parameters(recurse=False)))
    assert max(made.sizes) >= 64 * 96  # which this would have seen


def test_dora_starts_as_the_identity_on_rows_of_zeros_too_and_trains_them():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    with torch.no_grad():
        model[0].weight[1] = 0
    plain = model(x)
    delta = LoraModel(model, modified_modules=["0"], lora_r=2, use_dora=True)
    torch.testing.assert_close(model(x), plain)
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x)[:, 1].pow(2).sum().backward()
        assert all(p.grad.isfinite().all() for p in delta.parameters())
        optimizer.step()
    assert not torch.allclose(model(x)[:, 1], plain[:, 1], atol=1e-4)


@pytest.mark.parametrize(
    "sizes", [(16, 32), (32, 16)]
)  # a product that is computed again, and one kept
def test_dora_s_gradients_beside_a_bfloat16_weight_are_exact_but_for_its_rounding(sizes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*sizes)).bfloat16()
    options = {"modified_modules": ["0"], "use_dora": True, "dtype": "float32"}
    layer = shake(LoraModel(model, **options), scale=0.1).layers["0"]
    x = torch.randn(64, sizes[0]).bfloat16()
    model(x).float().pow(2).sum().backward()

    exact = {k: p.detach().double().requires_grad_() for k, p in layer.named_parameters()}
    W, b = (p.detach().double() for p in (model[0].weight, model[0].bias))
    changed = W + layer.scaling * exact["lora_B"] @ exact["lora_A"]
    n = exact["lora_magnitude_vector"] / changed.norm(dim=1).detach()
    (n * (x.double() @ changed.T) + b).pow(2).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad.double() - exact[name].grad).norm() / exact[name].grad.norm()
        assert error < 2e-2, name
