"""The defaults are those of OpenDelta 0.3.2, or stand in the list of what differs on purpose."""

import inspect
import re

import pytest
import transformers
from support import ROOT

import opendelta

PAGE = (ROOT / "docs" / "how-to" / "from_opendelta.md").read_text()
ON_PURPOSE = PAGE.partition("## Different on purpose")[2].partition("\n## ")[0]
COMMON = {
    "modified_modules": None, "exclude_modules": None, "unfrozen_modules": None,
    "common_structure": None, "interactive_modify": False,
}  # fmt: skip
COMPACTER = {
    "reduction_factor": 16, "phm_c_init": "normal", "hypercomplex_division": 4, "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform", "shared_phm_rule": False,
    "factorized_phm": True, "shared_W_phm": False, "factorized_phm_rule": False, "phm_rank": 1,
    "phm_init_range": 0.0001, "kronecker_prod": None, "use_bias_up_sampler": True,
    "use_bias_down_sampler": True,
}  # fmt: skip
CLASSES = {  # of 0.3.2
    "LoraModel": {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0},
    "AdapterModel": {"bottleneck_dim": 24, "non_linearity": "gelu_new"},
    "BitFitModel": {},
    "CompacterModel": {"non_linearity": "gelu_new", **COMPACTER},
    "LowRankAdapterModel": {
        "reduction_factor": 32, "non_linearity": "gelu_new", "low_rank_w_init": "glorot-uniform",
        "low_rank_rank": 1,
    },
    "ParallelAdapterModel": {"bottleneck_dim": 24, "non_linearity": "gelu_new"},
    "PrefixModel": {
        "prefix_token_num": 6, "reparameterize": True, "embed_dim": 512, "mid_dim": 512,
    },
    "SoftPromptModel": {"soft_token_num": 100, "init_range": 0.5, "token_init": True},
}  # fmt: skip
OF_CONFIGS = {  # where those of the config are others
    "CompacterModel": {"non_linearity": "relu"},
    "ParallelAdapterModel": {"scaled": 1.0},
}
VERBS = {
    "freeze_module": {"module": None},
    "log": {"module": None, "delta_ratio": True, "trainable_ratio": True, "visualization": True},
    "save_finetuned": {"finetuned_delta_path": "./delta_checkpoints/"},
    "from_finetuned": {
        "delta_config": None, "cache_dir": None, "force_download": False, "check_hash": True,
        "local_files_only": False,
    },
    "from_config": {"check_hash": True},
    "attach": {"module": None, "reset_state_dict": True},
    "detach": {"module": None, "reset_state_dict": True},
    "load_state_dict": {"strict": True},
}  # fmt: skip
# {default of 0.3.2 that is another here: words of the list}
OTHERS = {
    "default_exclude_modules=['lm_head']": "default_exclude_modules",
    "dtype of the backbone": '`dtype="backbone"` is 0.3\'s',
    "set_state_dict=True": "`set_state_dict=True` is 0.3's",
    "strip=False": "`strip=False`",
    "BitFit's norms": "embeddings' norm of BERT",
    "ParallelAdapter's attention of T5": "0.3's T5",
}

pytestmark = pytest.mark.covers("*Model", "*Config")


@pytest.mark.parametrize("name", CLASSES)
def test_options_have_the_defaults_of_0_3(name):
    parameters = inspect.signature(getattr(opendelta, name)).parameters
    ours = {key: parameter.default for key, parameter in parameters.items()}
    wanted = {**CLASSES[name], **COMMON}
    assert {key: ours[key] for key in wanted} == wanted
    kind = getattr(opendelta, name).delta_type
    config = opendelta.AutoDeltaConfig.from_dict({"delta_type": kind})
    wanted = {**CLASSES[name], **OF_CONFIGS.get(name, {})}
    assert {key: getattr(config, key) for key in wanted} == wanted


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_have_the_defaults_of_0_3(verb):
    parameters = inspect.signature(getattr(opendelta.LoraModel, verb)).parameters
    assert {key: parameters[key].default for key in VERBS[verb]} == VERBS[verb]


@pytest.mark.parametrize("words", OTHERS.values(), ids=OTHERS)
def test_what_differs_is_in_the_list(words):
    assert words in re.sub(r"\s+", " ", ON_PURPOSE)


# ------------------------------------------------------------------------------------------ places
def sizes(**others):
    return {"vocab_size": 99, "num_hidden_layers": 2, "hidden_size": 32, **others}


def bert():
    config = transformers.BertConfig(**sizes(num_attention_heads=4, intermediate_size=64))
    return transformers.BertForSequenceClassification(config)


def opt():
    config = transformers.OPTConfig(
        **sizes(num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32)
    )
    return transformers.OPTForCausalLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=99, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "options", "others"),
    [
        (bert, {"exclude_modules": ["embeddings"]}, {"bert.embeddings.LayerNorm"}),
        (
            opt,
            {"exclude_modules": ["decoder.final_layer_norm"]},
            {"model.decoder.final_layer_norm"},
        ),
    ],
)
def test_bitfit_goes_on_one_norm_more_than_in_0_3(make, options, others):
    ours, theirs = (opendelta.BitFitModel(make(), **given) for given in ({}, options))
    assert {*ours.modified_modules} - {*theirs.modified_modules} == others
    # each of the blocks: four of the attention, two of the feed-forward, two norms
    assert sum(p.numel() for p in theirs.parameters()) == 2 * (4 * 32 + 64 + 32 + 2 * 32)


def test_the_parallel_adapter_of_t5_begins_after_the_norm():
    ours = opendelta.ParallelAdapterModel(t5())
    there = [r"[r]layer\.0", r"[r]layer\.0", "wi", "wo"]
    theirs = opendelta.ParallelAdapterModel(t5(), modified_modules=there)
    count = [sum(p.numel() for p in delta.parameters()) for delta in (ours, theirs)]
    assert count[0] == count[1]
    assert {*theirs.modified_modules} - {*ours.modified_modules} == {
        f"{half}.block.{n}.layer.0" for half in ("encoder", "decoder") for n in range(2)
    }
