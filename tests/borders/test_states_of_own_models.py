"""Models of somebody's own with a state of earlier tokens, and embeddings with own forwards."""

import pytest
import torch
import transformers as T
from support.nets import shake
from torch import nn

import opendelta
from opendelta import LoReftModel, SiteError, SoftPromptModel

pytestmark = pytest.mark.covers("LoReftModel", "SoftPromptModel")
IDS = torch.randint(2, 59, (2, 9), generator=torch.Generator().manual_seed(0))
KNOWN = "past_key_values"
SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24}


class Attends(nn.Module):
    """Two blocks of attention over a state of its own."""

    def __init__(self, as_dict):
        super().__init__()
        self.embedding, self.as_dict = nn.Embedding(60, 16), as_dict
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(2)])

    def run(self, h, state):
        new = []
        for index, layer in enumerate(self.layers):
            x = layer(h)
            keys = x if state is None else torch.cat([state[index], x], 1)
            new.append(keys)
            seen = torch.ones(h.size(1), keys.size(1)).tril(keys.size(1) - h.size(1)).bool()
            h = h + (x @ keys.mT).masked_fill(~seen, -1e9).softmax(-1) @ keys
        return {"h": h, KNOWN: new} if self.as_dict else (h, new)


class Masked(Attends):
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **state):
        h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        return self.run(h, next(iter(state.values()), None))


class Unmasked(Attends):
    def forward(self, input_ids, **state):
        return self.run(self.embedding(input_ids), next(iter(state.values()), None))


def loreft(model):
    return shake(LoReftModel(model, modified_modules=["layers.0"], first=2))


def prompt(model):
    return shake(SoftPromptModel(model, soft_token_num=3, token_init=False))


def both(model, name, masks):
    """The outputs of one call, and of two that hand on the state under `name`."""

    def out(given):
        found = model(**given)
        return (found["h"], found[KNOWN]) if isinstance(found, dict) else found

    def mask(count):
        return {"attention_mask": torch.ones(2, count)} if masks else {}

    whole, _ = out({"input_ids": IDS, **mask(9)})
    first, state = out({"input_ids": IDS[:, :5], **mask(5)})
    second, _ = out({"input_ids": IDS[:, 5:], name: state, **mask(9)})
    return whole, torch.cat([first, second], 1)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", [KNOWN, "past", "kv_cache", "memory", "prev", "history"])
@pytest.mark.parametrize("put", [loreft, prompt])
def test_a_state_under_any_name_is_right_or_refused_by_name(put, name, masks):
    torch.manual_seed(0)
    model = Masked(as_dict=True)
    torch.testing.assert_close(*both(model, name, masks))
    put(model)
    if masks or name == KNOWN:
        torch.testing.assert_close(*both(model, name, masks))
    else:
        with pytest.raises(SiteError, match=f"'{name}'"):
            both(model, name, masks)


class Grows:
    """A cache that a forward fills in place, and that counts nothing."""

    keys = None


def of_no_tokens():
    return [torch.zeros(2, 0, 16), torch.zeros(2, 0, 16)]


class GrowsInPlace(Attends):
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, cache=None):
        h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        x = self.layers[0](h)
        if cache is not None:
            x = cache.keys = x if cache.keys is None else torch.cat([cache.keys, x], 1)
        seen = torch.ones(h.size(1), x.size(1)).tril(x.size(1) - h.size(1)).bool()
        return (h @ x.mT).masked_fill(~seen, -1e9).softmax(-1) @ x


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("put", [prompt, loreft])
def test_a_cache_that_grows_in_place_is_known_from_its_first_call(put, masks):
    model = GrowsInPlace(as_dict=False)
    put(model)

    def mask(count):
        return {"attention_mask": torch.ones(2, count)} if masks else {}

    cache = Grows()
    first = model(IDS[:, :5], **mask(5), cache=cache)
    second = model(IDS[:, 5:], **mask(9), cache=cache)
    torch.testing.assert_close(torch.cat([first, second], 1), model(IDS, **mask(9)))


def test_a_state_with_values_that_no_call_returned_is_refused():
    model = Masked(as_dict=True)
    _, state = model(IDS[:, :5]).values()
    prompt(model)
    for given in ({}, {"attention_mask": torch.ones(2, 4)}):
        with pytest.raises(SiteError, match=f"'{KNOWN}', which may .* None where nothing came"):
            model(IDS[:, 5:], **given, **{KNOWN: state})
    with pytest.raises(SiteError, match=f"'{KNOWN}' holds no 8 positions"):
        model(IDS[:, 5:], torch.ones(2, 9), **{KNOWN: state})


@pytest.mark.parametrize("empty", [[None, None], [], (), {}, Grows(), of_no_tokens()])
@pytest.mark.parametrize("name", [KNOWN, "state", "past", "memory"])
@pytest.mark.parametrize("put", [loreft, prompt])
def test_an_empty_state_holds_no_tokens(put, name, empty):
    model = Masked(as_dict=True)
    given = {"attention_mask": torch.ones(2, 9)}
    run = model.run
    model.run = lambda h, _: run(h, None)
    put(model)
    expected = model(IDS, **given)["h"]
    torch.testing.assert_close(model(IDS, **given, **{name: empty})["h"], expected)
    torch.testing.assert_close(model(IDS, **{name: empty})["h"], expected)


class Styled(Masked):
    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **styles):
        h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        for style in styles.values():
            h = h + (style["vector"] if isinstance(style, dict) else style)
        return self.run(h, None)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", ["state", "cache", "mems", "cache_params"])
def test_a_vector_under_the_name_of_a_state_is_refused_by_name(name, masks):
    model = Styled(as_dict=True)
    prompt(model)
    given = {"attention_mask": torch.ones(2, 9)} if masks else {}
    with pytest.raises(SiteError, match=f"'{name}', which may .*beside_tokens"):
        model(IDS, **given, **{name: torch.randn(2, 1, 16)})


@pytest.mark.parametrize("put", [loreft, prompt])
def test_conditions_in_a_mapping_are_told_apart_by_their_name(put):
    model = Styled(as_dict=True)
    put(model)
    mask, style = torch.ones(2, 9), {"vector": torch.randn(2, 1, 16)}
    with pytest.raises(SiteError, match=r"'style.*beside_tokens"):
        model(IDS, mask, style=style)
    expected = model(IDS, mask, cond=style["vector"])["h"]
    torch.testing.assert_close(model(IDS, mask, cond_style=style)["h"], expected)


@pytest.mark.parametrize("name", ["past", "memory"])
def test_a_state_from_before_the_prompt_is_refused(name):
    model = Masked(as_dict=False)
    _, state = model(IDS[:, :5], torch.ones(2, 5))
    prompt(model)
    with pytest.raises(SiteError, match=rf"'{name}' holds no 8 positions, of 5 tokens and of pro"):
        model(IDS[:, 5:], torch.ones(2, 9), **{name: state})


@pytest.mark.parametrize("name", [KNOWN, "past", "memory"])
def test_states_in_a_tuple_keep_the_prompt(name):
    model = Masked(as_dict=False)
    prompt(model)
    torch.testing.assert_close(*both(model, name, masks=True))


def test_a_model_that_takes_no_mask_is_not_taken_for_one_without_a_state():
    model = Unmasked(as_dict=True)
    loreft(model)
    torch.testing.assert_close(*both(model, KNOWN, masks=False))
    model = Unmasked(as_dict=False)
    loreft(model)
    torch.testing.assert_close(*both(model, KNOWN, masks=False))


@pytest.mark.parametrize("modules", [["backbone.blocks.0"], None])
def test_xlstm_s_state_counts_the_tokens(modules):
    config = T.xLSTMConfig(
        vocab_size=60, hidden_size=64, num_heads=4, num_blocks=2, num_hidden_layers=2,
        chunk_size=4, qk_dim_factor=1.0, v_dim_factor=1.0, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T.xLSTMForCausalLM(config).eval()
    shake(LoReftModel(model, first=2, **({} if modules is None else {"modified_modules": modules})))
    given = {"max_new_tokens": 4, "do_sample": False, "output_logits": True}
    given |= {"return_dict_in_generate": True}
    ids = IDS[:1]
    cached, not_cached = (model.generate(ids, use_cache=c, **given).logits for c in (True, False))
    torch.testing.assert_close(torch.stack(cached), torch.stack(not_cached), atol=1e-4, rtol=1e-4)


class Normed(nn.Embedding):
    def forward(self, ids):
        return nn.functional.rms_norm(super().forward(ids), (self.embedding_dim,))


def test_a_prompt_starts_as_what_an_embedding_of_its_own_forward_gives():
    torch.manual_seed(0)
    model = T.LlamaModel(
        T.LlamaConfig(
            vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=24,
        )
    ).eval()  # fmt: skip
    model.embed_tokens = Normed(60, 16)
    tokens = [7, 9, 11]
    written = torch.cat([torch.tensor([tokens] * 2), IDS], 1)
    expected = model(written).last_hidden_state[:, 3:]
    lora = shake(opendelta.LoraModel(model, modified_modules=["embed_tokens"]))
    lora.disable()
    SoftPromptModel(model, soft_token_num=3, token_init=tokens)
    torch.testing.assert_close(model(IDS).last_hidden_state, expected)


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 8), nn.BatchNorm1d(8), nn.InstanceNorm1d(8, affine=True)], ids=str
)
def test_norms_over_the_channels_before_the_time_are_refused(norm):
    model = nn.Sequential(nn.Conv1d(4, 8, 3), norm)
    with pytest.raises(SiteError, match=r"'1' .* returns \[batch, channels, ...\], \[2, 8, 14"):
        opendelta.AdapterModel(model, modified_modules=["1"], sample_inputs=torch.randn(2, 4, 16))


class Holder:
    """A state of somebody's own."""

    def __init__(self, state):
        self.state = state


FORMS = {  # how a model hands its states on, and reads them
    "pairs with a count": (lambda new: [(k, k.size(1)) for k in new], lambda s: [k for k, _ in s]),
    "pairs with None": (lambda new: [(k, None) for k in new], lambda s: [k for k, _ in s]),
    "pairs": (lambda new: tuple((k, k) for k in new), lambda s: [k for k, _ in s]),
    "by number": (lambda new: {**dict(enumerate(new)), "length": 3}, lambda s: [s[0], s[1]]),
    "an object": (Holder, lambda s: s.state),
    "objects": (lambda new: [Holder([k]) for k in new], lambda s: [h.state[0] for h in s]),
}


class Formed(Attends):
    def __init__(self, form, as_dict):
        super().__init__(as_dict)
        self.form = form

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **state):
        h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        write, read = FORMS[self.form]
        old = next(iter(state.values()), None)
        out = self.run(h, None if old is None else read(old))
        if self.as_dict:
            return out | {KNOWN: write(out[KNOWN])}
        return out[0], write(out[1])


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("name", [KNOWN, "past", "memory"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("put", [loreft, prompt])
def test_a_state_in_any_form_is_right_or_refused_by_name(put, form, name, masks, as_dict):
    torch.manual_seed(0)
    model = Formed(form, as_dict)
    torch.testing.assert_close(*both(model, name, masks))
    put(model)
    if masks or name == KNOWN:
        torch.testing.assert_close(*both(model, name, masks))
        return
    with pytest.raises(SiteError, match=r"may hold|how many came before"):
        both(model, name, masks)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(60, 16), nn.GRU(16, 16, batch_first=True)

    def forward(self, input_ids, hidden=None):
        return self.rnn(self.embedding(input_ids), hidden)


def test_the_hidden_state_of_a_recurrent_model_is_one():
    model = Recurrent()
    shake(LoReftModel(model, modified_modules=["embedding"], first=2))
    _, hidden = model(IDS[:, :5])
    with pytest.raises(SiteError, match="as 'hidden' may hold"):
        model(IDS[:, 5:], hidden)


class Keeps(nn.Module):
    """It holds its states inside, and is told where its tokens stand."""

    def __init__(self, how):
        super().__init__()
        self.how, self.kept = how, None
        self.embedding, self.layer = nn.Embedding(60, 16), nn.Linear(16, 16)

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, start_pos=0, input_pos=None,
        cache_position=None,
    ):  # fmt: skip
        h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        first = {"start_pos": start_pos, "input_pos": input_pos, "cache_position": cache_position}
        first = int(torch.as_tensor(first[self.how]).reshape(-1)[0])
        x = self.layer(h)
        self.kept = x if first == 0 else torch.cat([self.kept, x], 1)
        seen = torch.ones(h.size(1), self.kept.size(1)).tril(first).bool()
        return h + (x @ self.kept.mT).masked_fill(~seen, -1e9).softmax(-1) @ self.kept


@pytest.mark.parametrize("how", ["start_pos", "input_pos", "cache_position"])
def test_a_model_that_is_told_where_its_tokens_stand_counts_them(how):
    model = Keeps(how)

    def out(first, last):
        places = torch.arange(first, last)
        return model(IDS[:, first:last], **{how: first if how == "start_pos" else places})

    def parts():
        return out(0, 9), torch.cat([out(0, 5), out(5, 9)], 1)

    torch.testing.assert_close(*parts())
    delta = shake(LoReftModel(model, modified_modules=["layer"], first=2))
    torch.testing.assert_close(*parts())
    delta.detach()
    prompt(model)
    with pytest.raises(SiteError, match=f"Keeps is given '{how}', which says something of each"):
        parts()


class Pools(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.embedding = how, nn.Embedding(60, 16)
        self.layers, self.classifier = nn.ModuleList([nn.Linear(16, 16)]), nn.Linear(16, 3)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        h = self.layers[0](h)
        return self.classifier(h[:, 0] if self.how == "first" else h.mean(1))


@pytest.mark.parametrize("how", ["first", "mean"])
def test_a_classifier_in_the_forward_itself_refuses_a_prompt(how):
    model = Pools(how)
    prompt(model)
    with pytest.raises(SiteError, match=r"an output \[2, 3\] for 12 positions of prompt and tok"):
        model(IDS)


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("how", ["first", "mean", "kept", "values"])
def test_what_a_forward_pools_beside_its_hidden_states_refuses_a_prompt(how, as_dict):
    class Both(Pools):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
            h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
            h = self.layers[0](h)
            pooled = {
                "first": h[:, 0], "mean": h.mean(1), "kept": h.mean(1, True), "values": h[..., 0]
            }[how]  # fmt: skip
            return {"h": h, "pooled": pooled} if as_dict else (h, pooled)

    model = Both(how)
    delta = prompt(model)
    key = "'pooled'" if as_dict else "1"
    with pytest.raises(SiteError, match=rf"an output {key} of the shape .* strip=False"):
        model(IDS)
    delta.detach()
    shake(SoftPromptModel(model, soft_token_num=3, token_init=False, strip=False))
    out = model(IDS)
    assert (out["h"] if as_dict else out[0]).shape == (2, 12, 16)


@pytest.mark.parametrize("part", [slice(1, None), slice(0, 4), slice(None, None, 2)])
def test_a_forward_that_returns_a_part_of_the_positions_refuses_a_prompt(part):
    class Parts(Pools):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
            h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
            return self.layers[0](h)[:, part]

    model = Parts("")
    prompt(model)
    with pytest.raises(SiteError, match=r"an output \[2, \d+, 16\] for 12 positions of prompt"):
        model(IDS)


def test_hidden_states_inside_an_output_lose_the_prompt_and_a_state_keeps_it():
    class Nested(Pools):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
            h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
            h = self.layers[0](h)
            heads = h.unflatten(-1, (2, 8))
            return {"h": h, "heads": heads, "more": {"h": h, "all": (h, h)}, "kv": [h, h]}

    model = Nested("")
    before = model(IDS)
    prompt(model)
    out = model(IDS)
    torch.testing.assert_close(out["h"], before["h"])
    torch.testing.assert_close(out["heads"], before["heads"])
    torch.testing.assert_close(out["more"], before["more"])
    assert out["kv"][0].shape == (2, 12, 16)


class Inner(nn.Module):
    def __init__(self, pools):
        super().__init__()
        self.layers, self.pools = nn.ModuleList([nn.Linear(16, 16)]), pools

    def forward(self, h):
        h = self.layers[0](h)
        return {"both": (h, h.mean(1)), "alone": h.mean(1), "": h}[self.pools]


class Around(nn.Module):
    """Its blocks are in a child; it reads what that returns."""

    def __init__(self, labels=3, pools=""):
        super().__init__()
        self.embedding, self.inner = nn.Embedding(60, 16), Inner(pools)
        self.classifier = nn.Linear(16, labels)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        h = self.inner(h)
        if self.inner.pools:
            return self.classifier(h if self.inner.pools == "alone" else h[1])
        if attention_mask is not None:
            h = h * attention_mask[..., None]
        return self.classifier(h[:, 0])


@pytest.mark.parametrize("labels", [3, 12, 20])
def test_a_classifier_around_the_blocks_reads_the_tokens(labels):
    model = Around(labels)
    before = model(IDS)
    prompt(model)
    torch.testing.assert_close(model(IDS), before)  # token by token: no prompt changes others


@pytest.mark.parametrize(
    ("pools", "says"),
    [("both", r"an output 1 of the shape \[2, 16\] beside the hidden"),
     ("alone", r"an output \[2, 16\] for 12 positions")],
)  # fmt: skip
def test_a_child_that_pools_its_blocks_refuses_a_prompt(pools, says):
    model = Around(pools=pools)
    prompt(model)
    with pytest.raises(SiteError, match=says):
        model(IDS)


def test_an_error_behind_a_prompt_says_what_the_prompt_changed():
    model = Around()
    prompt(model)
    with pytest.raises(RuntimeError) as caught:
        model(IDS, torch.ones(2, 9))
    assert any("put 3 rows before the tokens" in note for note in caught.value.__notes__)


class Embeds(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how, self.norm = how, nn.LayerNorm(16)
        if how in ("positions first", "named"):
            self.positions = nn.Embedding(64, 16)
        self.tokens = nn.Embedding(60, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        h = inputs_embeds
        if h is None:
            h = self.tokens(input_ids)
            h = {"scale": lambda h: 4 * h, "norm": self.norm}.get(self.how, lambda h: h)(h)
        if self.how == "positions first":
            h = h + 0 * self.positions(torch.arange(h.size(1)))
        return self.layers[0](h)


@pytest.mark.parametrize("how", ["plain", "positions first", "scale", "norm", "named"])
def test_tokens_are_embedded_as_without_a_prompt_or_it_is_refused(how):
    model = Embeds(how)
    if how == "named":  # the wrong one
        model.get_input_embeddings = lambda: model.positions
    before, facts = model(IDS), opendelta.snapshot(model)
    if how in ("plain", "positions first"):
        prompt(model)
        torch.testing.assert_close(model(IDS), before)
        return
    with pytest.raises(SiteError, match="does not compute the same of token ids as of inputs_emb"):
        prompt(model)
    assert opendelta.snapshot(model) == facts


@pytest.mark.parametrize("table", ["pos_emb", "positional_embedding", "pos"])
def test_a_prompt_longer_than_a_table_of_somebody_s_own_is_refused_with_the_numbers(table):
    class Numbered(Embeds):
        def __init__(self):
            super().__init__("plain")
            rows = nn.Embedding(10, 16) if table == "pos_emb" else nn.Parameter(torch.zeros(10, 16))
            setattr(self, table, rows)

        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
            h = self.tokens(input_ids) if inputs_embeds is None else inputs_embeds
            rows = getattr(self, table)
            return self.layers[0](h + getattr(rows, "weight", rows)[torch.arange(h.size(1))])

    model = Numbered()
    prompt(model)
    with pytest.raises(SiteError, match="need 12 positions, and the model's table has 10"):
        model(IDS)
    assert model(IDS[:, :7]).shape == (2, 7, 16)


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, h, mask=None):
        return h + torch.tanh(self.linear(h))


class WithMask(nn.Module):
    """It takes a mask under a name of its own."""

    def __init__(self, name, hand_on=None):
        super().__init__()
        self.tokens, self.blocks = nn.Embedding(60, 16), nn.ModuleList([Mixes()])
        self.name, self.hand_on = name, hand_on


class ById(WithMask):
    def forward(self, input_ids, mask=None, pad_mask=None, lengths=None):
        return self.blocks[0](self.tokens(input_ids))


class ByPosition(WithMask):
    def forward(self, idx, mask=None):
        return self.blocks[0](self.tokens(idx), mask)


class ByKeyword(WithMask):
    def forward(self, idx, mask=None):
        return self.blocks[0](self.tokens(idx), mask=mask)


@pytest.mark.parametrize(
    ("cls", "name"),
    [(ById, "mask"), (ById, "pad_mask"), (ById, "lengths"), (ByPosition, "mask"),
     (ByKeyword, "mask")],
)  # fmt: skip
def test_a_mask_under_a_name_of_its_own_refuses_first_tokens(cls, name):
    model = cls(name)
    shake(LoReftModel(model, modified_modules=["[r]^blocks\\.0$"], first=1))
    plain = model(IDS)
    mask = torch.tensor([9, 7]) if name == "lengths" else torch.ones(2, 9)
    with pytest.raises(SiteError, match=r"first= and last=: .*(mask|lengths)"):
        model(IDS, **{name: mask})
    if cls is ById:  # a causal mask is none of padding
        torch.testing.assert_close(model(IDS, **{name: torch.ones(9, 9).tril()}), plain)


def test_two_texts_in_one_forward_refuse_first_tokens():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.enc, self.dec = nn.Embedding(60, 16), Mixes(), Mixes()

        def forward(self, input_ids, attention_mask=None, decoder_input_ids=None):
            return self.enc(self.tokens(input_ids)), self.dec(self.tokens(decoder_input_ids))

    with pytest.raises(SiteError, match="'dec' is in Two, which is given the tokens of two texts"):
        LoReftModel(Two(), modified_modules=["[r]^dec$"], first=1)


def test_the_mask_of_one_text_is_not_that_of_another():
    torch.manual_seed(0)
    config = T.LlamaConfig(**SMALL)

    class Bi(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = T.LlamaModel(config)

        def forward(self, input_ids, attention_mask, doc_ids):
            first = self.enc(input_ids=input_ids, attention_mask=attention_mask)[0]
            return first, self.enc(input_ids=doc_ids)[0]

    model, mask = Bi().eval(), torch.ones(2, 9)
    mask[0, :4] = 0
    shake(LoReftModel(model, modified_modules=["layers.0"], first=1))
    documents = IDS.flip(1)
    _, second = model(IDS, mask, documents)
    torch.testing.assert_close(second, model.enc(input_ids=documents)[0])


def test_several_choices_for_each_row_have_first_tokens():
    torch.manual_seed(0)
    config = T.BertConfig(**SMALL)
    model = T.BertForMultipleChoice(config).eval()
    shake(LoReftModel(model, modified_modules=["encoder.layer.0"], first=1))
    ids, mask = IDS[:, None].repeat(1, 3, 1), torch.ones(2, 3, 9)
    mask[0, 1, 5:] = 0
    out = model(input_ids=ids, attention_mask=mask).logits
    alone = model(input_ids=ids[:1, 1:2, :5]).logits
    torch.testing.assert_close(out[0, 1], alone[0, 0])


@pytest.mark.covers("GateModel")
@pytest.mark.parametrize("how", ["flag", "gru", "mask", "encoder"])
def test_a_gate_for_each_sequence_is_refused_where_tokens_see_no_later_ones(how):
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.q = nn.Embedding(60, 16), nn.Linear(16, 16)
            self.gru = nn.GRU(16, 16, batch_first=True)

        def forward(self, input_ids):
            h = self.q(self.tokens(input_ids))
            if how == "gru":
                return self.gru(h)[0]
            if how == "flag":
                return nn.functional.scaled_dot_product_attention(h, h, h, is_causal=True)
            scores = h @ h.mT
            if how == "mask":
                seen = torch.ones_like(scores).tril().bool()
                scores = scores.masked_fill(~seen, -1e9)
            return scores.softmax(-1) @ h

    model = Causal()
    for name in ("a", "b"):
        shake(opendelta.LoraModel(model, modified_modules=["q"], name=name))
    if how == "encoder":
        assert opendelta.GateModel(model, deltas=["a", "b"], per="sequence").attached
        return
    with pytest.raises(SiteError, match="'q' is inside Causal, where a token may not see later"):
        opendelta.GateModel(model, deltas=["a", "b"], per="sequence")


def by_hook(table):
    table.register_forward_hook(lambda module, args, out: 2 * out)


def by_instance(table):
    own = table.forward
    table.forward = lambda ids: 2 * own(ids)


@pytest.mark.parametrize("change", [by_hook, by_instance])
def test_a_prompt_starts_as_an_embedding_with_hooks_gives_it(change):
    model = T.GPT2Model(T.GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2)).eval()
    change(model.wte)
    tokens = [7, 9, 11]
    delta = SoftPromptModel(model, soft_token_num=3, token_init=tokens)
    torch.testing.assert_close(next(delta.parameters()).data, model.wte(torch.tensor(tokens)).data)


@pytest.mark.filterwarnings("ignore::opendelta.LostGradientWarning")
def test_a_prompt_starts_from_offloaded_and_quantised_embeddings():
    accelerate = pytest.importorskip("accelerate")
    torchao = pytest.importorskip("torchao.quantization")
    config = T.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2)

    def offloaded(model):
        accelerate.cpu_offload(model, torch.device("cpu"))

    def quantised(model):
        torchao.quantize_(
            model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name == "wte"
        )

    for change in (offloaded, quantised):
        model = T.GPT2Model(config).eval()
        change(model)
        delta = SoftPromptModel(model, soft_token_num=3, token_init=[7, 9, 11])
        expected = model.wte(torch.tensor([7, 9, 11]))
        torch.testing.assert_close(next(delta.parameters()).data, expected.data)


def test_channels_before_the_time_are_refused_around_convolutions_too():
    block = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU())
    with pytest.raises(SiteError, match=r"'0' .* returns \[batch, channels, time\], \[2, 8, 14"):
        opendelta.AdapterModel(
            nn.Sequential(block), modified_modules=["[r]^0$"], sample_inputs=torch.randn(2, 4, 16)
        )


class Caching(nn.Module):
    """A block with a state of its own in a mapping, as in small GPTs."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(16, 16)

    def forward(self, x, cache=None):
        if cache is not None:
            keys = torch.cat([cache["k"], x], 1) if "k" in cache else x
            cache["k"] = x = keys
        return self.mlp(x)[:, -1:]


class Gpt(nn.Module):
    def __init__(self, by_keyword):
        super().__init__()
        self.by_keyword, self.emb = by_keyword, nn.Embedding(60, 16)
        self.blocks = nn.ModuleList([Caching()])

    def forward(self, idx, cache=None):
        own = None if cache is None else cache[0]
        x = self.emb(idx)
        return self.blocks[0](x, cache=own) if self.by_keyword else self.blocks[0](x, own)


def both_calls(model, state):
    for ids in (IDS[:, :5], IDS[:, 5:]):
        model(ids, state)


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize("where", ["blocks.0", "blocks.0.mlp"])
def test_blocks_that_are_given_a_state_without_token_ids_refuse_first_tokens(where, by_keyword):
    model = Gpt(by_keyword)
    shake(LoReftModel(model, modified_modules=[where], first=2))
    model(IDS)
    state = [{}]
    with pytest.raises(SiteError, match=r"show the tokens|which nothing counts|a mask or a cache"):
        both_calls(model, state)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_compiled_by_torchscript_is_refused_by_name():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layers = nn.Embedding(60, 16), nn.Sequential(nn.Linear(16, 16))

        def forward(self, input_ids):
            return self.layers(self.embedding(input_ids))

    with pytest.raises(SiteError, match="compiled by TorchScript"):
        loreft(torch.jit.script(Plain()))
