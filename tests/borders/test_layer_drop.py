"""Layers that training leaves out at random are no mistake; layers that no run reaches are one."""

import itertools
import warnings
from collections import OrderedDict

import pytest
import torch
import transformers
from torch import nn

import opendelta
from opendelta import LoraModel
from opendelta.errors import UnreachedWarning

pytestmark = pytest.mark.covers("check", "UnreachedWarning")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.side = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.fc(x)


class Dropping(nn.Module):
    """Leaves out the blocks in `plan` in one forward after another; in eval mode, the `dead`."""

    def __init__(self, plan, dead=()):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.plan, self.dead, self.forwards = plan, dead, 0
        self.calls = itertools.count()  # which a check does not put back

    def forward(self, x):
        away = {*self.dead}
        if self.training:
            away |= {*self.plan[self.forwards % len(self.plan)]}
            self.forwards += 1
            next(self.calls)
        for number, block in enumerate(self.blocks):
            x = x if number in away else block(x)
        return x


def attached(plan, dead=(), modules=("fc",)):
    model = Dropping(plan, dead).train()
    LoraModel(model, modified_modules=[*modules], name="x").freeze_module()
    return model


def told(model, forwards, train=True):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(forwards):
            model.train(train)(torch.randn(2, 8))
    return [str(each.message) for each in caught if each.category is UnreachedWarning]


def test_a_layer_that_a_later_forward_reaches_is_not_told():
    assert told(attached([[1], [1, 2], [0], []]), 8) == []


def test_a_layer_that_no_forward_reaches_is_told_once_after_some():
    model = attached([[1], [2], [0]], dead=[3])
    assert told(model, 5) == []
    (text,) = told(model, 5)
    assert "1 delta layers did not run in the first 6 forwards of Dropping" in text
    assert "blocks.3.fc.deltas.x" in text


def test_a_forward_in_eval_mode_tells_at_once():
    model = attached([[1], [2], [0]], dead=[3])
    assert told(model, 1) == []
    (text,) = told(model, 2, train=False)
    assert "blocks.3.fc.deltas.x" in text
    (text,) = told(attached([[]], dead=[3]), 1, train=False)
    assert "1 delta layers did not run in the first forward of Dropping" in text


def test_layers_of_which_none_ran_are_told_at_once_and_the_others_later():
    model = attached([[1], [2], [0]], dead=[3], modules=("fc", "side"))
    (text,) = told(model, 1)
    assert "4 delta layers did not run in the first forward" in text
    assert ".side." in text
    assert ".fc." not in text
    (text,) = told(model, 6)
    assert "1 delta layers did not run in the first 6 forwards" in text


def test_check_looks_again():
    model = attached([[1], [1, 2], [0]])
    report = opendelta.check(model, torch.randn(2, 8))
    assert report, report
    assert all(module.training for module in model.modules())


def test_check_names_what_no_run_reaches():
    model = attached([[1], [1, 2], [0]], dead=[3])
    report = opendelta.check(model, torch.randn(2, 8))
    assert report.unreached == ["blocks.3.fc.deltas.x"]
    assert report.no_gradient == [f"blocks.3.fc.deltas.x.lora_{half}" for half in "AB"]


def test_check_runs_no_more_often_where_eval_mode_reaches_nothing_else():
    model = attached([[]], dead=[3])
    assert opendelta.check(model, torch.randn(2, 8)).unreached == ["blocks.3.fc.deltas.x"]
    assert next(model.calls) == 1


def test_check_names_a_layer_that_runs_in_eval_mode_alone():
    report = opendelta.check(attached([[2]]), torch.randn(2, 8))
    assert report.unreached == []
    assert report.no_gradient == [f"blocks.2.fc.deltas.x.lora_{half}" for half in "AB"]


class TrainsAlone(Dropping):
    def forward(self, x):
        if not self.training:
            raise ValueError("no targets")
        return super().forward(x)


def test_check_needs_no_eval_mode():
    model = TrainsAlone([[1], [1, 2], [0]]).train()
    LoraModel(model, modified_modules=["fc"], sample_inputs=torch.randn(2, 8)).freeze_module()
    assert opendelta.check(model, torch.randn(2, 8))


@pytest.mark.parametrize("kind", ["Wav2Vec2", "Hubert", "WavLM"])
def test_speech_models_drop_layers(kind, recwarn):
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32,
        vocab_size=20, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 8), layerdrop=0.3,
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCTC")(config).train()
    LoraModel(model, modified_modules=["q_proj"], modules_to_save=["lm_head"]).freeze_module()
    batch = {"input_values": torch.randn(2, 2000)}
    assert opendelta.check(model, batch)
    for _ in range(6):
        model(**batch)
    assert [str(each.message) for each in recwarn if each.category is UnreachedWarning] == []


@pytest.mark.parametrize("blocks", [[1], [1, 2]])
def test_deltas_on_few_blocks_are_not_told_when_a_forward_leaves_all_of_them_out(blocks):
    modules = [f"blocks.{number}.fc" for number in blocks]
    assert told(attached([blocks, []], modules=modules), 6) == []
    assert opendelta.check(attached([blocks, []], modules=modules), torch.randn(2, 8))


def test_a_single_block_that_no_forward_reaches_is_told_after_some():
    model = attached([[0]], dead=[3], modules=["blocks.3.fc"])
    assert told(model, 5) == []
    (text,) = told(model, 1)
    assert "blocks.3.fc.deltas.x" in text
    report = opendelta.check(attached([[]], dead=[3], modules=["blocks.3.fc"]), torch.randn(2, 8))
    assert report.unreached == ["blocks.3.fc.deltas.x"]


def test_a_layer_of_a_block_that_ran_is_told_at_once():
    (text,) = told(attached([[1]], modules=["blocks.0.fc", "blocks.0.side", "blocks.1.side"]), 1)
    assert "2 delta layers did not run in the first forward" in text


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x):
        return x @ self.body[0].weight + self.body[1].bias


def test_what_is_in_a_sequential_is_told_at_once():
    model = Reading().train()
    LoraModel(model, modified_modules=["0"]).freeze_module()
    (text,) = told(model, 1)
    assert "body.0.deltas" in text


class Experts(nn.Module):
    """Calls the experts `chosen` of a list or a dictionary."""

    def __init__(self, experts, chosen):
        super().__init__()
        self.experts, self.chosen = experts, chosen

    def forward(self, x):
        return sum(self.experts[key](x) for key in self.chosen)


def expert():
    return nn.Sequential(OrderedDict(up=nn.Linear(8, 8), act=nn.ReLU(), down=nn.Linear(8, 8)))


PARTS = ["up", "down"]
EXPERTS = {
    "list": (lambda: nn.ModuleList([expert(), expert()]), [0], "experts.1"),
    "dictionary": (lambda: nn.ModuleDict({"a": expert(), "b": expert()}), ["b"], "experts.a"),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("method", [LoraModel, opendelta.AdapterModel])
@pytest.mark.parametrize("kind", EXPERTS)
def test_check_says_of_experts_that_were_not_called_that_a_larger_batch_tells_more(
    kind, method, train
):
    make, chosen, away = EXPERTS[kind]
    model = Experts(make(), chosen).train(train)
    method(model, modified_modules=PARTS, name="x").freeze_module()
    report = opendelta.check(model, torch.randn(2, 8))
    assert report.not_called == report.unreached == [f"{away}.{n}.deltas.x" for n in PARTS]
    assert report.no_gradient
    told = [text for text in report.problems if away in text]
    assert len(told) == 1
    assert "larger" in told[0]
    assert "reads=True" not in str(report)


def test_check_keeps_its_advice_for_layers_of_which_none_ran():
    report = opendelta.check(attached([[]], modules=["side"]), torch.randn(2, 8))
    assert not report.not_called
    assert "reads=True" in str(report)
