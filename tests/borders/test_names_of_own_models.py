"""Models of somebody's own, which say by names of their own what tokens, masks and states are."""

import dataclasses

import pytest
import torch
import transformers as T
from support.nets import shake
from torch import nn
from torch._dynamo.testing import CompileCounter

import opendelta
from opendelta import LoReftModel, SiteError, SoftPromptModel

pytestmark = pytest.mark.covers("LoReftModel", "SoftPromptModel")
TOKENS = [7, 9, 11]
IDS = torch.randint(20, 59, (2, 7), generator=torch.Generator().manual_seed(0))
WRITTEN = torch.cat([torch.tensor([TOKENS] * 2), IDS], 1)
LEFT = torch.ones(2, 7, dtype=torch.long)
LEFT[0, :3] = 0
PADDED = [[0, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]  # the first two tokens of each row


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.mlp = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, h, seen, old):
        q, k, v = self.qkv(h).split(16, -1)
        if old is not None:
            k, v = torch.cat([old[0], k], 1), torch.cat([old[1], v], 1)
        count, keys = q.size(1), k.size(1)
        shown = torch.ones(count, keys).tril(keys - count).bool()
        if seen is not None:
            shown = shown & seen[:, None]
        h = h + (q @ k.mT / 4).masked_fill(~shown, -1e9).softmax(-1) @ v
        return h + self.mlp(h).tanh(), (k, v)


class Net(nn.Module):
    """Two causal blocks; their forwards take states as pairs of keys and values."""

    def __init__(self):
        super().__init__()
        self.table, self.blocks = nn.Embedding(60, 16), nn.ModuleList([Attention(), Attention()])

    def run(self, h, seen=None, old=None):
        new = []
        for index, block in enumerate(self.blocks):
            h, pair = block(h, seen, None if old is None else old[index])
            new.append(pair)
        return h, new

    def embedded(self, ids, embeds):
        return self.table(ids) if embeds is None else embeds


def prompt(model):
    return SoftPromptModel(model, soft_token_num=3, token_init=TOKENS)


def loreft(model, first=2, **options):
    options = {"modified_modules": ["blocks.1.mlp"], "first": first, **options}
    return shake(LoReftModel(model, **options))


def changed(model, delta, call):
    """Where a delta changes the output of a call: 0 or 1 for each token."""
    with torch.no_grad():
        out = call(model)
        with delta.disabled():
            return (out - call(model)).abs().sum(-1).gt(1e-5).int().tolist()


def in_steps(model, ends, **given):
    """The output of all tokens, of which the model is given some at a time."""
    with torch.no_grad():
        starts = (0, *ends[:-1])
        return torch.cat(
            [model(IDS[:, a:b], **given) for a, b in zip(starts, ends, strict=True)], 1
        )


# ------------------------------------------------------------------------------------------- masks
class ZeroesPadding(Net):
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        h = self.embedded(input_ids, inputs_embeds)
        h = self.run(h, attention_mask)[0].clone()
        h[~attention_mask] = 0
        return h


class Adds(Net):
    """Takes a mask that is 0 for tokens, and very low for padding."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        seen = None if attention_mask is None else attention_mask > -1
        return self.run(self.embedded(input_ids, inputs_embeds), seen)[0]


LOW = torch.where(LEFT == 1, 0.0, -1e9)


@pytest.mark.parametrize(("cls", "mask"), [(ZeroesPadding, LEFT.bool()), (Adds, LOW)])
def test_a_mask_stays_of_its_kind_behind_a_prompt(cls, mask):
    model = cls().eval()
    real = mask[:1, 3:]
    alone = model(WRITTEN[:1, [0, 1, 2, 6, 7, 8, 9]], torch.cat([real[:, :3], real], 1))[:, 3:]
    prompt(model)
    torch.testing.assert_close(model(IDS, mask)[:1, 3:], alone)


@pytest.mark.parametrize("low", [LOW, torch.zeros(2, 7)])
def test_loreft_hears_an_added_mask(low):
    model = Adds().eval()
    row = [0, 0, 0, 1, 1, 0, 0] if low.any() else [1, 1, 0, 0, 0, 0, 0]
    assert changed(model, loreft(model), lambda m: m(IDS, low)) == [row, [1, 1, 0, 0, 0, 0, 0]]


class Names(Net):
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **more):
        return self.run(self.embedded(input_ids, inputs_embeds))[0]


COUNTS = torch.tensor([4, 7])


@pytest.mark.parametrize("put", [prompt, loreft, lambda m: loreft(m, None, last=1)])
@pytest.mark.parametrize(
    "name",
    ["lens", "seq_lengths", "valid_len", "valid_length", "seqlens", "n_tokens", "src_lengths",
     "ilens", "input_lengths", "num_valid", "token_counts", "eos_pos", "sizes"],
)  # fmt: skip
def test_lengths_under_any_name_are_refused(put, name):
    model = Names()
    put(model)
    for counts in (COUNTS, COUNTS[:, None], COUNTS.tolist()):
        with pytest.raises(SiteError, match=f"'{name}'"):
            model(IDS, **{name: counts})


@pytest.mark.parametrize("mask", [LEFT.bool(), LEFT == 0, LEFT, LEFT.float()])
@pytest.mark.parametrize("name", ["valid", "keep", "is_pad", "attn", "input_padding_mask"])
def test_what_may_be_a_mask_is_refused_whatever_its_name(name, mask):
    model = Names()
    loreft(model)
    model(IDS, **{name: torch.ones_like(IDS)} if "mask" not in name else {})
    with pytest.raises(SiteError, match=f"'{name}'"):
        model(IDS, **{name: mask})


def test_a_mask_of_pairs_in_each_head_is_refused():
    model = Names()
    loreft(model)
    with pytest.raises(SiteError, match="'attn_mask'"):
        model(IDS, attn_mask=LEFT.bool()[:, None, None].expand(2, 2, 7, 7).flatten(0, 1))
    model(IDS, attn_mask=torch.ones(4, 7, 7).tril())


def test_types_of_tokens_are_no_documents_beside_a_mask():
    model = Names()
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    delta = loreft(model)
    for name in ("segment_ids", "token_type_ids"):
        out = changed(model, delta, lambda m, n=name: m(IDS, LEFT, **{n: types}))
        assert out == [[0, 0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]


class ById(Net):
    """Hides a token by its id, and takes no mask."""

    def __init__(self, pad):
        super().__init__()
        self.pad = pad

    def forward(self, tokens):
        return self.run(self.table(tokens), tokens != self.pad)[0]


@pytest.mark.parametrize("pad", [0, 3])
def test_padding_that_is_found_by_its_id_alone_is_heard(pad):
    model = ById(pad).eval()
    ids = torch.where(LEFT == 1, IDS, pad)
    assert changed(model, loreft(model), lambda m: m(ids)) == PADDED


def test_a_plain_id_is_no_padding():
    model = Idx().eval()
    ids = torch.where(LEFT == 1, IDS, 0)
    assert changed(model, loreft(model), lambda m: m(ids)) == [[1, 1, 0, 0, 0, 0, 0]] * 2


@pytest.mark.parametrize("shape", [(7, 7), (1, 7, 7), (1, 1, 7, 7), (2, 1, 7, 7)])
def test_a_mask_of_pairs_under_any_name_is_refused_behind_a_prompt(shape):
    model = Names()
    prompt(model)
    for name in ("mask", "attention_mask", "bias"):
        with pytest.raises(SiteError, match=r"mask|'bias'"):
            model(IDS, **{name: torch.ones(shape)})


@pytest.mark.parametrize("put", [prompt, loreft])
def test_ends_and_numbers_of_documents_are_refused_without_position_ids(put):
    model = Names()
    put(model)
    with pytest.raises(SiteError, match="'cu_seqlens'"):
        model(IDS[:1], cu_seqlens=torch.tensor([0, 3, 7]))
    for name in ("segment_ids", "doc_ids", "seq_idx"):
        if put is loreft:
            with pytest.raises(SiteError, match=f"'{name}'"):
                model(IDS[:1], **{name: torch.tensor([[0, 0, 0, 1, 1, 1, 1]])})
            model(IDS[:1], **{name: torch.zeros(1, 7, dtype=torch.long)})


def test_labels_and_numbers_beside_are_no_masks():
    model = Names()
    delta = loreft(model)
    beside = {"masked_lm_labels": IDS, "max_len": 7, "loss_mask": LEFT}
    beside |= {"embedding_lens": torch.ones(3)}
    whole = [[1, 1, 0, 0, 0, 0, 0]] * 2
    assert changed(model, delta, lambda m: m(IDS, **beside)) == whole
    assert changed(model, delta, lambda m: m(IDS, LEFT, lens=COUNTS, use_cache=False)) == PADDED


# ------------------------------------------------------------------------------------------ states
class LayerState:
    k = v = None


class States:
    def __init__(self):
        self.layers = [LayerState(), LayerState()]

    def get(self):
        pairs = [(layer.k, layer.v) for layer in self.layers]
        return None if pairs[0][0] is None else pairs

    def put(self, pairs):
        for layer, pair in zip(self.layers, pairs, strict=True):
            layer.k, layer.v = pair


class Counts(States):
    def get_seq_length(self):
        return 0 if self.layers[0].k is None else self.layers[0].k.size(1)


class One:
    kept = None

    def get(self):
        return self.kept

    def put(self, pairs):
        self.kept = pairs


class Slots(One):
    __slots__ = ("kept",)

    def __init__(self):
        self.kept = None


class AsModule(nn.Module, One):
    pass


@dataclasses.dataclass(slots=True)
class Record:
    kept: object = None
    get, put = One.get, One.put


class Stateful(Net):
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **states):
        held = next((state for state in states.values() if state is not None), None)
        h, new = self.run(self.embedded(input_ids, inputs_embeds), attention_mask, held.get())
        held.put(new)
        return h


@pytest.mark.parametrize("kind", [States, Counts, Slots, AsModule, Record])
@pytest.mark.parametrize("put", [prompt, loreft])
def test_a_state_of_any_class_is_known_from_its_first_call(put, kind):
    model = Stateful().eval()
    whole = model(WRITTEN, cache=kind())[:, 3:] if put is prompt else None
    put(model)
    if whole is None:
        whole = model(IDS, cache=kind())
    torch.testing.assert_close(in_steps(model, (4, 5, 7), cache=kind()), whole)
    with pytest.raises(SiteError, match="'kv_cache'"):
        in_steps(model, (4, 7), kv_cache=kind())


@pytest.mark.parametrize("put", [prompt, loreft])
def test_an_empty_state_that_counts_is_none(put):
    model = Stateful().eval()
    put(model)
    expected = model(IDS, LEFT.bool(), cache=Counts())
    torch.testing.assert_close(model(IDS, LEFT.bool(), kv_cache=Counts()), expected)


class Takes(Net):
    def forward(self, input_ids, **states):
        return self.run(self.table(input_ids), None, next(iter(states.values()), None))


@pytest.mark.parametrize("name", ["decoder_hidden", "decoder_cache", "input_state"])
def test_a_state_of_a_decoder_is_one(name):
    model = Takes().eval()
    loreft(model)
    _, state = model(IDS[:, :4])
    with pytest.raises(SiteError, match=f"'{name}'"):
        model(IDS[:, 4:], **{name: state})


class OneRow(Net):
    def forward(self, input_ids, past_key_values=None):
        h, new = self.run(self.table(input_ids)[None], None, past_key_values)
        return h[0], new


def test_ids_of_one_row_go_on_after_a_state():
    model = OneRow().eval()
    loreft(model)
    first, state = model(IDS[0, :1])
    second, _ = model(IDS[0, 1:], past_key_values=state)
    torch.testing.assert_close(torch.cat([first, second]), model(IDS[0])[0])


class Buffers(Net):
    """Writes keys and values into buffers, which a number beside them counts."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, cache=None):
        h = self.embedded(input_ids, inputs_embeds)
        if cache is None:
            cache = self.new(h.size(0))
        held = cache["n"]
        old = [cache["buffer"][i, :, :held].split(16, -1) for i in range(2)]
        h, new = self.run(h, None, old)
        for i, pair in enumerate(new):
            cache["buffer"][i, :, : pair[0].size(1)] = torch.cat(pair, -1).detach()
        cache["n"] = new[0][0].size(1)
        return {"h": h, "cache": cache}

    def new(self, batch):
        return {"buffer": torch.zeros(2, batch, 32, 32), "n": 0}


class OwnBuffers(Buffers):
    buffer = None

    def new(self, batch):
        if self.buffer is None:
            self.buffer = torch.zeros(2, batch, 32, 32)
        return {"buffer": self.buffer, "n": 0}


def of_buffers(model, cache=None):
    parts = []
    for a, b in ((0, 1), (1, 2), (2, 7)):
        out = model(IDS[:, a:b], cache=cache)
        cache = out["cache"]
        parts.append(out["h"])
    return torch.cat(parts, 1), cache


@pytest.mark.parametrize("put", [prompt, loreft])
def test_buffers_that_hold_a_second_text(put):
    model = OwnBuffers().eval()
    whole = model(WRITTEN)["h"][:, 3:] if put is prompt else None
    put(model)
    whole = model(IDS)["h"] if whole is None else whole
    for _ in range(3):
        torch.testing.assert_close(of_buffers(model)[0], whole)
    model = Buffers().eval()
    put(model)
    _, cache = of_buffers(model)
    cache["n"] = 0
    with pytest.raises(SiteError, match="cache"):
        of_buffers(model, cache)


class KeepsInside(Net):
    kept = None

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, use_cache=False, offset=0
    ):
        h = self.embedded(input_ids, inputs_embeds)
        h, new = self.run(h, None, self.kept if use_cache else None)
        self.kept = new if use_cache else None
        return h


@pytest.mark.parametrize("given", [{"use_cache": True}, {"offset": 2}])
@pytest.mark.parametrize("put", [prompt, loreft])
def test_a_cache_inside_the_model_is_refused(put, given):
    model = KeepsInside().eval()
    put(model)
    model(IDS)
    with pytest.raises(SiteError, match=next(iter(given))):
        model(IDS, **given)


# --------------------------------------------------------------------------------------- positions
class Placed(Net):
    def forward(self, input_ids, input_pos=None, start_pos=None, position_ids=None):
        return self.run(self.table(input_ids))[0]


@pytest.mark.parametrize("name", ["input_pos", "start_pos"])
@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_each_row_begins_where_it_says(name, shape):
    model = Placed().eval()
    starts = torch.tensor([5, 1]).view(shape)
    found = changed(model, loreft(model, 3), lambda m: m(IDS[:, :1], **{name: starts}))
    assert found == [[0], [1]]


def test_positions_of_all_rows_are_routed():
    model = Placed().eval()
    delta = loreft(model, 3)
    whole = model(IDS, position_ids=torch.arange(7))
    with opendelta.route(model, [[delta.name], None]):
        routed = model(IDS, position_ids=torch.arange(7))
    torch.testing.assert_close(routed[0], whole[0])
    with delta.disabled():
        torch.testing.assert_close(routed[1], model(IDS)[1])


class FromStart(Net):
    def forward(self, input_ids, start_pos=0, cache=None):
        old = [cache[i, :, :start_pos].split(16, -1) for i in range(2)]
        h, new = self.run(self.table(input_ids), None, old)
        for i, pair in enumerate(new):
            cache[i, :, : pair[0].size(1)] = torch.cat(pair, -1).detach()
        return h


def test_a_start_counts_what_a_buffer_holds():
    model = FromStart().eval()
    loreft(model, 3)
    whole = model(IDS, 0, torch.zeros(2, 2, 32, 32))
    for buffer in [torch.zeros(2, 2, 32, 32)] * 2:  # the second text in the same one
        parts = [model(IDS[:, a:b], a, buffer) for a, b in ((0, 2), (2, 3), (3, 7))]
        torch.testing.assert_close(torch.cat(parts, 1), whole)


# ------------------------------------------------------------------------------------- other texts
class Idx(Net):
    def forward(self, idx, attention_mask=None):
        return self.run(self.table(idx))[0]


class Batch(Net):
    def forward(self, batch):
        batch = batch.get("text", batch)
        return self.run(self.table(batch["input_ids"]))[0]


class Embeds(Net):
    def forward(self, inputs_embeds, attention_mask):
        return self.run(inputs_embeds)[0]


class Tokens(Net):
    """Keeps its cache inside, and is told how many tokens came before."""

    kept = None

    def forward(self, tokens, start_pos):
        h, self.kept = self.run(self.table(tokens), None, self.kept if start_pos else None)
        return h


class Fast(Tokens):
    def forward(self, idx, input_pos):
        return super().forward(idx, int(input_pos[0]))


CALLS = [
    (Idx, lambda m: m(IDS, LEFT), PADDED),
    (Batch, lambda m: m({"input_ids": IDS, "attention_mask": LEFT}), PADDED),
    (Batch, lambda m: m({"text": {"input_ids": IDS, "attention_mask": LEFT}}), PADDED),
    (Embeds, lambda m: m(m.table(IDS), LEFT), PADDED),
    (Idx, lambda m: m(IDS), [[1, 1, 0, 0, 0, 0, 0]] * 2),
    (Batch, lambda m: m({"input_ids": IDS}), [[1, 1, 0, 0, 0, 0, 0]] * 2),
    (
        Tokens,
        lambda m: torch.cat([m(IDS[:, :1], 0)] + [m(IDS[:, i : i + 1], i) for i in range(1, 7)], 1),
        [[1, 1, 0, 0, 0, 0, 0]] * 2,
    ),
    (
        Fast,
        lambda m: torch.cat([m(IDS[:, i : i + 1], torch.tensor([i])) for i in range(7)], 1),
        [[1, 1, 0, 0, 0, 0, 0]] * 2,
    ),
]


@pytest.mark.parametrize(("cls", "call", "expected"), CALLS)
def test_tokens_have_other_names_than_input_ids(cls, call, expected):
    model = cls().eval()
    assert changed(model, loreft(model), call) == expected


class Sources(Net):
    def forward(self, src_tokens, src_lengths=None, src_mask=None):
        return self.run(self.table(src_tokens))[0]


@pytest.mark.parametrize("given", [{"src_lengths": COUNTS}, {"src_mask": LEFT}])
def test_masks_beside_other_ids_are_refused(given):
    model = Sources()
    loreft(model)
    model(IDS)
    with pytest.raises(SiteError, match=next(iter(given))):
        model(IDS, **given)


class Flat(Net):
    def __init__(self):
        super().__init__()
        self.flat = nn.Linear(16, 16)

    def forward(self, idx):
        h = self.run(self.table(idx))[0]
        return h + self.flat(h.flatten(0, 1)).view_as(h)


class LengthFirst(Flat):
    def forward(self, idx):
        h = self.run(self.table(idx))[0]
        return h + self.flat(h.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("cls", [Flat, LengthFirst])
def test_an_output_that_does_not_show_the_rows_is_refused(cls):
    model = cls()
    loreft(model, modified_modules=["flat"])
    with pytest.raises(SiteError, match="does not show the rows"):
        model(IDS)


class TwoTexts(Net):
    def forward(self, src, tgt, attention_mask=None):
        return self.run(self.table(src))[0] + self.run(self.table(tgt))[0]


def test_a_mask_beside_two_texts_is_refused():
    model = TwoTexts()
    loreft(model)
    model(IDS, IDS)
    with pytest.raises(SiteError, match="several texts"):
        model(IDS, IDS, LEFT)


def test_keys_of_the_other_text_are_refused_whatever_its_length():
    sizes = {"vocab_size": 60, "d_model": 16, "max_position_embeddings": 64}
    sides = ("encoder", "decoder")
    sizes |= {f"{side}_layers": 1 for side in sides} | {f"{side}_ffn_dim": 24 for side in sides}
    sizes |= {f"{side}_attention_heads": 2 for side in sides}
    model = T.BartModel(T.BartConfig(**sizes)).eval()
    delta = loreft(model, None, modified_modules=["encoder_attn.k_proj"], last=1)
    for count in (7, 5):
        with pytest.raises(SiteError, match="another text"):
            model(IDS, decoder_input_ids=IDS[:, :count])
    delta.detach()
    delta = loreft(model, None, modified_modules=["encoder_attn"], last=1)
    call = {"input_ids": IDS, "decoder_input_ids": IDS}
    assert changed(model, delta, lambda m: m(**call)[0])[0] == [0, 0, 0, 0, 0, 0, 1]


# ---------------------------------------------------------------------------------------- compiled
class Pairs(Net):
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, past_key_values=None
    ):
        h = self.embedded(input_ids, inputs_embeds)
        h, new = self.run(h, None, past_key_values)
        return {"h": h, "past_key_values": tuple(new)}


@pytest.mark.parametrize("put", [prompt, loreft])
@torch.no_grad()
def test_pairs_of_tensors_as_a_cache_are_one_graph(put):
    torch._dynamo.reset()
    model, ids, counter = Pairs().eval(), IDS.repeat(1, 3), CompileCounter()
    put(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    out = compiled(ids[:, :3], torch.ones(2, 3))
    for i in range(3, 12):
        state = out["past_key_values"]
        out = compiled(ids[:, i : i + 1], torch.ones(2, i + 1), past_key_values=state)
    torch.testing.assert_close(out["h"], model(ids[:, :12])["h"][:, -1:])
    assert counter.frame_count <= 3
