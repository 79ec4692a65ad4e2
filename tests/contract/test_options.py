"""Options: by name or by position, and what is said of a wrong one."""

import copy
import dataclasses
import inspect

import pytest
from support.nets import net, places_of, put, untouched
from torch import nn

import opendelta
from opendelta import AdapterModel, LoraModel
from opendelta._deltas.registry import METHODS


@pytest.mark.covers(
    "OptionError", "DeltaConfig.interactive_modify", "DeltaConfig.modified_modules",
    "DeltaConfig.dtype", "DeltaConfig.name",
)  # fmt: skip
def test_every_option_error_says_what_was_given():
    model = net()
    wrong = {
        "lora_r": [0, -1, "8", 1.5, None, True],
        "lora_dropout": [1.0, -0.1, "x"],
        "modified_modules": [3, [3]],
        "dtype": ["int8", "float33"],
        "name": [3],
    }
    for option, values in wrong.items():
        for value in values:
            options = {"modified_modules": ["linear"], option: value}
            with untouched(model), pytest.raises(opendelta.OptionError, match=rf"{option}="):
                LoraModel(model, **options)
    with pytest.raises(opendelta.OptionError, match=r"no option 'lora_rank'; nearest: lora_r"):
        LoraModel(model, modified_modules=["linear"], lora_rank=4)
    for name, ours in {
        "target_modules": "modified_modules",
        "r": "lora_r",
        "alpha": "lora_alpha",
    }.items():
        with pytest.raises(opendelta.OptionError, match=rf"no option '{name}'; nearest: {ours}\b"):
            LoraModel(model, **{name: 1})
    with pytest.raises(opendelta.OptionError, match=r"no activation 'gelu_nwe'; nearest: gelu_new"):
        AdapterModel(model, modified_modules=["linear"], non_linearity="gelu_nwe")
    with pytest.raises(opendelta.OptionError, match=r"no method 'lroa'; nearest: lora"):
        opendelta.AutoDeltaConfig.from_dict({"delta_type": "lroa"})
    with pytest.raises(opendelta.OptionError, match=r"interactive_modify=-1 must be at least 0"):
        LoraModel(model, interactive_modify=-1)
    with pytest.raises(opendelta.OptionError, match=r"must be a torch.nn.Module"):
        LoraModel("bert-base-cased")


HUGE = {
    "lora": ["lora_r"],
    "adapter": ["bottleneck_dim"],
    "compacter": ["hypercomplex_division", "phm_rank"],
    "hra": ["r"],
    "loha": ["r"],
    "low_rank_adapter": ["low_rank_rank"],
}


@pytest.mark.covers("OptionError", "plan")
@pytest.mark.parametrize("size", [10**20, 2**60])
@pytest.mark.parametrize("name", HUGE)
def test_a_size_that_no_memory_holds_is_refused_before_torch_is_asked(name, size):
    model, method = net(), METHODS[name]
    for option in HUGE[name]:
        config = method.config_class(modified_modules=["linear"], **{option: size})
        for verb in (method.from_config, lambda config, model: opendelta.plan(model, config)):
            with (
                untouched(model),
                pytest.raises(opendelta.OptionError, match=r"'linear': no memory"),
            ):
                verb(config, model)


def test_options_may_be_given_by_position_as_in_0_3():
    delta = LoraModel(net(), 2, 4, modified_modules=["linear"])
    assert (delta.config.lora_r, delta.config.lora_alpha) == (2, 4)
    with pytest.raises(opendelta.OptionError, match=r"given twice"):
        LoraModel(net(), 2, lora_r=3, modified_modules=["linear"])


PLACES = "modified_modules exclude_modules unfrozen_modules common_structure interactive_modify"
LORA_PLACES = "modified_modules unfrozen_modules exclude_modules common_structure"
# The arguments of OpenDelta 0.3.2's classes by position, after the backbone and without `backend`.
ORDER_OF_0_3 = {
    "AdapterModel": f"bottleneck_dim non_linearity {PLACES}",
    "BitFitModel": PLACES,
    "CompacterModel": f"{PLACES} reduction_factor non_linearity phm_c_init hypercomplex_division "
    "learn_phm hypercomplex_nonlinearity shared_phm_rule factorized_phm shared_W_phm "
    "factorized_phm_rule phm_rank phm_init_range kronecker_prod use_bias_up_sampler "
    "use_bias_down_sampler",
    "LoraModel": f"lora_r lora_alpha lora_dropout {LORA_PLACES} interactive_modify",
    "LowRankAdapterModel": "reduction_factor non_linearity low_rank_w_init low_rank_rank " + PLACES,
    "ParallelAdapterModel": f"bottleneck_dim non_linearity {PLACES}",
    "PrefixModel": f"prefix_token_num reparameterize embed_dim mid_dim {PLACES}",
}


@pytest.mark.covers(
    "AdapterModel", "BitFitModel", "CompacterModel", "LoraModel", "LowRankAdapterModel",
    "ParallelAdapterModel", "PrefixModel",
)  # fmt: skip
@pytest.mark.parametrize("name", ORDER_OF_0_3)
def test_options_by_position_have_the_order_of_opendelta_0_3(name):
    parameters = inspect.signature(getattr(opendelta, name)).parameters
    by_position = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert by_position == ["backbone_model", *ORDER_OF_0_3[name].split()]


@pytest.mark.covers("Delta.config", "Delta.modified_modules", "Delta.unfrozen_modules")
def test_options_by_position_reach_their_names():
    delta = opendelta.LoraModel(_net(), 2, 4, 0.1, ["0"], ["2"])
    assert vars(delta.config).items() >= {"lora_r": 2, "lora_alpha": 4, "lora_dropout": 0.1}.items()
    assert (delta.modified_modules, delta.unfrozen_modules) == (["0"], ["deltas", "2"])
    with pytest.raises(opendelta.OptionError, match=r"at most 8 options by position"):
        opendelta.LoraModel(_net(), 2, 4, 0.1, ["0"], None, None, None, False, True)


def _net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.covers("Delta.from_config", "DeltaConfig")
def test_a_config_makes_a_delta_and_options_beside_it_come_first():
    config = opendelta.LoraConfig(lora_r=2, modified_modules=["linear"])
    delta = LoraModel.from_config(config, net(), lora_alpha=3, name="mine")
    assert (delta.config.lora_r, delta.config.lora_alpha, delta.name) == (2, 3, "mine")
    assert (config.lora_alpha, config.name) == (16, None)
    with pytest.raises(opendelta.OptionError, match="AdapterModel takes a AdapterConfig, not Lora"):
        AdapterModel.from_config(config, net())


@pytest.mark.covers("Delta.config", "DeltaConfig")
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_the_options_of_an_attached_delta_cannot_be_set(name, copied, tmp_path):
    model, method = net(), METHODS[name]
    delta = put(method, model, places_of(method)[0])
    delta.freeze_module()
    delta.save_finetuned(tmp_path / "before")
    if copied:
        delta = next(iter(opendelta.composition(copy.deepcopy(model))))
    for option in ("dtype", "modified_modules"):
        refusal = f"^{type(delta.config).__name__}.{option} of an attached delta cannot be set"
        with pytest.raises(opendelta.OptionError, match=refusal):
            setattr(delta.config, option, None)
    with pytest.raises(opendelta.OptionError, match="reads of an attached delta cannot be set to"):
        delta.reads = True
    with pytest.raises(opendelta.OptionError, match="attached delta cannot be set"):
        delta.config.update({"gate": True})
    assert dataclasses.replace(delta.config, gate=True).gate is True
    delta.save_finetuned(tmp_path / "after")
    before, after = (tmp_path / which / "config.json" for which in ("before", "after"))
    assert before.read_bytes() == after.read_bytes()


def test_options_stay_fixed_after_a_conversion():
    delta = LoraModel(net(), modified_modules=["linear"])
    delta.to("bfloat16")
    assert delta.dtype == "bfloat16"
    with pytest.raises(opendelta.OptionError, match=r"LoraConfig\.lora_alpha of an attached"):
        delta.lora_alpha = 3
