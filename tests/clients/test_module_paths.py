"""The import lines of programs for OpenDelta 0.3 find what they name, or an error names it."""

import importlib
import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import opendelta

pytestmark = pytest.mark.covers("Visualization", "AutoDeltaConfig", "AutoDeltaModel", "roles")

HERE = {  # {module of 0.3: names in it that are ours under the same name}
    "auto_delta": "AutoDeltaConfig AutoDeltaModel",
    "delta_models": "LoraModel LoraConfig AdapterModel AdapterConfig BitFitModel BitFitConfig "
    "CompacterModel CompacterConfig LowRankAdapterModel LowRankAdapterConfig ParallelAdapterModel "
    "ParallelAdapterConfig PrefixModel PrefixConfig SoftPromptModel SoftPromptConfig",
    "delta_models.adapter": "AdapterModel AdapterConfig",
    "delta_models.bitfit": "BitFitModel BitFitConfig",
    "delta_models.compacter": "CompacterModel CompacterConfig",
    "delta_models.lora": "LoraModel LoraConfig",
    "delta_models.low_rank_adapter": "LowRankAdapterModel LowRankAdapterConfig",
    "delta_models.parallel_adapter": "ParallelAdapterModel ParallelAdapterConfig",
    "delta_models.prefix": "PrefixModel PrefixConfig",
    "delta_models.soft_prompt": "SoftPromptModel SoftPromptConfig",
    "utils.visualization": "Visualization",
}
LAYERS = {
    "delta_models.adapter": ("AdapterModel", "AdapterLayer"),
    "delta_models.bitfit": ("BitFitModel", "BiasLayer"),
    "delta_models.compacter": ("CompacterModel", "HyperComplexAdapterLayer"),
    "delta_models.low_rank_adapter": ("LowRankAdapterModel", "LowRankAdapter"),
    "delta_models.parallel_adapter": ("ParallelAdapterModel", "ParallelAdapterLayer"),
    "delta_models.soft_prompt": ("SoftPromptModel", "SoftPromptLayer"),
}
GONE = [
    "delta_models.layers", "delta_models.layers.activations", "utils.delta_center",
    "utils.delta_hub", "utils.model_md5", "utils.saving_loading_utils", "utils.data_parallel",
    "utils.backend", "utils.file_utils", "utils.interactive", "utils.interactive.web",
]  # fmt: skip


@pytest.mark.parametrize("module", HERE)
def test_names_of_0_3_are_ours(module):
    found = importlib.import_module(f"opendelta.{module}")
    for name in HERE[module].split():
        assert getattr(found, name) is getattr(opendelta, name)


@pytest.mark.parametrize("module", LAYERS)
def test_layers_of_0_3_are_the_layers_of_the_method(module):
    model, layer = LAYERS[module]
    found = importlib.import_module(f"opendelta.{module}")
    assert getattr(found, layer) is getattr(opendelta, model).layer_class


@pytest.mark.covers("Delta", "DeltaConfig")
def test_the_bases_have_their_names_of_0_3():
    from opendelta.basemodel import DeltaBase as same
    from opendelta.delta_configs import BaseDeltaConfig as same_config

    from opendelta import BaseDeltaConfig, DeltaBase

    assert DeltaBase is same is opendelta.Delta
    assert BaseDeltaConfig is same_config is opendelta.DeltaConfig
    assert issubclass(opendelta.LoraModel, DeltaBase)


@pytest.mark.covers("BaseDeltaConfig", "CommonStructureMap", "DeltaBase")
def test_names_are_found_where_0_3_happened_to_have_them():
    found = {}
    exec("from opendelta import *", found)
    assert {"DeltaBase", "BaseDeltaConfig", "CommonStructureMap", "Visualization"} <= found.keys()
    for module in HERE.keys() - {"delta_models", "utils.visualization"}:
        names = "BaseDeltaConfig, DeltaBase, get_dtype, get_device, endswith_in"
        exec(f"from opendelta.{module} import {names}")
    from opendelta.basemodel import inspect_module_statistics
    from opendelta.delta_configs import CONFIG_NAME

    assert inspect_module_statistics is opendelta.utils.inspect.inspect_module_statistics
    assert CONFIG_NAME == "config.json"


@pytest.mark.parametrize("module", GONE)
def test_a_module_without_counterpart_is_named_with_what_replaces_it(module):
    with pytest.raises(ImportError, match=r"opendelta\.[\w.]+ of OpenDelta 0.3 is gone: \w+"):
        importlib.import_module(f"opendelta.{module}")


@pytest.mark.parametrize(
    ("module", "name", "instead"),
    [
        ("auto_delta", "DELTA_MODEL_MAPPING", "from_config"),
        ("auto_delta", "LAZY_DELTA_MAPPING", "from_config"),
        ("delta_models.adapter", "Activations", "ACT2FN"),
        ("delta_models.compacter", "PHMLinear", "CompacterLayer"),
        ("delta_models.lora", "LoraArguments", "LoraConfig"),
        ("delta_models.lora", "LowRankLinear", "LoraLayer"),
        ("utils.decorate", "fix", "inspect.signature"),
        ("utils.logging", "enable_explicit_format", "get_logger"),
        ("delta_models.prefix", "PrefixLayerT5", "PrefixLayer"),
        ("utils.structure_mapping", "CoreMappings", r"opendelta\.roles"),
        ("utils.visualization", "ModuleTree", r"opendelta\.tree"),
    ],
)
def test_a_name_without_counterpart_is_named_with_what_replaces_it(module, name, instead):
    with pytest.raises(
        ImportError, match=rf"{module}.{name} of OpenDelta 0.3 is gone: .*{instead}"
    ):
        exec(f"from opendelta.{module} import {name}")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from opendelta.{module} import nothing")


def test_a_module_is_loaded_only_when_it_is_imported():
    code = (
        "import sys, opendelta\n"
        "old = [n for n in sys.modules if n.startswith(('opendelta.delta_', 'opendelta.utils',"
        " 'opendelta.auto_', 'opendelta._compat'))]\n"
        "import opendelta.delta_models.lora\n"
        "print(old, 'opendelta.delta_models.lora' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"


def test_nothing_in_the_library_imports_the_old_paths():
    folder = Path(opendelta.__file__).parent
    for path in folder.rglob("*.py"):
        if "_compat" not in path.parts:
            assert not re.search(r"^\s*(from|import) .*_compat", path.read_text(), re.M), path


# ------------------------------------------------------------------------------------ what they do
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x, scale=1.0):
        return self.head(self.up(x)) * scale


@pytest.mark.covers("statistics", "Delta.stat")
def test_statistics_of_a_model_and_of_an_optimizer(capsys):
    from opendelta.utils.inspect import (
        inspect_module_statistics,
        inspect_optimizer_statistics,
        num_delta_parameters,
        num_total_parameters,
        num_trainable_parameters,
    )

    model = Net()
    delta = opendelta.LoraModel(model, lora_r=2, modified_modules=["up"])
    delta.freeze_module(exclude=["deltas", "head"])
    counts = inspect_module_statistics(model, verbose=False)
    assert capsys.readouterr().out == ""
    assert counts == delta.stat
    assert counts["total_parameters"] == num_total_parameters(model) == 30 + 14 + 20
    assert counts["trainable_parameters"] == num_trainable_parameters(model) == 14 + 20
    assert counts["delta_parameters"] == num_delta_parameters(model) == 20
    assert (counts["trainable_ratio"], counts["delta_ratio"]) == (34 / 64, 20 / 64)
    assert {"cudamem", "maxcudamem"} <= counts.keys()
    optimizer = torch.optim.AdamW(
        [{"params": model.head.parameters()}, {"params": model.up.parameters(), "lr": 0.5}], lr=0.1
    )
    groups = inspect_optimizer_statistics(optimizer)
    assert str(groups) in capsys.readouterr().out
    assert groups["group_0"]["total_parameters"] == 14
    assert (groups["group_1"]["trainable_parameters"], groups["group_1"]["lr"]) == (20, 0.5)


def test_a_decorated_method_has_its_name_and_signature_and_is_bound_again():
    from opendelta.utils.decorate import decorate

    def caller(function, factor, *args, **kwargs):
        module, *rest = args
        assert isinstance(module, Net)
        return function(*rest, **kwargs) * factor

    model, x = Net(), torch.randn(3, 4)
    plain = model(x, scale=2.0)
    new = decorate(model.forward, caller, extras=(10.0,), kwsyntax=True)
    assert (new.__name__, list(inspect.signature(new).parameters)) == (
        "forward",
        ["self", "x", "scale"],
    )
    model.forward = new.__get__(model, Net)
    assert torch.equal(model(x, scale=2.0), plain * 10)
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale"]


def test_arguments_of_a_function():
    from opendelta.utils.signature import get_arg_names, get_arg_names_inside_func, signature

    def function(self, first, second=2, *rest, only=3, **others): ...

    assert signature(function) == (["self", "first", "second"], [2], "rest", "others")
    assert get_arg_names(function) == ["first", "second"]
    assert list(get_arg_names_inside_func(function)) == ["first", "second"]


def test_tests_of_dotted_names():
    from opendelta.utils.name_based_addressing import (
        endswith_in,
        endswith_in_normal,
        endswith_in_regex,
        is_child_key,
        substring_in,
        substring_in_regex,
        superstring_in,
    )

    name = "encoder.layer.11.attention"
    assert endswith_in(name, ["attention"])
    assert endswith_in(name, ["11.attention"])
    assert not endswith_in(name, ["1.attention", "tention"])
    assert endswith_in(name, [re.compile(r"\d+\.attention")])
    assert not endswith_in(name, [re.compile(r"[0-5]\.attention")])
    assert endswith_in("a.0.b", [r"[r]\d\.b"])
    assert not endswith_in("a.0.b", [r"[r]\d", r"[r]a\.\d", r"\d\.b"])
    assert endswith_in_regex("a.0.b", [r"\d\.b"])
    assert not endswith_in_regex("a.10.b", [r"\d\.b"])
    assert endswith_in_normal("a.0.b", ["0.b"])
    assert substring_in_regex("a.0.b", [r"a\.\d"])
    assert is_child_key(name, ["encoder.layer"])
    assert not is_child_key(name, ["encoder.lay"])
    assert substring_in(name, ["layer.11"])
    assert not substring_in(name, ["layer.1"])
    assert superstring_in("layer.1", [name])
    assert not superstring_in("layer.2", [name])


def test_roles_are_the_common_structure():
    import transformers
    from opendelta.utils.structure_mapping import CommonStructureMap

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    model = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=8))
    found = CommonStructureMap.load(model)
    assert found.transform("encoder.layer.0.attention.self.query") == ("attn.q", None, None)
    assert found.transform("pooler") == (None, None, None)
    assert found.transform("pooler", strict=False) == ("pooler", None, None)
    assert found.mapping == opendelta.roles(model)


def test_the_device_and_the_dtype_of_a_module():
    from opendelta.utils.cuda import get_device, get_dtype, move_dict_to_cuda

    assert get_device(nn.Linear(2, 2)) == torch.device("cpu")
    assert get_device(nn.ReLU()) is None
    assert get_device(nn.Parameter(torch.zeros(1))) == torch.device("cpu")
    both = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(opendelta.OptionError, match="has several devices: cpu, meta"):
        get_device(both)
    with pytest.raises(opendelta.OptionError, match="not a list"):
        get_device([])
    assert get_dtype(both) == get_dtype(nn.Parameter(torch.zeros(1))) == torch.float32
    assert get_dtype(nn.ReLU()) is None
    both[0].half()
    with pytest.raises(opendelta.OptionError, match=r"dtypes: torch.float16, torch.float32"):
        get_dtype(both)
    batch = {"x": torch.zeros(1), "inner": {"y": torch.zeros(1)}, "n": 3}
    moved = move_dict_to_cuda(batch, "meta")
    assert (moved["x"].is_meta, moved["inner"]["y"].is_meta, moved["n"]) == (True, True, 3)


def test_loggers():
    from opendelta.utils import logging as old

    before = old.get_verbosity()
    try:
        old.set_verbosity_error()
        assert old.get_verbosity() == old.ERROR == logging.ERROR
        assert old.get_logger("opendelta.mine").getEffectiveLevel() == logging.ERROR
        old.set_verbosity_info()
        assert old.get_logger().level == logging.INFO
        assert old.get_logger("mine", old.DEBUG).level == logging.DEBUG
        assert old.get_logger("mine", verbosity="info").level == logging.INFO
    finally:
        old.set_verbosity(before)
