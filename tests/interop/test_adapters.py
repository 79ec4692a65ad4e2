"""Checkpoints of the adapters library give its own logits here, or are refused by name."""

import contextlib
import json
import random
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from support.nets import shake, untouched

import opendelta
from opendelta import (
    AdapterModel,
    AutoDeltaModel,
    DeltaLoadError,
    LoraModel,
    UnsavedWarning,
    interop,
)
from opendelta.interop import adapters, peft

pytestmark = pytest.mark.covers(
    "load", "AdapterModel", "CompacterModel", "PrefixModel", "ParallelAdapterModel"
)

GOLDEN = Path(__file__).parent / "golden_adapters"
INDEX = json.loads((GOLDEN / "index.json").read_text())
CASES = [(kind, case) for kind in INDEX for case in INDEX[kind]["cases"] if case != "base"]
REFUSED = ("t5", "prefix_flat")
FUSED = [(kind, case) for kind in INDEX for case in INDEX[kind]["fused"] if case != "par_bn"]
LOADED = [each for each in CASES if each != REFUSED]


# ------------------------------------------------------------------------------------------ helpers
def backbone(kind, model_class=None):
    """The model that the library put its adapters on; with another class, its base."""
    cls = getattr(transformers, model_class or INDEX[kind]["model_class"])
    model = cls.from_pretrained(GOLDEN / kind / "backbone", attn_implementation="eager")
    return model.eval()


def run(kind, model):
    """The logits of `model` for the library's inputs."""
    tensors = safetensors.torch.load_file(GOLDEN / kind / "io.safetensors")
    inputs = {k.removeprefix("input."): t for k, t in tensors.items() if k.startswith("input.")}
    with torch.no_grad():
        return model(**inputs)[0]


def theirs(kind, case, what="logits"):
    """The logits of the library."""
    return safetensors.torch.load_file(GOLDEN / kind / "io.safetensors")[f"{what}.{case}"]


def assert_same(kind, case, model, what="logits"):
    torch.testing.assert_close(run(kind, model), theirs(kind, case, what), atol=1e-5, rtol=0)


def tensors_of(folder):
    path = folder / "adapter.safetensors"
    if path.is_file():
        return safetensors.torch.load_file(path)
    return torch.load(folder / "pytorch_adapter.bin", weights_only=True)


@pytest.fixture
def edited(tmp_path):
    """A copy of a case with other options, tensors, or facts."""

    def edit(kind, case, tensors=None, facts=(), **options):
        folder = tmp_path / "edited"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(GOLDEN / kind / case, folder)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text()) | dict(facts)
        if isinstance(config["config"], dict):
            config["config"] |= options
        path.write_text(json.dumps(config))
        if tensors is not None:
            given = tensors_of(folder)
            tensors(given)
            (folder / "adapter.safetensors").unlink(missing_ok=True)
            torch.save(given, folder / "pytorch_adapter.bin")
        return folder

    return edit


def refused(folder, message, kind="bert", model_class=None):
    model = backbone(kind, model_class)
    with untouched(model), pytest.raises(DeltaLoadError, match=message):
        opendelta.load(folder, model)


# ---------------------------------------------------------------------------------------- the cases
@pytest.mark.parametrize(("kind", "case"), LOADED)
def test_an_adapter_of_the_library_gives_its_logits(kind, case):
    model = backbone(kind)
    plain = run(kind, model)
    torch.testing.assert_close(plain, theirs(kind, "base"), atol=1e-5, rtol=0)
    deltas = opendelta.load(GOLDEN / kind / case, model)
    assert_same(kind, case, model)
    ours = run(kind, model)
    assert ours.shape != plain.shape or (ours - plain).abs().max() > 0.05
    if len(deltas) == 1:
        model = backbone(kind)
        delta = AutoDeltaModel.from_finetuned(GOLDEN / kind / case, backbone_model=model)
        assert delta.name == "task"
        assert torch.equal(run(kind, model), ours)
        delta.detach()
        opendelta.assert_pristine(model)


@pytest.mark.parametrize("case", ["seq_bn", "mam", "compacter", "prefix", "flex_head"])
def test_what_was_read_is_saved_and_loaded_as_ours(case, tmp_path):
    model, fresh = backbone("bert"), backbone("bert")
    deltas = opendelta.load(GOLDEN / "bert" / case, model)
    next(iter(deltas)).freeze_module()
    opendelta.composition(model).save(tmp_path)
    opendelta.load(tmp_path, fresh)
    assert torch.equal(run("bert", fresh), run("bert", model))


def test_a_union_is_one_delta_for_each_method():
    model = backbone("bert")
    first, second = opendelta.load(GOLDEN / "bert" / "mam", model)
    assert (first.name, second.name) == ("task_prefix", "task_adapter")
    assert (first.delta_type, second.delta_type) == ("prefix", "parallel_adapter")
    fresh = backbone("bert")
    with untouched(fresh), pytest.raises(DeltaLoadError, match="holds 2 deltas"):
        AutoDeltaModel.from_finetuned(GOLDEN / "bert" / "mam", fresh)


def test_another_method_is_refused_by_name():
    model = backbone("bert")
    with untouched(model), pytest.raises(DeltaLoadError, match="holds a 'lora'"):
        AdapterModel.from_finetuned(GOLDEN / "bert" / "lora", model)


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        ("bert", "BertModel"),
        ("gpt2", "GPT2Model"),
        ("t5", "T5EncoderModel"),
        ("llama", "LlamaModel"),
    ],
)
def test_the_base_model_takes_what_a_model_with_a_head_had(kind, plain, edited):
    def keep_encoder(tensors):
        for key in [key for key in tensors if key.startswith("decoder.")]:
            del tensors[key]

    model = backbone(kind, plain)
    (delta,) = opendelta.load(edited(kind, "lora", keep_encoder), model)
    names = delta.modified_modules
    assert len(names) in (2, 4)
    assert not any(name.startswith(("bert.", "transformer.", "model.")) for name in names)


# ---------------------------------------------------------------------------------------- the heads
@pytest.mark.covers("DeltaConfig.modules_to_save", "DeltaConfig.num_labels")
def test_a_head_is_the_deltas_own_module_and_goes_with_it():
    model = backbone("bert")
    delta = LoraModel.from_finetuned(GOLDEN / "bert" / "flex_head", model)
    assert delta.config.modules_to_save == ["bert.pooler", "classifier"]
    assert model.num_labels == delta.config.num_labels == 4
    delta.detach()
    assert model.num_labels == 3
    torch.testing.assert_close(run("bert", model), theirs("bert", "base"), atol=1e-5, rtol=0)


def test_the_backbones_own_head_is_not_owned_again(tmp_path):
    model = backbone("roberta")
    shutil.copytree(GOLDEN / "roberta" / "head", tmp_path / "same")
    head = {f"classifier.{k}": t for k, t in model.classifier.state_dict().items()}
    safetensors.torch.save_file(head, tmp_path / "same" / "model_head.safetensors")
    delta = LoraModel.from_finetuned(tmp_path / "same", model)
    assert delta.config.modules_to_save is None


@pytest.mark.covers("UnsavedWarning")
@pytest.mark.parametrize("case", ["head", "flex_head"])
def test_a_head_of_another_task_is_left_out_with_a_warning(case):
    model = backbone("bert", "BertForQuestionAnswering")
    with pytest.warns(UnsavedWarning, match="none of this BertForQuestionAnswering's") as caught:
        opendelta.load(GOLDEN / "bert" / case, model)
    assert caught[0].filename == __file__
    assert opendelta.composition(model).names == ["task"]


def test_a_head_must_be_whole(tmp_path):
    folder = tmp_path / "head"
    shutil.copytree(GOLDEN / "bert" / "head", folder)
    (folder / "model_head.safetensors").unlink()
    refused(folder, "neither model_head.safetensors nor pytorch_model_head.bin")
    torch.save({"classifier.weight": torch.ones(3, 16)}, folder / "pytorch_model_head.bin")
    refused(folder, "1 missing: classifier.deltas.task.module.bias")


# ----------------------------------------------------------------------------------- other versions
def test_before_1_1_alpha_had_no_effect(edited):
    facts = {"version": "adapters.1.0.1"}
    for version, alpha in (
        (facts, 2),
        ({"version": "adapters.1.1.0"}, 6),
        ({"version": "3.2.1"}, 6),
    ):
        delta = LoraModel.from_finetuned(edited("bert", "lora", facts=version), backbone("bert"))
        assert (delta.config.lora_alpha, delta.config.lora_r) == (alpha, 2)


def test_the_keys_of_adapter_transformers_1_are_known(edited):
    def rename(tensors):
        for key in list(tensors):
            kind = "attention" if ".attention." in key else "layer"
            new = key.replace(".adapters.", f".{kind}_text_task_adapters.")
            tensors[new] = tensors.pop(key)

    model = backbone("bert")
    opendelta.load(edited("bert", "double_seq_bn", rename, {"type": "text_task"}), model)
    assert_same("bert", "double_seq_bn", model)


# ---------------------------------------------------------------------------------- the recognisers
def test_no_two_readers_claim_a_folder(tmp_path):
    import peft as library

    config = library.LoraConfig(r=2, target_modules=["query"])
    library.get_peft_model(backbone("bert"), config).save_pretrained(tmp_path / "peft")
    shutil.copytree(GOLDEN / "bert" / "lora", tmp_path / "cut")
    (tmp_path / "cut" / "pytorch_adapter.bin").unlink()
    fusions = (GOLDEN / kind / "fused" / case / "fusion" for kind, case in FUSED)
    for folder in (*(GOLDEN / kind / case for kind, case in CASES), *fusions, tmp_path / "cut"):
        assert interop.reader_of(folder) is adapters
        assert not peft.recognises(folder)
    assert interop.reader_of(tmp_path / "peft") is peft
    assert not adapters.recognises(tmp_path / "peft")
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    assert not adapters.recognises(tmp_path / "peft")
    assert not adapters.recognises(tmp_path)
    refused(tmp_path / "cut", "neither adapter.safetensors nor pytorch_adapter.bin")


def test_a_setup_of_adapters_is_refused(tmp_path):
    (tmp_path / "adapter_setup.json").write_text("{}")
    refused(tmp_path, "adapter_setup.json says how several adapters act together; load the folders")


# ------------------------------------------------------------------------------------- the fusions
@pytest.fixture
def fused(tmp_path):
    """A copy of a fusion of BERT's and its adapters, with other facts or options of the fusion."""

    def edit(case="seq_bn", tensors=None, facts=(), **options):
        shutil.rmtree(tmp_path / "fused", ignore_errors=True)
        shutil.copytree(GOLDEN / "bert" / "fused" / case, tmp_path / "fused")
        folder = tmp_path / "fused" / "fusion"
        path = folder / "adapter_fusion_config.json"
        config = json.loads(path.read_text()) | dict(facts)
        if isinstance(config["config"], dict):
            config["config"] |= options
        path.write_text(json.dumps(config))
        if tensors is not None:
            path = folder / "pytorch_model_adapter_fusion.bin"
            given = torch.load(path, weights_only=True)
            tensors(given)
            torch.save(given, path)
        return folder

    return edit


@pytest.mark.covers("FuseModel", "FuseConfig.value")
@pytest.mark.parametrize(("kind", "case"), FUSED)
def test_a_fusion_gives_its_logits_over_adapters_on_the_model_or_beside_it(kind, case):
    folder = GOLDEN / kind / "fused" / case
    model, beside = backbone(kind), backbone(kind)
    for name in "abc":
        opendelta.load(folder / name, model)
    opendelta.load(folder / "fusion", model)
    assert_same(kind, case, model, "fused")
    assert opendelta.composition(model).names == ["a", "b", "c", "a_b_c"]
    block = AutoDeltaModel.from_finetuned(folder / "fusion", backbone_model=beside)
    assert (block.delta_type, block.config.deltas) == ("fuse", ["a", "b", "c"])
    assert torch.equal(run(kind, beside), run(kind, model))
    for delta in [block, *opendelta.composition(beside)]:
        delta.detach()
    opendelta.assert_pristine(beside)


def test_a_fusion_that_was_read_is_saved_and_loaded_as_ours(tmp_path):
    model, fresh = backbone("bert"), backbone("bert")
    opendelta.load(GOLDEN / "bert" / "fused" / "flex_head" / "fusion", model)["a"].freeze_module()
    opendelta.composition(model).save(tmp_path)
    opendelta.load(tmp_path, fresh)
    assert torch.equal(run("bert", fresh), run("bert", model))
    assert run("bert", fresh).shape == (2, 4)


def test_a_fusion_without_its_adapters_is_refused(tmp_path):
    shutil.copytree(GOLDEN / "bert" / "fused" / "seq_bn" / "fusion", tmp_path / "fusion")
    refused(tmp_path / "fusion", "it fuses 'a', which is neither on the model nor in a folder")


def test_no_folder_but_its_neighbours_is_looked_at(fused):
    for name in ("..", "../fused/a", "a/../a", "."):
        refused(fused(facts={"adapter_names": ["a", name]}), "is neither on the model nor in a")


def test_fusions_by_another_rule_are_refused_by_name(fused):
    refused(
        GOLDEN / "bert" / "fused" / "par_bn" / "fusion", r"'a'.*\(par_bn\) asks with the branch"
    )
    for option, value, message in (
        ("temperature", True, "falls from 50 with each forward"),
        ("query_before_ln", True, "asks after that sum"),
        ("residual_before", True, "leaves the residual as it is"),
        ("query", False, "always has this matrix"),
        ("key", False, "always has this matrix"),
        ("dropout_prob", 0.1, "acts in training only"),
        ("heads", 2, "no such option is known"),
    ):
        refused(fused(**{option: value}), f"fusion_config.json: {option}={value}.*{message}")
    folder = fused()
    config = json.loads((folder.parent / "b" / "adapter_config.json").read_text())
    for options, message in (
        ({"ln_after": True}, "adapter_norm_after.weight is missing"),
        ({"original_ln_before": False}, "only some normalise their sum"),
    ):
        changed = {**config, "config": {**config["config"], **options}}
        (folder.parent / "b" / "adapter_config.json").write_text(json.dumps(changed))
        refused(folder, message)
    model = backbone("bert")
    for name in "abc":
        places = ["output.LayerNorm"]
        options = {"residual": "input", "layer_norm": "after"}
        AdapterModel(model, modified_modules=places, name=name, **options)
    with pytest.raises(DeltaLoadError, match=r"'a'.*\(ln_after\)"):
        opendelta.load(folder, model)


def test_a_fusion_of_other_modules_is_refused(fused):
    lose = lambda t: [t.pop(key) for key in [*t] if ".layer.1." in key]  # noqa: E731
    refused(fused(tensors=lose), "no matrices for the adapters on bert.encoder.layer.1.output.Lay")
    key = "bert.encoder.layer.0.output.adapter_fusion_layer.a,b,c.key.bias"
    refused(fused(tensors=lambda t: t.pop(key)), "key.bias is missing")
    refused(fused(tensors=lambda t: t.update({key: torch.ones(2)})), "of another shape: .*key.bias")


@pytest.mark.parametrize("value", [None, 0, "a", [], ["a"], ["a", "a"], [1], {}, {"query": []}])
@pytest.mark.parametrize("fact", ["config", "name", "adapter_names", "model_type"])
def test_any_value_of_any_fact_of_a_fusion_loads_or_is_refused(fact, value, fused):
    with contextlib.suppress(DeltaLoadError):
        opendelta.load(fused(facts={fact: value}), backbone("bert"))


# --------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("kind", "case", "options", "message"),
    [
        (
            "bert",
            "seq_bn",
            {"use_gating": True},
            "use_gating=True.*averages over the whole sequence",
        ),
        ("bert", "seq_bn", {"dropout": 0.1}, "dropout=0.1.*acts in training only: set it to 0"),
        ("bert", "adapter_plus", {"stochastic_depth": 0.1}, "stochastic_depth=0.1.*training only"),
        ("bert", "seq_bn", {"adapter_residual_before_ln": True}, "adapter_residual_before_ln=True"),
        (
            "bert",
            "seq_bn",
            {"residual_before_ln": "post_add"},
            "residual_before_ln='post_add' it fits",
        ),
        (
            "bert",
            "seq_bn",
            {"original_ln_after": False},
            "original_ln_before=True cannot be loaded",
        ),
        ("bert", "layer_norm", {"ln_after": True}, "ln_after=True.*one normalisation"),
        ("bert", "par_bn", {"ln_before": True}, "ln_before=True.*no normalisation of its own"),
        ("bert", "par_bn", {"original_ln_after": False}, "original_ln_after=False"),
        (
            "bert",
            "compacter",
            {"original_ln_before": True},
            "a Compacter here adds to what it reads",
        ),
        ("bert", "compacter", {"scaling": 2.0}, "scaling=2.0.*has no scale"),
        ("bert", "compacter", {"reduction_factor": 4.5}, "reduction_factor=4.5.*whole number"),
        ("bert", "seq_bn", {"scaling": "none"}, "scaling='none'.*must be a number"),
        ("bert", "seq_bn", {"non_linearity": "glue"}, "no activation 'glue'; nearest: "),
        ("bert", "seq_bn", {"n_experts": 3}, "n_experts=3.*no such option is known"),
        ("bert", "lora", {"use_gating": True}, "use_gating=True"),
        ("bert", "lora", {"vera_d": 0.1}, "vera_d=0.1.*trains whole matrices"),
        ("bert", "lora", {"composition_mode": "mix"}, "composition_mode='mix'"),
        ("bert", "lora", {"r": 2.5}, "r=2.5.*whole number"),
        ("bert", "lora", {"architecture": "mtl_lora"}, "'mtl_lora' cannot be loaded: several"),
        ("bert", "lora", {"architecture": "reft"}, "'reft' cannot be loaded"),
        ("bert", "lora", {"architecture": "prompt_tuning"}, "train a SoftPromptModel"),
        (
            "bert",
            "lora",
            {"architecture": "new"},
            "'new' cannot be loaded: there is no such method",
        ),
        ("bert", "lora", {"architecture": None}, "no adapters for 'bottleneck'"),
        (
            "bert",
            "lora",
            {"architecture": "union", "configs": []},
            "must be an object with the opt",
        ),
        ("gpt2", "lora", {"attn_matrices": []}, r"attn_matrices=\[\].*some of q, k and v"),
        ("gpt2", "lora", {"use_dora": True}, "use_dora=True.*fused projection"),
        (
            "gpt2",
            "double_seq_bn",
            {"original_ln_before": True},
            "no module of GPT2LMHeadModel gives",
        ),
        ("llama", "dora", {"alpha": 4}, "use_dora=True.*leaves out alpha / r"),
        ("bert", "prefix", {"use_gating": True}, "use_gating=True"),
        ("bert", "prefix", {"dropout": 0.1}, "dropout=0.1"),
        ("bert", "prefix", {"non_linearity": "relu"}, "non_linearity='relu'.*'tanh'"),
        ("bert", "prefix", {"leave_out": [0]}, "does not fit"),
        ("bert", "prefix", {"leave_out": [0, 1]}, "has 2 self-attention modules"),
        ("bert", "prefix_flat", {"leave_out": 3}, "leave_out=3"),
        ("bert", "prefix_flat", {"prefix_length": 5}, r"control_trans \[192\] is none of 2 layers"),
    ],
)
def test_options_that_no_delta_has_are_refused_by_name(kind, case, options, message, edited):
    refused(edited(kind, case, **options), message, kind)


def test_prefixes_of_t5_are_refused():
    refused(GOLDEN / "t5" / "prefix_flat", "shifts the relative positions of T5's tokens", "t5")


def test_dora_that_scales_a_bias_is_refused(edited):
    refused(edited("bert", "lora", use_dora=True, alpha=2), "scales the bias of 'bert.encoder")


def test_what_is_beside_the_adapter_is_refused(edited):
    def invertible(tensors):
        tensors["bert.invertible_adapters.task.F.0.weight"] = torch.ones(2)

    def gate(tensors):
        tensors["bert.encoder.layer.0.attention.output.adapters.task.gate.weight"] = torch.ones(2)

    def prompt(tensors):
        tensors["bert.prompt_tuning.prompt_tunings.task.prompt_embedding.weight"] = torch.ones(2)

    def rule(tensors):
        tensors["bert.shared_parameters.task.phm_rule"] = torch.ones(2)

    def stranger(tensors):
        tensors["bert.encoder.layer.0.output.adapters.other.gate.weight"] = torch.ones(2)

    bert = "double_seq_bn"
    refused(edited("bert", bert, invertible, inv_adapter="nice"), "inv_adapter='nice'.*embeddings")
    refused(
        edited("bert", bert, gate), "nothing is known of gate.weight on 'bert.encoder.layer.0.att"
    )
    refused(edited("bert", bert, prompt), "nothing is known of its prompt_tunings")
    refused(edited("bert", bert, rule), "nothing is known of shared_parameters")
    refused(edited("bert", bert, stranger), "1 of 17 tensors belong to nothing called 'task'")


def test_sizes_that_differ_are_refused(edited):
    def narrow(tensors):
        start = "bert.encoder.layer.1.output.adapters.task"
        for key in ("adapter_down.0.weight", "adapter_down.0.bias"):
            tensors[f"{start}.{key}"] = tensors[f"{start}.{key}"][:2]
        tensors[f"{start}.adapter_up.weight"] = tensors[f"{start}.adapter_up.weight"][:, :2]

    folder = edited("bert", "double_seq_bn", narrow, reduction_factor={"1": 8, "default": 4})
    refused(folder, "reduction_factor=.*a delta has one size")


def test_a_rule_that_the_library_did_not_save_is_missed_by_name(edited):
    def lose(tensors):
        del tensors["bert.shared_parameters.task.phm_rule"]

    refused(edited("bert", "compacter", lose), "shared_phm_rule=True.*is not in the file")


def test_another_model_is_refused(edited):
    refused(GOLDEN / "bert" / "lora", "saved from a 'bert'.*is a 'roberta'", "roberta")
    folder = edited("bert", "lora", facts={"model_type": None})
    refused(folder, "there is no module 'bert.encoder.layer.0.attention.self.*'", "llama")


WHOLE = [(kind, case) for kind, case in LOADED if not case.startswith("prefix")]
LAYERS = {"gpt2": ["n_layer"], "t5": ["num_layers", "num_decoder_layers"]}
LACKS = r"it has no tensors for \d+ modules that its options select: "


@pytest.mark.parametrize(("kind", "case"), WHOLE)
def test_a_deeper_model_is_refused(kind, case):
    cls = getattr(transformers, INDEX[kind]["model_class"])
    config = cls.config_class.from_pretrained(GOLDEN / kind / "backbone")
    for option in LAYERS.get(kind, ["num_hidden_layers"]):
        setattr(config, option, 3)
    model = cls(config)
    why = "is none of 3 layers" if case == "mam" else LACKS
    with untouched(model), pytest.raises(DeltaLoadError, match=why):
        opendelta.load(GOLDEN / kind / case, model)


@pytest.mark.parametrize(("kind", "case"), WHOLE)
def test_a_file_that_lost_a_layer_is_refused_unless_the_options_leave_it_out(kind, case, edited):
    last = {"t5": "decoder.block.1.", "gpt2": "h.1.", "llama": "layers.1."}.get(kind, "layer.1.")

    def lose(tensors):
        for key in [key for key in tensors if last in key and "prefix" not in key]:
            del tensors[key]

    if case == "seq_bn" and kind != "t5":  # there is no other layer
        return
    refused(edited(kind, case, lose), LACKS, kind)
    if case != "mam":  # its options are one step deeper
        given = json.loads((GOLDEN / kind / case / "adapter_config.json").read_text())["config"]
        left = [*given["leave_out"], 3 if kind == "t5" else 1]
        opendelta.load(edited(kind, case, lose, leave_out=left), backbone(kind))


@pytest.mark.parametrize(
    ("case", "lost"),
    [
        ("double_seq_bn", ".attention.output."),
        ("double_seq_bn", "[01].output."),
        ("par_bn_attention", ".attention.output."),
        ("lora", ".value."),
        ("lora_everywhere", ".intermediate."),
        ("ia3", ".output.dense."),
    ],
)
def test_a_file_that_lost_all_of_a_kind_is_refused(case, lost, edited):
    def lose(tensors):
        for key in [key for key in tensors if re.search(lost, key)]:
            del tensors[key]

    refused(edited("bert", case, lose), LACKS.replace(r"\d+", "2"))


def test_damaged_tensors_are_refused(edited):
    key = "bert.encoder.layer.0.attention.self.query.loras.task.lora_A"
    refused(edited("bert", "lora", lambda t: t.pop(key)), "lora_A is missing; there is lora_B")
    wide = edited("bert", "lora", lambda t: t.update({key: torch.ones(2, 99)}))
    refused(wide, r"of another shape: .*lora_A: \[2, 99\] instead of \[2, 16\]")
    flat = edited("bert", "lora", lambda t: t.update({key: torch.ones(2)}))
    refused(flat, r"lora_A is \[2\] instead of \[2, -1\]")
    (flat / "pytorch_adapter.bin").write_bytes(b"no pickle")
    refused(flat, "nothing else is unpickled")


@pytest.mark.parametrize(
    ("kind", "case"),
    [("bert", "compacter"), ("bert", "seq_bn"), ("gpt2", "lora"), ("gpt2", "prefix")],
)
def test_any_value_of_any_option_loads_or_is_refused(kind, case, edited):
    numbers = [0, -1, 2.5, 1e30, 10**400, float("nan"), float("inf")]
    strange = [None, True, *numbers, "x", [], [[]], {}, {"a": 1}]
    options = json.loads((GOLDEN / kind / case / "adapter_config.json").read_text())["config"]
    some = random.Random(0).sample([(o, v) for o in sorted(options) for v in strange], 60)
    model = backbone(kind)
    before = opendelta.snapshot(model)
    for option, value in some:
        with contextlib.suppress(DeltaLoadError):
            for delta in list(opendelta.load(edited(kind, case, **{option: value}), model)):
                delta.detach()
                del delta
    opendelta.assert_pristine(model, like=before)


@pytest.mark.parametrize("value", [None, 0, "pfeiffer", [], {}, [[1]], {"architecture": []}])
@pytest.mark.parametrize("fact", ["config", "name", "version", "model_type", "model_class"])
def test_any_value_of_any_fact_loads_or_is_refused(fact, value, edited):
    folder = edited("bert", "lora", facts={fact: value})
    with contextlib.suppress(DeltaLoadError):
        opendelta.load(folder, backbone("bert"))


# -------------------------------------------------------------- adapters that normalise their sum
@pytest.mark.covers("AdapterConfig.residual")
def test_an_adapter_on_the_input_of_a_normalisation_is_its_equation():
    model = backbone("bert").double()
    name = "bert.encoder.layer.1.output.LayerNorm"
    options = {"bottleneck_dim": 3, "scaling": 0.5, "residual": "input", "non_linearity": "relu"}
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    norm = model.get_submodule(name)
    plain = norm(x)
    delta = AdapterModel(model, modified_modules=[name], **options)
    assert torch.equal(norm(x), plain)
    shake(delta)
    own = {key.rpartition(".adapter.")[2]: t for key, t in delta.state_dict().items()}
    hidden = (plain @ own["down_proj.weight"].T + own["down_proj.bias"]).relu()
    change = hidden @ own["up_proj.weight"].T + own["up_proj.bias"]
    delta.detach()
    expected = norm(x + 0.5 * change)
    delta.attach()
    torch.testing.assert_close(norm(x), expected, atol=1e-12, rtol=0)
    norm(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in delta.parameters())


@pytest.mark.covers("DeltaConfig.gate")
def test_its_gate_is_open_as_far_as_it_says():
    model = backbone("bert")
    name = "bert.encoder.layer.1.output.LayerNorm"
    plain = run("bert", model)
    delta = shake(AdapterModel(model, modified_modules=[name], residual="input", gate=True))
    (bias,) = [p for key, p in delta.named_parameters() if key.endswith("gate.bias")]
    with torch.no_grad():
        bias.fill_(-1e4)
    torch.testing.assert_close(run("bert", model), plain)
    with torch.no_grad():
        bias.fill_(1e4)
    opened = run("bert", model)
    ungated = backbone("bert")
    other = AdapterModel(ungated, modified_modules=[name], residual="input")
    for key, tensor in other.state_dict().items():
        tensor.copy_(delta.state_dict()[key])
    torch.testing.assert_close(opened, run("bert", ungated))


@pytest.mark.covers("AdapterConfig.residual")
def test_only_a_normalisation_takes_it():
    model = backbone("bert")
    with untouched(model), pytest.raises(opendelta.SiteError, match=r"LayerNorm, RMSNorm"):
        AdapterModel(model, residual="input")
