"""The equations of the papers, written out in float64 with numpy, against what the methods give."""

import copy

import numpy as np
import peft
import pytest
import torch
import transformers
from support.models import build, token_ids
from support.nets import WIDTH, net, put, shake
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN

import opendelta
from opendelta import (
    AdapterModel,
    CompacterModel,
    FourierFTModel,
    HRAModel,
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
from opendelta.author import Acts

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


@pytest.mark.covers(
    "AdapterModel", "AdapterConfig.bottleneck_dim", "AdapterConfig.scaling",
    "AdapterConfig.layer_norm",
)  # fmt: skip
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


@pytest.mark.covers(
    "ParallelAdapterModel", "ParallelAdapterConfig.bottleneck_dim",
    "ParallelAdapterConfig.non_linearity", "ParallelAdapterConfig.scaled",
)  # fmt: skip
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


@pytest.mark.covers(
    "LowRankAdapterModel", "LowRankAdapterConfig.reduction_factor",
    "LowRankAdapterConfig.non_linearity", "LowRankAdapterConfig.low_rank_rank",
)  # fmt: skip
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


@pytest.mark.covers(
    "CompacterModel", "CompacterConfig.reduction_factor", "CompacterConfig.non_linearity",
    "CompacterConfig.hypercomplex_division", "CompacterConfig.shared_phm_rule",
    "CompacterConfig.factorized_phm", "CompacterConfig.shared_W_phm",
    "CompacterConfig.factorized_phm_rule",
)  # fmt: skip
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


@pytest.mark.covers(
    "LoReftModel", "LoReftConfig.low_rank_dimension", "LoReftConfig.first", "LoReftConfig.last"
)
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


@pytest.mark.parametrize("scale", [0.1, 30.0])
@pytest.mark.parametrize(
    ("method", "options"),
    [(LoReftModel, {"low_rank_dimension": rank}) for rank in (1, 3, 99)]
    + [(OFTModel, {"oft_block_size": size}) for size in (2, 99)],
)
def test_what_is_exported_to_onnx_computes_the_same(method, options, scale, monkeypatch):
    model = two()
    shake(put(method, model, "w2", **options), scale=scale)
    expected = model(X)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    torch.testing.assert_close(model(X), expected, atol=1e-9, rtol=1e-9)


# --------------------------------------------------------------------------------------- the starts
LLAMA = transformers.LlamaConfig(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=60,
)  # fmt: skip


@pytest.mark.covers("LoraConfig.init")
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


@pytest.mark.covers(
    "SoftPromptModel", "SoftPromptConfig.token_init", "SoftPromptConfig.tokenizer",
    "SoftPromptConfig.soft_token_num",
)  # fmt: skip
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


@pytest.mark.covers("HRAModel", "HRAConfig.r")
@pytest.mark.parametrize("r", [2, 6])
def test_hra_is_pefts(r):
    model, theirs = two(), two()
    delta = shake(HRAModel(model, modified_modules=["w1", "w2"], r=r))
    config = peft.HRAConfig(r=r, target_modules=["w1", "w2"])
    theirs = peft.get_peft_model(theirs, config).double()
    with torch.no_grad():
        for name in ("w1", "w2"):
            layer = theirs.get_submodule(f"base_model.model.{name}")
            layer.hra_u["default"].copy_(delta.layers[name].hra_u)
        H = theirs.base_model.model.w1.get_delta_weight("default")
        ours = X
        for u in reversed(delta.layers["w1"].reflections(X)):
            ours = ours - 2 * (ours @ u)[..., None] * u
        torch.testing.assert_close(ours, X @ H.T, rtol=1e-12, atol=1e-12)
        before = model(X)
        opendelta.composition(model).merge()
        torch.testing.assert_close(model(X), before, rtol=1e-12, atol=1e-12)
        weight = two().w1.weight @ H
        torch.testing.assert_close(model.w1.weight, weight, rtol=1e-12, atol=1e-12)


@pytest.mark.covers("HRAModel")
def test_hra_starts_with_pairs_of_equal_vectors_and_refuses_an_odd_number():
    model = two()
    plain = model(X)
    u = HRAModel(model, modified_modules=["w1"]).layers["w1"].hra_u
    assert torch.equal(u[:, ::2], u[:, 1::2])
    torch.testing.assert_close(model(X), plain, rtol=1e-12, atol=1e-12)
    with pytest.raises(opendelta.OptionError, match=r"r=3 must be a multiple of 2"):
        HRAModel(two(), modified_modules=["w1"], r=3)


# -------------------------------------------------------- activations, seeds, and what is not built
@pytest.mark.covers("AdapterConfig.non_linearity")
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


@pytest.mark.covers("VeraModel", "VeraConfig.r", "VeraConfig.projection_prng_key")
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


@pytest.mark.covers("IA3Model", "IA3Config.feedforward_modules")
def test_ia3_scales_inputs_of_feed_forward_modules_and_outputs_of_others():
    model = net()
    delta = IA3Model(model, modified_modules=["linear", "conv1d"], feedforward_modules=["conv1d"])
    assert {name: layer.acts for name, layer in delta.layers.items()} == {
        "linear": Acts.AFTER,
        "conv1d": Acts.BEFORE,
    }
    with pytest.raises(opendelta.AddressError, match=r"no modified module matches 'bare'"):
        IA3Model(net(), modified_modules=["linear"], feedforward_modules=["bare"])


@pytest.mark.covers(
    "LohaModel", "LohaConfig.r", "LohaConfig.alpha", "LohaConfig.rank_pattern",
    "LohaConfig.alpha_pattern",
)  # fmt: skip
@pytest.mark.parametrize("patterns", [False, True])
def test_the_elementwise_product_of_loha_2108_06098(patterns):
    model = two()
    options = {"rank_pattern": {"w2": 1}, "alpha_pattern": {"w2": 5.0}} if patterns else {}
    delta = shake(LohaModel(model, modified_modules=["w2"], r=2, alpha=3.0, **options))
    A1, B1, A2, B2 = (value(p) for p in delta.layers["w2"].parameters())
    rank, alpha = (1, 5.0) if patterns else (2, 3.0)
    assert A1.shape == A2.shape == (WIDTH, rank)
    x = np.tanh(affine(value(X), model.w1))
    near(model, plain(model) + alpha / rank * x @ ((A1 @ B1) * (A2 @ B2)).T)


@pytest.mark.covers(
    "LokrModel", "LokrConfig.r", "LokrConfig.alpha", "LokrConfig.decompose_both",
    "LokrConfig.decompose_factor", "LokrConfig.rank_pattern", "LokrConfig.alpha_pattern",
)  # fmt: skip
@pytest.mark.parametrize(
    ("options", "alpha", "tensors"),
    [
        ({"r": 1}, 3.0, {"w1": (2, 3), "w2_a": (4, 1), "w2_b": (1, 4)}),
        ({"r": 2}, 1.5, {"w1": (2, 3), "w2": (4, 4)}),  # factors of rank 2 would be no smaller
        (
            {"r": 1, "decompose_both": True, "decompose_factor": 4},
            3.0,
            {"w1_a": (4, 1), "w1_b": (1, 4), "w2_a": (2, 1), "w2_b": (1, 3)},
        ),
        (
            {"r": 2, "rank_pattern": {"w2": 1}, "alpha_pattern": {"w2": 5.0}},
            5.0,
            {"w1": (2, 3), "w2_a": (4, 1), "w2_b": (1, 4)},
        ),
    ],
)
def test_the_kronecker_product_of_lokr_2309_14859(options, alpha, tensors):
    model = two()
    delta = shake(LokrModel(model, modified_modules=["w2"], alpha=3.0, **options))
    own = {name.removeprefix("lokr_"): p for name, p in delta.layers["w2"].named_parameters()}
    assert {name: tuple(p.shape) for name, p in own.items()} == tensors

    def factor(name):
        if name in own:
            return value(own[name])
        return value(own[f"{name}_a"]) @ value(own[f"{name}_b"])

    x = np.tanh(affine(value(X), model.w1))
    near(model, plain(model) + alpha * x @ np.kron(factor("w1"), factor("w2")).T)


@pytest.mark.covers(
    "FourierFTModel", "FourierFTConfig.n_frequency", "FourierFTConfig.scaling",
    "FourierFTConfig.random_loc_seed",
)  # fmt: skip
@pytest.mark.parametrize("seed", [0, 777])
def test_the_sparse_spectrum_of_fourierft_2405_03003(seed):
    model = two()
    options = {"n_frequency": 9, "scaling": 4.0, "random_loc_seed": seed}
    delta = shake(FourierFTModel(model, modified_modules=["w2"], **options))
    (spectrum,) = delta.parameters()
    places = torch.randperm(WIDTH * 12, generator=torch.Generator().manual_seed(seed))[:9]
    F = np.zeros(WIDTH * 12)
    F[places.numpy()] = value(spectrum)
    D = 4.0 * np.fft.ifft2(F.reshape(WIDTH, 12)).real
    near(model, plain(model) + np.tanh(affine(value(X), model.w1)) @ D.T)


@pytest.mark.covers(
    "CompacterConfig.phm_rank", "CompacterConfig.learn_phm", "CompacterConfig.use_bias_up_sampler",
    "CompacterConfig.use_bias_down_sampler",
)  # fmt: skip
@pytest.mark.parametrize(("down", "up"), [(True, False), (False, True)])
def test_compacter_of_a_higher_rank_with_fixed_rules_and_with_one_bias(down, up):
    model = two()
    delta = CompacterModel(
        model, modified_modules=["w2"], reduction_factor=2, hypercomplex_division=2,
        non_linearity="relu", phm_rank=2, phm_init_range=0.5, learn_phm=False,
        use_bias_down_sampler=down, use_bias_up_sampler=up,
    )  # fmt: skip
    layer, h = shake(delta).layers["w2"], plain(model)
    assert (layer.down_sampler.b is not None, layer.up_sampler.b is not None) == (down, up)
    assert not [name for name, _ in delta.named_parameters() if "phm_rule" in name]
    assert len([name for name in delta.state_dict() if "phm_rule" in name]) == 2

    def sampler(x, part):
        assert part.blocks.W_left.shape[-1] == part.blocks.W_right.shape[1] == 2
        A, B = value(part.rule.phm_rule), value(part.blocks.W_left) @ value(part.blocks.W_right)
        out = x @ sum(np.kron(A[i], B[i]) for i in range(2))
        return out if part.b is None else out + value(part.b)

    near(model, h + sampler(np.maximum(sampler(h, layer.down_sampler), 0), layer.up_sampler))


@pytest.mark.covers("CompacterConfig.kronecker_prod")
def test_the_two_ways_of_0_3_to_write_compacter_s_product_are_one():
    outputs = []
    for kronecker_prod in (None, True, False):
        model = two()
        delta = CompacterModel(model, modified_modules=["w2"], kronecker_prod=kronecker_prod)
        shake(delta)
        outputs.append(model(X))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
