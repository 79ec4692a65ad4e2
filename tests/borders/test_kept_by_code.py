"""Tables that a forward keeps in a file, a class or a cache have values after a trial."""

import functools
import types

import pytest
import torch
import transformers
from torch import nn

import opendelta
from opendelta._modules.reached import by_forwards

pytestmark = pytest.mark.covers("Delta.attach")
WIDTH = 16
IDS = torch.tensor([[7, 3, 5], [1, 2, 4]])
FILE = None
BY_LENGTH = {}
COUNT = 0
elsewhere = types.ModuleType("somebodys_rope")
elsewhere.TABLE = None


def made(length):
    return torch.arange(length * WIDTH).view(length, WIDTH) / 100


def in_the_file(length):
    global FILE, COUNT
    COUNT += 1
    if FILE is None or len(FILE) < length:
        FILE = made(length)
    return FILE[:length]


def in_a_dictionary(length):
    if length not in BY_LENGTH:
        BY_LENGTH[length] = made(length)
    return BY_LENGTH[length]


def new_in_the_file(length):
    global LATER
    if "LATER" not in globals() or len(LATER) < length:
        LATER = made(length)
    return LATER[:length]


def in_another_file(length):
    if elsewhere.TABLE is None or len(elsewhere.TABLE) < length:
        elsewhere.TABLE = made(length)
    return elsewhere.TABLE[:length]


class Rope:
    table, calls = None, 0

    @classmethod
    def of(cls, length):
        cls.calls += 1
        if cls.table is None or len(cls.table) < length:
            cls.table = made(length)
        return cls.table[:length]


class Later:
    @staticmethod
    def of(length):
        if not hasattr(Later, "table") or len(Later.table) < length:
            Later.table = made(length)
        return Later.table[:length]


class Keeper:
    """An object that a module holds."""

    def __init__(self):
        self.table, self.calls = None, [0]

    def __call__(self, length):
        self.calls[0] += 1
        if self.table is None or len(self.table) < length:
            self.table = made(length)
        return self.table[:length]


KEEPER = Keeper()


@functools.lru_cache
def cached(length):
    return made(length)


def in_an_argument(length, tables={}):  # noqa: B006
    return tables.setdefault(length, made(length))


def kept():
    """Return all tables that are kept now."""
    one = [FILE, globals().get("LATER"), elsewhere.TABLE, Rope.table, vars(Later).get("table")]
    one += [KEEPER.table, Attention.shared]
    return [*one, *BY_LENGTH.values(), *in_an_argument.__defaults__[0].values()]


def assert_values():
    for table in kept():
        assert table is None or (
            type(table) is torch.Tensor and torch.equal(table, made(len(table)))
        )


class Attention(nn.Module):
    shared = None

    def __init__(self, table):
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = table

    def forward(self, x):
        rows, length, width = x.shape
        qkv = self.qkv(x + self.positions(length)).chunk(3, -1)
        q, k, v = (part.view(rows, length, 2, -1).transpose(1, 2) for part in qkv)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(rows, length, width))

    def positions(self, length):
        if self.table is not None:
            return self.table(length)
        cls = Attention
        if cls.shared is None or len(cls.shared) < length:
            cls.shared = made(length)
        return cls.shared[:length]


class Block(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(WIDTH), Attention(table)
        self.ln2, self.mlp = nn.LayerNorm(WIDTH), nn.Sequential(
            nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)
        )  # fmt: skip

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.wte = nn.Embedding(50, WIDTH)
        self.h = nn.ModuleList(Block(table) for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, 50)

    def forward(self, input_ids):
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x)
        return self.lm_head(x)


@pytest.fixture(autouse=True)
def _nothing_kept():
    global FILE, COUNT
    FILE, COUNT, elsewhere.TABLE, Rope.table, Rope.calls, Attention.shared = (
        None,
        0,
        *[None] * 2,
        0,
        None,
    )
    for kept in (BY_LENGTH, in_an_argument.__defaults__[0]):
        kept.clear()
    cached.cache_clear()
    KEEPER.__init__()
    globals().pop("LATER", None)
    if hasattr(Later, "table"):
        del Later.table


TABLES = [
    in_the_file, in_a_dictionary, new_in_the_file, in_another_file, Rope.of, Later.of, cached,
    in_an_argument, KEEPER, None,
]  # fmt: skip
METHODS = ["LoraModel", "AdapterModel", "ParallelAdapterModel", "LoReftModel", "IA3Model"]


@pytest.mark.parametrize("before", [False, True], ids=["first", "after a run"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "table", TABLES, ids=lambda t: getattr(t, "__qualname__", type(t).__name__)
)
def test_a_trial_leaves_no_stand_in_in_what_a_forward_keeps(table, method, before):
    torch.manual_seed(0)
    model = GPT(table).eval()
    if before:
        model(IDS[:, :1])
    delta = getattr(opendelta, method)(model)
    assert_values()
    delta.disable()
    out = model(IDS)
    torch.manual_seed(0)
    plain = GPT(made).eval()
    assert torch.equal(out, plain(IDS))


@pytest.mark.parametrize(
    "table", TABLES, ids=lambda t: getattr(t, "__qualname__", type(t).__name__)
)
def test_a_run_with_values_leaves_values(table):
    """LoReFT looks if a model moves its tokens, `route` if it moves its rows; `check` runs it."""
    torch.manual_seed(0)
    model = GPT(table).eval()
    model(IDS[:, :1])
    delta = opendelta.LoReftModel(model, first=1)
    assert_values()
    opendelta.check(model, {"input_ids": IDS})
    assert_values()
    with opendelta.route(model, [delta, None]):
        out = model(IDS)
    torch.manual_seed(0)
    assert torch.equal(out[1], GPT(made).eval()(IDS)[1])


def test_packages_that_a_forward_names_are_not_looked_through():
    """transformers has thousands of names, and each trial would pass them all."""

    class Naming(nn.Linear):
        def forward(self, x):
            return super().forward(x) if transformers.__version__ else x

    assert len(by_forwards([Naming(4, 4)])) < 50
