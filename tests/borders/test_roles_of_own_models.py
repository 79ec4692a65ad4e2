"""Models of somebody's own: what the flow of data says of their roles, whatever their names are."""

import pytest
import torch
import torch.nn.functional as F
from support.nets import shake
from torch import nn

import opendelta
from opendelta import AdapterModel, IA3Model, LoraModel, ParallelAdapterModel

pytestmark = pytest.mark.covers("roles")

WIDTH = 8


def heads(t):
    return t.unflatten(-1, (2, -1)).transpose(1, 2)


def merged(t):
    return t.transpose(1, 2).flatten(2)


def attended(q, k, v):
    return merged(F.scaled_dot_product_attention(q, k, v))


def split_by(z, size):
    return [heads(t) for t in z.split(size, -1)]


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm; its attention and its feed-forward are given, and called in a neutral way."""

    def __init__(self, one, other):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.one, self.other = one, other

    def forward(self, x):
        x = x + self.one(self.n1(x))
        return x + self.other(self.n2(x))


def net(make):
    """Two blocks between an embedding and a head."""
    return nn.Sequential(nn.Embedding(9, WIDTH), nn.Sequential(make(), make()), nn.Linear(WIDTH, 3))


def found(model, where="1.0."):
    """{module inside the block: role}, without norms."""
    roles = opendelta.roles(model).items()
    return {n.removeprefix(where): r for n, r in roles if n.startswith(where) and "norm" not in r}


# -------------------------------------------------------------------------- one projection for all
def by_map(self, x):
    q, k, v = map(heads, self.qkv(x).chunk(3, -1))
    return attended(q, k, v)


def by_map_of_sizes(self, x):
    q, k, v = map(heads, self.qkv(x).split(WIDTH, -1))
    return attended(q, k, v)


def by_comprehension(self, x):
    q, k, v = [heads(t) for t in self.qkv(x).split(WIDTH, -1)]
    return attended(q, k, v)


def by_generator(self, x):
    q, k, v = (heads(t) for t in torch.chunk(self.qkv(x), dim=-1, chunks=3))
    return attended(q, k, v)


def by_a_function(self, x):
    q, k, v = split_by(self.qkv(x), WIDTH)
    return attended(q, k, v)


def by_a_loop(self, x):
    parts = []
    for t in self.qkv(x).split(WIDTH, -1):
        parts.append(heads(t))
    q, k, v = parts
    return attended(q, k, v)


def by_arguments(self, x):
    return attended(*map(heads, self.qkv(x).chunk(3, dim=-1)))


def by_number(self, x):
    parts = [heads(t) for t in self.qkv(x).split([WIDTH, WIDTH, WIDTH], -1)]
    return attended(parts[0], parts[1], parts[2])


def by_name(self, x):
    parts = {name: heads(t) for name, t in zip("qkv", self.qkv(x).chunk(3, -1), strict=True)}
    return attended(parts["q"], parts["k"], parts["v"])


SPLITS = (
    by_map, by_map_of_sizes, by_comprehension, by_generator, by_a_function, by_a_loop,
    by_arguments, by_number, by_name,
)  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["MHSA", "MultiHead", "SA", "TokenMixer"])
def test_a_fused_projection_is_found_however_its_heads_are_split(name, split):
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.proj(split(self, x))

    Fused.__name__ = name
    model = net(lambda: Block(Fused(), FeedForward()))
    model(torch.zeros(1, 4, dtype=torch.long))  # the code is right
    roles = found(model)
    assert roles["one.qkv"] in ("attn.qkv", "mixer.in")  # a mixer, by the name of its class
    assert roles["one.proj"] == "attn.proj"
    ends = ["1.0.one.proj", "1.0.other.down", "1.1.one.proj", "1.1.other.down"]
    assert AdapterModel(model, bottleneck_dim=2).modified_modules == ends
    assert LoraModel(model).modified_modules == ["1.0.one.qkv", "1.1.one.qkv"]


# --------------------------------------------------------------------- blocks that stand in no list
class Attention(nn.Module):
    """Attention with Llama's names; `end` is around its output."""

    def __init__(self, end=lambda linear: linear):
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.wo = end(nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return self.wo(attended(heads(self.wq(x)), heads(self.wk(x)), heads(self.wv(x))))


class Lone(nn.Module):
    """An embedding, blocks as attributes, a head."""

    def __init__(self, **blocks):
        super().__init__()
        self.embed = nn.Embedding(9, WIDTH)
        self.order = list(blocks)
        for name, block in blocks.items():
            setattr(self, name, block)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, ids):
        x = self.embed(ids)
        for name in self.order:
            x = getattr(self, name)(x)
        return self.head(x)


ENDS = (
    lambda linear: linear,
    lambda linear: nn.Sequential(linear, nn.Dropout(0.0)),
    lambda linear: nn.Sequential(linear, nn.LayerNorm(WIDTH)),
)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("names", [["block"], ["encoder", "decoder"]])
def test_a_branch_around_attention_needs_no_list_of_blocks(names, end):
    model = Lone(**{name: Block(Attention(end), FeedForward()) for name in names})
    model(torch.zeros(1, 4, dtype=torch.long))
    around = [name for name in names for _ in range(2)]
    expected = [f"{name}.one" for name in around]
    expected += [f"{name}.other.{part}" for name in names for part in ("up", "down")]
    assert ParallelAdapterModel(model, bottleneck_dim=2).modified_modules == expected


# ------------------------------------------------------------------------- wrappers of one sublayer
class GEGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, 32)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class Gated(nn.Module):
    """As diffusers has it, in a class whose name says nothing."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(GEGLU(), nn.Dropout(0.0), nn.Linear(16, WIDTH))

    def forward(self, x):
        return self.net(x)


class Square(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.a = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.c(F.silu(self.a(x)))


class PreNorm(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(WIDTH), fn

    def forward(self, x):
        return self.fn(self.norm(x))


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return x + self.fn(x)


class Pairs(nn.Module):
    """Lists of two, as lucidrains has them."""

    def __init__(self, wrapped):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(wrapped()) for _ in range(2))

    def forward(self, x):
        for attn, ff in self.layers:
            x = x + attn(x)
            x = x + ff(x)
        return x


LAYOUTS = {
    "pairs": lambda pair: Pairs(lambda: map(PreNorm, pair())),
    "pairs of residuals": lambda pair: Pairs(lambda: [Residual(PreNorm(m)) for m in pair()]),
    "in a row": lambda pair: nn.Sequential(*(PreNorm(m) for _ in range(2) for m in pair())),
    "in rows": lambda pair: nn.Sequential(
        *(nn.Sequential(*(Residual(PreNorm(m)) for m in pair())) for _ in range(2))
    ),
    "a norm in a row": lambda pair: nn.Sequential(
        *(Residual(nn.Sequential(nn.LayerNorm(WIDTH), m)) for _ in range(2) for m in pair())
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("make", "parts"),
    [(Gated, {"net.0.proj": "gate_up", "net.2": "w2"}), (Square, {"a": "w1", "c": "w2"})],
)
def test_a_feed_forward_is_found_in_a_wrapper_beside_that_of_its_attention(layout, make, parts):
    model = LAYOUTS[layout](lambda: (Attention(), make()))
    model(torch.zeros(1, 4, WIDTH))
    roles = found(model, "")
    ends = [{n: r[3:] for n, r in roles.items() if r.startswith("ff.") and n.endswith(f".{part}")}
            for part in parts]  # fmt: skip
    assert [list(end.values()) for end in ends] == [[role] * 2 for role in parts.values()]
    assert len([role for role in roles.values() if role.startswith("ff.")]) == 2 * len(parts)
    norms = [role for role in opendelta.roles(model).values() if role.endswith("layer_norm")]
    assert sorted(norms) == ["attn.layer_norm"] * 2 + ["ff.layer_norm"] * 2


def test_linears_without_attention_beside_them_are_no_feed_forward():
    model = nn.Sequential(*(PreNorm(make()) for make in (Gated, Square)))
    assert opendelta.roles(model) == {}


@pytest.mark.parametrize("make", [FeedForward, Gated])
def test_a_branch_around_a_feed_forward_needs_no_list_of_blocks(make):
    model = Lone(block=Block(Attention(), make()))
    places = {"modified_modules": ["ff", "ff"], "common_structure": True}
    around = "block.other.net" if make is Gated else "block.other"
    assert ParallelAdapterModel(model, bottleneck_dim=2, **places).modified_modules == [around] * 2


# ------------------------------------------------------------------ all of a block in one module
class Flat(nn.Module):
    """Linears of these names: queries, keys, values, the output, and a feed-forward."""

    def __init__(self, names, hidden):
        super().__init__()
        self.names = names.split()
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        *attention, up, down = self.names
        for name in attention:
            setattr(self, name, nn.Linear(WIDTH, WIDTH))
        setattr(self, up, nn.Linear(WIDTH, hidden))
        setattr(self, down, nn.Linear(hidden, WIDTH))

    def forward(self, x):
        q, k, v, *out, up, down = (getattr(self, name) for name in self.names)
        h = self.n1(x)
        h = attended(heads(q(h)), heads(k(h)), heads(v(h)))
        x = x + (out[0](h) if out else h)
        return x + down(F.gelu(up(self.n2(x))))


@pytest.mark.parametrize("hidden", [8, 16])
@pytest.mark.parametrize(
    "names",
    [f"{attention} {ff}"
     for attention in ("wq wk wv wo", "q_proj k_proj v_proj o_proj", "w1 w2 w3 fc", "wq wk wv")
     for ff in ("fc1 fc2", "wi wf", "up down", "a b")],
)  # fmt: skip
def test_the_flow_of_a_flat_block_tells_its_attention_from_its_feed_forward(names, hidden):
    *attention, up, down = names.split()
    expected = dict(zip(attention, ("attn.q", "attn.k", "attn.v", "attn.proj"), strict=False))
    expected |= {up: "ff.w1", down: "ff.w2"}
    model = net(lambda: Flat(names, hidden))
    assert found(model) == expected
    assert IA3Model(model).modified_modules[:3] == [
        f"1.0.{name}" for name in (*attention[1:3], down)
    ]
    assert ParallelAdapterModel(model, bottleneck_dim=2).modified_modules[-2:] == [
        f"1.1.{up}", f"1.1.{down}"
    ]  # fmt: skip


# -------------------------------------------------------------------------- relative positions
class Relative(nn.Module):
    """Keys of relative positions beside those of the tokens; `first`: they come first."""

    def __init__(self, first, table):
        super().__init__()
        self.r, self.a, self.b, self.c, self.d = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.first, self.table = first, nn.Parameter(torch.zeros(4, WIDTH)) if table else None

    def forward(self, x):
        places = torch.ones_like(x) if self.table is None else self.table[None]
        q = heads(self.a(x))
        keys = [self.r(places), self.b(x)] if self.first else [self.b(x), self.r(places)]
        scores = q @ heads(keys[0]).mT + q @ heads(keys[1]).mT
        return self.d(merged(scores.softmax(-1) @ heads(self.c(x))))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("table", [True, False])
def test_keys_of_relative_positions_are_not_the_keys(first, table):
    model = net(lambda: Block(Relative(first, table), FeedForward()))
    model(torch.zeros(1, 4, dtype=torch.long))
    roles = {n: r for n, r in found(model).items() if n.startswith("one.")}
    assert roles == {
        f"one.{name}": f"attn.{part}"
        for name, part in zip("abcd", ("q", "k", "v", "proj"), strict=True)
    }


# ------------------------------------------------------- queries, keys and values are given apart
class Given(nn.Module):
    """An attention that takes three inputs, in this order; its linears are called `names`."""

    def __init__(self, names, order):
        super().__init__()
        self.names, self.order = names, order
        for name in names:
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, *given, mask=None):
        given = dict(zip(self.order, given, strict=True))
        q, k, v = (
            heads(getattr(self, n)(given[p])) for n, p in zip(self.names, "qkv", strict=False)
        )
        scores = q @ k.mT if mask is None else (q @ k.mT).masked_fill(mask == 0, -1e9)
        return getattr(self, self.names[3])(merged(scores.softmax(-1) @ v))


class ByValueKeyQuery(nn.Module):
    def __init__(self, names, cls):
        super().__init__()
        self.one, self.other = type(cls, (Given,), {})(names, "vkq"), FeedForward()
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, value, key, query, mask):
        x = self.n1(self.one(value, key, query, mask=mask) + query)
        return self.n2(self.other(x) + x)


class ByQueryKeyValue(ByValueKeyQuery):
    def __init__(self, names, cls):
        super().__init__(names, cls)
        self.one.order = "qkv"

    def forward(self, q, k, v, mask=None):
        x = self.n1(self.one(q, k, v, mask=mask) + q)
        return self.n2(self.other(x) + x)


class Threefold(nn.Module):
    def __init__(self, make, *given):
        super().__init__()
        self.layers = nn.ModuleList(make(*given) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, x, x, None)
        return x


@pytest.mark.parametrize("cls", ["SelfAttention", "Neutral"])
@pytest.mark.parametrize("make", [ByValueKeyQuery, ByQueryKeyValue])
@pytest.mark.parametrize("names", ["queries keys values fc_out", "q k v end", "a b c d"])
def test_all_of_one_attention_is_of_one_sublayer(names, make, cls):
    model = Threefold(make, names.split(), cls)
    model(torch.zeros(1, 4, WIDTH))
    q, k, v, out = (f"one.{name}" for name in names.split())
    expected = {q: "attn.q", k: "attn.k", v: "attn.v", out: "attn.proj"}
    roles = found(model, "layers.0.")
    assert {n: r for n, r in roles.items() if n.startswith("one.")} == expected
    assert opendelta.roles(model)["layers.1.n1"] == "attn.layer_norm"
    ends = [f"layers.{i}.{end}" for i in range(2) for end in (out, "other.down")]
    assert AdapterModel(model, bottleneck_dim=2).modified_modules == ends
    model = Threefold(make, names.split(), cls)
    places = ParallelAdapterModel(model, bottleneck_dim=2).modified_modules
    assert places[:2] == ["layers.0.one"] * 2


# ------------------------------------------------------------------------------ a list of heads
class Head(nn.Module):
    """One head: it gives `size` channels. Its linears are called `names`."""

    def __init__(self, names, size):
        super().__init__()
        self.names = names
        for name in names:
            setattr(self, name, nn.Linear(WIDTH, size, bias=False))

    def forward(self, x):
        q, k, v = (getattr(self, name)(x) for name in self.names)
        scores = (q @ k.mT).masked_fill(torch.ones_like(q @ k.mT).tril() == 0, float("-inf"))
        return scores.softmax(-1) @ v


class ManyHeads(nn.Module):
    def __init__(self, count=2, names=("query", "key", "value"), size=4):
        super().__init__()
        self.heads = nn.ModuleList(Head(names, size) for _ in range(count))
        self.proj = nn.Linear(size * count, WIDTH)

    def forward(self, x):
        return self.proj(torch.cat([head(x) for head in self.heads], -1))


class Net(nn.Module):
    """A feed-forward in a row."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, WIDTH), nn.Dropout(0.0)
        )

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("size", [4, WIDTH])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("names", ["query key value", "W_q W_k W_v"])
@pytest.mark.parametrize("blocks", ["in a row", "alone"])
def test_the_items_of_a_list_of_heads_are_no_blocks(blocks, names, count, size):
    def make():
        return Block(ManyHeads(count, names.split(), size), Net())

    model = net(make) if blocks == "in a row" else Lone(block=make())
    model(torch.zeros(1, 4, dtype=torch.long))
    where = "1.0." if blocks == "in a row" else "block."
    expected = {
        f"one.heads.{i}.{name}": f"attn.{part}"
        for i in range(count)
        for name, part in zip(names.split(), "qkv", strict=True)
    }
    expected |= {"one.proj": "attn.proj", "other.net.0": "ff.w1", "other.net.2": "ff.w2"}
    assert found(model, where) == expected
    ends = [f"{where}one.proj", f"{where}other.net.2"]
    assert AdapterModel(model, bottleneck_dim=2).modified_modules[:2] == ends
    model = net(make) if blocks == "in a row" else Lone(block=make())
    places = ParallelAdapterModel(model, bottleneck_dim=2).modified_modules
    assert places[:2] == [f"{where}one"] * 2


def test_layers_with_only_queries_keys_and_values_are_blocks():
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Head(("query", "key", "value"), WIDTH) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x

    model = Layers()
    roles = {f"layers.{i}.{n}": f"attn.{n[0]}" for i in range(2) for n in ("query", "key", "value")}
    assert opendelta.roles(model) == roles


# ------------------------------------------------------------------ two attentions in one block
class Twice(nn.Module):
    """Two attentions of one class."""

    def __init__(self, make):
        super().__init__()
        self.attn1, self.attn2, self.ff = make(), make(), FeedForward()
        self.n1, self.n2, self.n3 = (nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x):
        x = x + self.attn1(self.n1(x))
        x = x + self.attn2(self.n2(x))
        return x + self.ff(self.n3(x))


@pytest.mark.parametrize("make", [Attention, lambda: Attention(ENDS[1]), ManyHeads])
def test_each_of_two_attentions_gets_one_branch(make):
    model = net(lambda: Twice(make))
    before = model(torch.zeros(1, 4, dtype=torch.long))
    places = ParallelAdapterModel(model, bottleneck_dim=2).modified_modules
    block = ["attn1", "attn1", "attn2", "attn2"]
    expected = [f"1.{i}.{name}" for i in range(2) for name in block]
    assert [name for name in places if ".ff." not in name] == expected
    assert torch.equal(model(torch.zeros(1, 4, dtype=torch.long)), before)


# ------------------------------------------------------------------- self- and cross-attention
class Nameless(nn.Module):
    """Attention of linears without names; `convolved`: other convolutions for queries and keys."""

    def __init__(self, convolved=False):
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        make = (lambda: nn.Conv1d(WIDTH, WIDTH, 1)) if convolved else nn.Identity
        self.before = nn.ModuleList(make() for _ in range(3))

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        given = [c(t.mT).mT for c, t in zip(self.before, (x, memory, memory), strict=True)]
        q, k, v = (heads(linear(t)) for linear, t in zip(self.linears[:3], given, strict=True))
        return self.linears[-1](attended(q, k, v))


class Sublayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x, sublayer):
        return x + sublayer(self.norm(x))


class Layer(nn.Module):
    """As the Annotated Transformer has it; its attentions have the given names, the self's first.

    Args:
        listed: the residual connections are in a list.
    """

    def __init__(self, names, listed=True, convolved=False):
        super().__init__()
        self.names = names.split()
        for name in self.names:
            setattr(self, name, Nameless(convolved))
        self.feed_forward = FeedForward()
        parts = [Sublayer() for _ in range(3)]
        self.sublayer = nn.ModuleList(parts) if listed else None
        self.s0, self.s1, self.s2 = (None,) * 3 if listed else parts

    def forward(self, x, memory=None):
        first, second, third = self.sublayer or (self.s0, self.s1, self.s2)
        attns = [getattr(self, name) for name in self.names]
        x = first(x, lambda x: attns[0](x))
        if len(attns) > 1:
            x = second(x, lambda x: attns[1](x, memory))
        return third(x, self.feed_forward)


class Swapped(Layer):
    """The memory is the first argument."""

    def forward(self, memory, x):
        return super().forward(x, memory)


class Translator(nn.Module):
    """An encoder and a decoder of `number` layers; without lists if it is 1."""

    def __init__(self, names, number, listed=True, convolved=False, decoder=Layer):
        super().__init__()
        self.src, self.tgt = nn.Embedding(9, WIDTH), nn.Embedding(9, WIDTH)
        one, two = names.split()
        encoders = [Layer(one, listed, convolved) for _ in range(number)]
        decoders = [decoder(f"{one} {two}", listed, convolved) for _ in range(number)]
        self.swapped = decoder is Swapped
        several = nn.ModuleList if number > 1 else lambda items: items[0]
        self.encoder, self.decoder = several(encoders), several(decoders)

    def forward(self, src, tgt):
        lists = [s if isinstance(s, nn.ModuleList) else [s] for s in (self.encoder, self.decoder)]
        memory, x = self.src(src), self.tgt(tgt)
        for layer in lists[0]:
            memory = layer(memory)
        for layer in lists[1]:
            x = layer(memory, x) if self.swapped else layer(x, memory)
        return x


@pytest.mark.parametrize("decoder", [Layer, Swapped])
@pytest.mark.parametrize("convolved", [False, True])
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("names", ["self_attn src_attn", "attn_a attn_b", "mha1 mha2", "a b"])
def test_cross_attention_is_that_whose_keys_come_from_elsewhere(
    names, number, listed, convolved, decoder
):
    model = Translator(names, number, listed, convolved, decoder)
    model(*torch.ones(2, 1, 4, dtype=torch.long))
    one, two = names.split()
    parts = ("q", "k", "v", "proj")
    roles = {n: r for n, r in opendelta.roles(model).items() if ".linears." in n}
    for name, role in roles.items():
        sub = "cross_attn" if f".{two}." in name else "attn"
        assert role == f"{sub}.{parts[int(name[-1])]}", name
    assert len(roles) == 12 * number
    selves = [n for n in dict(model.named_modules()) if n.endswith(f".{one}")]
    assert LoraModel(model).modified_modules == [
        f"{name}.linears.{n}" for name in selves for n in (0, 2)
    ]


def test_each_layer_of_a_decoder_gets_the_same_deltas():
    model = Translator("self_attn src_attn", 2)
    for cls in (AdapterModel, ParallelAdapterModel):
        places = cls(model, bottleneck_dim=2).modified_modules
        first, second = ([n[10:] for n in places if n.startswith(f"decoder.{i}.")] for i in (0, 1))
        assert first == second
        assert any("self_attn" in name for name in first)
        assert not any("src_attn" in name for name in places)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.tokens = nn.Conv2d(3, WIDTH, 4, 4), nn.Embedding(9, WIDTH)
        self.image, self.text = (Block(Nameless(), FeedForward()) for _ in range(2))

    def forward(self, pixels, ids):
        image = self.image(self.patches(pixels).flatten(2).mT).mean(1)
        return image @ self.text(self.tokens(ids)).mean(1).T


def test_each_of_two_towers_attends_to_itself():
    model = Towers()
    model(torch.zeros(1, 3, 8, 8), torch.ones(1, 4, dtype=torch.long))
    roles = opendelta.roles(model)
    for tower in ("image", "text"):
        got = [roles[f"{tower}.one.linears.{n}"] for n in range(4)]
        assert got == ["attn.q", "attn.k", "attn.v", "attn.proj"]
    assert AdapterModel(model, bottleneck_dim=2).modified_modules == [
        f"{tower}.{part}" for tower in ("image", "text") for part in ("one.linears.3", "other.down")
    ]


class Optional(nn.Module):
    """As Whisper has it: keys may come from elsewhere, by an argument whose name says nothing."""

    def __init__(self, *names):
        super().__init__()
        self.names = names
        for name in names:
            setattr(self, name, Nameless())
        self.mlp = FeedForward()

    def forward(self, x, xa=None):
        for name in self.names:
            x = x + getattr(self, name)(x, xa if "cross" in name else None)
        return x + self.mlp(x)


@pytest.mark.parametrize("names", [("attn", "cross_attn"), ("multihead_attn",)])
def test_a_name_beside_another_attention_says_that_it_is_cross_attention(names):
    roles = found(net(lambda: Optional(*names)))
    subs = {n.split(".")[0]: r.split(".")[0] for n, r in roles.items() if ".linears." in n}
    assert subs == dict(zip(names, ("attn", "cross_attn"), strict=False))


# ---------------------------------------------------------------------- lists beside lists
class Spatial(nn.Module):
    """Attention over an image: a list of transformer blocks, which may have one item."""

    def __init__(self, count):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.transformer_blocks = nn.ModuleList(
            Block(Attention(), FeedForward()) for _ in range(count)
        )

    def forward(self, x):
        h = self.proj_in(x)
        for block in self.transformer_blocks:
            h = block(h)
        return x + self.proj_out(h)


class Resnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(WIDTH, WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x.mT).relu()).mT


class Stage(nn.Module):
    """A stage of a U-Net: a list of attentions beside one of resnets."""

    def __init__(self, count):
        super().__init__()
        self.attentions = nn.ModuleList(Spatial(count) for _ in range(2))
        self.resnets = nn.ModuleList(Resnet() for _ in range(2))

    def forward(self, x):
        for resnet, attention in zip(self.resnets, self.attentions, strict=True):
            x = attention(resnet(x))
        return x


@pytest.mark.parametrize("count", [1, 2])
def test_blocks_are_found_in_each_stage_though_another_list_is_beside_theirs(count):
    stages = nn.Sequential(Stage(count), Stage(count))
    model = nn.ModuleDict({"down_blocks": stages, "mid_block": Stage(count)})
    places = [f"{stage}.attentions.{n}.transformer_blocks.{m}"
              for stage in ("down_blocks.0", "down_blocks.1", "mid_block")
              for n in range(2) for m in range(count)]  # fmt: skip
    roles = opendelta.roles(model)
    for place in places:
        assert [roles[f"{place}.one.{part}"] for part in ("wq", "wo")] == ["attn.q", "attn.proj"]
        assert roles[f"{place}.other.down"] == "ff.w2"
    assert sum(role == "attn.q" for role in roles.values()) == len(places)


class WithLanguages(Block):
    """A block that holds a list of small modules beside its attention."""

    def __init__(self, count):
        super().__init__(Attention(), FeedForward())
        self.attn, self.one = self.one, None
        self.languages = nn.ModuleList(FeedForward() for _ in range(count))

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        x = x + self.other(self.n2(x))
        return x + self.languages[0](x)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_list_in_a_block_with_an_attention_holds_no_blocks(count):
    roles = opendelta.roles(net(lambda: WithLanguages(count)))
    assert [roles[f"1.{n}.attn.{part}"] for n in range(2) for part in ("wq", "wo")] == [
        "attn.q", "attn.proj", "attn.q", "attn.proj",
    ]  # fmt: skip


class Scored(nn.Module):
    """Additive attention, whose scores are those of a linear."""

    def __init__(self):
        super().__init__()
        self.attn, self.v = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, 1, bias=False)

    def forward(self, x, memory):
        both = torch.cat([x[:, None].expand_as(memory), memory], -1)
        return self.v(self.attn(both).tanh()).squeeze(-1).softmax(-1)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = Scored(), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, memory):
        read = (self.attention(x, memory)[:, None] @ memory)[:, 0]
        return self.out(torch.cat([x, read], -1))


def test_the_scorer_of_additive_attention_gives_no_values():
    assert not any(opendelta.roles(Recurrent()).values())


class Timed(nn.Module):
    """A residual block that is told the time, as in a U-Net."""

    def __init__(self, activated):
        super().__init__()
        linear = nn.Linear(WIDTH, WIDTH)
        self.emb = nn.Sequential(nn.SiLU(), linear) if activated else linear
        self.one, self.two = nn.Conv1d(WIDTH, WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x, time):
        h = self.one(torch.nn.functional.silu(x)) + self.emb(time)[..., None]
        return x + self.two(torch.nn.functional.silu(h))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        x = x.mT
        h = torch.nn.functional.scaled_dot_product_attention(
            self.to_q(x), self.to_k(x), self.to_v(x)
        )
        return (x + self.to_out(h)).mT


class UNet(nn.Module):
    def __init__(self, activated):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.down, self.mid, self.up = (Timed(activated) for _ in range(3))
        self.attend = Attending()

    def forward(self, x, t):
        t = self.time(t.float()[:, None])
        return self.up(self.attend(self.mid(self.down(x, t), t)), t)


@pytest.mark.parametrize("activated", [False, True])
def test_the_projections_of_a_time_are_no_feed_forwards(activated):
    found = {name: role for name, role in opendelta.roles(UNet(activated)).items() if role}
    parts = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj"}
    assert found == {f"attend.{name}": f"attn.{part}" for name, part in parts.items()}


def called(model):
    return {name: role for name, role in opendelta.roles(model).items() if role}


class Classifier(nn.Module):
    """Its attention has no projection of its own: the head is the first linear after it."""

    def __init__(self, width, pooled):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.fc, self.pooled = nn.Linear(WIDTH, width), pooled

    def forward(self, x):
        read = F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))
        return self.fc(read.mean(1) if self.pooled else read)


@pytest.mark.parametrize(("width", "pooled"), [(3, True), (3, False), (WIDTH, True)])
def test_a_head_behind_attention_is_no_projection_of_it(width, pooled):
    parts = {"query": "attn.q", "key": "attn.k", "value": "attn.v"}
    assert called(Classifier(width, pooled)) == parts
    assert called(Classifier(WIDTH, pooled=False)) == {**parts, "fc": "attn.proj"}


@pytest.mark.parametrize("width", [1, 3, 2 * WIDTH])
def test_a_tower_that_ends_in_logits_is_no_feed_forward(width):
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, width))

        def forward(self, x):
            return self.mlp(x)

    found = called(Tower())
    assert found == ({"mlp.0": "ff.w1", "mlp.2": "ff.w2"} if width == 16 else {})


class Slots(nn.Module):
    """Slot attention (arXiv 2006.15055): the slots compete for the inputs."""

    def __init__(self, keys_first):
        super().__init__()
        self.slots, self.keys_first = nn.Parameter(torch.randn(1, 3, WIDTH)), keys_first
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gru = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x):
        k, v, slots = self.to_k(x), self.to_v(x), self.slots.expand(len(x), -1, -1)
        for _ in range(2):
            q = self.to_q(slots)
            if self.keys_first:
                weights = (k @ q.mT).softmax(-1)
                read = (weights / weights.sum(1, keepdim=True)).mT @ v
            else:
                weights = torch.einsum("bid,bjd->bij", q, k).softmax(1)
                weights = weights / weights.sum(-1, keepdim=True)
                read = torch.einsum("bjd,bij->bid", v, weights)
            slots = self.gru(read.flatten(0, 1), slots.flatten(0, 1)).view(slots.shape)
        return slots


@pytest.mark.parametrize("keys_first", [False, True])
def test_slots_that_compete_have_the_roles_that_their_names_say(keys_first):
    assert called(Slots(keys_first)) == {"to_q": "attn.q", "to_k": "attn.k", "to_v": "attn.v"}


class Direct(nn.Module):
    """A block that holds its projections itself."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x):
        h = self.ln1(x)
        x = x + self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return x + self.fc2(F.relu(self.fc1(self.ln2(x))))


def test_a_branch_around_an_attention_without_a_module_goes_from_queries_to_projection():
    torch.manual_seed(0)
    model, plain = nn.Sequential(Direct(), Direct()), nn.Sequential(Direct(), Direct())
    plain.load_state_dict(model.state_dict())
    delta = ParallelAdapterModel(model)
    pairs = [(f"{n}.{a}", f"{n}.{b}") for n in (0, 1) for a, b in (("q", "o"), ("fc1", "fc2"))]
    found = delta.modified_modules
    assert sorted(zip(found[::2], found[1::2], strict=True)) == sorted(pairs)
    shake(delta)
    x = torch.randn(2, 3, WIDTH)
    branch = model[0].q.deltas.parallel_adapter
    h = plain[0].ln1(x)
    given = []
    model[0].o.register_forward_hook(lambda module, args, output: given.append(output))
    model(x)
    read = F.scaled_dot_product_attention(plain[0].q(h), plain[0].k(h), plain[0].v(h))
    assert not torch.allclose(given[0], plain[0].o(read), atol=1e-3)
    with torch.no_grad():
        own = branch.up_proj(branch.non_linearity(branch.down_proj(h)))
    torch.testing.assert_close(given[0], plain[0].o(read) + own)


class Matcher(nn.Module):
    """Its feed-forward takes what attention gives along with the states, as in LightGlue."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attn = nn.ModuleDict({"q": self.q, "k": self.k, "v": self.v, "out": self.out})
        self.mlp = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x):
        read = self.out(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))
        return x + self.mlp(torch.cat([x, read], -1))


def test_a_feed_forward_may_take_what_attention_gives_beside_the_states():
    found = called(Matcher())
    assert (found["mlp.0"], found["mlp.2"]) == ("ff.w1", "ff.w2")
    found = called(nn.ModuleList([Matcher(), Matcher()]))
    assert (found["0.mlp.0"], found["1.mlp.2"]) == ("ff.w1", "ff.w2")


class Widening(Direct):
    """A block whose feed-forward goes to the width of the next stage, as in MViT."""

    def __init__(self, width):
        super().__init__()
        del self.fc1, self.fc2
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, width))
        self.proj = nn.Linear(WIDTH, width)

    def forward(self, x):
        h = self.ln1(x)
        x = x + self.o(F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)))
        return self.proj(x) + self.mlp(self.ln2(x))


def test_blocks_in_a_list_may_go_to_another_width():
    found = called(nn.Sequential(Direct(), Widening(2 * WIDTH)))
    assert (found["0.fc2"], found["1.mlp.0"], found["1.mlp.2"]) == ("ff.w2", "ff.w1", "ff.w2")


class Excited(nn.Module):
    """Channels, each times a gate from the means, and perhaps the maxima, of all (CBAM)."""

    def __init__(self, maxima, bare):
        super().__init__()
        self.conv, self.maxima, self.bare = nn.Conv2d(16, 16, 3, padding=1), maxima, bare
        if bare:
            self.fc1, self.fc2 = nn.Linear(16, 4), nn.Linear(4, 16)
        else:
            self.mlp = nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16))

    def gate(self, means):
        return self.fc2(F.relu(self.fc1(means))) if self.bare else self.mlp(means)

    def forward(self, x):
        gate = self.gate(x.mean((2, 3)))
        gate = gate + self.gate(x.amax((2, 3))) if self.maxima else gate
        return x + self.conv(x) * gate.sigmoid()[..., None, None]


@pytest.mark.parametrize("maxima", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_squeeze_and_excitation_is_no_feed_forward(maxima, bare):
    assert called(nn.Sequential(*[Excited(maxima, bare) for _ in range(2)])) == {}


class Projected(nn.Module):
    """Attention of four linears; what its class and its linears are called says nothing of it."""

    def __init__(self, mask="tuple"):
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mask = mask

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        q, k, v = self.wq(x), self.wk(memory), self.wv(memory)
        scores = q @ k.mT
        n = x.shape[1]
        if self.mask == "ones":
            scores = scores.masked_fill(torch.tril(torch.ones(n, n)) == 0, -1e9)
        if self.mask == "zeros":
            scores = scores + torch.zeros(n, n, device=x.device).fill_(-1e9).triu(1)
        return self.wo(scores.softmax(-1) @ v)


class MultiHeadAttention(Projected):
    pass


class CrossAttention(Projected):
    pass


class Having(nn.Module):
    """A block with attentions of a class, called by names, and a feed-forward."""

    def __init__(self, cls, *names):
        super().__init__()
        self.attentions = names
        for name in names:
            self.add_module(name, cls())
        self.norm, self.mlp = nn.LayerNorm(WIDTH), FeedForward()

    def forward(self, x, memory=None):
        for name in self.attentions:
            given = (memory,) if name == self.attentions[-1] and name[-1] == "2" else ()
            x = x + self.get_submodule(name)(self.norm(x), *given)
        return x + self.mlp(x)


@pytest.mark.parametrize("mask", ["ones", "zeros"])
def test_sizes_that_torch_takes_one_by_one_are_read(mask):
    found = called(nn.Sequential(*[nn.Sequential(Projected(mask)) for _ in range(2)]))
    parts = {"wq": "attn.q", "wk": "attn.k", "wv": "attn.v", "wo": "attn.proj"}
    assert found == {f"{n}.0.{name}": role for n in range(2) for name, role in parts.items()}
    assert torch.ones is torch._C._VariableFunctions.ones


@pytest.mark.parametrize(
    ("cls", "names", "kinds"),
    [
        (Projected, ["attn", "temporal"], ["attn", "attn"]),
        (Projected, ["self_attn", "cross"], ["attn", "cross_attn"]),
        (MultiHeadAttention, ["multihead_attn"], ["attn"]),
        (MultiHeadAttention, ["self_attn", "multihead_attn"], ["attn", "cross_attn"]),
        (CrossAttention, ["attn1", "attn2"], ["attn", "cross_attn"]),
        (CrossAttention, ["attn"], ["cross_attn"]),
    ],
)
def test_attentions_of_one_class_are_known_beside_each_other(cls, names, kinds):
    found = called(nn.ModuleList([Having(cls, *names) for _ in range(2)]))
    for name, kind in zip(names, kinds, strict=True):
        assert [found[f"1.{name}.{part}"] for part in ("wq", "wo")] == [f"{kind}.q", f"{kind}.proj"]


class Encoder(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.add_module(name, nn.ModuleList([Having(Projected, "attn") for _ in range(2)]))

    def forward(self, x):
        for layer in self.get_submodule(self.name):
            x = layer(x)
        return x


@pytest.mark.parametrize("name", ["attn_layers", "attention_blocks"])
def test_a_list_of_layers_holds_blocks_whatever_else_its_name_says(name):
    found = called(nn.ModuleDict({"encoder": Encoder(name), "decoder": Encoder("layers")}))
    assert found[f"encoder.{name}.1.attn.wq"] == found["decoder.layers.1.attn.wq"] == "attn.q"
    assert found[f"encoder.{name}.1.mlp.down"] == "ff.w2"


class OfTime(Having):
    def __init__(self, name):
        super().__init__(Projected, "attn")
        made = nn.Sequential(nn.Linear(4, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.name = name
        self.add_module(name, made)

    def forward(self, x, t=None):
        return super().forward(x + self.get_submodule(self.name)(t))


@pytest.mark.parametrize("name", ["time_mlp", "pos_mlp", "head_mlp"])
def test_an_mlp_of_times_or_positions_is_no_feed_forward(name):
    found = called(nn.ModuleList([OfTime(name) for _ in range(2)]))
    assert not [where for where in found if name in where]
    assert found["1.mlp.down"] == "ff.w2"


class MambaBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        x, gate = self.in_proj(x).chunk(2, -1)
        return self.out_proj(x.cumsum(1) * F.silu(gate))


def test_a_mamba_called_mixer_is_one():
    found = called(nn.ModuleList([Having(MambaBlock, "mixer"), Having(Projected, "attn")]))
    assert found["0.mixer.in_proj"] == "mixer.in"
    assert found["0.mixer.out_proj"] == "mixer.out"
    assert found["1.attn.wq"] == "attn.q"


class SelfGated(nn.Module):
    """What its feed-forward gives has an activation at the end, written out."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x):
        y = self.fc2(self.fc1(x).relu())
        return x + y * torch.sigmoid(y)


def test_an_activation_behind_a_feed_forward_is_no_gate():
    found = called(nn.ModuleList([SelfGated(), SelfGated()]))
    assert (found["1.fc1"], found["1.fc2"]) == ("ff.w1", "ff.w2")
