"""What a forward keeps in objects, lists and counts is after a trial as it was before."""

import contextvars
import dataclasses
import functools
import threading
import types
import warnings
import weakref
from collections import UserDict

import numpy
import pytest
import torch
from torch import nn

import opendelta

pytestmark = pytest.mark.covers("Delta.attach")
WIDTH = 16
IDS = torch.tensor([[7, 3, 5], [1, 2, 4]])


@dataclasses.dataclass
class Table:
    cos: torch.Tensor
    sin: torch.Tensor


class InSlots:
    __slots__ = ("table",)


class Single:
    """Its class keeps the only one."""

    own = None

    def __new__(cls, angles):
        if cls.own is None:
            cls.own = super().__new__(cls)
            cls.own.table = table_of(angles)
        return cls.own


class Memo:
    """A decorator."""

    def __init__(self, function):
        self.function, self.kept = function, {}

    def __call__(self, angles):
        key = len(angles)
        if key not in self.kept:
            self.kept[key] = self.function(angles)
        return self.kept[key]


class Meta(type):
    table = None


class OfMeta(metaclass=Meta):
    pass


class Rotary(nn.Module):
    def forward(self, angles):
        if "cos" not in self._buffers:
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())
        return self


FILE, LATER = None, {}
TASK = contextvars.ContextVar("table", default=None)


def table_of(angles):
    return Table(angles.cos(), angles.sin())


def in_a_variable(angles):
    global FILE
    if FILE is None:
        FILE = table_of(angles)
    return FILE


def by_its_name(angles):
    if "ROTARY" not in globals():
        globals()["ROTARY"] = table_of(angles)
    return globals()["ROTARY"]


def in_a_task(angles):
    if TASK.get() is None:
        TASK.set(table_of(angles))
    return TASK.get()


def in_a_metaclass(angles):
    if Meta.table is None:
        Meta.table = table_of(angles)
    return OfMeta.table


def kept_in(owner):
    """Return a function that keeps its table as an attribute."""

    def get(angles):
        if getattr(owner, "table", None) is None:
            owner.table = table_of(angles)
        return owner.table

    return get


def kept_under(tables, key="table"):
    """Return a function that keeps its table in a mapping."""

    def get(angles):
        if key not in tables:
            tables[key] = table_of(angles)
        return tables[key]

    return get


def deep(inside):
    return types.SimpleNamespace(a=[types.SimpleNamespace(b={"c": [inside]})])


@functools.cache
def cached(length):
    return table_of(torch.ones(length, 1) * 10_000 ** -torch.linspace(0, 1, WIDTH))


KEY, ROTATING = types.SimpleNamespace, Rotary()
DEEP, DEEP_TABLES = deep(types.SimpleNamespace(table=None)), deep({})
WAYS = {
    "a variable": in_a_variable,
    "its name": by_its_name,
    "a task": in_a_task,
    "a metaclass": in_a_metaclass,
    "a thread": kept_in(threading.local()),
    "slots": kept_in(InSlots()),
    "a class": kept_in(type("Own", (), {})),
    "a dictionary": kept_under({}),
    "a dictionary of one's own": kept_under(UserDict()),
    "weak keys": kept_under(weakref.WeakKeyDictionary(), KEY),
    "deep inside": lambda angles: kept_under(DEEP_TABLES.a[0].b["c"][0])(angles),
    "an object deep inside": lambda angles: kept_in(DEEP.a[0].b["c"][0])(angles),
    "a single object": lambda angles: Single(angles).table,
    "a memo": Memo(table_of),
    "a module's buffers": ROTATING,
}


class Attention(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.table = table
        self.register_buffer("rates", 10_000 ** -torch.linspace(0, 1, WIDTH))

    def forward(self, x):
        table = self.table(torch.outer(torch.arange(8), self.rates))
        cos, sin = (each[: x.shape[1]] for each in (table.cos, table.sin))
        q, k = (y * cos + y.roll(WIDTH // 2, -1) * sin for y in (self.q(x), self.k(x)))
        return self.o((q @ k.mT).softmax(-1) @ self.v(x))


class Net(nn.Module):
    def __init__(self, table=table_of):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, 50)
        self.attn = nn.ModuleList(Attention(table) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for attention in self.attn:
            x = x + attention(x)
        return self.head(x + self.mlp(x))


@pytest.fixture(params=[False, True], ids=["alone", "beside a thread"])
def _threads(request):
    """Let a thread of somebody's own run, maybe; then counts may move, as it may count."""
    ends = threading.Event()
    thread = threading.Thread(target=lambda: ends.wait(60))
    if request.param:
        thread.start()
    yield
    ends.set()
    if request.param:
        thread.join()


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("method", ["LoraModel", "ParallelAdapterModel", "LoReftModel"])
@pytest.mark.parametrize("way", WAYS)
def test_a_trial_leaves_no_stand_in_in_objects(way, method):
    model = Net(WAYS[way])
    opendelta.plan(model, opendelta.LoraConfig())
    options = {"first": 1, "modified_modules": ["attn.0"]} if method == "LoReftModel" else {}
    delta = getattr(opendelta, method)(model, **options)
    opendelta.check(model)
    delta.detach()
    out = model(IDS)
    assert type(out) is torch.Tensor
    assert torch.equal(out, Net()(IDS))


COUNT, WARNED, LOSSES = 0, False, []


@functools.cache
def state_for(length):
    return {"calls": 0}


class Counting(Net):
    """It counts, warns once, and keeps losses for the loop around."""

    def __init__(self):
        super().__init__()
        self.calls, self.usage = 0, [0]

    def forward(self, input_ids):
        global COUNT, WARNED
        COUNT += 1
        self.calls += 1
        self.usage[0] += 1
        state_for(0)["calls"] += 1
        if not WARNED:
            warnings.warn("no mask", stacklevel=2)
            WARNED = True
        out = super().forward(input_ids)
        LOSSES.append(out.square().mean())
        return out


VERBS = {
    "plan": lambda model: opendelta.plan(model, opendelta.LoraConfig()),
    "LoRA": opendelta.LoraModel,
    "parallel adapter": opendelta.ParallelAdapterModel,
    "LoReFT": lambda model: opendelta.LoReftModel(model, modified_modules=["attn.0"], first=1),
    "check": lambda model: opendelta.LoraModel(model) and opendelta.check(model),
    "check with a batch": lambda model: (
        opendelta.LoraModel(model) and opendelta.check(model, {"input_ids": IDS})
    ),
}


def counts(model):
    return COUNT, WARNED, len(LOSSES), model.calls, [*model.usage], state_for(0)["calls"]


@pytest.mark.filterwarnings("ignore:no mask")
@pytest.mark.parametrize("ran", [False, True], ids=["first", "after a run"])
@pytest.mark.parametrize("verb", VERBS)
def test_what_a_forward_counts_and_collects_is_as_before(verb, ran):
    global COUNT, WARNED
    COUNT, WARNED = 0, False
    LOSSES.clear()
    state_for(0)["calls"] = 0
    model = Counting()
    if ran:
        model(IDS)
    before = counts(model)
    VERBS[verb](model)
    assert counts(model) == before
    model(IDS)
    assert counts(model) != before


@pytest.mark.filterwarnings("ignore:no mask")
def test_a_route_leaves_what_its_forward_collects_alone():
    model = Counting()
    delta = opendelta.LoReftModel(model, modified_modules=["attn.0"], first=1)
    LOSSES.clear()
    for _ in range(2):
        with opendelta.route(model, [delta, None]):
            model(IDS)
        assert len(LOSSES) == 1
        LOSSES.clear()


def test_what_other_threads_collect_meanwhile_stays():
    inside, goes = threading.Event(), threading.Event()

    class Waits(Net):
        def forward(self, input_ids):
            out = super().forward(input_ids)
            LOSSES.append(out)
            if threading.current_thread() is threading.main_thread():
                inside.set()
                goes.wait(30)
            return out

    def serve():
        inside.wait(30)
        with torch.no_grad():
            model(IDS)
        goes.set()
        ends.wait(30)

    model, ends = Waits(), threading.Event()
    LOSSES.clear()
    thread = threading.Thread(target=serve)
    thread.start()
    opendelta.LoReftModel(model, modified_modules=["attn.0"], first=1)
    ends.set()
    thread.join()
    assert any(not loss.requires_grad and torch.equal(loss, Net()(IDS)) for loss in LOSSES)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64], ids=lambda d: str(d)[6:]
)
def test_a_table_in_another_dtype_leaves(dtype):
    tables = {}

    def get(angles):
        if "rates" not in tables:
            tables["rates"] = torch.linspace(0, 1, WIDTH).to(angles.dtype)
        return Table(angles.cos() * tables["rates"], angles.sin())

    model = Net(get).to(dtype)
    opendelta.ParallelAdapterModel(model).detach()
    assert tables.get("rates", torch.ones(1, dtype=dtype)).dtype == dtype
    assert model(IDS).dtype == dtype


def trained(model):
    return next(p for p in model.parameters() if p.requires_grad)


HOOKS = {
    "full backward": lambda model, hook: model.head.register_full_backward_hook(
        lambda module, inputs, outputs: hook(outputs[0])
    ),
    "full backward, before": lambda model, hook: model.head.register_full_backward_pre_hook(
        lambda module, outputs: hook(outputs[0])
    ),
    "a parameter's": lambda model, hook: trained(model).register_hook(hook),
    "after a gradient": lambda model, hook: trained(model).register_post_accumulate_grad_hook(
        lambda p: hook(p.grad)
    ),
}


@pytest.mark.parametrize("batch", [None, {"input_ids": IDS}], ids=["shapes", "batch"])
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_on_gradients_has_nothing_of_a_check(name, batch):
    model, norms = Net(), []
    opendelta.LoraModel(model, modified_modules=["attn.0.q"]).freeze_module()
    HOOKS[name](model, lambda grad: norms.append(grad.norm()))
    opendelta.check(model, batch)
    assert norms == []
    model(IDS).sum().backward()
    assert [type(norm) for norm in norms] == [torch.Tensor]


def test_a_hook_on_gradients_that_needs_values_asks_check_for_a_batch():
    model, norms = Net(), []
    opendelta.LoraModel(model, modified_modules=["attn.0.q"]).freeze_module()
    HOOKS["full backward"](model, lambda grad: norms.append(grad.norm().item()))
    (why,) = opendelta.check(model).not_checked
    assert "the backward failed on shapes; give check a batch" in why
    assert opendelta.check(model, {"input_ids": IDS}).not_checked == []
    assert norms == []


def test_arrays_that_cannot_be_written_or_are_data_are_let_be():
    class Holding(Net):
        def __init__(self):
            super().__init__()
            self.fixed, self.counts = numpy.arange(3), numpy.zeros(3)
            self.fixed.flags.writeable = False
            self.data = numpy.lib.stride_tricks.as_strided(self.counts[:1], (2**30,), (0,))

        def forward(self, input_ids):
            self.counts[1] += 1
            return super().forward(input_ids)

    model = Holding()
    opendelta.ParallelAdapterModel(model).freeze_module()
    opendelta.check(model, {"input_ids": IDS})
    assert model.counts.tolist() == [0, 0, 0]
