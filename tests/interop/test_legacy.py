"""Checkpoints of OpenDelta 0.3.2 give its own logits here, or what is wrong with them is said."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from support.nets import untouched

import opendelta
from opendelta import AutoDeltaConfig, AutoDeltaModel, DeltaLoadError, LoraModel, UncheckedWarning
from opendelta.interop import legacy

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "index.json").read_text())
FOLDERS = [name for name in CASES if (GOLDEN / name / "delta").is_dir()]
COMPOSITIONS = [name for name in CASES if name not in FOLDERS]
FAULT = "t5_prefix_default"

pytestmark = [
    pytest.mark.covers("load", "AutoDeltaModel"),
    pytest.mark.filterwarnings("ignore:.*md5:opendelta.UncheckedWarning"),
]


# ------------------------------------------------------------------------------------------ helpers
def backbone(name):
    """The model that 0.3.2 put its deltas on."""
    model = getattr(transformers, CASES[name]["model_class"]).from_pretrained(
        GOLDEN / name / "backbone", attn_implementation="eager"
    )
    return model.eval()


def both(name, model):
    """The logits of 0.3.2 and of `model`, with and without the delta as 0.3.2 saved them."""
    tensors = load_file(GOLDEN / name / "io.safetensors")
    inputs = {k.removeprefix("input."): t for k, t in tensors.items() if k.startswith("input.")}
    with torch.no_grad():
        return tensors["logits.delta"], model(**inputs).logits, tensors["logits.base"]


# Arguments with which we compute what 0.3.2 did, where its defaults are other places or results.
AS_THERE = {
    "bert_softprompt": {"strip": False},
    "t5_softprompt_documented": {"strip": False},
    "t5_parallel_documented": {"modified_modules": [r"[r]layer\.0", r"[r]layer\.0", "wi", "wo"]},
}


def put(name, model, **others):
    """The deltas of a case with the arguments that 0.3.2 got, in its order, and others."""
    return [getattr(opendelta, cls)(model, **kw, **others) for cls, kw in CASES[name]["deltas"]]


def assert_same(name, model):
    theirs, ours, base = both(name, model)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (theirs - base).abs().max() > 0.5


# ------------------------------------------------------------------------------------- the cases
@pytest.mark.parametrize("name", [name for name in FOLDERS if name != FAULT])
@pytest.mark.parametrize("load", [AutoDeltaModel.from_finetuned, opendelta.load])
def test_a_folder_of_0_3_gives_its_logits(name, load):
    model = backbone(name)
    assert CASES[name]["expect"] == "equal"
    load(GOLDEN / name / "delta", model)
    assert_same(name, model)


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_of_0_3_gives_its_logits(name):
    model = backbone(name)
    put(name, model)
    legacy.load_state_dict(model, GOLDEN / name / "composition.bin")
    assert_same(name, model)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_0_3_loads_as_a_state_dict_too(name):
    model, loaded = backbone(name), backbone(name)
    put(name, model, **AS_THERE.get(name, {}))
    legacy.load_state_dict(model, GOLDEN / name / "delta" / "pytorch_model.bin")
    AutoDeltaModel.from_finetuned(GOLDEN / name / "delta", loaded)
    assert torch.equal(both(name, model)[1], both(name, loaded)[1])


@pytest.mark.parametrize("name", [name for name in CASES if name != FAULT])
def test_torchs_own_load_state_dict_takes_the_names_of_0_3(name):
    model = backbone(name)
    put(name, model, **AS_THERE.get(name, {}))
    file = GOLDEN / name / "composition.bin"
    file = file if file.is_file() else GOLDEN / name / "delta" / "pytorch_model.bin"
    result = model.load_state_dict(torch.load(file, weights_only=True), strict=False)
    assert not result.unexpected_keys
    assert_same(name, model)


class Around(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model


def test_names_of_0_3_are_taken_in_a_module_around_and_refused_without_their_delta():
    name = "bert_lora_default"
    state = torch.load(GOLDEN / name / "delta" / "pytorch_model.bin", weights_only=True)
    model = backbone(name)
    put(name, model)
    Around(model).load_state_dict({f"inner.{k}": t for k, t in state.items()}, strict=False)
    assert_same(name, model)
    other = backbone(name)
    delta = opendelta.LoraModel(other, modified_modules=["query"])
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    with pytest.raises(DeltaLoadError, match=r"no delta for .*self\.value \(lora\)"):
        other.load_state_dict(state, strict=False)
    assert all(torch.equal(t, before[key]) for key, t in other.state_dict().items())
    delta.detach()
    assert other.load_state_dict(state, strict=False).unexpected_keys == [
        *state
    ]  # no delta, no hook


def test_a_pattern_of_0_3_that_repeats_too_much_is_read_from_the_tensors(tmp_path):
    folder = GOLDEN / "roberta_lora_pattern" / "delta"
    config = json.loads((folder / "config.json").read_text())
    assert AutoDeltaConfig.from_finetuned(folder).modified_modules == config["modified_modules"]
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    slow = {
        **config,
        "modified_modules": [r"[r](\d|layer)+\.output.dense", "attention.output.dense"],
    }
    other = written(tmp_path / "slow", slow, state)
    assert len(AutoDeltaConfig.from_finetuned(other).modified_modules) == 24
    with pytest.warns(UncheckedWarning, match=r"what \[r\].* selects cannot be told"):
        AutoDeltaModel.from_finetuned(other, model := backbone("roberta_lora_pattern"))
    assert_same("roberta_lora_pattern", model)


def test_a_prefix_of_0_3_loses_the_relative_positions_of_t5_and_ours_does_not():
    model = backbone(FAULT)
    assert CASES[FAULT]["expect"].startswith("fault: 0.3.2 drops the relative position bias")
    delta = AutoDeltaModel.from_finetuned(GOLDEN / FAULT / "delta", model)
    theirs, ours, _ = both(FAULT, model)
    assert not torch.allclose(ours, theirs, atol=1e-2)
    given = torch.load(GOLDEN / FAULT / "delta" / "pytorch_model.bin", weights_only=True)
    assert sorted(t.norm().item() for t in given.values()) == sorted(
        p.norm().item() for p in delta.parameters()
    )


@pytest.mark.parametrize("name", CASES)
def test_as_many_parameters_are_trained_as_in_0_3(name):
    model = backbone(name)
    deltas = put(name, model)
    stat = CASES[name]["stat"]
    assert sum(p.numel() for d in deltas for p in d.parameters()) == stat["delta_parameters"]


# -------------------------------------------------------------------------- what is around them
@pytest.mark.covers("UncheckedWarning")
def test_the_md5_of_0_3_is_ignored_with_a_notice_that_check_hash_silences(recwarn):
    name = "bert_lora_default"
    with pytest.warns(UncheckedWarning, match="md5"):
        LoraModel.from_finetuned(GOLDEN / name / "delta", backbone(name))
    recwarn.clear()
    LoraModel.from_finetuned(GOLDEN / name / "delta", backbone(name), check_hash=False)
    assert not recwarn.list


@pytest.mark.covers("AutoDeltaConfig")
def test_the_config_of_a_folder_of_0_3_is_read():
    config = AutoDeltaConfig.from_finetuned(GOLDEN / "bert_lora_default" / "delta")
    assert (config.delta_type, config.lora_r, config.lora_alpha) == ("lora", 8, 16)
    model = backbone("bert_lora_default")
    with pytest.warns(opendelta.UnusedWarning, match="exclude_modules.*'lm_head'"):
        delta = AutoDeltaModel.from_config(config, model)
    assert len(delta.modified_modules) == 4
    other = backbone("gpt2_bitfit_default")
    folder = GOLDEN / "gpt2_bitfit_default" / "delta"
    delta = AutoDeltaModel.from_config(AutoDeltaConfig.from_finetuned(folder), other)
    assert "lm_head" not in delta.modified_modules


def test_another_method_is_refused_by_name():
    model = backbone("bert_adapter_default")
    with untouched(model), pytest.raises(DeltaLoadError, match="holds a 'adapter'"):
        LoraModel.from_finetuned(GOLDEN / "bert_adapter_default" / "delta", model)


def test_another_model_is_refused():
    model = backbone("gpt2_bitfit_default")
    with untouched(model), pytest.raises(DeltaLoadError, match=r"does not fit this GPT2LMHead"):
        AutoDeltaModel.from_finetuned(GOLDEN / "bert_lora_default" / "delta", model)


LAYERS = {  # the options of a config that say how many layers there are, as many as in the file
    "bert_adapter_default": {"num_hidden_layers": 2},
    "bert_lora_default": {"num_hidden_layers": 2},
    "bert_parallel_default": {"num_hidden_layers": 2},
    "gpt2_bitfit_default": {"n_layer": 2},
    "t5_compacter_default": {"num_layers": 2, "num_decoder_layers": 2},
    "t5_parallel_documented": {"num_layers": 12, "num_decoder_layers": 12},
    "t5_prefix_default": {"num_layers": 2, "num_decoder_layers": 2},
}


def of_other_depth(name, more):
    """A random model of the class of a case with so many layers more."""
    cls = getattr(transformers, CASES[name]["model_class"])
    config = cls.config_class.from_pretrained(GOLDEN / name / "backbone")
    for option, layers in LAYERS[name].items():
        assert getattr(config, option) == layers
        setattr(config, option, layers + more)
    return cls(config)


@pytest.mark.parametrize("name", LAYERS)
def test_tensors_of_no_module_are_refused(name):
    model = of_other_depth(name, -1)
    with untouched(model), pytest.raises(DeltaLoadError, match=r"no module matches '.*\.1[.12]"):
        opendelta.load(GOLDEN / name / "delta", model)


@pytest.mark.parametrize("name", LAYERS)
def test_modules_that_the_config_selects_and_the_file_lacks_are_refused(name):
    model = of_other_depth(name, 1)
    why = r"pytorch_model.bin has no tensors for \d+ modules that modified_modules selects: "
    with untouched(model), pytest.raises(DeltaLoadError, match=why):
        opendelta.load(GOLDEN / name / "delta", model)


@pytest.mark.parametrize("name", ["bert_lora_default", "bert_parallel_default"])
@pytest.mark.parametrize("lost", ["layer.0", "value|intermediate"])
def test_a_file_that_lost_whole_modules_is_refused(tmp_path, name, lost):
    folder = GOLDEN / name / "delta"
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    rest = {key: tensor for key, tensor in state.items() if not re.search(lost, key)}
    assert len(rest) == len(state) / 2
    other = written(tmp_path / "half", json.loads((folder / "config.json").read_text()), rest)
    model = backbone(name)
    with untouched(model), pytest.raises(DeltaLoadError, match="has no tensors for 2 modules"):
        opendelta.load(other, model)


def test_a_composition_needs_its_deltas_first():
    name = "roberta_composition"
    model = backbone(name)
    with untouched(model), pytest.raises(DeltaLoadError, match="attach the deltas"):
        legacy.load_state_dict(model, GOLDEN / name / "composition.bin")


def test_a_composition_does_not_load_into_other_deltas():
    name = "bart_same_layer"
    model = backbone(name)
    deltas = put(name, model)[:2]
    before = {key: t.clone() for d in deltas for key, t in d.state_dict().items()}
    path = GOLDEN / name / "composition.bin"
    third = opendelta.LoraModel(model, modified_modules=["fc1"])
    with pytest.raises(DeltaLoadError, match="missing"):
        legacy.load_state_dict(model, path)
    third.detach()
    assert all(torch.equal(t, before[k]) for d in deltas for k, t in d.state_dict().items())


def test_a_pickle_that_would_run_code_is_not_unpickled(tmp_path):
    class Harm:
        def __reduce__(self):
            return (exec, ("raise SystemExit('it ran')",))

    name = "bert_lora_default"
    text = (GOLDEN / name / "delta" / "config.json").read_text()
    (tmp_path / "config.json").write_text(text)
    torch.save({"a": Harm()}, tmp_path / "pytorch_model.bin")
    model = backbone(name)
    with untouched(model), pytest.raises(DeltaLoadError, match="nothing else is unpickled"):
        AutoDeltaModel.from_finetuned(tmp_path, model)


def test_an_unknown_option_is_refused_by_name(tmp_path):
    name = "bert_lora_default"
    given = json.loads((GOLDEN / name / "delta" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**given, "lora_n": 3}))
    (tmp_path / "pytorch_model.bin").write_bytes(
        (GOLDEN / name / "delta" / "pytorch_model.bin").read_bytes()
    )
    with pytest.raises(DeltaLoadError, match="lora_n=3 is no option of 'lora'"):
        AutoDeltaModel.from_finetuned(tmp_path, backbone(name))


# --------------------------------------------- what 0.3 writes and no case above has, by its keys
def written(folder, facts, tensors):
    """A folder as 0.3 writes it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"opendelta_version": "0.3.2", **facts}))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def network_and_prefixes(layers, width=32):
    """A network of 0.3 for so many layers, and the keys and values [2 layers, 3, width] of it."""
    network = {
        "wte.weight": torch.randn(3, 8),
        "control_trans.0.weight": torch.randn(5, 8),
        "control_trans.0.bias": torch.randn(5),
        "control_trans.2.weight": torch.randn(2 * layers * width, 5),
        "control_trans.2.bias": torch.randn(2 * layers * width),
    }
    hidden = F.linear(*(network[f"{n}.weight"] for n in ("wte", "control_trans.0")))
    hidden = (hidden + network["control_trans.0.bias"]).tanh()
    rows = hidden @ network["control_trans.2.weight"].T + network["control_trans.2.bias"]
    return network, rows.view(3, 2 * layers, width).transpose(0, 1)


@pytest.mark.covers(
    "PrefixModel", "PrefixConfig.reparameterize", "PrefixConfig.embed_dim", "PrefixConfig.mid_dim"
)
@pytest.mark.parametrize("deltas", [1, 2])
def test_a_reparameterised_prefix_of_0_3_gives_the_prefixes_that_its_network_computes(
    tmp_path, deltas
):
    name, start = "bert_lora_default", "bert.encoder.layer.{}.attention."
    torch.manual_seed(3)
    made = [network_and_prefixes(2 // deltas) for _ in range(deltas)]
    parts = torch.cat([prefixes for _, prefixes in made])
    tensors = {
        start.format(i) + f"reparams.{key}": tensor
        for i, (network, _) in enumerate(made)
        for key, tensor in network.items()
    }
    facts = {"delta_type": "prefix", "prefix_token_num": 3, "embed_dim": 8, "mid_dim": 5}
    places = [{"modified_modules": ["attn@"], "common_structure": True}]
    if deltas == 2:
        places = [{"modified_modules": ["layer.0.attention"]}]
        other = {"modified_modules": ["attention"], "exclude_modules": ["bert.encoder.layer.0"]}
        places.append(other)
    by_network = [
        written(tmp_path / f"network{i}", {**facts, **place, "reparameterize": True}, tensors)
        for i, place in enumerate(places)
    ]
    plain = written(
        tmp_path / "plain",
        {**facts, "modified_modules": ["attention"], "reparameterize": False},
        {
            start.format(i) + f"prefix.past_{part}": parts[2 * i + j].clone()
            for i in range(2)
            for j, part in enumerate(("key", "value"))
        },
    )
    outs = []
    for folders in (by_network, [plain]):
        model = backbone(name)
        for folder in folders:
            AutoDeltaModel.from_finetuned(folder, model, check_hash=False)
        outs.append(both(name, model)[1])
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)
    assert not torch.allclose(outs[0], both(name, backbone(name))[1], atol=1e-2)


@pytest.mark.covers("ParallelAdapterModel")
def test_a_branch_of_0_3_starts_where_its_exclude_modules_let_it(tmp_path):
    start = "bert.encoder.layer.1.intermediate"
    shapes = {"down_proj": (4, 32), "up_proj": (32, 4)}
    tensors = {f"{n}.weight": torch.randn(shape) for n, shape in shapes.items()}
    tensors |= {f"{n}.bias": torch.randn(shape[0]) for n, shape in shapes.items()}
    facts = {
        "delta_type": "parallel_adapter", "bottleneck_dim": 4,
        "modified_modules": ["intermediate", "output.dense"],
        "exclude_modules": ["bert.encoder.layer.0", "bert.encoder.layer.1.att"],
    }  # fmt: skip
    given = {f"{start}.parallel_adapter.modulelist.{key}": t for key, t in tensors.items()}
    folder = written(tmp_path / "parallel", facts, given)
    delta = AutoDeltaModel.from_finetuned(folder, backbone("bert_lora_default"))
    assert delta.modified_modules == [start, "bert.encoder.layer.1.output.dense"]
    assert all(torch.equal(t, tensors[key]) for key, t in delta.layers[start].state_dict().items())


@pytest.mark.covers("BitFitModel")
def test_biases_that_0_3_adds_behind_modules_and_trained_heads_load(tmp_path):
    model, expected = backbone("bert_lora_default"), backbone("bert_lora_default")
    added, whole = torch.randn(32), torch.randn(32)
    head = {key: torch.randn_like(t) for key, t in model.classifier.state_dict().items()}
    folder = written(
        tmp_path / "bitfit",
        {
            "delta_type": "bitfit",
            "modified_modules": ["attn@", "layer_norm@", "lm_head@.proj@"],
            "common_structure": True,
        },
        {
            "bert.encoder.layer.0.output.LayerNorm.bitfit.bias": added,
            "bert.encoder.layer.0.attention.self.query.bias": whole,
            **{f"classifier.{key}": tensor for key, tensor in head.items()},
        },
    )
    AutoDeltaModel.from_finetuned(folder, model, check_hash=False)
    with torch.no_grad():
        layer = expected.bert.encoder.layer[0]
        layer.output.LayerNorm.bias += added
        layer.attention.self.query.bias.copy_(whole)
        expected.classifier.load_state_dict(head)
    ours, by_hand = (both("bert_lora_default", m)[1] for m in (model, expected))
    torch.testing.assert_close(ours, by_hand, atol=1e-5, rtol=0)


# ------------------------------------------- folders of several deltas that were on one backbone
QUERY, VALUE = (f"bert.encoder.layer.{{}}.attention.self.{part}" for part in ("query", "value"))


def by_hand(changes):
    """The logits of a backbone with these matrices and biases added: {module: (matrix, bias)}."""
    model = backbone("bert_lora_default")
    with torch.no_grad():
        for where, (matrix, bias) in changes.items():
            module = model.get_submodule(where)
            module.weight += matrix
            module.bias += bias
    return both("bert_lora_default", model)[1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("roles", [False, True])
def test_of_two_deltas_of_a_method_each_folder_gives_its_own(tmp_path, order, roles):
    torch.manual_seed(0)
    tensors, folders, changes = {}, [], {}
    for part, rank in ((QUERY, 2), (VALUE, 3)):
        for where in map(part.format, range(2)):
            a, b = torch.randn(rank, 32), torch.randn(32, rank)
            tensors |= {f"{where}.lora.lora_A": a, f"{where}.lora.lora_B": b}
            changes[where] = (4 * rank / rank * b @ a, 0)
    for part, rank in (("query", 2), ("value", 3)):
        wanted = [f"attn@.{part[0]}@"] if roles else [rf"[r](\d)+\.attention.self.{part}"]
        facts = {"lora_r": rank, "lora_alpha": 4 * rank, "exclude_modules": ["lm_head"]}
        facts |= {"modified_modules": wanted, "common_structure": roles, "delta_type": "lora"}
        folders.append(written(tmp_path / part, facts, tensors))
    model = backbone("bert_lora_default")
    deltas = [AutoDeltaModel.from_finetuned(folders[i], model) for i in order]
    assert [len(delta.modified_modules) for delta in deltas] == [2, 2]
    ours = both("bert_lora_default", model)[1]
    torch.testing.assert_close(ours, by_hand(changes), atol=1e-5, rtol=0)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_folders_of_a_composition_give_their_deltas_in_any_order(tmp_path, order):
    torch.manual_seed(0)
    where, first, second = (n.format(0) for n in (QUERY, QUERY, VALUE))
    a, b, *whole = torch.randn(8, 32), torch.randn(32, 8), torch.randn(32), torch.randn(32)
    biases = {f"{first}.bias": whole[0], f"{second}.bias": whole[1]}
    tensors = {f"{where}.lora.lora_A": a, f"{where}.lora.lora_B": b, **biases}
    given = [("lora", [where]), ("bitfit", [first]), ("bitfit", [second])]
    model = backbone("bert_lora_default")
    old = {n: model.get_submodule(n).bias.detach().clone() for n in (first, second)}
    changes = {first: (2 * b @ a, whole[0] - old[first]), second: (0, whole[1] - old[second])}
    for i in order:
        facts = {"delta_type": given[i][0], "modified_modules": given[i][1]}
        folder = written(tmp_path / str(i), facts, tensors)
        AutoDeltaModel.from_finetuned(folder, model)
    ours = both("bert_lora_default", model)[1]
    torch.testing.assert_close(ours, by_hand(changes), atol=1e-5, rtol=0)
