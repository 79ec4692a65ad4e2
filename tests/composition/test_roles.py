"""Roles in many architectures, against a truth written from their code; nets of no known name."""

import architectures
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft.utils import constants
from support.nets import untouched
from support.truth import TRUTH
from torch import nn

import opendelta
from opendelta import AdapterModel, BitFitModel, IA3Model, LoraModel, ParallelAdapterModel

pytestmark = pytest.mark.covers("roles")


def build(name):
    """The model of a case, without weights, of its default configuration."""
    case = TRUTH[name]
    cls = getattr(transformers, case["class"])
    with torch.device("meta"):
        return cls(cls.config_class(**case.get("config", {})))


def flat(block):
    """{module relative to the block: role} of what truth.py writes in short."""
    roles = {}
    for sublayer, places in block.items():
        for around, modules in places.items():
            for entry in modules.split(", "):
                name, part = entry.split(": ")
                path = ".".join(step for step in (around, name) if step and step != "*")
                roles[path] = f"{sublayer}.{part}"
    return roles


@pytest.mark.parametrize("name", sorted(TRUTH))
def test_the_roles_are_those_of_the_code(name):
    case = TRUTH[name]
    found = opendelta.roles(build(name))
    for where, block in case["blocks"].items():
        got = {
            n.removeprefix(where).lstrip("."): role
            for n, role in found.items()
            if n == where or n.startswith(f"{where}.")
        }
        assert got == flat(block), where
    outside = {n: r for n, r in found.items() if r in ("embeddings", "lm_head.proj")}
    expected = dict.fromkeys(case["embeddings"], "embeddings")
    assert outside == expected | dict.fromkeys(case["heads"], "lm_head.proj")


# ------------------------------------------------------------------------------------ coverage
SAMPLE = """
    aimv2 align altclip aria audio-spectrogram-transformer bamba biogpt blip bridgetower canine
    chinese_clip clap codegen cohere2 convbert cvt data2vec-audio deepseek_v2 dia dinov3_vit dpt
    ernie4_5_moe exaone_moe falcon_mamba flava florence2 fuyu gemma4 git glm4_moe glpn gpt_oss
    granitemoehybrid groupvit idefics3 jetmoe kosmos-2 led levit lfm2 lilt lxmert m2m_100 mamba2
    mgp-str minimax mllama mobilevit moonshine mpnet nemotron_h nllb-moe olmoe perceiver pvt
    qwen3_next reformer rwkv seamless_m4t vitdet
"""


@pytest.mark.parametrize("name", SAMPLE.split())
def test_the_defaults_reach_every_block_that_has_the_role(name):
    result = architectures.study(name)
    assert architectures.failures([result], {name}) == []
    assert result.seconds < 2


def test_the_sample_is_of_those_that_must_be_covered():
    covered = architectures.COVERED.read_text().split()
    assert len(SAMPLE.split()) == 60
    assert set(SAMPLE.split()) <= set(covered)
    assert len(covered) > 515
    assert covered == sorted(covered)


# ---------------------------------------------------------------------------------------- PEFT
CROSS = "PEFT's names are those of cross-attention too; OpenDelta put nothing there"
QUERIES = "the paper rescales keys and values; PEFT's table names the queries, not the keys"
PARTIAL = "PEFT's end of a name is that of the attention's output too"
DIFFERENT = {  # (method, model type): what only PEFT takes, what only we take, the reason
    ("lora", "bart"): ("encoder_attn.q_proj encoder_attn.v_proj", "", CROSS),
    ("lora", "t5"): ("EncDecAttention.q EncDecAttention.v", "", CROSS),
    ("lora", "mt5"): ("EncDecAttention.q EncDecAttention.v", "", CROSS),
    ("lora", "blip-2"): (
        "", "attention.query attention.value self_attn.qkv",
        "PEFT's names are those of the language model alone",
    ),
    ("lora", "phi"): ("mlp.fc1 mlp.fc2", "", "PEFT takes the feed-forward too"),
    ("lora", "nemotron_h"): (
        "mixer.k_proj mixer.o_proj", "mixer.in_proj",
        "PEFT takes all of attention, and nothing of the state-space mixers",
    ),
    ("lora", "rwkv"): (
        "attention.output feed_forward.key feed_forward.receptance feed_forward.value", "",
        "PEFT takes all linears of a block",
    ),
    ("ia3", "bart"): (
        "encoder_attn.q_proj encoder_attn.v_proj self_attn.q_proj", "self_attn.k_proj",
        f"{QUERIES}; {CROSS}",
    ),
    ("ia3", "t5"): ("EncDecAttention.k EncDecAttention.v", "", CROSS),
    ("ia3", "mt5"): (
        "DenseReluDense.wi_1 EncDecAttention.k EncDecAttention.v", "DenseReluDense.wo",
        f"the paper rescales what the last layer takes; {CROSS}",
    ),
    ("ia3", "opt"): (
        "self_attn.q_proj", "self_attn.v_proj",
        "the paper rescales keys and values; PEFT's table names queries and keys",
    ),
    ("ia3", "gpt_neo"): ("attention.q_proj", "attention.k_proj", QUERIES),
    ("ia3", "gptj"): ("attn.q_proj", "attn.k_proj", QUERIES),
    ("ia3", "llama4"): (
        "self_attn.q_proj", "mlp.fc2 self_attn.k_proj",
        f"{QUERIES}; PEFT's names miss the feed-forward of the vision tower",
    ),
    **{
        ("ia3", name): ("self_attn.q_proj", "self_attn.k_proj", QUERIES)
        for name in ("gemma", "gemma2", "gemma3_text", "phi", "qwen2", "qwen3")
    },
    **{
        ("ia3", name): ("output.dense", "", PARTIAL)
        for name in ("bert", "deberta", "deberta-v2", "roberta")
    },
}  # fmt: skip
TABLES = {
    "lora": constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    "ia3": constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
}
BOTH = [
    (method, name)
    for method, table in TABLES.items()
    for name in sorted(table)
    if name in transformers.CONFIG_MAPPING
]


def ends(names):
    """The last two steps of the names, without numbers."""
    return {".".join([p for p in name.split(".") if not p.isdigit()][-2:]) for name in names}


@pytest.mark.parametrize(("method", "name"), BOTH)
def test_the_defaults_are_those_of_peft_or_the_difference_is_listed(method, name):
    model = architectures.build(name)
    architectures.shorten(model)
    delta = {"lora": LoraModel, "ia3": IA3Model}[method](model)
    ours = set(delta.modified_modules)
    delta.detach()
    patterns = TABLES[method][name]
    if method == "lora":
        make, key, options = peft.LoraConfig, ".lora_A", {}
    else:
        make, key, options = peft.IA3Config, ".ia3_l", {"feedforward_modules": []}
    config = make(target_modules=patterns, fan_in_fan_out=name == "gpt2", **options)
    wrapped = peft.get_peft_model(model, config)
    hit = (n.removeprefix("base_model.model.") for n, _ in wrapped.named_modules())
    theirs = {n.removesuffix(key) for n in hit if n.endswith(key)}
    more, less, _ = DIFFERENT.get((method, name), ("", "", ""))
    assert ends(theirs - ours) == set(more.split())
    assert ends(ours - theirs) == set(less.split())


# -------------------------------------------------------------------------- nets of no known name
class Attention(nn.Module):
    """Attention over `memory`, or over its own input."""

    def __init__(self, width=16):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        weights = (self.a(x) @ self.b(memory).transpose(-1, -2)).softmax(-1)
        return self.d(weights @ self.c(memory))


class Block(nn.Module):
    """A pre-norm, a post-norm and a gated feed-forward, with names that say nothing."""

    def __init__(self, width=16):
        super().__init__()
        self.n1, self.n2, self.n3 = (nn.LayerNorm(width) for _ in range(3))
        self.x, self.y = Attention(), Attention()
        self.g, self.h, self.i = nn.Linear(width, 32), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x, memory):
        x = x + self.x(self.n1(x))
        x = self.n2(x + self.y(x, memory))
        z = self.n3(x)
        return x + self.i(self.g(z) * F.silu(self.h(z)))


class Net(nn.Module):
    """Three such blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, memory):
        for block in self.blocks:
            x = block(x, memory)
        return x


def test_the_flow_tells_what_names_do_not():
    model = Net()
    with untouched(model):
        found = opendelta.roles(model)
    assert {n.removeprefix("blocks.1."): r for n, r in found.items() if ".1." in n} == {
        "n1": "attn.layer_norm", "n2": "cross_attn.layer_norm", "n3": "ff.layer_norm",
        "x.a": "attn.q", "x.b": "attn.k", "x.c": "attn.v", "x.d": "attn.proj",
        "y.a": "cross_attn.q", "y.b": "cross_attn.k", "y.c": "cross_attn.v",
        "y.d": "cross_attn.proj",
        "g": "ff.w1", "h": "ff.gate", "i": "ff.w2",
    }  # fmt: skip
    assert len(found) == 3 * 14
    assert LoraModel(model).modified_modules == [
        f"blocks.{block}.x.{name}" for block in range(3) for name in "ac"
    ]
    assert opendelta.roles(model) == found  # with deltas on it


class FeedForward(nn.Module):
    """Linears of these names: two in a row, or a pair of which one gates, and the last.

    They run in the order of `names`; `written` is the order in which they are written.
    """

    def __init__(self, names, width, written=None):
        super().__init__()
        self.names = names.split()
        for name in (written or names).split():
            end = name == self.names[-1]
            setattr(self, name, nn.Linear(*((width, 8) if end else (8, width))))

    def forward(self, x):
        *pair, last = (getattr(self, name) for name in self.names)
        h = F.silu(pair[0](x))
        return last(h * pair[1](x) if len(pair) == 2 else h)


def in_a_row(*parts, width):
    """A Sequential of these modules; what is between its linears has that width."""
    linears = [part for part in parts if part == "linear"]
    made, size = [], 8
    for part in parts:
        if part == "linear":
            linears.pop()
            out = width if linears else 8
            made.append(nn.Linear(size, out))
            size = out
        else:
            made.append(part())
    return nn.Sequential(*made)


class WithFeedForward(nn.Module):
    """One block of attention and a given feed-forward."""

    def __init__(self, ff):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.ff = ff

    def forward(self, x):
        h = self.norm1(x)
        h = F.scaled_dot_product_attention(self.q_proj(h), self.k_proj(h), self.v_proj(h))
        x = x + self.o_proj(h)
        return x + self.ff(self.norm2(x))


def ff_roles(make):
    """The roles in the feed-forward of two blocks, without the norm."""
    model = nn.Sequential(WithFeedForward(make()), WithFeedForward(make()))
    ParallelAdapterModel(model, bottleneck_dim=2).detach()
    found = opendelta.roles(model)
    assert {k: v for k, v in found.items() if v.startswith("attn") and "norm" not in v} == {
        f"{block}.{part}_proj": f"attn.{'proj' if part == 'o' else part}"
        for block in (0, 1)
        for part in "qkvo"
    }
    return {n[5:]: r[3:] for n, r in found.items() if n.startswith("1.ff.")}


@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize(
    ("parts", "ends"),
    [
        (("linear", nn.GELU, "linear"), (0, 2)),
        (("linear", nn.GELU, nn.Dropout, "linear"), (0, 3)),
        ((nn.Dropout, "linear", nn.GELU, "linear"), (1, 3)),
        (("linear", nn.GELU, nn.Dropout, nn.Dropout, "linear"), (0, 4)),
        (("linear", nn.GELU, "linear", nn.GELU, "linear"), (0, 4)),
        (("linear", "linear"), (0, 1)),
    ],
)
def test_numbers_say_the_order_and_no_width_makes_a_gate_of_a_first_linear(parts, ends, width):
    first, last = map(str, ends)
    assert ff_roles(lambda: in_a_row(*parts, width=width)) == {first: "w1", last: "w2"}


@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ("fc1 fc2", "w1 w2"),
        ("fc1 fc3", "w1 w2"),
        ("layer0 layer1", "w1 w2"),
        ("dense dense_1", "w1 w2"),
        ("a b", "w1 w2"),
        ("gate_proj up_proj down_proj", "gate w1 w2"),
        ("w1 w3 w2", "gate w1 w2"),
        ("w1 w2 w3", "gate w1 w2"),
        ("a b c", "gate w1 w2"),
        ("gate value out", "gate w1 w2"),
        ("gate hidden out", "gate w1 w2"),
        ("gate dense out", "gate w1 w2"),
        ("gate lin lin_out", "gate w1 w2"),
        ("gate lift down", "gate w1 w2"),
        ("to_gate to_hidden to_out", "gate w1 w2"),
        ("gate_layer value_layer output_layer", "gate w1 w2"),
        ("w1 v w2", "gate w1 w2"),
    ],
)
def test_a_square_feed_forward_has_the_roles_of_a_wide_one(names, parts, width):
    expected = dict(zip(names.split(), parts.split(), strict=True))
    assert ff_roles(lambda: FeedForward(names, width)) == expected


@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize(
    ("run", "written"),
    [
        ("inner outer", "outer inner"),
        ("d c", "c d"),
        ("t s r", "r s t"),
        ("alpha beta omega", "alpha omega beta"),
        ("out value gate", "gate out value"),
    ],
)
def test_the_order_of_the_run_decides_not_that_in_which_it_is_written(run, written, width):
    parts = ("gate", "w1", "w2")[-len(run.split()) :]
    expected = dict(zip(run.split(), parts, strict=True))
    assert ff_roles(lambda: FeedForward(run, width, written)) == expected


class ThreeInARow(nn.Module):
    """Three linears that are written in the opposite order."""

    def __init__(self, width):
        super().__init__()
        self.c, self.b, self.a = nn.Linear(width, 8), nn.Linear(width, width), nn.Linear(8, width)

    def forward(self, x):
        return self.c(F.silu(self.b(F.silu(self.a(x)))))


@pytest.mark.parametrize("width", [8, 24])
def test_the_order_of_the_run_decides_for_three_in_a_row(width):
    assert ff_roles(lambda: ThreeInARow(width)) == {"a": "w1", "c": "w2"}


class Channels(FeedForward):
    """RWKV's: the gate, whose output no other linear takes, acts on what the last one gives."""

    def __init__(self):
        super().__init__("key value", 24, "value key")
        self.gate = nn.Linear(8, 8)

    def forward(self, x):
        return torch.sigmoid(self.gate(x)) * super().forward(x)


def test_a_gate_may_act_on_what_the_last_linear_gives():
    assert ff_roles(Channels) == {"gate": "gate", "key": "w1", "value": "w2"}


class Unreadable(FeedForward):
    """A feed-forward that runs on tensors only."""

    def forward(self, x):
        if len(x.shape) != 3:
            raise ValueError(x.shape)
        return super().forward(x)


@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize(
    "names",
    ["gate value out", "gate hidden out", "gate dense out", "gate lift down", "gate up down"],
)
def test_without_a_run_a_linear_of_the_size_of_the_gate_is_what_it_gates(names, width):
    expected = dict(zip(names.split(), ("gate", "w1", "w2"), strict=True))
    assert ff_roles(lambda: Unreadable(names, width)) == expected


class Bare(WithFeedForward):
    """A block whose feed-forward has no module of its own."""

    def __init__(self, names, width):
        super().__init__(None)
        self.names = names.split()
        for name, child in FeedForward(names, width).named_children():
            setattr(self, name, child)
        del self.ff

    def ff(self, x):
        return FeedForward.forward(self, x)


@pytest.mark.parametrize("width", [8, 24])
@pytest.mark.parametrize("names", ["w1 v w2", "fc1 gate fc2", "gate up down", "a b c"])
def test_a_feed_forward_in_the_block_itself_has_all_its_roles(names, width):
    found = opendelta.roles(nn.Sequential(Bare(names, width), Bare(names, width)))
    expected = dict(zip(names.split(), ("ff.gate", "ff.w1", "ff.w2"), strict=True))
    assert {name: found.get(f"1.{name}") for name in expected} == expected


def test_a_square_patchtst_has_no_gate():
    config = transformers.PatchTSTConfig(d_model=16, ffn_dim=16, num_hidden_layers=1)
    with torch.device("meta"):
        model = transformers.PatchTSTModel(config)
    ff = {n.partition(".ff.")[2]: r for n, r in opendelta.roles(model).items() if ".ff." in n}
    assert ff == {"0": "ff.w1", "3": "ff.w2"}


def test_each_decision_has_a_reason():
    why = opendelta.roles(Net(), why=True)
    assert why["blocks.0.n2"] == ("cross_attn.layer_norm", "it follows 'y.d'")
    assert why["blocks.0.x.a"] == ("attn.q", "its output is the attention's q")
    assert all(reason for _, reason in why.values())


@pytest.mark.covers("DeltaConfig.common_structure")
def test_a_mapping_overrides_what_is_found():
    model = Net()
    override = {"blocks.0.x.a": None, r"[r]blocks\.\d+\.y\.a": "attn.q"}
    found = opendelta.roles(model, override=override)
    assert "blocks.0.x.a" not in found
    assert found["blocks.2.y.a"] == "attn.q"
    delta = LoraModel(model, modified_modules=["attn.q"], common_structure=override)
    assert delta.modified_modules == [
        "blocks.0.y.a", "blocks.1.x.a", "blocks.1.y.a", "blocks.2.x.a", "blocks.2.y.a"
    ]  # fmt: skip
    delta.detach()
    by_default = IA3Model(model, common_structure={"blocks.0.i": None})
    assert "blocks.1.i" in by_default.modified_modules
    assert "blocks.0.i" not in by_default.modified_modules
    with pytest.raises(opendelta.OptionError, match=r"'attn.w' is no role; nearest: attn.v"):
        opendelta.roles(model, override={"x.a": "attn.w"})
    with pytest.raises(opendelta.AddressError, match=r"no module matches 'x.z'.*nearest: 'x.d'"):
        opendelta.roles(model, override={"x.z": "attn.q"})


@pytest.mark.covers("AddressError")
@pytest.mark.parametrize("method", [LoraModel, AdapterModel, IA3Model])
def test_what_cannot_be_read_names_its_blocks_and_two_candidates(method):
    with torch.device("meta"):
        model = transformers.ConvNextModel(transformers.ConvNextConfig())
    message = (
        r"its architecture is not known. Name the modules instead: modified_modules=\[...\], such "
        r"as 'pwconv\d' \(18 modules\) or 'pwconv\d' \(18 modules\); its repeated blocks are "
        r".*encoder.stages.\*.layers.0-8 \(ConvNextLayer\)"
    )
    with untouched(model), pytest.raises(opendelta.AddressError, match=message):
        method(model)
    with pytest.raises(opendelta.AddressError, match=r"no module matches 'pwconv3'.*ConvNextLayer"):
        method(model, modified_modules=["pwconv3"])


def test_a_method_skips_sublayers_that_hold_nothing_for_it():
    with torch.device("meta"):
        model = transformers.MixtralModel(transformers.MixtralConfig(num_hidden_layers=1))
    modules = BitFitModel(model).modified_modules
    assert "layers.0.self_attn.q_proj" in modules
    assert not any("mlp" in name for name in modules)


def test_a_model_of_70_billion_parameters_is_read_at_once():
    config = transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert len(opendelta.roles(model)) == 80 * 9 + 2
    assert len(LoraModel(model).modified_modules) == 160
