"""Code that reads a weight, or calls a part, of a module in `modules_to_save` gets the copy's."""

import copy
import pickle

import accelerate
import pytest
import torch
import transformers
from support.models import build
from support.nets import shake
from torch import nn
from torch.nn import functional as F

import opendelta
from opendelta import AdapterModel, LoraModel, SiteError, composition, route

pytestmark = pytest.mark.covers("DeltaConfig.reads", "DeltaConfig.modules_to_save")


class Tied(nn.Module):
    """A language model whose head reads the weight of its embedding."""

    def __init__(self):
        super().__init__()
        self.emb, self.mid = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, input_ids):
        return F.linear(torch.tanh(self.mid(self.emb(input_ids))), self.emb.weight)


class Named(nn.Module):
    """A module of somebody's own, with a parameter of another name."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.gain


class Scaled(nn.Linear):
    """A Linear with a forward of its own."""

    def __init__(self):
        super().__init__(8, 8)
        self.factor = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return F.linear(x, self.weight * self.factor, self.bias)


IDS = torch.arange(10).view(2, 5)
MODULES = {
    "Linear": lambda: nn.Linear(8, 8),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "Conv1d": lambda: nn.Conv1d(5, 5, 1),
    "GRU": lambda: nn.GRU(8, 8),
    "Named": Named,
    "Scaled": Scaled,
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
}


class Chain(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), module

    def forward(self, x):
        out = self.b(self.a(x))
        return out if isinstance(out, torch.Tensor) else out[0]


NAMES = ("weight", "bias", "gain", "factor", "weight_ih_l0")


def read(module):
    """Return what code reads of a module, by name."""
    found = {name: getattr(module, name, None) for name in NAMES}
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("kind", MODULES)
def test_all_parameters_of_a_copy_are_read_as_long_as_it_acts(kind):
    net = Chain(MODULES[kind]())
    x = torch.randn(2, 5, 8)
    plain, before, own = net(x), opendelta.snapshot(net), read(net.b)
    names = [name for name, _ in net.named_parameters()]
    delta = LoraModel(net, modified_modules=["a"], modules_to_save=["b"], reads=True)
    shake(delta)
    copied = delta.layers["b"].module
    places = [net, copy.deepcopy(net)]
    if kind != "weight_norm":  # torch pickles none
        places.append(pickle.loads(pickle.dumps(net)))
    for place in places:
        theirs = place.b.deltas.lora.module
        for name, value in read(place.b).items():
            assert torch.equal(value, getattr(theirs, name))
            assert value is getattr(theirs, name) or kind == "weight_norm"
    assert read(net.b).keys() == own.keys()
    with composition(net).only():
        for name, value in read(net.b).items():
            assert torch.equal(value, own[name])
        assert torch.equal(net(x), plain)
    with composition(net).frozen():
        for name, value in read(net.b).items():
            assert torch.equal(value, getattr(copied, name))
    assert [n for n, _ in net.named_parameters() if "deltas" not in n] == names
    net.double().float()
    delta.detach()
    opendelta.assert_pristine(net, like=before)
    assert torch.equal(net(x), plain)


def test_a_head_that_reads_its_embedding_trains_the_copy_in_both_uses():
    net = Tied()
    delta = LoraModel(net, modified_modules=["mid"], modules_to_save=["emb"], reads=True)
    shake(delta)
    weight = net.emb.weight
    assert weight is delta.layers["emb"].module.weight
    expected = F.linear(torch.tanh(net.mid(F.embedding(IDS, weight))), weight)
    out = net(IDS)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert weight.grad.abs().sum(1).gt(0).all()
    assert torch.allclose(composition(net).to_backbone()(IDS), expected, atol=1e-5)


def test_rows_without_the_copy_run_through_the_module_itself():
    net = Chain(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)))
    x = torch.randn(2, 5, 8)
    plain = net(x)
    shake(LoraModel(net, modified_modules=["a"], modules_to_save=["b"], reads=True))
    both = net(x)
    with route(net, [["lora"], []]):
        assert torch.allclose(net(x), torch.stack([both[0], plain[1]]), atol=1e-6)
        with pytest.raises(SiteError, match="acts on all rows"):
            net.b[0]


def test_a_module_in_a_dtype_of_its_own_shows_the_copy_in_that_dtype():
    net = Tied().bfloat16()
    shake(LoraModel(net, modified_modules=["mid"], modules_to_save=["emb"], reads=True))
    assert net.emb.weight.dtype == torch.bfloat16
    net(IDS).float().sum().backward()


def test_the_parts_of_a_copied_head_are_read_and_called():
    config = transformers.RobertaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=40, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.RobertaForMaskedLM(config).eval()
    own = model.get_output_embeddings()
    options = {"modified_modules": ["query"], "modules_to_save": ["lm_head"], "reads": True}
    delta = shake(LoraModel(model, **options))
    batch = {"input_ids": torch.arange(3, 15).view(2, 6)}
    head, out = model.lm_head, model.get_output_embeddings()
    x = head.layer_norm(F.gelu(head.dense(model.roberta(**batch).last_hidden_state)))
    read = F.linear(x, out.weight, out.bias)
    assert torch.allclose(read, model(**batch).logits, atol=1e-5)
    with pytest.raises(opendelta.DeltaError, match="resize"):
        model.resize_token_embeddings(50)
    delta.disable()
    assert model.get_output_embeddings() is own
    delta.enable()
    LoraModel(model, modified_modules=["key"], name="second")
    with pytest.raises(opendelta.DeltaError, match="resize"):
        model.resize_token_embeddings(50)


def test_the_items_of_a_copied_sequential_are_those_of_the_copy():
    net = Chain(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    delta = shake(LoraModel(net, modified_modules=["a"], modules_to_save=["b"], reads=True))
    copied = delta.layers["b"].module
    assert [net.b[0], net.b[-1], *net.b] == [copied[0], copied[1], *copied]
    assert len(net.b) == 2
    with composition(net).only():
        assert net.b[0] is net.b._modules["0"]


def test_weights_are_tied_to_those_of_the_model():
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=40, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    own = model.model.embed_tokens.weight
    delta = LoraModel(model, modules_to_save=["embed_tokens"], reads=True)
    assert model.get_input_embeddings().weight is delta.layers["model.embed_tokens"].module.weight
    model.tie_weights()
    assert model.lm_head.weight is own
    assert model.model.embed_tokens._parameters["weight"] is own


def test_a_layer_on_a_module_that_shows_a_copy_is_refused():
    net = Tied()
    LoraModel(net, modified_modules=["mid"], modules_to_save=["emb"], reads=True)
    before = opendelta.snapshot(net)
    with pytest.raises(SiteError, match=r"'emb' \(Embedding\).*folded weights can be shown"):
        LoraModel(net, modified_modules=["emb"], name="above")
    assert opendelta.snapshot(net) == before


@pytest.mark.parametrize(
    "method",
    ["Adapter", "Prefix", "SoftPrompt", "ParallelAdapter", "BitFit", "LNTuning", "LoReft", "Lora"],
)
def test_a_copy_of_the_head_is_read_beside_any_method(method):
    model = build("llama")
    cls = getattr(opendelta, f"{method}Model")
    delta = shake(cls(model, modules_to_save=["lm_head"], reads=True))
    assert model.lm_head.weight is delta.layers["lm_head"].module.weight
    assert len(delta.layers) > 1


def test_without_a_copy_what_cannot_show_is_refused():
    with pytest.raises(SiteError, match=r"'mid' .*reads=True lets .*Leave reads=True out"):
        AdapterModel(Tied(), modified_modules=["mid"], reads=True)


@pytest.mark.filterwarnings("ignore::opendelta.TiedWeightWarning")
@pytest.mark.parametrize("reads", [False, True])
def test_a_delta_may_be_a_copy_alone(reads, tmp_path):
    net = Tied()
    delta = LoraModel(net, modified_modules=[], modules_to_save=["emb"], reads=reads)
    assert list(delta.layers) == ["emb"]
    shake(delta).freeze_module()
    out = net(IDS)
    delta.save_finetuned(tmp_path)
    fresh = Tied()
    fresh.load_state_dict({k: v for k, v in net.state_dict().items() if "deltas" not in k})
    opendelta.AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert torch.equal(fresh(IDS), out)
    with pytest.raises(opendelta.DeltaError, match=r"no copies .* without layers beside them"):
        opendelta.interop.peft.save(delta, tmp_path / "peft")


def test_a_delta_of_no_layers_at_all_is_refused():
    with pytest.raises(opendelta.AddressError, match=r"empty list.*copies alone"):
        LoraModel(Tied(), modified_modules=[])


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))

    def forward(self, x):
        return self.head(self.body(x))


def of_parts(name):
    """A model, the head of several modules that a delta has a copy of, and an input."""
    torch.manual_seed(0)
    if name == "sequential":
        return WithHead(), "head", torch.randn(2, 8)
    kind = transformers.RobertaForSequenceClassification if name == "roberta" else None
    kind = kind or transformers.BertForMaskedLM
    config = kind.config_class(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, pad_token_id=0,
    )  # fmt: skip
    return kind(config), "classifier" if name == "roberta" else "cls", IDS


def logits(model, x):
    return getattr(out := model(x), "logits", out)


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("name", ["sequential", "roberta", "bert"])
def test_a_functional_call_leaves_the_backbone_and_the_copy_where_they_are(name, reads):
    model, head, x = of_parts(name)
    model.eval()
    shake(LoraModel(model, modified_modules=[], modules_to_save=[head], reads=reads))
    held = [*map(id, model.parameters())]
    expected = logits(model, x)
    own = {key: p.detach() for key, p in model.named_parameters()}
    for tensors in (own, {key: t for key, t in own.items() if "deltas" in key}):
        out = torch.func.functional_call(model, tensors, (x,))
        assert torch.equal(getattr(out, "logits", out), expected)
        assert torch.equal(logits(model, x), expected)
    halved = {key: t / 2 if ".deltas." in key else t for key, t in own.items()}
    out = torch.func.functional_call(model, halved, (x,))
    assert not torch.equal(getattr(out, "logits", out), expected)
    assert [*map(id, model.parameters())] == held


@pytest.mark.parametrize("reads", [False, True])
def test_accelerate_offloads_a_copy_of_several_modules(reads):
    model, head, x = of_parts("sequential")
    shake(LoraModel(model, modified_modules=[], modules_to_save=[head], reads=reads))
    expected = model(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert torch.equal(model(x), expected)
