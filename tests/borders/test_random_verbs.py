"""Random verbs on one model, beside an onion of layers that is computed by hand in float64."""

import copy
import math
import tempfile
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis.stateful import initialize, invariant, precondition, rule
from support.nets import Scaled
from support.verbs import Deltas
from torch import nn

import opendelta
from opendelta import composition

pytestmark = pytest.mark.covers(
    "Composition.merge", "Composition.to_backbone", "Composition.only", "Composition.reorder",
    "Composition.save", "Delta.attach", "Delta.detach", "Delta.disabled", "Delta.scale", "load",
)  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.own = nn.LayerNorm(6), nn.Linear(6, 8), Scaled(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x + self.own(torch.tanh(self.up(self.norm(x)))))


def made():
    torch.manual_seed(0)
    return Net().double()


LINEAR = ["up", "own", "head"]
KINDS = {  # the method, its options, and the modules that it may be put on
    "lora": (opendelta.LoraModel, {"lora_r": 2, "lora_alpha": 3.0}, LINEAR),
    "dora": (opendelta.LoraModel, {"lora_r": 2, "lora_alpha": 3.0, "use_dora": True}, LINEAR),
    "ia3": (opendelta.IA3Model, {"feedforward_modules": []}, LINEAR),
    "bitfit": (opendelta.BitFitModel, {}, ["norm", "up", "head"]),
    "adapter": (opendelta.AdapterModel, {"bottleneck_dim": 2, "non_linearity": "tanh"}, LINEAR),
    "copy": (opendelta.LoraModel, {"lora_r": 2, "lora_alpha": 3.0, "modules_to_save": ["head"]},
             ["up"]),
}  # fmt: skip
FOLDING = {"lora", "dora", "ia3", "bitfit", "copy"}


def around(known, site, x, y, weight, bias):
    """y of one layer around a site, and the weight and bias with the layer in them."""
    own, scale = known.tensors(site), known.scale
    if known.kind in ("lora", "copy", "dora"):
        change = 1.5 * own["lora_B"] @ own["lora_A"]
        if known.kind != "dora":
            return y + scale * x @ change.T, weight + scale * change, bias
        factor = own["lora_magnitude_vector"] / (weight + change).norm(dim=1)
        shift = 0 if bias is None else bias
        return (
            factor * (y - shift + x @ change.T) + shift,
            factor[:, None] * (weight + change),
            bias,
        )
    if known.kind == "ia3":
        factor = own["ia3_l"]
        return factor * y, factor[:, None] * weight, None if bias is None else factor * bias
    if known.kind == "bitfit":
        return y + scale * own["bias"], weight, bias + scale * own["bias"]
    hidden = torch.tanh(F.linear(y, own["down_proj.weight"], own["down_proj.bias"]))
    return y + scale * F.linear(hidden, own["up_proj.weight"], own["up_proj.bias"]), weight, bias


class Verbs(Deltas):
    kinds, scaled = KINDS, {"lora", "bitfit", "adapter"}

    @initialize()
    def start(self):
        self.begin(made())
        self.x = torch.randn(2, 4, 6, dtype=torch.float64)

    # ------------------------------------------------------------------------------- the onion
    def expected(self, blocks):
        acting = [known for known in self.order if self.acts(known, blocks)]
        model = self.model
        plain = {n: p.detach() for n, p in model.named_parameters() if "deltas" not in n}

        def site(name, x, function, weight, bias):
            if name == "head":
                for known in acting:
                    if known.kind == "copy":
                        weight, bias = known.tensors("head").values()
            y = function(x, weight, bias)
            for known in acting:
                if name in known.sites:
                    y, weight, bias = around(known, name, x, y, weight, bias)
            return y

        def norm(x, weight, bias):
            return F.layer_norm(x, (6,), weight, bias)

        def own(x, weight, bias):
            return F.linear(x, weight) / math.sqrt(8)

        x = site("norm", self.x, norm, plain["norm.weight"], plain["norm.bias"])
        x = torch.tanh(site("up", x, F.linear, plain["up.weight"], plain["up.bias"]))
        x = self.x + site("own", x, own, plain["own.weight"], None)
        return site("head", x, F.linear, plain["head.weight"], plain["head.bias"])

    @invariant()
    def outputs_are_those_of_the_onion(self):
        if not hasattr(self, "model"):
            return
        with torch.no_grad():
            torch.testing.assert_close(self.model(self.x), self.expected(self.blocks))
            elsewhere = []
            thread = threading.Thread(target=lambda: elsewhere.append(self.forward()))
            thread.start()
            thread.join()
            torch.testing.assert_close(elsewhere[0], self.expected([]))

    def forward(self):
        with torch.no_grad():
            return self.model(self.x)

    # -------------------------------------------------------------------- whole models and files
    @precondition(lambda self: not getattr(self, "blocks", True))
    @rule()
    def merge_and_back(self):
        composed, before = composition(self.model), self.expected([]).detach()
        try:
            composed.merge()
        except opendelta.SiteError:
            return
        torch.testing.assert_close(self.forward(), before)
        composed.unmerge()

    @rule()
    def plain(self):
        acting = [known for known in self.order if self.acts(known, self.blocks)]
        refused = any(
            k.kind not in FOLDING or (k.kind == "dora" and "own" in k.sites) for k in acting
        )
        try:
            plain = composition(self.model).to_backbone()
        except opendelta.SiteError:
            assert refused
            return
        assert not refused
        with torch.no_grad():
            torch.testing.assert_close(plain(self.x), self.expected(self.blocks).detach())

    @rule()
    def copied(self):
        if self.order:
            twin = copy.deepcopy(self.model)
            with torch.no_grad():
                torch.testing.assert_close(twin(self.x), self.expected(self.blocks).detach())

    @rule()
    def saved_and_loaded(self):
        if not any(known.attached for known in self.order):
            return
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", opendelta.UnsavedWarning)
            composition(self.model).save(folder)
            other = made()
            opendelta.load(folder, other)
            with torch.no_grad():
                torch.testing.assert_close(other(self.x), self.expected(self.blocks).detach())


TestVerbs = Verbs.TestCase
TestVerbs.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
