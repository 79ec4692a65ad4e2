"""Which modules a pattern selects, and what the error says when it selects none."""

import copy
import warnings

import pytest
import torch
import transformers
from support.nets import net, places_of, put, untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, AddressError, LoraModel, SiteError
from opendelta._deltas.registry import METHODS

pytestmark = pytest.mark.covers(
    "DeltaConfig.modified_modules", "DeltaConfig.exclude_modules", "Delta.modified_modules",
    "AddressError",
)  # fmt: skip


@pytest.fixture
def bert():
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=24,
        vocab_size=30,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def modules(model, patterns, **options):
    delta = LoraModel(model, modified_modules=patterns, **options)
    names = delta.modified_modules
    delta.detach()
    return names


def test_a_suffix_matches_on_a_name_boundary_only(bert):
    assert len(modules(bert, ["self.query"])) == 12
    assert len(modules(bert, ["1.attention.self.query"])) == 1
    with pytest.raises(opendelta.AddressError, match=r"no module matches 'uery'"):
        modules(bert, ["uery"])


def test_a_full_name_selects_one_module(bert):
    name = "bert.encoder.layer.3.attention.self.query"
    assert modules(bert, [name]) == [name]
    assert modules(bert, name) == [name]


def test_a_regular_expression_matches_the_end_of_a_name_from_a_boundary(bert):
    assert len(modules(bert, [r"[r][0-5]\.attention\.self\.query"])) == 6
    assert len(modules(bert, [r"[r]1[01]?\.attention\.self\.(query|key)"])) == 6
    assert len(modules(bert, [r"[r].*query"])) == 12
    with pytest.raises(opendelta.AddressError, match=r"no module matches"):
        modules(bert, [r"[r]uery"])
    with pytest.raises(opendelta.AddressError, match=r"is no regular expression"):
        modules(bert, [r"[r](query"])


def test_modules_come_in_the_order_of_the_model_each_once(bert):
    names = modules(bert, ["query", "self.query", r"[r]0\..*query"])
    assert names == [f"bert.encoder.layer.{i}.attention.self.query" for i in range(12)]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("qeury", "no module matches 'qeury' in BertForSequenceClassification; nearest: 'query'"),
        ("self.qury", r"nearest: 'self.query' \(12 modules\)"),
        ("pooler.dens", r"nearest: 'pooler.dense' \(1 module\)"),
        ("[r]qeury", "nearest: 'query'"),
        ("attn.q", r"'attn\.q' is a role: for roles pass common_structure=True"),
        (
            "xxxxxx",
            r"none is near; there are 'dense' \(37 modules\), 'query' \(12 modules\); its rep",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest(bert, pattern, message):
    with untouched(bert), pytest.raises(opendelta.AddressError, match=message):
        LoraModel(bert, modified_modules=[pattern])


def test_parts_of_deltas_are_no_places(bert):
    def told():
        with pytest.raises(opendelta.AddressError) as error:
            LoraModel(bert, modified_modules=["xxxxxx"])
        return str(error.value)

    before = told()
    opendelta.AdapterModel(bert, modified_modules=["dense", "query", "value", "key"])
    opendelta.PrefixModel(bert)
    assert told() == before


def test_one_of_several_patterns_that_matches_nothing_raises_too(bert):
    with untouched(bert), pytest.raises(opendelta.AddressError, match=r"'vlaue'.*nearest: 'value'"):
        LoraModel(bert, modified_modules=["query", "vlaue"])


class Twins(nn.Module):
    """Two networks side by side."""

    def __init__(self):
        super().__init__()
        self.one, self.other = net(), net()

    def forward(self, ids):
        return self.one(ids) + self.other(ids)


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("excluded", ["other", "[r]o.her"])
def test_every_method_heeds_exclude_modules(name, excluded):
    place = places_of(METHODS[name])[0]
    names = [f"{twin}.{place}".rstrip(".") for twin in ("one", "other")]
    delta = put(METHODS[name], Twins(), *names, exclude_modules=[excluded])
    assert set(delta.modified_modules) == {names[0]}


@pytest.mark.parametrize(
    "excluded",
    ["layer.0", "bert.encoder.layer.0", r"[r]layer\.0", "0.attention", "0.attention.self"],
)
def test_exclusion_of_a_module_excludes_all_inside_it(bert, excluded):
    names = modules(bert, ["query"], exclude_modules=[excluded])
    assert names == [f"bert.encoder.layer.{i}.attention.self.query" for i in range(1, 12)]


def test_exclusions_that_match_nothing_or_leave_nothing_raise(bert):
    with pytest.warns(opendelta.UnusedWarning, match=r"exclude.*'poolr'.*nearest: 'pooler'"):
        LoraModel(bert, modified_modules=["query"], exclude_modules=["poolr"]).detach()
    with pytest.raises(opendelta.AddressError, match=r"leaves none of the 12 modules"):
        LoraModel(bert, modified_modules=["query"], exclude_modules=["encoder"])
    with pytest.raises(opendelta.AddressError, match=r"empty list"):
        LoraModel(bert, modified_modules=[])


def test_deltas_never_match_inside_a_delta():
    model = net()
    AdapterModel(model, modified_modules=["linear"])
    with pytest.raises(opendelta.AddressError, match=r"no module matches 'down_proj'"):
        LoraModel(model, modified_modules=["down_proj"])
    assert LoraModel(model, modified_modules=["[r].*linear"]).modified_modules == ["linear"]


def test_a_module_registered_twice_gets_one_layer():
    model = nn.Module()
    model.a = nn.Linear(2, 2)
    model.b = model.a
    delta = LoraModel(model, modified_modules=["a", "b"])
    assert list(delta.layers) == ["a"]
    delta.detach()
    assert list(LoraModel(model, modified_modules=["b"]).layers) == ["b"]


@pytest.mark.parametrize("pattern", ["", "root"])
def test_the_backbone_itself_is_a_module_too(pattern):
    model = nn.Linear(4, 4)
    plain = model(torch.ones(1, 4))
    delta = AdapterModel(model, modified_modules=[pattern])
    assert sorted(delta.state_dict())[0] == "deltas.adapter.down_proj.bias"
    assert sorted(model.state_dict())[0] == "bias"
    with torch.no_grad():
        delta.layers[""].up_proj.bias.fill_(1)
    assert torch.equal(model(torch.ones(1, 4)), plain + 1)
    delta.detach()
    assert type(model) is nn.Linear


def test_a_module_called_root_is_meant_by_root():
    model = nn.Module()
    model.root = nn.Linear(2, 2)
    assert LoraModel(model, modified_modules=["root"]).modified_modules == ["root"]


@pytest.mark.covers("SiteError")
def test_a_kind_that_a_method_does_not_take_names_what_is_inside(bert):
    message = (
        r"'bert.encoder.layer.0.attention.self' \(BertSelfAttention\) cannot carry 'lora'.*"
        r"Inside it there are 'bert.encoder.layer.0.attention.self.query'"
    )
    with untouched(bert), pytest.raises(opendelta.SiteError, match=message):
        LoraModel(bert, modified_modules=["0.attention.self"])


def tiny(kind):
    T = transformers
    if kind == "bert":
        return T.BertModel(
            T.BertConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                vocab_size=30,
            )
        )
    if kind == "roberta":
        return T.RobertaModel(
            T.RobertaConfig(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
            )
        )
    if kind == "bart":
        return T.BartModel(
            T.BartConfig(
                d_model=16,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
            )
        )
    if kind == "gpt2":
        return T.GPT2Model(T.GPT2Config(n_embd=16, n_layer=2, n_head=2))
    if kind == "t5":
        return T.T5Model(T.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    return T.LlamaModel(T.LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                      intermediate_size=24))  # fmt: skip


# What each method gets by default in the last block (of the decoder, where there are two stacks).
# OpenDelta 0.3 puts nothing on cross-attention; IA3's places are those of its paper.
DEFAULTS = {
    "bert": {
        "lora": ["attention.self.query", "attention.self.value"],
        "adapter": ["attention.output.dense", "output.dense"],
        "ia3": ["attention.self.key", "attention.self.value", "output.dense"],
    },
    "bart": {
        "lora": ["self_attn.q_proj", "self_attn.v_proj"],
        "adapter": ["self_attn.out_proj", "fc2"],
        "ia3": ["self_attn.k_proj", "self_attn.v_proj", "fc2"],
    },
    "gpt2": {
        "lora": ["attn.c_attn"],
        "adapter": ["attn.c_proj", "mlp.c_proj"],
        "ia3": ["attn.c_attn", "mlp.c_proj"],
    },
    "t5": {
        "lora": ["layer.0.SelfAttention.q", "layer.0.SelfAttention.v"],
        "adapter": ["layer.0.SelfAttention.o", "layer.2.DenseReluDense.wo"],
        "ia3": [
            "layer.0.SelfAttention.k", "layer.0.SelfAttention.v", "layer.2.DenseReluDense.wo"
        ],
    },
    "llama": {
        "lora": ["self_attn.q_proj", "self_attn.v_proj"],
        "adapter": ["self_attn.o_proj", "mlp.down_proj"],
        "ia3": ["self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"],
    },
}  # fmt: skip
DEFAULTS["roberta"] = DEFAULTS["bert"]


@pytest.mark.parametrize("name", ["lora", "adapter", "ia3"])
@pytest.mark.parametrize("kind", sorted(DEFAULTS))
def test_the_default_places_of_six_architectures(kind, name):
    with torch.device("meta"):
        model = tiny(kind)
    places = METHODS[name](model).modified_modules
    blocks = {"bert": 2, "roberta": 2, "gpt2": 2, "llama": 2, "bart": 4, "t5": 4}[kind]
    expected = DEFAULTS[kind][name]
    assert len(places) == blocks * len(expected)
    last = [place.rpartition(".1.")[2] for place in places[-len(expected) :]]
    if kind == "t5":
        last = [f"layer.{p.rpartition('layer.')[2]}" for p in places[-len(expected) :]]
    assert sorted(last) == sorted(expected)


@pytest.mark.covers("DeltaConfig.common_structure")
def test_roles_can_be_named_instead_of_modules(bert):
    by_role = LoraModel(bert, modified_modules=["attn.q", "ff.w2"], common_structure=True)
    assert len(by_role.modified_modules) == 24
    same = LoraModel(bert, modified_modules=["attn@.q@", "ff@.w2@"], common_structure=True)
    assert same.modified_modules == by_role.modified_modules
    with pytest.raises(opendelta.AddressError, match=r"has the role 'attn.qq'.*nearest: attn.q"):
        LoraModel(bert, modified_modules=["attn.qq"], common_structure=True)


def test_an_unknown_architecture_says_what_to_do():
    model = nn.Sequential(nn.Linear(2, 2))
    message = r"architecture is not known. Name the modules instead: modified_modules=\[...\]"
    with untouched(model), pytest.raises(opendelta.AddressError, match=message):
        LoraModel(model)


@pytest.mark.covers("TiedWeightWarning")
def test_a_tied_weight_is_warned_of():
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2)
        )
    model.lm_head.weight = model.transformer.wte.weight
    with pytest.warns(opendelta.TiedWeightWarning, match=r"'transformer.wte'.*'lm_head' uses too"):
        LoraModel(model, modified_modules=["wte"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdapterModel(model, modified_modules=["wte"])


@pytest.mark.parametrize("place", ["conv", "block", "norm"])
def test_images_are_no_hidden_states(place):
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            return self.norm(self.block(self.conv(x)))

    model = Images()
    with untouched(model), pytest.raises(opendelta.SiteError, match=rf"'{place}'"):
        AdapterModel(model, modified_modules=[place])


def test_the_width_of_a_float16_block_is_found():
    model = tiny("bart").to(torch.float16)
    AdapterModel(model, modified_modules=["encoder.layers.0"])
    assert model.encoder.layers[0].deltas["adapter"].width == 16


def test_the_places_of_the_test_network_cover_all_kinds():
    for method in METHODS.values():
        assert places_of(method)


def test_hints_for_those_who_write_a_regular_expression_or_another_name(bert):
    with pytest.raises(opendelta.AddressError, match=r"is written '\[r\]layer.\*query'"):
        LoraModel(bert, modified_modules=["layer.*query"])
    with pytest.raises(opendelta.OptionError, match=r"no option 'r'; nearest: lora_r"):
        LoraModel(bert, r=4)
    with pytest.raises(opendelta.OptionError, match=r"from_config\(config, model\)"):
        LoraModel(bert, opendelta.LoraConfig())


def parametrized():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))


@pytest.mark.parametrize("pattern", ["0", "[r]0", r"[r]0|weight\.0"])
def test_modules_that_compute_a_weight_are_chosen_by_that_name_alone(pattern):
    model = parametrized()
    inner = "0.parametrizations.weight.0"
    assert [*LoraModel(model, modified_modules=[pattern]).layers] == ["0"]
    with pytest.raises(AddressError, match="no module matches"):
        LoraModel(model, modified_modules=["weight"])
    for naming in (inner, "parametrizations.weight.0", r"[r]parametrizations\..*0"):
        with pytest.raises(SiteError, match=inner):
            LoraModel(model, modified_modules=[naming])
    assert inner not in opendelta.roles(parametrized(), override={pattern: "attn.q"})


def test_excluding_a_module_excludes_what_computes_its_weight():
    model, patterns = parametrized(), ["[r].+", "[r].*parametrizations.*"]
    delta = LoraModel(model, modified_modules=patterns, exclude_modules=["0"])
    assert [*delta.layers] == ["1"]


class NormedWeight(torch.nn.Module):
    """A parametrization of somebody's own, with a linear layer inside."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(8, 8)

    def forward(self, weight):
        return self.mix(weight)


def normed(layer):
    return nn.utils.parametrizations.weight_norm(layer)


def mixed(layer):
    nn.utils.parametrize.register_parametrization(layer, "weight", NormedWeight())
    return layer


@pytest.mark.parametrize("change", [normed, mixed])
def test_what_computes_a_weight_is_no_default_place(change):
    sound = nn.Sequential(*(normed(nn.Conv1d(4, 4, 3, padding=1)) for _ in range(2)))
    for cls in (opendelta.LNTuningModel, opendelta.BitFitModel):
        with pytest.raises(AddressError, match="no module of Sequential has the role"):
            cls(sound)
    with pytest.raises(AddressError, match="no module of Sequential has the role"):
        opendelta.plan(sound, opendelta.LNTuningConfig())
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    plain = plain.eval().requires_grad_(False)
    model = copy.deepcopy(plain)
    change(model.layers[0].linear1)
    assert opendelta.roles(model) == opendelta.roles(plain)
    for cls in (
        opendelta.LNTuningModel,
        opendelta.BitFitModel,
        opendelta.LoReftModel,
        AdapterModel,
    ):
        places = cls(copy.deepcopy(plain)).modified_modules
        assert cls(model).modified_modules == places
        assert model(torch.randn(2, 3, 8)).shape == (2, 3, 8)
