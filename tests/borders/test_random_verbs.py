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
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.nets import Scaled, shake
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
SCALED = {"lora", "bitfit", "adapter"}
FOLDING = {"lora", "dora", "ia3", "bitfit", "copy"}


class Known:
    """What the test knows of one delta: nothing of it comes from the library but its tensors."""

    def __init__(self, kind, handle, sites):
        self.kind, self.handle, self.sites = kind, handle, sites
        self.attached, self.enabled, self.scale = True, True, 1.0

    def tensors(self, site):
        return dict(self.handle.layers[site].named_parameters())


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


class Verbs(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.model, self.order, self.blocks = made(), [], []
        self.before = opendelta.snapshot(self.model)
        self.x = torch.randn(2, 4, 6, dtype=torch.float64)
        self.number = 0

    # ------------------------------------------------------------------------------- the onion
    def acts(self, known, blocks):
        if not known.attached:
            return False
        for block in reversed(blocks):
            if known in block[1]:
                return block[1][known]
        return known.enabled

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

    # --------------------------------------------------------------------------------- the verbs
    def one(self, data, **wanted):
        those = [k for k in self.order if all(getattr(k, n) == v for n, v in wanted.items())]
        return data.draw(st.sampled_from(those)) if those else None

    @rule(kind=st.sampled_from(sorted(KINDS)), data=st.data())
    def put(self, kind, data):
        if len(self.order) >= 6:
            return
        method, options, places = KINDS[kind]
        sites = data.draw(st.lists(st.sampled_from(places), min_size=1, max_size=2, unique=True))
        self.number += 1
        handle = method(self.model, modified_modules=sites, name=f"d{self.number}", **options)
        shake(handle, seed=self.number)
        self.order.append(Known(kind, handle, sites))
        self.joined(self.order[-1])

    def joined(self, known):
        for _, choice, alone in self.blocks:
            if alone:
                choice.setdefault(known, known.enabled)

    @rule(data=st.data())
    def take(self, data):
        if known := self.one(data, attached=True):
            known.handle.detach()
            known.attached = False

    @rule(data=st.data(), where=st.sampled_from(["old", "before", "after"]))
    def bring_back(self, data, where):
        known, other = self.one(data, attached=False), self.one(data, attached=True)
        if known is None:
            return
        beside = {} if where == "old" or other is None else {where: other.handle}
        known.handle.attach(**beside)
        known.attached = True
        if beside:
            self.order.remove(known)
            self.order.insert(self.order.index(other) + (where == "after"), known)
        self.joined(known)

    @rule(data=st.data())
    def reorder(self, data):
        attached = [known for known in self.order if known.attached]
        wanted = data.draw(st.permutations(attached))
        composition(self.model).reorder([known.handle for known in wanted])
        new = iter(wanted)
        self.order = [next(new) if known.attached else known for known in self.order]

    @rule(data=st.data(), active=st.booleans())
    def switch(self, data, active):
        if known := self.one(data, attached=True):
            known.handle.enable() if active else known.handle.disable()
            for block in reversed(self.blocks):
                if known in block[1]:
                    block[1][known] = active
                    return
            known.enabled = active

    @rule(data=st.data(), scale=st.sampled_from([0.0, 0.5, -2.0, 1.0]))
    def weigh(self, data, scale):
        known = self.one(data)
        if known is not None and known.kind in SCALED:
            known.handle.scale = known.scale = scale

    @rule(data=st.data())
    def train(self, data):
        if known := self.one(data):
            self.number += 1
            shake(known.handle, seed=self.number)

    # -------------------------------------------------------------------------------- the blocks
    @rule(data=st.data(), alone=st.booleans())
    def open(self, data, alone):
        attached = [known for known in self.order if known.attached]
        if len(self.blocks) >= 3 or not attached:
            return
        if alone:
            chosen = data.draw(st.lists(st.sampled_from(attached), unique=True))
            block = composition(self.model).only(*[known.handle for known in chosen])
            choice = {known: known in chosen for known in attached}
        else:
            known = data.draw(st.sampled_from(attached))
            block, choice = known.handle.disabled(), {known: False}
        block.__enter__()
        self.blocks.append((block, choice, alone))

    @precondition(lambda self: getattr(self, "blocks", None))
    @rule(data=st.data())
    def close(self, data):
        """End an open block, whichever began last."""
        block = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        block[0].__exit__(None, None, None)

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

    def teardown(self):
        for block, *_ in getattr(self, "blocks", ()):
            block.__exit__(None, None, None)
        for known in getattr(self, "order", ()):
            if known.attached:
                known.handle.detach()
        if hasattr(self, "model"):
            opendelta.assert_pristine(self.model, like=self.before)


TestVerbs = Verbs.TestCase
TestVerbs.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
