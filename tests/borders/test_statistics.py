"""Statistics of a BatchNorm that move while deltas train: told, kept with what trains in place."""

import warnings

import pytest
import torch
from torch import nn

import opendelta
from opendelta import LoraModel, UnsavedWarning

pytestmark = pytest.mark.covers("Delta.freeze_module", "check", "UnsavedWarning")

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1


def net(affine=True):
    torch.manual_seed(0)
    block = nn.Sequential(nn.BatchNorm2d(8, affine=affine), nn.ReLU())
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 8, 3), block, pool, nn.Linear(8, 2))


def trained(model):
    """Some steps, then the output in evaluation mode."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    model.train()
    for _ in range(5):
        model(X).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()(X).detach()


def attached(model, exclude=("deltas",), **options):
    delta = LoraModel(model, modified_modules=["3"], **options)
    delta.freeze_module(exclude=exclude, set_state_dict=True)
    return delta


def test_statistics_that_no_file_holds_are_told_by_freezing_and_by_check():
    model = net()
    with pytest.warns(UnsavedWarning, match=r"1 normalisations .*: 1\.0\..*modules_to_save"):
        attached(model)
    report = opendelta.check(model.train(), X)
    assert report.moving == ["1.0"]
    assert "modules_to_save" in str(report)
    assert opendelta.check(model.eval(), X).moving == []
    model.train()
    model[1].eval()
    assert opendelta.check(model, X).moving == []


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["1.0"]},
        {"modules_to_save": ["1"]},
        {"unfrozen_modules": ["1.0"]},
        {"unfrozen_modules": ["1"]},
        {"exclude": ["deltas", "1.0"]},
    ],
)
@pytest.mark.parametrize("affine", [True, False])
def test_statistics_that_a_file_holds_come_back_and_are_not_told(tmp_path, options, affine):
    model = net(affine)
    before = opendelta.snapshot(model)
    delta = attached(model, **options)
    assert opendelta.check(model.train(), X).moving == []
    expected = trained(model)
    delta.save_finetuned(tmp_path)
    fresh = net(affine)
    opendelta.load(tmp_path, fresh)
    assert torch.equal(fresh.eval()(X), expected)
    if "modules_to_save" in options:
        delta.detach()
        model.requires_grad_(True).train()
        opendelta.assert_pristine(model, like=before)


@pytest.mark.parametrize(
    "options",
    [
        {"unfrozen_modules": ["1.0.bias"]},
        {"exclude": ["deltas", "1.0.weight", "1.0.bias"]},
        {"exclude": ["deltas", "1.0.bias"]},
    ],
)
def test_statistics_beside_a_parameter_that_a_file_holds_are_in_it(tmp_path, options):
    model = net()
    delta = attached(model, **options)
    expected = trained(model)
    delta.save_finetuned(tmp_path)
    fresh = net()
    opendelta.load(tmp_path, fresh)
    assert torch.equal(fresh.eval()(X), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"unfrozen_modules": ["1.0"]},
        {"unfrozen_modules": ["1"]},
        {"exclude": ["deltas", "1"]},
        {"modules_to_save": ["1"]},
    ],
)
@pytest.mark.parametrize("affine", [True, False])
def test_the_filtered_state_dict_resumes_a_training(options, affine):
    model = net(affine)
    attached(model, **options)
    expected = trained(model)
    state = model.state_dict()
    assert any(key.endswith("running_mean") for key in state)
    assert not any(key.startswith("0.") for key in state)
    again = net(affine)
    attached(again, **options)
    result = again.load_state_dict(state, strict=False)
    assert result.unexpected_keys == []
    assert torch.equal(again.eval()(X), expected)


def test_statistics_of_frozen_modules_are_left_out_of_the_filtered_state_dict():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnsavedWarning)
        delta = attached(model)
    assert list(model.state_dict()) == list(delta.state_dict())
    wrapped = nn.Sequential(model)  # the hook is on the model inside
    assert list(wrapped.state_dict()) == [f"0.{key}" for key in delta.state_dict()]


class Codebook(nn.Module):
    """Keeps a running average of its inputs in training mode, as vector quantisers do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.register_buffer("average", torch.zeros(8))
        self.register_buffer("last", torch.zeros(8), persistent=False)

    def forward(self, x):
        if self.training:
            self.average.lerp_(x.detach().mean(0), 0.1)
            self.last = x.detach().mean(0)
        return x * self.weight + self.average


def test_check_names_any_buffer_that_moves_with_a_batch():
    model = nn.Sequential(nn.Linear(8, 8), Codebook(), nn.Linear(8, 2))
    model[0] = nn.utils.parametrizations.spectral_norm(model[0])
    LoraModel(model, modified_modules=["2"]).freeze_module()
    x = torch.randn(4, 8)
    assert opendelta.check(model.train(), x).moving == ["0.parametrizations.weight.0", "1"]
    assert opendelta.check(model.eval(), x).moving == []
    model.train().requires_grad_(True)
    assert opendelta.check(model, x).moving == []  # nothing is frozen: a full fine-tuning
    model.requires_grad_(False)
    LoraModel(model, modified_modules=["2"], modules_to_save=["1"])
    assert opendelta.check(model, x).moving == ["0.parametrizations.weight.0"]
    assert torch.equal(model[1].average, torch.zeros(8))


def test_check_names_a_copied_module_whose_own_hook_moves_its_buffers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.utils.spectral_norm(nn.Linear(8, 8)), Codebook())
    x, before = torch.randn(4, 8), model[1].weight_u.clone()
    delta = LoraModel(model, modified_modules=["0"], modules_to_save=["1", "2"])
    delta.freeze_module()
    assert opendelta.check(model.train(), x).moving == ["1"]
    assert torch.equal(model[1].weight_u, before)
    model[1].eval()
    assert opendelta.check(model, x).moving == []
    model(x).sum().backward()
    assert torch.equal(model[1].weight_u, before)


def test_a_normalisation_without_statistics_is_no_matter():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
    model.extend([nn.InstanceNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)])
    LoraModel(model, modified_modules=["5"]).freeze_module()
    assert opendelta.check(model, X).moving == []


def _switched_off(norm):
    norm.track_running_stats = False
    return norm


STILL = {
    "eval": lambda: nn.BatchNorm2d(8).eval(),
    "momentum": lambda: nn.BatchNorm2d(8, momentum=0.0),
    "switched off": lambda: _switched_off(nn.BatchNorm2d(8)),
    "instances": lambda: nn.InstanceNorm2d(8, momentum=None, track_running_stats=True),
}
MOVING = {
    "average": lambda: nn.BatchNorm2d(8, momentum=None),
    "instances": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
    "instances switched off": lambda: _switched_off(nn.InstanceNorm2d(8, track_running_stats=True)),
}


def with_norm(norm):
    model = net()
    model[1][0] = norm
    return model


@pytest.mark.parametrize("which", STILL)
def test_statistics_that_stand_still_in_training_are_not_told(which):
    model = with_norm(STILL[which]())
    before = model[1][0].running_mean.clone()
    attached(model)  # warns of none
    assert opendelta.check(model, X).moving == opendelta.check(model).moving == []
    model(X)
    assert torch.equal(model[1][0].running_mean, before)


@pytest.mark.parametrize("which", MOVING)
def test_statistics_that_move_in_some_other_way_are_told(which):
    model = with_norm(MOVING[which]())
    before = model[1][0].running_mean.clone()
    with pytest.warns(UnsavedWarning, match=r"1\.0"):
        attached(model)
    assert opendelta.check(model, X).moving == ["1.0"]
    model(X)
    assert not torch.equal(model[1][0].running_mean, before)


def test_a_model_in_eval_will_move_its_statistics_once_it_trains():
    with pytest.warns(UnsavedWarning, match=r"1\.0"):
        attached(net().eval())


class Momentum(nn.Module):
    """An encoder, and one that follows it in training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fast, self.slow = nn.Linear(4, 4), nn.Linear(4, 4)
        self.slow.requires_grad_(False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.follow(self.slow.weight, self.fast.weight)
        return self.fast(x) * self.slow(x)

    def follow(self, slow, fast):
        slow.lerp_(fast, 0.1)


class ByData(Momentum):
    def follow(self, slow, fast):
        slow.data = slow.data * 0.9 + fast.data * 0.1


@pytest.mark.filterwarnings("ignore::opendelta.TiedWeightWarning")
@pytest.mark.parametrize("cls", [Momentum, ByData])
def test_weights_that_follow_others_are_told(cls):
    model, x = cls(), torch.randn(2, 4)
    LoraModel(model, modified_modules=["fast"]).freeze_module()
    assert opendelta.check(model.train(), x).moving == ["slow"]
    assert opendelta.check(model.eval(), x).moving == []
