"""A plan says what attaching then does, and touches nothing."""

import json
import random
import re
import sys
import warnings

import pytest
import rich.style  # noqa: F401  it draws a random number when it is imported
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import build
from support.nets import net, places_of, untouched
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import opendelta
from opendelta import (
    AdapterConfig,
    BitFitConfig,
    DeltaError,
    LoraConfig,
    LoraModel,
    OptionError,
    ParallelAdapterConfig,
    SoftPromptConfig,
)
from opendelta._deltas.registry import METHODS
from opendelta._layers.costs import Flops
from opendelta._modules import devices, kinds

pytestmark = pytest.mark.covers("plan", "Plan")

NAMES = sorted(METHODS)


class Allocations(TorchDispatchMode):
    """Notes the sizes of what is computed outside of the meta device and fake tensors."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and not isinstance(each, FakeTensor):
                self.sizes += [] if each.is_meta else [each.numel()]
        return out


def attached(model, configs):
    """What attaching really does, in the words of a plan; or the error. Detaches again."""
    made, told = [], []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for config in configs:
                made.append(METHODS[config.delta_type].from_config(config, model))
                told.append([str(warning.message) for warning in caught])
                caught.clear()
        made[0].freeze_module()
        share = opendelta.statistics(model).trainable_ratio
        facts = [
            (
                delta.name,
                delta.config.to_dict(),
                {w: sum(p.numel() for p in ly.parameters()) for w, ly in delta.layers.items()},
                sum(t.nbytes for ly in delta.layers.values() for t in tensors(ly)),
                warned,
            )
            for delta, warned in zip(made, told, strict=True)
        ]
        return share, facts
    except DeltaError as error:
        return type(error), str(error)
    finally:
        for delta in reversed(made):
            delta.detach()


def tensors(layer):
    return [*layer.parameters(), *layer.buffers()]


def planned(model, configs):
    """The same facts from a plan; or the error."""
    try:
        plan = opendelta.plan(model, configs)
    except DeltaError as error:
        return type(error), str(error)
    return plan.trainable_share, [
        (
            delta.name,
            delta.options,
            {module.name: module.parameters for module in delta.modules},
            delta.memory.parameters,
            delta.warnings,
        )
        for delta in plan.deltas
    ]


def config_of(name, place, **options):
    method = METHODS[name]
    places = [place] * (1 + method.layer_class.paired)
    return method.config_class(modified_modules=places, **options)


# ------------------------------------------------------------------------------- what it promises
@pytest.mark.parametrize("name", NAMES)
def test_it_says_for_every_method_what_attaching_does_and_touches_nothing(name):
    model = net()
    for place in places_of(METHODS[name]):
        configs = [config_of(name, place), config_of(name, place, gate=True)]
        seeds = torch.get_rng_state(), random.getstate()
        with untouched(model), Allocations() as allocations:
            told = planned(model, configs)
            str(opendelta.plan(model, configs))
        assert max(allocations.sizes, default=0) < 300  # ids and positions of three tokens
        assert torch.equal(seeds[0], torch.get_rng_state())
        assert seeds[1] == random.getstate()
        assert told == attached(model, configs)
        assert told[1][1][0] == f"{name}_1"


@st.composite
def anything(draw):
    """A config of any method on one or two modules of the network, whether they take it or not."""
    name = draw(st.sampled_from([n for n in NAMES if not n.startswith("prefix")]))
    own = places_of(METHODS[name])
    where = st.sampled_from(own if draw(st.integers(0, 5)) else ["head", "pair", "conv2d", ""])
    pair = draw(st.lists(where, min_size=2, max_size=2))
    if METHODS[name].layer_class.paired:  # a branch that ends before it starts breaks any forward
        pair = [pair[0], pair[0]]
    options = {
        "modified_modules": pair,
        "name": draw(st.sampled_from([None, None, None, "a", "b"])),
        "reads": draw(st.booleans()) and draw(st.booleans()),
        "modules_to_save": draw(st.sampled_from([*[None] * 7, ["pair"], ["head"]])),
        "unfrozen_modules": draw(st.sampled_from([None, None, ["norm"], ["bare.weight"]])),
        "exclude_modules": draw(st.sampled_from([*[None] * 5, ["bare"]])),
        "dtype": draw(st.sampled_from([None, "bfloat16", "backbone"])),
    }
    return METHODS[name].config_class(**options)


@settings(max_examples=60, deadline=None)
@given(st.lists(anything(), min_size=1, max_size=3))
def test_several_are_planned_as_if_attached_one_after_another_with_the_same_errors(configs):
    model = net()
    with untouched(model):
        told = planned(model, configs)
    assert told == attached(model, configs)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
def test_defaults_of_transformers_models_on_top_of_attached_deltas(name):
    model = build(name)
    first = LoraModel(model, unfrozen_modules=["embeddings"] if name == "bert" else None)
    first.freeze_module()
    held = LoraModel(model, name="held")
    held.detach()
    chosen = ["lora", "adapter", "ia3", "bitfit", "soft_prompt", "ln_tuning"]
    configs = [METHODS[n].config_class() for n in chosen]
    before = opendelta.snapshot(model)
    told = planned(model, configs)
    assert opendelta.snapshot(model) == before
    assert told == attached(model, configs)
    assert [name for name, *_ in told[1]][:2] == ["lora_1", "adapter"]
    assert planned(model, [LoraConfig(name="held")]) == attached(model, [LoraConfig(name="held")])


# --------------------------------------------------------------------------------- errors alone
def test_what_only_a_start_from_the_weights_refuses_is_refused():
    model, place = net(), ["linear"]
    for config in (
        LoraConfig(modified_modules=place, init="pissa", lora_r=9),
        LoraConfig(modified_modules=["embedding"], init="olora"),
        LoraConfig(modified_modules=["embedding"], use_dora=True),
        SoftPromptConfig(token_init="some text"),
        SoftPromptConfig(token_init=[11]),
    ):
        told = planned(model, [config])
        assert told[0] in (OptionError, opendelta.SiteError)
        assert told == attached(model, [config])


def test_it_takes_models_and_configs_only():
    with pytest.raises(OptionError, match="model must be"):
        opendelta.plan("bert", LoraConfig())
    with pytest.raises(OptionError, match=r"configs such as LoraConfig\(\.\.\.\), not 'lora'"):
        opendelta.plan(net(), ["lora"])
    for wrong in (LoraModel, [LoraModel]):
        with pytest.raises(OptionError, match=r"such as LoraConfig\(\.\.\.\), not LoraModel$"):
            opendelta.plan(net(), wrong)
    with pytest.raises(OptionError, match="at least one config"):
        opendelta.plan(net(), [])


# ----------------------------------------------------------------------------------- what it shows
def test_it_counts_parameters_memory_and_flops():
    with torch.device("meta"):
        model = build("llama").to("meta", torch.bfloat16)
    plan = opendelta.plan(model, LoraConfig(lora_r=4))
    (lora,) = plan.deltas
    q, v = lora.modules[:2]
    assert (q.role, q.block, q.type) == ("attn.q", "model.layers.0", "Linear")
    assert (q.parameters, v.parameters) == (4 * (32 + 32), 4 * (32 + 16))
    assert (q.flops, v.flops) == (Flops(2 * 4 * 64, 0), Flops(2 * 4 * 48, 0))
    assert plan.added_parameters == plan.trainable_parameters == 2 * 4 * (64 + 48)
    assert lora.memory.parameters == lora.memory.gradients == 4 * plan.added_parameters
    assert plan.memory.total == 16 * plan.added_parameters  # float32: 4 + 4 + 2 * 4 bytes
    small = opendelta.plan(model, LoraConfig(lora_r=4, dtype="backbone")).memory
    assert small.total == 8 * plan.added_parameters
    assert opendelta.plan(model, LoraConfig(lora_r=4), optimizer_states=0).memory.optimizer == 0
    assert plan.flops == Flops(2 * 2 * 4 * (64 + 48), 0)


FLOPS = [  # of a module 8 -> 8, for each token and once
    ("lora", {"lora_r": 2}, (2 * 2 * 16, 0)),
    ("lora", {"lora_r": 2, "gate": True}, (2 * 2 * 16 + 2 * 8, 0)),
    # x @ A.T @ B.T; and for |W + D| the products W A^T, A A^T and B (A A^T)
    (
        "lora",
        {"lora_r": 2, "use_dora": True},
        (2 * 2 * 16, 2 * (8 * 8 * 2 + 2 * 2 * 8 + 2 * 2 * 8)),
    ),
    ("adapter", {"bottleneck_dim": 3}, (2 * 2 * 3 * 8, 0)),
    ("parallel_adapter", {"bottleneck_dim": 3}, (2 * 2 * 3 * 8, 0)),
    ("vera", {"r": 5}, (2 * 5 * 16, 0)),
    ("bitfit", {}, (0, 0)),
    ("loha", {"r": 2}, (2 * 8 * 8, 2 * (2 * 8 * 2 * 8))),
]


@pytest.mark.parametrize(("name", "options", "expected"), FLOPS)
def test_flops_are_those_of_the_paper_s_equation(name, options, expected):
    plan = opendelta.plan(net(), config_of(name, "linear", **options))
    assert plan.flops == Flops(*expected)


def test_flops_of_prefixes_prompts_convolutions_and_embeddings():
    plan = opendelta.plan(
        build("llama"),
        [
            opendelta.PrefixConfig(prefix_token_num=5, reparameterize=False),
            SoftPromptConfig(soft_token_num=7),
            LoraConfig(modified_modules=["embed_tokens"], lora_r=2),
        ],
    )
    prefix, prompt, embedding = plan.deltas
    assert [m.flops for m in prefix.modules] == [Flops(2 * 5 * 4 * 16, 0)] * 2  # q k^T and a v
    assert (prompt.positions, prompt.modules[0].flops) == (7, Flops(0, 0))
    assert {m.name: m.flops for m in embedding.modules} == {
        "model.embed_tokens": Flops(2 * 2 * 32, 0)
    }
    assert "soft_prompt makes every sequence 7 longer" in str(plan)
    conv = opendelta.plan(net(), LoraConfig(modified_modules=["conv2d"], lora_r=2))
    assert conv.flops == Flops(2 * 2 * (9 + 3), 0)
    image = nn.Sequential(nn.Conv2d(16, 32, 3))  # rank 8: the matrix 32 x 144 is the smaller one
    loha = opendelta.plan(image, opendelta.LohaConfig(modified_modules=["0"])).flops
    assert loha == Flops(2 * 32 * 144, 2 * 2 * 32 * 8 * 144)


def test_what_is_alike_but_left_out_is_named():
    model = build("llama")
    plan = opendelta.plan(model, LoraConfig(modified_modules=["layers.0.self_attn.q_proj"]))
    assert plan.deltas[0].missed == ["model.layers.1.self_attn.q_proj"]
    tower = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])
    plan = opendelta.plan(tower, LoraConfig(modified_modules=["0.0"]))
    assert plan.deltas[0].missed == ["1.0", "2.0"]
    assert "lora leaves out: 2 alike, 1-2.0" in str(plan)


def test_tied_read_and_quantised_weights_are_named():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["m"] = nn.MultiheadAttention(4, 2)
    model["b"].weight = model["a"].weight
    model["c"] = quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    config = LoraConfig(modified_modules=["a", "m.out_proj", "c"])
    plan = opendelta.plan(model, config)
    a, out, c = plan.deltas[0].modules
    assert (a.tied, out.reads, c.quantised) == (["b"], True, "Parameter")
    text = str(plan)
    assert "lora is tied: a shares a weight with b" in text
    assert "lora is read: the module around reads the weight of m.out_proj" in text
    assert "lora is quantised: Parameter in c" in text
    assert "lora warns: 'lora' on 'a' changes one use of a weight that 'b' uses too" in text


def test_it_prints_as_a_table_and_is_data():
    model = build("bert")
    plan = opendelta.plan(model, [LoraConfig(), AdapterConfig(modified_modules=["output"])])
    lines = str(plan).splitlines()
    assert lines[0] == "plan for BertForMaskedLM"
    row = next(line for line in lines if "self.query" in line)
    name = "bert.encoder.layer.0-1.attention.self.query"
    assert row.split() == ["lora", "attn.q", name, "2", "1,024", "2,048"]
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["added_parameters"] == plan.added_parameters
    assert data["deltas"][0]["modules"][0]["flops"] == {"per_token": 1024, "per_forward": 0}
    assert data["memory"]["total"] == plan.memory.total


# ------------------------------------------------------------------------------------------- speed
def llama_70b():
    config = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=131072,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def test_a_plan_for_70_billion_parameters_looks_at_each_module_a_few_times(monkeypatch):
    model = llama_70b()
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    configs = [LoraConfig(modified_modules=projections), BitFitConfig(), ParallelAdapterConfig()]
    looks = []
    kind_of, tensors_of = kinds.kind_of, devices._tensors
    for name, real in (("kind_of", kind_of), ("_tensors", tensors_of)):

        def count(*args, real=real):
            looks.append(1)
            return real(*args)

        for module in [m for n, m in sys.modules.items() if n.startswith("opendelta.")]:
            if vars(module).get(name) is real:
                monkeypatch.setattr(module, name, count)
    plan = opendelta.plan(model, configs)
    assert plan.total_parameters == 70_553_706_496
    assert sum(len(delta.modules) for delta in plan.deltas) == 560 + 721 + 240
    assert len(looks) < 40 * len(list(model.modules()))
    assert re.search(r"q_proj +80 +10,485,760 +20,971,520", str(plan))
    assert str(opendelta.tree(model)).count("\n") < 30
