"""What `check` finds, and that it leaves everything as it was."""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from support.models import build, by_hand, inputs, tower, vectors
from torch import nn
from torch.utils.checkpoint import checkpoint

import opendelta
from opendelta import AdapterModel, DeltaError, LoraModel

pytestmark = pytest.mark.covers("check", "CheckReport")


class Noisy(nn.Module):
    """Draws from every generator, and keeps statistics and a buffer that it replaces."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        x = x + random.random() + np.random.rand()
        return self.drop(self.norm(self.fc(x)))


class Reader(nn.Module):
    """Lets a function read the weight of `q` instead of calling it, as nobody can see."""

    def __init__(self):
        super().__init__()
        self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return by_hand(self.q, x) + self.v(x)


class Checkpointed(nn.Module):
    """Recomputes its layer in the backward the old way."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return checkpoint(self.fc, x.requires_grad_(), use_reentrant=True)


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])


# ------------------------------------------------------------------------------------ all is well
def test_nothing_is_wrong_with_a_model_that_trains():
    model = build("bert").train()
    lora = LoraModel(model)
    lora.freeze_module()
    report = opendelta.check(
        model, inputs(model) | {"labels": inputs(model)["input_ids"]}, adamw(model)
    )
    assert report
    assert report.trainable_parameters == sum(p.numel() for p in lora.parameters())
    assert str(report).startswith("check of BertForMaskedLM: all is well; 2,048 of 25,600 par")
    assert json.loads(json.dumps(report.to_dict()))["problems"] == []


def test_that_nothing_is_frozen_is_said_and_is_no_problem():
    model = build("bert").train()
    lora = LoraModel(model)
    report = opendelta.check(model, inputs(model))
    assert report
    assert "nothing of the backbone is frozen: freeze_module()" in str(report)
    lora.freeze_module(exclude=["deltas", "LayerNorm"])
    assert "is frozen" not in str(opendelta.check(model, inputs(model)))


def test_everything_is_afterwards_as_it_was():
    model = Noisy().train()
    delta = LoraModel(model, modified_modules=["fc"])
    model.fc.weight.grad = grad = torch.ones(8, 8)
    before = opendelta.snapshot(model)
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert opendelta.check(model, vectors(4, 8))
    assert opendelta.snapshot(model) == before
    assert torch.equal(drawn[0], torch.get_rng_state())
    assert drawn[1] == random.getstate()
    assert (drawn[2] == np.random.get_state()[1]).all()
    assert model.fc.weight.grad is grad
    assert (grad == 1).all()
    assert all(p.grad is None for p in delta.parameters())


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_without_a_batch_it_runs_on_shapes(name):
    model = build(name)
    LoraModel(model).freeze_module()
    before = opendelta.snapshot(model)
    assert opendelta.check(model)
    assert opendelta.snapshot(model) == before
    model.requires_grad_(True)
    opendelta.composition(model)["lora"].disable()
    assert len(opendelta.check(model).no_gradient) == len(
        list(opendelta.composition(model)["lora"].parameters())
    )


def test_on_the_meta_device_too():
    model = tower().to("meta")
    LoraModel(model, modified_modules=["fc"])
    assert opendelta.check(model)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_where_no_gradients_flow_too(mode):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    LoraModel(model, modified_modules=["0"]).freeze_module()
    with mode():
        found = opendelta.check(model, torch.randn(2, 4))
    assert found, found


def test_wrappers_are_looked_through():
    model = tower()
    LoraModel(model, modified_modules=["fc"])
    assert opendelta.check(nn.DataParallel(torch.compile(model)), vectors(2, 8))


# ---------------------------------------------------------------------------------- each mistake
def test_layers_that_do_not_run_are_named_with_shapes_alone_too():
    model = Reader()
    LoraModel(model, modified_modules=["q", "v"])
    for batch in (vectors(2, 8), None):
        report = opendelta.check(model, batch)
        assert report.unreached == ["q.deltas.lora"]
        assert report.no_gradient == ["q.deltas.lora.lora_A", "q.deltas.lora.lora_B"]
        assert "1 delta layers did not run: q.deltas.lora. To do: if the module" in str(report)


def test_what_the_optimizer_does_not_hold_holds_twice_or_holds_in_vain():
    model = tower()
    early = LoraModel(model, modified_modules=["fc"])
    early.freeze_module()
    optimizer = adamw(model)
    late = AdapterModel(model, modified_modules=["out"])
    report = opendelta.check(model, vectors(2, 8), optimizer)
    assert report.not_optimized == [name for name, _ in late.named_parameters()]
    assert (report.optimized_twice, report.strangers) == ([], 0)
    assert "8 trainable parameters are not in the optimizer: blocks.0.out" in str(report)

    both = [optimizer, torch.optim.SGD([*late.parameters(), *early.parameters()], lr=1)]
    report = opendelta.check(model, vectors(2, 8), both)
    assert report.optimized_twice == [name for name, _ in early.named_parameters()]
    assert report.not_optimized == []

    early.detach()
    report = opendelta.check(model, vectors(2, 8), optimizer)
    assert report.strangers == 4
    assert "holds 4 tensors that are no parameters of the model" in str(report)


def test_a_learning_rate_of_0_is_named_unless_a_scheduler_changes_it():
    model, x = tower(), vectors(2, 8)
    LoraModel(model, modified_modules=["fc"]).freeze_module()
    trained = [p for p in model.parameters() if p.requires_grad]
    still = torch.optim.SGD([{"params": trained[:1], "lr": 0.0}, {"params": trained[1:]}], lr=0.1)
    report = opendelta.check(model, x, still)
    assert len(report.at_rest) == 1
    assert "1 trainable parameters have a learning rate of 0" in str(report)
    warmed = torch.optim.SGD(trained, lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(warmed, lambda step: step)
    assert warmed.param_groups[0]["lr"] == 0
    assert opendelta.check(model, x, warmed)
    own = transformers.optimization.Adafactor(trained, relative_step=True, lr=None)
    assert opendelta.check(model, x, own)  # it chooses its own rate


def test_deltas_that_train_with_a_scale_of_0_are_named():
    model, x = tower(), vectors(2, 8)
    deltas = [LoraModel(model, modified_modules=["fc"], name=name) for name in ("one", "two")]
    deltas[0].freeze_module()
    deltas[0].scale = 0
    report = opendelta.check(model, x)
    assert report.scaled_to_0 == ["one"]
    assert "1 deltas train with a scale of 0: one. To do: set delta.scale" in str(report)
    deltas[0].disable()
    assert opendelta.check(model, x).scaled_to_0 == []
    deltas[0].enable()
    deltas[0].requires_grad_(False)
    assert opendelta.check(model, x).scaled_to_0 == []


NOTHING = {
    "lora": (LoraModel, {"lora_alpha": 0}),
    "adapter": (AdapterModel, {"scaling": 0.0}),
    "loha": (opendelta.LohaModel, {"alpha": 0}),
    "lokr": (opendelta.LokrModel, {"alpha": 0}),
    "fourierft": (opendelta.FourierFTModel, {"scaling": 0.0}),
}


@pytest.mark.parametrize("method", NOTHING)
def test_a_delta_that_an_option_multiplies_by_0_is_named(method):
    kind, options = NOTHING[method]
    model = tower()
    kind(model, modified_modules=["fc"], name="one", **options).freeze_module()
    report = opendelta.check(model.train(), vectors(3, 8))
    assert report.scaled_to_0 == ["one"]
    assert "lora_alpha" in str(report)


def test_layers_that_a_pattern_multiplies_by_0_are_named_and_dora_trains_its_magnitudes():
    model = tower()
    LoraModel(model, modified_modules=["fc"], alpha_pattern={"1.fc": 0}, name="x").freeze_module()
    assert opendelta.check(model.train(), vectors(3, 8)).scaled_to_0 == ["blocks.1.fc.deltas.x"]
    model = tower()
    LoraModel(model, modified_modules=["fc"], lora_alpha=0, use_dora=True).freeze_module()
    assert opendelta.check(model.train(), vectors(3, 8)).scaled_to_0 == []


class Losing(nn.Module):
    """Gives a loss, which is no number where all labels are left out."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.fc(x), labels), "logits": self.fc(x)}


@pytest.mark.parametrize("label", [1, -100])
def test_a_loss_that_is_no_number_is_named(label):
    model = Losing().train()
    batch = {"x": torch.randn(2, 8), "labels": torch.tensor([1, 1])}
    LoraModel(model, modified_modules=["fc"], sample_inputs=batch).freeze_module()
    report = opendelta.check(model, batch | {"labels": torch.full((2,), label)})
    assert report.not_finite == ([] if label == 1 else ["loss = nan"])
    assert bool(report) == (label == 1)


OUTPUTS = {
    "alone": (lambda x: x.sum() / 0, ["loss = inf"]),
    "finite": (lambda x: x.sum(), []),
    "first": (lambda x: (x.sum() / 0, x), ["loss = inf"]),
    "per sample": (
        lambda x: {"loss": x / torch.tensor([[1], [0]])},
        ["loss = inf in 3 of 6 values"],
    ),
    "with masked scores": (lambda x: {"loss": x.sum(), "scores": x / 0}, []),
    "scores": (lambda x: x / 0, []),
    "scores first": (lambda x: (x / 0, x), []),
    "none": (lambda x: {"loss": None, "logits": x}, []),
}


class Giving(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.fc, self.give = nn.Linear(8, 3), give

    def forward(self, x):
        return self.give(self.fc(x).square())


@pytest.mark.parametrize("case", OUTPUTS)
def test_a_loss_that_is_no_number_is_named_in_all_forms(case):
    give, expected = OUTPUTS[case]
    model = Giving(give).train()
    LoraModel(model, modified_modules=["fc"], sample_inputs=torch.randn(2, 8)).freeze_module()
    assert opendelta.check(model, torch.randn(2, 8)).not_finite == expected


def test_deltas_that_are_all_frozen_are_named():
    model, x = tower(), vectors(2, 8)
    one = LoraModel(model, modified_modules=["fc"], name="one")
    LoraModel(model, modified_modules=["out"], name="two")
    one.freeze_module(exclude=["blocks.0.out.bias"])
    report = opendelta.check(model, x)
    assert report.frozen == ["one", "two"]
    assert 'put "deltas" into freeze_module(exclude=[...])' in str(report)
    one.requires_grad_()
    assert opendelta.check(model, x).frozen == []


def test_a_block_in_which_nothing_trains_is_named():
    model, x = tower(), vectors(2, 8)
    one = LoraModel(model, modified_modules=["fc"], name="one")
    two = LoraModel(model, modified_modules=["out"], name="two")
    one.freeze_module(exclude=["deltas"])
    two.requires_grad_(False)
    for chosen, good in ((["one"], True), (["two"], False), ([], False)):
        with opendelta.composition(model).only(*chosen):
            report = opendelta.check(model, x)
        assert bool(report) is good
        assert good or "nothing trains" in str(report) or report.frozen == ["two"]


@pytest.mark.parametrize("method", ["lora", "vera"])
def test_dropout_that_is_off_is_named(method):
    model, x = tower().eval(), vectors(2, 8)
    if method == "lora":
        LoraModel(model, modified_modules=["fc"], lora_dropout=0.3).freeze_module()
    else:
        opendelta.VeraModel(model, modified_modules=["fc"], vera_dropout=0.3).freeze_module()
    report = opendelta.check(model, x)
    assert (
        report.no_dropout == [f"blocks.{i}.q.deltas.{method}" for i in (0, 1)] or report.no_dropout
    )
    assert "call model.train()" in str(report)
    assert opendelta.check(model.train(), x)


def test_trainable_parameters_without_gradient_are_named():
    model = tower()
    first, second = (LoraModel(model, modified_modules=["fc"], name=n) for n in "ab")
    second.disable()
    report = opendelta.check(model, vectors(2, 8))
    assert report.no_gradient == [name for name, _ in second.named_parameters()]
    second.requires_grad_(False)
    assert opendelta.check(model, vectors(2, 8))
    model.forward = lambda x: tower()(x)
    report = opendelta.check(model, vectors(2, 8))
    assert {name for name, _ in first.named_parameters()} <= {*report.no_gradient}


def test_deltas_that_rest_in_a_block_are_trained_by_others():
    model, x = tower(), vectors(2, 8)
    first, second = (LoraModel(model, modified_modules=["fc"], name=n) for n in "ab")
    first.freeze_module()
    optimizer = torch.optim.AdamW(first.parameters())
    assert opendelta.check(model, x, optimizer).not_optimized == [
        n for n, _ in second.named_parameters()
    ]
    with opendelta.composition(model).only("a"):
        report = opendelta.check(model, x, optimizer)
    assert report.problems == []
    assert report.trainable_parameters == sum(p.numel() for p in first.parameters())
    with opendelta.composition(model).only("b"):
        report = opendelta.check(model, x, optimizer)
    assert report.not_optimized == [n for n, _ in second.named_parameters()]


def test_modules_left_in_train_mode_and_layers_in_another_mode_are_named():
    model = tower().eval()
    LoraModel(model, modified_modules=["fc"], lora_dropout=0.5)
    assert opendelta.check(model, vectors(2, 8)).mixed_modes == {}
    model.blocks[1].train()
    report = opendelta.check(model, vectors(2, 8))
    assert report.mixed_modes == {"blocks.1": "train"}
    assert "1 modules are in another mode than what is around them: blocks.1 in train" in str(
        report
    )
    model.train()
    opendelta.composition(model)["lora"].eval()
    modes = opendelta.check(model, vectors(2, 8)).mixed_modes
    assert modes == {f"blocks.{i}.fc.deltas.lora": "eval" for i in range(2)}


# ----------------------------------------------------------------------------- what cannot be done
def test_what_cannot_be_looked_at_is_said():
    model = Checkpointed()
    LoraModel(model, modified_modules=["fc"])
    report = opendelta.check(model, vectors(2, 8))
    assert report
    assert "not checked: gradients: reentrant checkpointing" in str(report)


def test_it_needs_a_delta_an_optimizer_and_a_batch_where_shapes_do_not_do():
    model = build("bert")
    with pytest.raises(DeltaError, match="carries no delta, so there is nothing to check"):
        opendelta.check(model, inputs(model))
    LoraModel(model)
    with pytest.raises(
        DeltaError, match="optimizer must be a torch optimizer, or several, not int"
    ):
        opendelta.check(model, inputs(model), 3)
    odd = Noisy()
    odd.forward = lambda a, b: a + b
    LoraModel(odd, modified_modules=["fc"])
    with pytest.raises(DeltaError, match=r"Noisy does not run on shapes: .*Give a batch"):
        opendelta.check(odd)
