"""Models of somebody's own are tried on a few tokens: what that tells, and what it leaves."""

import itertools

import pytest
import torch
import transformers
from support.nets import shake
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

import opendelta
from opendelta import GateModel, LoraModel, PrefixModel, SiteError, SoftPromptModel

pytestmark = pytest.mark.covers("SoftPromptModel", "SiteError")

IDS = torch.randint(20, 59, (2, 7), generator=torch.Generator().manual_seed(0))
TOKENS = [7, 9, 11]
WRITTEN = torch.cat([torch.tensor([TOKENS] * 2), IDS], 1)
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.mlp = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, h, keep=None, causal=True):
        q, k, v = self.qkv(h).split(16, -1)
        seen = torch.ones(q.size(1), k.size(1)).bool()[None]
        seen = seen.tril() if causal else seen
        seen = seen if keep is None else seen & keep[:, None]
        h = h + (q @ k.mT / 4).masked_fill(~seen, -1e9).softmax(-1) @ v
        return h + torch.tanh(self.mlp(h))


class Net(nn.Module):
    """Two blocks; what its forward takes and returns is written in subclasses."""

    causal = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tok, self.blocks = nn.Embedding(60, 16), nn.ModuleList([Attention(), Attention()])
        self.eval()

    def run(self, h, keep=None):
        for block in self.blocks:
            h = block(h, keep, self.causal)
        return h

    def embedded(self, ids, embeds):
        return self.tok(ids) if embeds is None else embeds


def prompt(model, **options):
    return SoftPromptModel(model, soft_token_num=3, token_init=TOKENS, **options)


# ------------------------------------------------------------------------- what a trial draws
class Noisy(Net):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        h = self.embedded(input_ids, inputs_embeds)
        h = h + torch.randn_like(h) + torch.randn(h.shape, generator=self.generator)
        return self.run(h)


def test_noise_is_no_difference_between_token_ids_and_embeddings():
    model = Noisy()
    states = torch.get_rng_state(), model.generator.get_state()
    prompt(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(model.generator.get_state(), states[1])
    assert model(IDS).shape == (2, 7, 16)


# --------------------------------------------------------------------------- tables of positions
class Tagged(Net):
    """What has "pos" in its name and is no table of positions."""

    def __init__(self):
        super().__init__()
        self.pos_bias_u = nn.Parameter(torch.randn(2, 8))  # as Transformer-XL's
        self.pos_tag_emb, self.pos_emb = nn.Embedding(6, 16), nn.Embedding(6, 16)
        self.upos, self.composer = nn.Parameter(torch.randn(4, 16)), nn.Embedding(5, 16)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, tags=None):
        h = self.embedded(input_ids, inputs_embeds) + self.pos_bias_u.flatten() + self.upos.sum(0)
        return self.run(h if tags is None else h + self.pos_emb(tags))


def test_a_table_of_tags_or_biases_is_none_of_positions():
    model = Tagged()
    prompt(model)
    assert model(IDS).shape == (2, 7, 16)


class Counted(Net):
    def __init__(self, table, first=0):
        super().__init__()
        self.composed, self.first = table, first

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        h = self.embedded(input_ids, inputs_embeds)
        places = torch.arange(self.first, self.first + h.size(1))
        rows = self.composed.squeeze(0) if isinstance(self.composed, nn.Parameter) else None
        return self.run(h + (self.composed(places) if rows is None else rows[places]))


@pytest.mark.parametrize("table", [
    lambda: nn.Embedding(9, 16),
    lambda: nn.Embedding.from_pretrained(torch.randn(9, 16)),
    lambda: nn.Parameter(torch.randn(1, 9, 16)),
])  # fmt: skip
def test_a_table_that_is_read_by_position_limits_the_length(table):
    model = Counted(table())
    prompt(model)
    assert model(IDS[:, :6]).shape == (2, 6, 16)
    with pytest.raises(SiteError, match="need 10 positions, and the model's table has 9"):
        model(IDS)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_table_is_found_where_no_gradients_flow_too(mode):
    model = Counted(nn.Embedding(9, 16))
    with mode():
        prompt(model)
    with pytest.raises(SiteError, match="need 10 positions, and the model's table has 9"):
        model(IDS)


class Tagger(nn.Module):
    """The loss is computed of labels around the child that has the blocks."""

    def __init__(self):
        super().__init__()
        self.tok, self.head = nn.Embedding(60, 16), nn.Linear(16, 3)
        block = nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 1, enable_nested_tensor=False)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None):
        h = self.tok(input_ids) if inputs_embeds is None else inputs_embeds
        hides = None if attention_mask is None else attention_mask == 0
        logits = self.head(self.encoder(h, src_key_padding_mask=hides))
        if labels is None:
            return logits
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def test_labels_of_a_loss_around_the_blocks_are_named_with_the_way_out():
    model, labels = Tagger().eval(), IDS % 3
    prompt(model)
    with pytest.raises(SiteError, match=r"set model.beside_tokens = \['labels'\]"):
        model(IDS, labels=labels)
    model = Tagger().eval()
    model.beside_tokens = ["labels"]
    prompt(model)
    wanted = nn.functional.cross_entropy(model(IDS).flatten(0, 1), labels.flatten())
    assert torch.equal(model(IDS, labels=labels)[1], wanted)


# ----------------------------------------------------------- what is returned beside hidden states
class Beside(Net):
    """It returns maps [batch, heads, length, length], heads [batch, length, ...] and a router's."""

    def __init__(self, heads, scores=False):
        super().__init__()
        self.heads, self.scores, self.router = heads, scores, nn.Linear(16, 5)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        h = self.run(self.embedded(input_ids, inputs_embeds))
        q = h.unflatten(-1, (self.heads, -1))
        maps = q.transpose(1, 2) @ q.permute(0, 2, 3, 1)
        maps = maps if self.scores else maps.softmax(-1)
        return {"h": h, "maps": maps, "heads": q, "router": self.router(h.flatten(0, 1))}


@pytest.mark.parametrize("count", [4, 5, 6])
def test_maps_keep_their_heads_and_a_router_gives_the_tokens_rows(count):
    model = Beside(8)
    bare = model(WRITTEN[:, : count + 3])
    prompt(model)
    out = model(IDS[:, :count])
    torch.testing.assert_close(out["maps"], bare["maps"])
    torch.testing.assert_close(out["heads"], bare["heads"][:, 3:])
    router = bare["router"].unflatten(0, (2, -1))[:, 3:].flatten(0, 1)
    torch.testing.assert_close(out["router"], router)


def test_scores_of_as_many_heads_as_positions_are_refused():
    model = Beside(8, scores=True)
    prompt(model)
    assert model(IDS[:, :4])["maps"].shape == (2, 8, 7, 7)
    with pytest.raises(SiteError, match=r"\[2, 8, 8, 8\] .* which of its axes are positions"):
        model(IDS[:, :5])


def test_the_routers_of_mixtral_see_the_tokens_and_its_loss_takes_them():
    config = transformers.MixtralConfig(
        vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4,
        output_router_logits=True,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    bare = model(WRITTEN).router_logits
    prompt(model)
    out = model(IDS, attention_mask=torch.ones_like(IDS), labels=IDS)
    for one, other in zip(out.router_logits, bare, strict=True):
        torch.testing.assert_close(one, other.unflatten(0, (2, -1))[:, 3:].flatten(0, 1))
    assert out.aux_loss.isfinite()


# ----------------------------------------------------------------- gates for each sequence
def gate(model, where="mlp"):
    for name in "ab":
        shake(LoraModel(model, modified_modules=[where], name=name))
    return shake(GateModel(model, deltas=["a", "b"], per="sequence", name="gate"))


class Idx(Net):
    def forward(self, idx):
        return self.run(self.tok(idx))


class Batch(Net):
    def forward(self, batch):
        return {"logits": self.run(self.tok(batch["tokens"]))}


class Nano(Net):
    """As nanoGPT: without targets the last position's logits alone."""

    def forward(self, input_ids, targets=None):
        h = self.run(self.tok(input_ids))
        return (h[:, [-1]], None) if targets is None else (h, h.sum())


class Start(Net):
    def forward(self, input_ids, start_pos):
        return self.run(self.tok(input_ids))


class LengthFirst(Net):
    def forward(self, idx):
        return self.run(self.tok(idx)).transpose(0, 1)


class Embedded(Net):
    def forward(self, inputs_embeds):
        return self.run(inputs_embeds)


class Loss(Net):
    def forward(self, tokens, labels):
        logits = self.run(self.tok(tokens)) @ self.tok.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class InFunctions(nn.Module):
    """No module behind the gate shows what attention does."""

    causal = True

    def __init__(self):
        super().__init__()
        self.tok, self.mlp = nn.Embedding(60, 16), nn.Linear(16, 16)

    def forward(self, tokens):
        h = self.mlp(self.tok(tokens))
        h = nn.functional.scaled_dot_product_attention(h, h, h, is_causal=self.causal)
        return h.square().mean() if self.causal else h.mean(1)


EMBEDS = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
CALLS = {
    Idx: (IDS,), Batch: ({"tokens": IDS},), Nano: (IDS,), Start: (IDS, 0), LengthFirst: (IDS,),
    Embedded: (EMBEDS,), Loss: (IDS, IDS), InFunctions: (IDS,),
}  # fmt: skip


@pytest.mark.covers("GateConfig.per")
@pytest.mark.parametrize("cls", CALLS)
def test_a_gate_for_each_sequence_is_refused_in_any_causal_model(cls):
    model = cls()

    def first_call():
        gate(model)
        model(*CALLS[cls])

    with pytest.raises(SiteError, match=r"a token may not see later ones: choose a gate for each"):
        first_call()


@pytest.mark.parametrize("cls", CALLS)
def test_a_gate_for_each_sequence_acts_in_any_encoder(cls):
    model = type("Encoder", (cls,), {"causal": False})()
    gate(model)
    before = torch.get_rng_state()
    first = model(*CALLS[cls])
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(model(*CALLS[cls]), first)


def test_where_nothing_shows_what_tokens_see_the_model_must_say_it():
    class Odd(Net):
        causal = False

        def forward(self, text):
            ids = torch.tensor([[ord(letter) % 60 for letter in text]])
            return self.run(self.tok(ids)) + next(self.steps)

    for said in (False, True):
        model = Odd()
        model.steps = iter([0.0])  # a second run fails
        if said:
            model.is_causal = False
        gate(model)
        if said:
            assert model("some text").shape == (1, 9, 16)
        else:
            with pytest.raises(SiteError, match=r"around 'blocks.0.mlp', .*model.is_causal = F"):
                model("some text")


def test_a_part_of_a_model_that_was_not_tried_is_refused():
    model = Batch()
    model.causal = False
    gate(model)
    with pytest.raises(SiteError, match="call the whole model once"):
        model.blocks[0](EMBEDS)
    model({"tokens": IDS})
    assert model.blocks[0](EMBEDS).shape == EMBEDS.shape


class Encoder(Net):
    """Its mask has the usual name, its ids have not."""

    causal = False

    def forward(self, idx, attention_mask=None, **other):
        other = {k: v for k, v in other.items() if v is not None}
        (mask,) = other.values() if other else (attention_mask,)
        if mask is not None and mask.ndim == 1:
            mask = torch.arange(idx.size(1)) < mask[:, None]
        return self.run(self.tok(idx), None if mask is None else mask.bool())


def test_padding_is_heard_of_where_token_ids_have_another_name():
    model = Encoder()
    gate(model)
    torch.testing.assert_close(model(IDS, LEFT)[:1, 3:], model(IDS[:1, 3:]))


@pytest.mark.parametrize("name", ["valid_len", "src_lengths", "pad_mask"])
def test_padding_under_another_name_is_refused(name):
    model = Encoder()
    gate(model)
    model(IDS)
    mask = LEFT.flip(1).bool() if name == "pad_mask" else torch.tensor([4, 7])
    with pytest.raises(SiteError, match=f"may say by '{name}' which tokens are padding"):
        model(IDS, **{name: mask})


def test_a_first_call_of_one_token_decides_nothing():
    model = Batch()
    gate(model)
    model({"tokens": IDS[:, :1]})
    with pytest.raises(SiteError, match="may not see later ones"):
        model({"tokens": IDS})


class Positioned(Net):
    """Many blocks, a table of positions, and linears of all tokens at once."""

    causal, runs = False, itertools.count()  # a trial puts back what it can

    def __init__(self):
        super().__init__()
        self.pos, self.blocks = nn.Embedding(60, 16), nn.ModuleList(Attention() for _ in range(9))

    def forward(self, idx):
        next(self.runs)
        h = self.tok(idx) + self.pos(torch.arange(idx.size(1)))
        return self.run(h.flatten(0, 1).view(h.shape))


def test_a_model_is_tried_with_few_runs():
    model = Positioned()
    gate(model)
    assert 3 <= next(model.runs) <= 18


class TwoSides(Net):
    """Two texts of one length: the first sees all of itself, the second no later tokens."""

    def forward(self, src, tgt):
        memory = self.blocks[0](self.tok(src), causal=False)
        return self.blocks[1](self.tok(tgt) + memory.mean(1, keepdim=True))


def test_each_side_of_two_texts_is_tried():
    model = TwoSides()
    gate(model, where="blocks.0.mlp")
    assert model(IDS, IDS).shape == EMBEDS.shape
    model = TwoSides()
    gate(model, where="blocks.1.mlp")
    with pytest.raises(
        SiteError, match=r"'blocks.1.mlp' is inside TwoSides, where a token may not"
    ):
        model(IDS, IDS)


class ByArgument(Net):
    """Who sees whom comes with the call, by an argument of any name."""

    def forward(self, idx, batch=None, **other):
        other = {**other, **(batch or {})}
        (said,) = other.values() if other else (False,)
        h, seen = self.tok(idx), torch.ones(idx.size(1), idx.size(1)).bool()
        if isinstance(said, torch.Tensor):
            shows = said > -1000 if said.min() < 0 else said != 0
            shows = ~shows if said.dtype == torch.bool else shows
            seen = shows if shows.ndim < 3 else shows.flatten(0, -3)[:1]
        elif said:
            seen = seen.tril()
        for block in self.blocks:
            q, k, v = block.qkv(h).split(16, -1)
            h = h + (q @ k.mT / 4).masked_fill(~seen, -1e9).softmax(-1) @ v
            h = h + torch.tanh(block.mlp(h))
        return h


ADDED = nn.Transformer.generate_square_subsequent_mask(7)
HIDING = {
    "src_mask": ADDED, "attn_bias": ADDED[None, None] - 1.0, "mask": ADDED < -1,
    "attn_mask": (ADDED == 0).long().expand(4, 7, 7), "whom": (ADDED == 0).float()[None],
    "causal": True, "is_causal": True,
}  # fmt: skip


@pytest.mark.parametrize("name", HIDING)
def test_a_call_that_says_that_tokens_see_no_later_ones_is_refused(name):
    model, why = ByArgument(), f"where by '{name}' a token may not see later ones: choose a gate"
    model(IDS, **{name: HIDING[name]})
    gate(model)
    model(IDS)
    for call in (lambda **given: model(IDS, **given), lambda **given: model(IDS, batch=given)):
        with pytest.raises(SiteError, match=why):
            call(**{name: HIDING[name]})
    model = ByArgument()
    model.is_causal = False
    gate(model)
    model(IDS, **{name: HIDING[name]})


NEAR = (torch.arange(7) - torch.arange(7)[:, None]).abs() < 3


@pytest.mark.parametrize("given", [
    {"mask": ~NEAR}, {"attn_mask": NEAR.long()}, {"attn_bias": torch.randn(7, 7)},
    {"attn_mask": torch.zeros(7, 7).masked_fill(~NEAR, -torch.inf)}, {"is_causal": False},
    {"causal": None},
    {"mask": torch.zeros(7, 7).bool()}, {"mask": torch.ones(7, 7)},
])  # fmt: skip
def test_masks_that_let_tokens_see_later_ones_are_taken(given):
    model = ByArgument()
    gate(model)
    assert model(IDS, **given).shape == EMBEDS.shape


def test_a_gate_in_a_tried_model_is_compiled_in_one_graph():
    model = Positioned()
    gate(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS))
    model = ByArgument()
    gate(model)
    with pytest.raises(SiteError, match=r"may not see later ones|in compiled code"):
        torch.compile(model, backend="eager")(IDS, src_mask=ADDED)


def test_a_mask_of_the_other_text_is_none_of_a_gate_in_the_first():
    model = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0, batch_first=True)
    gate(model, where="encoder.layers.0.linear1")
    for _ in range(2):
        assert model(EMBEDS, EMBEDS, tgt_mask=ADDED).shape == EMBEDS.shape


# --------------------------------------------------------------- prefixes, and what turns queries
def turned(x, places):
    angles = places[:, None, :, None] / 10.0 ** (torch.arange(4) / 4)
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


class ByInterface(nn.Module):
    is_causal, num_key_value_groups = True, 1

    def __init__(self, config):
        super().__init__()
        self.config, self.qkv = config, nn.Linear(16, 48)

    def forward(self, x, mask, places):
        heads = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).split(16, -1))
        q, k, v = heads
        if places is not None:
            q, k = turned(q, places), turned(k, places)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        return attend(self, q, k, v, mask, scaling=0.35, dropout=0.0)[0].flatten(2)


class Turning(nn.Module):
    """Its positions: ids or its own numbers, turned or as biases, from a table, or none."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.config = how, transformers.PretrainedConfig()
        self.config._attn_implementation = "sdpa"
        self.emb, self.table = nn.Embedding(60, 16), nn.Embedding(20, 16)
        self.h = nn.ModuleList([ByInterface(self.config) for _ in range(2)])
        self.eval()

    def run(self, input_ids, attention_mask, position_ids=None):
        x, length = self.emb(input_ids), input_ids.size(1)
        places = torch.arange(length)[None] if position_ids is None else position_ids
        seen = torch.ones(length, length).tril().bool()[None, None]
        if attention_mask is not None:
            seen = seen & attention_mask.bool()[:, None, None]
        mask = torch.zeros(seen.shape).masked_fill(~seen, -1e9)
        if self.how == "bias":
            mask = mask - (places[0] - places[0][:, None]).abs()
        if self.how == "table":
            x = x + self.table(places)
        for part in self.h:
            x = x + part(x, mask, places if self.how == "turned" else None)
        return x


class WithIds(Turning):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None):
        return self.run(input_ids, attention_mask, position_ids)


class WithoutIds(Turning):
    def forward(self, input_ids, attention_mask=None):
        return self.run(input_ids, attention_mask)


class Ignoring(WithIds):
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None):
        return self.run(input_ids, attention_mask)


@pytest.mark.covers("PrefixModel")
@pytest.mark.parametrize("how", ["turned", "bias", "none", "table"])
@pytest.mark.parametrize("cls", [WithIds, WithoutIds, Ignoring])
def test_a_prefix_acts_on_padded_rows_as_on_rows_alone_or_refuses_them(cls, how):
    model = cls(how)
    shake(PrefixModel(
        model, modified_modules=["h.0", "h.1"], prefix_token_num=3, reparameterize=False,
        sample_inputs={"input_ids": IDS},
    ))  # fmt: skip
    alone = model(IDS[:1, 3:])
    torch.testing.assert_close(model(IDS.flip(1), LEFT.flip(1))[:1, :4], model(IDS.flip(1)[:1, :4]))
    if how == "turned" and cls is not WithIds:
        with pytest.raises(SiteError, match="may turn queries and keys by positions that count"):
            model(IDS, LEFT)
        return
    if how == "table" and cls is WithIds:
        places = (LEFT.cumsum(-1) - 1).clamp(min=0)
        torch.testing.assert_close(model(IDS, LEFT, position_ids=places)[:1, 3:], alone)
    found = model(IDS, LEFT)[:1, 3:]
    if how != "table":  # there the model alone counts the padding
        torch.testing.assert_close(found, alone)


# ---------------------------------------------------------------------------- padding by id
class ById(Net):
    pad, name = 0, ""

    def __init__(self):
        super().__init__()
        if self.name:
            setattr(self, self.name, self.pad)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        if attention_mask is None and input_ids is not None:
            attention_mask = input_ids != self.pad
        h = self.embedded(input_ids, inputs_embeds)
        return self.run(h, None if attention_mask is None else attention_mask != 0)


class Own(ById):
    """Its mask must be one of booleans."""

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        assert attention_mask is None or attention_mask.dtype == torch.bool
        return super().forward(input_ids, attention_mask, inputs_embeds)


BY_ID = [(ById, 0, ""), (ById, 5, "pad_id"), (Own, 0, ""), (Own, 5, "padding_idx")]


@pytest.mark.parametrize(("cls", "pad", "name"), BY_ID)
def test_padding_by_id_stays_hidden_behind_a_prompt(cls, pad, name):
    model = type("Padded", (cls,), {"pad": pad, "name": name})()
    expected = model(torch.cat([torch.tensor([TOKENS]), IDS[:1, 3:]], 1))[:, 3:]
    ids = torch.where(LEFT == 1, IDS, pad)
    prompt(model)
    if cls is Own:
        with pytest.raises(SiteError, match=f"of the token id {pad} than of its .*attention_mask"):
            model(ids)
        model(IDS)
        torch.testing.assert_close(model(ids, LEFT == 1)[:1, 3:], expected)
    else:
        torch.testing.assert_close(model(ids)[:1, 3:], expected)
        torch.testing.assert_close(model(ids, LEFT)[:1, 3:], expected)


def test_first_tokens_and_means_are_those_behind_padding_by_id():
    model, ids = ById(), torch.where(LEFT == 1, IDS, 0)
    shake(opendelta.LoReftModel(model, modified_modules=["blocks.1.mlp"], first=2))
    torch.testing.assert_close(model(ids)[:1, 3:], model(IDS[:1, 3:]))
    model = type("Encoder", (ById,), {"causal": False})()
    gate(model)
    torch.testing.assert_close(model(ids)[:1, 3:], model(IDS[:1, 3:]))


def test_an_id_that_is_like_others_is_no_padding():
    class Plain(Net):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
            keep = None if attention_mask is None else attention_mask.bool()
            return self.run(self.embedded(input_ids, inputs_embeds), keep)

    model, ids = Plain(), IDS * LEFT
    expected = model(torch.cat([torch.tensor([TOKENS] * 2), ids], 1))[:, 3:]
    model.pad_id = 0
    prompt(model)
    torch.testing.assert_close(model(ids), expected)


# ------------------------------------------------------- an encoder, and a decoder beside it
class Enc(Net):
    causal = False

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        keep = None if attention_mask is None else attention_mask != 0
        return self.run(self.embedded(input_ids, inputs_embeds), keep)


class Dec(Net):
    def attended(self, tgt, memory, hidden):
        h = self.run(self.tok(tgt))
        scores = h @ memory.mT
        if hidden is not None:
            scores = scores.masked_fill(hidden if hidden.ndim > 2 else hidden[:, None], -1e9)
        return h + scores.softmax(-1) @ memory


class ByKeep(Dec):
    def forward(self, tgt, memory, src_mask=None):
        return self.attended(tgt, memory, None if src_mask is None else src_mask == 0)


class ByPadding(Dec):
    def forward(self, tgt, enc_out, enc_mask=None):  # true for padding
        return self.attended(tgt, enc_out, enc_mask)


class InThree(Dec):
    def forward(self, tgt, encoder_output, padding=None):  # [batch, 1, length]
        return self.attended(tgt, encoder_output, padding)


class Torchs(Dec):
    def __init__(self):
        super().__init__()
        self.inner = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
        self.eval()

    def forward(self, tgt, memory, memory_key_padding_mask=None):
        return self.inner(self.tok(tgt), memory, memory_key_padding_mask=memory_key_padding_mask)


class Both(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.encoder, self.decoder = Enc(), decoder()

    def forward(self, input_ids, decoder_input_ids, attention_mask=None):
        memory = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        mask = attention_mask
        if mask is not None and not isinstance(self.decoder, ByKeep):
            mask = mask == 0
        if mask is not None and isinstance(self.decoder, InThree):
            mask = mask[:, None]
        return self.decoder(decoder_input_ids, memory, mask)


@pytest.mark.parametrize("strip", [True, False])
@pytest.mark.parametrize("padded", ["", "left", "right"])
@pytest.mark.parametrize("decoder", [ByKeep, ByPadding, InThree, Torchs])
def test_a_decoder_beside_the_encoder_attends_to_the_prompt(decoder, padded, strip):
    model, starts = Both(decoder), IDS[:, :4]
    mask = {"": None, "left": LEFT, "right": LEFT.flip(1)}[padded]
    rows = [IDS[i] if mask is None else IDS[i][mask[i] == 1] for i in range(2)]
    expected = [
        model(torch.cat([torch.tensor(TOKENS), row])[None], starts[i : i + 1])
        for i, row in enumerate(rows)
    ]
    prompt(model, strip=strip)
    torch.testing.assert_close(model(IDS, starts, mask), torch.cat(expected))


def test_a_decoder_that_does_not_show_what_it_attends_to_needs_strip():
    class Bare(Dec):
        def forward(self, tgt, h):
            return self.attended(tgt, h, None)

    model, starts = Both(Bare), IDS[:, :4]
    model.forward = lambda ids, tgt: model.decoder(tgt, model.encoder(input_ids=ids))
    expected, facts = model(WRITTEN, starts), opendelta.snapshot(model)
    with pytest.raises(SiteError, match=r"'decoder' may attend to the output of 'enc.*strip=F"):
        prompt(model)
    assert opendelta.snapshot(model) == facts
    prompt(model, strip=False)
    torch.testing.assert_close(model(IDS, starts), expected)


def test_a_decoder_attends_to_two_prompts():
    model, starts = Both(ByPadding), IDS[:, :4]
    row = torch.cat([torch.tensor([TOKENS + TOKENS[:2]]), IDS[:1, 3:]], 1)
    orders = [row, torch.cat([row[:, 3:5], row[:, :3], row[:, 5:]], 1)]
    expected = [model(ids, starts[:1]) for ids in orders]
    prompt(model, name="one")
    SoftPromptModel(model, soft_token_num=2, token_init=TOKENS[:2], name="two")
    found = model(IDS, starts, LEFT)[:1]
    assert min((found - each).abs().max() for each in expected) < 1e-5


def test_a_decoder_that_is_a_head_sees_the_tokens():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = Enc(), nn.Linear(16, 5)

        def forward(self, input_ids, attention_mask=None):
            return self.decoder(self.encoder(input_ids, attention_mask))

    model = Head()
    expected = model(WRITTEN)[:, 3:]
    prompt(model)
    torch.testing.assert_close(model(IDS), expected)
