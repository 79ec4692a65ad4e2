"""What a forward changes in its modules, their parts and modes is after a trial as it was."""

import os

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import opendelta

pytestmark = pytest.mark.covers("Delta.attach", "check")
WIDTH = 16
IDS = torch.tensor([[7, 3, 5], [1, 2, 4]])


class Last:
    """What code saw last, in a slot."""

    __slots__ = ("seen",)

    def __init__(self):
        self.seen = None


class Net(nn.Module):
    last = Last()

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in "qkvo")
        self.center, self.held = torch.zeros(WIDTH), [nn.BatchNorm1d(WIDTH)]

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        self.change(x)
        return self.head(x)

    def change(self, x):
        pass


class Growing(Net):
    def change(self, x):
        self.extra = nn.Linear(x.size(-1), WIDTH)


class Replacing(Net):
    def change(self, x):
        self.head = nn.Linear(WIDTH, 50)


class Hooking(Net):
    def change(self, x):
        self.head.register_forward_hook(lambda *_: None)


class Switching(Net):
    def change(self, x):
        self.head.eval()


class Freezing(Net):
    def change(self, x):
        self.embed.weight.requires_grad_(False)


class Normalising(Net):
    def change(self, x):
        self.head.weight.data = F.normalize(self.head.weight.data)


class Showing(Net):
    def change(self, x):
        self.last.seen = x


class Writing(Net):
    def change(self, x):
        with torch.no_grad():
            self.head.weight.lerp_(self.head.weight.flip(0), 0.5)
            self.center.mul_(0.9).add_(x.mean((0, 1)))
            self.held[0].running_mean.add_(1)


class Normed(Net):
    """Its BatchNorm is in a list, and so in training mode."""

    def change(self, x):
        self.held[0](x.mT)


class Counting(Net):
    def change(self, x):
        self.head.calls = getattr(self.head, "calls", 0) + 1
        self.head.register_buffer("seen", x.detach())
        self.head.extra = nn.Parameter(torch.zeros(2))
        self.head.weight.grad = torch.ones_like(self.head.weight)


class Setting(Net):
    def change(self, x):
        torch.set_default_dtype(torch.float64)
        os.environ["OF_A_FORWARD"] = "1"


KINDS = [
    Growing, Replacing, Hooking, Switching, Freezing, Normalising, Showing, Writing, Normed,
    Counting, Setting,
]  # fmt: skip


def state(model):
    """All that a forward may change, by name; modules and hooks by their numbers."""
    parts = dict(model.named_modules())
    return {
        **{name: (id(m), m.training, len(m._forward_hooks)) for name, m in parts.items()},
        **{name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()},
        "buffers": [name for name, _ in model.named_buffers()],
        "calls": getattr(model.head, "calls", 0),
        "center": model.center.tolist(),
        "mean": model.held[0].running_mean.tolist(),
        "batches": int(model.held[0].num_batches_tracked),
        "process": (torch.get_default_dtype(), os.environ.get("OF_A_FORWARD")),
        **{f"{name} values": p.tolist() for name, p in model.named_parameters()},
        "last": id(Net.last.seen),
    }


@pytest.mark.parametrize("method", ["LoraModel", "ParallelAdapterModel", "LoReftModel"])
@pytest.mark.parametrize("kind", KINDS)
def test_attaching_leaves_no_change_in_modules(kind, method):
    torch.manual_seed(0)
    model = kind()
    before = state(model)
    chosen = {"modified_modules": ["o"], "first": 1} if method == "LoReftModel" else {}
    chosen = {"modified_modules": ["q", "o"]} if method == "ParallelAdapterModel" else chosen
    getattr(opendelta, method)(model, **chosen).detach()
    assert state(model) == before


STAY = {Writing, Normed, Counting}  # which write values, or set attributes of torch's modules


@pytest.mark.parametrize("batch", [None, {"ids": IDS}], ids=["shapes", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_check_leaves_no_change_in_modules(kind, batch):
    torch.manual_seed(0)
    model = kind()
    opendelta.LoraModel(model, modified_modules=["q"])
    before = state(model)
    opendelta.check(model, batch)
    after = state(model)
    if batch is not None and kind in STAY:
        for each in ("center", "mean", "batches", "calls", "head.weight values"):
            del before[each], after[each]
    assert after == before


@pytest.mark.covers("Composition.to_backbone", "shared_copy")
@pytest.mark.parametrize("verb", ["to_backbone", "shared_copy"])
def test_losses_that_a_forward_keeps_in_a_list_hinder_no_copy(verb):
    class Keeping(Net):
        def change(self, x):
            vars(self).setdefault("losses", []).append({"mean": x.mean()})

    model = Keeping()
    opendelta.LoraModel(model, modified_modules=["q"])
    model(IDS)
    kept = model.losses[0]["mean"]
    made = opendelta.shared_copy(model)
    if verb == "to_backbone":
        made = opendelta.composition(model).to_backbone()
    assert torch.equal(made.losses[0]["mean"], kept)
    assert model.losses[0]["mean"] is kept


def test_a_check_of_a_model_with_a_lazy_module_says_what_to_do():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(2))
    opendelta.LoraModel(model, modified_modules=["0"])
    for batch in (None, torch.ones(2, 4)):
        with pytest.raises(opendelta.SiteError, match=r"'1' \(LazyLinear\) .* run the model once"):
            opendelta.check(model, batch)


def test_an_8_bit_linear_has_its_numbers_after_a_trial():
    """Its first run takes them from its parameter."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain, x = nn.Linear(64, 64), torch.randn(2, 5, 64)

    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)

        def forward(self, x):
            return self.fc(x)

    model = Quantised()
    model.fc.load_state_dict(plain.state_dict())
    model = model.to("cpu")
    opendelta.LoReftModel(model, modified_modules=["fc"], first=1).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), atol=0.05, rtol=0.05)


class Reading(nn.Module):
    """It computes in place with what it is given, and has buffers of many sorts."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scripted = torch.jit.trace(nn.BatchNorm1d(WIDTH), torch.ones(2, WIDTH))
        self.links = nn.Parameter(torch.eye(WIDTH).to_sparse(), requires_grad=False)
        self.register_buffer("others", torch.eye(WIDTH).to_sparse())

    def forward(self, x):
        y = self.fc(self.norm(x))
        y += x
        return self.scripted(torch.sparse.mm(self.links, y.T).T)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:The given NumPy array")
def test_a_check_reads_batches_that_cannot_be_written(tmp_path):
    path = tmp_path / "batch.npy"
    numpy.save(path, numpy.ones((4, WIDTH), numpy.float32))
    batch = torch.from_numpy(numpy.load(path, mmap_mode="r"))
    model = Reading()
    opendelta.LoraModel(model, modified_modules=["fc"])
    assert opendelta.check(model, batch)
    assert model.norm.running_mean.count_nonzero() == 0
    assert batch.sum() == 4 * WIDTH
