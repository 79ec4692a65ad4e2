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


@pytest.mark.parametrize("empty", [[None, None], [], (), {}])
@pytest.mark.parametrize("name", [KNOWN, "state", "past", "memory"])
@pytest.mark.parametrize("put", [loreft, prompt])
def test_an_empty_state_holds_no_tokens(put, name, empty):
    model = Masked(as_dict=True)
    given = {"attention_mask": torch.ones(2, 9)}
    run = model.run
    model.run = lambda h, state: run(h, state if state and state[0] is not None else None)
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
    with pytest.raises(SiteError, match=f"'{name}', which may .* begin its name with 'cond'"):
        model(IDS, **given, **{name: torch.randn(2, 1, 16)})


@pytest.mark.parametrize("put", [loreft, prompt])
def test_conditions_in_a_mapping_are_told_apart_by_their_name(put):
    model = Styled(as_dict=True)
    put(model)
    mask, style = torch.ones(2, 9), {"vector": torch.randn(2, 1, 16)}
    with pytest.raises(SiteError, match=r"'style'.* begin its name with 'cond'"):
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
    model = Unmasked(as_dict=False)  # what is in a tuple has no name
    loreft(model)
    with pytest.raises(SiteError, match="how many came before"):
        both(model, KNOWN, masks=False)


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
    if masks or (name == KNOWN and (as_dict or put is prompt)):
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
@pytest.mark.parametrize("how", ["first", "mean", "values"])
def test_what_a_forward_pools_beside_its_hidden_states_refuses_a_prompt(how, as_dict):
    class Both(Pools):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
            h = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
            h = self.layers[0](h)
            pooled = {"first": h[:, 0], "mean": h.mean(1), "values": h[..., 0]}[how]
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
    with pytest.raises(SiteError, match=r"runs after earlier tokens|is given a mask or a cache"):
        both_calls(model, state)
