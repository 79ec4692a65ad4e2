"""Models of somebody's own that take a state, and tokens and masks under names of their own."""

import copy
import inspect

import pytest
import torch
from support.nets import shake
from torch import nn

from opendelta import LoReftModel, SiteError

pytestmark = pytest.mark.covers("LoReftConfig.first", "LoReftConfig.last")
IDS = torch.randint(2, 59, (2, 9), generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * 9])
LEFT = RIGHT.flip(1)
PLACES = torch.tensor([[*range(5), *range(4)], [*range(9)]])
STATES = ["cache", "past", "past_key_values", "kv_cache", "state", "hidden", "hx", "prev_state"]
MADE = {"none": lambda: None, "in each call": dict}  # what stands for a state that is not given
SITES = [["out"], [r"[r]blocks\.\d$"], ["blocks.1"], ["blocks.1.out"]]


class Block(nn.Module):
    """Attention over the keys that a mapping holds under the number of the block."""

    def __init__(self, index):
        super().__init__()
        self.index, self.qk, self.out = index, nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, bias=None, cache=None):
        keys = self.qk(x)
        if cache is not None:
            keys = torch.cat([cache[self.index], keys], 1) if self.index in cache else keys
            cache[self.index] = keys
        return x + self.out((x @ keys.mT + bias).softmax(-1) @ keys)


class Decoder(nn.Module):
    """Two causal blocks, which one call gives the same mapping."""

    def __init__(self, made):
        super().__init__()
        self.emb, self.blocks = nn.Embedding(60, 16), nn.ModuleList([Block(0), Block(1)])
        self.made = made

    def run(self, tokens, mask=None, cache=None, places=None):
        cache = self.made() if cache is None else cache
        held = cache[0].size(1) if cache else 0
        count = held + tokens.size(1)
        bias = torch.full((1, count, count), -1e9).triu(1)[:, held:]
        if mask is not None:
            bias = bias + (1 - mask[:, None].float()) * -1e9
        if places is not None:  # several documents in a row
            number = (places == 0).cumsum(1)
            bias = bias + (number[:, None] != number[:, :, None]) * -1e9
        x = self.emb(tokens)
        for block in self.blocks:
            x = block(x, bias, cache)
        return x


def own(*names, made="none"):
    """A decoder whose forward takes `tokens` and these arguments."""

    def forward(self, *args, **kwargs):
        given = dict(zip(("tokens", *names), args, strict=False)) | kwargs
        tokens, mask, places = (given.get(n) for n in ("tokens", "attention_mask", "position_ids"))
        state = next((given[n] for n in names if n in STATES and n in given), None)
        return self.run(tokens, mask, state, places)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    known = [inspect.Parameter(n, kind, default=None) for n in names]
    given = [inspect.Parameter(n, kind) for n in ("self", "tokens")]
    forward.__signature__ = inspect.Signature([*given, *known])
    torch.manual_seed(0)
    return type("Own", (Decoder,), {"forward": forward})(MADE[made]).eval()


def put(model, sites, first, last):
    """Attach LoReFT; return what computes one document in plain torch."""
    twin = copy.deepcopy(model)
    options = {"low_rank_dimension": 2, "modified_modules": sites, "first": first, "last": last}
    delta = shake(LoReftModel(model, **options))

    def alone(row):
        chosen = torch.zeros(row.size(1), 1, dtype=torch.bool)
        chosen[:first] = True
        chosen[row.size(1) - last :] = True
        handles = []
        for name, layer in delta.layers.items():
            if hasattr(layer, "rotate_layer"):
                R, source = torch.linalg.qr(layer.rotate_layer)[0].T, layer.learned_source

                def change(_, args, h, R=R, source=source):
                    return torch.where(chosen, h + (source(h) - h @ R.T) @ R, h)

                handles.append(twin.get_submodule(name).register_forward_hook(change))
        out = twin(row)
        for handle in handles:
            handle.remove()
        return out

    return alone


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("sites", SITES, ids=str)
@torch.no_grad()
def test_a_mask_is_heard_where_blocks_share_a_state_of_the_call(sites, made):
    model = own("attention_mask", "cache", made=made)
    alone = put(model, sites, 1, 2)
    for _ in range(2):
        right, left, whole = model(IDS, RIGHT), model(IDS, LEFT), model(IDS)
        torch.testing.assert_close(right[:1, :5], alone(IDS[:1, :5]))
        torch.testing.assert_close(left[:1, 4:], alone(IDS[:1, 4:]))
        torch.testing.assert_close(whole, alone(IDS))


@pytest.mark.parametrize("name", STATES)
@torch.no_grad()
def test_what_tells_of_tokens_is_heard_beside_a_state_of_any_name(name):
    model = own("attention_mask", "position_ids", "lengths", "segments", name)
    alone = put(model, ["blocks.1.out"], 1, 2)
    for given in ({}, {name: None}, {name: {}}):
        padded = model(IDS, RIGHT, **given)
        torch.testing.assert_close(padded[:1, :5], alone(IDS[:1, :5]))
        given = {n: v if v is None else {} for n, v in given.items()}
        packed = model(IDS, position_ids=PLACES, **given)
        parts = [alone(IDS[:1, :5]), alone(IDS[:1, 5:])]
        torch.testing.assert_close(packed[:1], torch.cat(parts, 1))
        for other in ("lengths", "segments"):
            told = torch.tensor([5, 9]) if other == "lengths" else (PLACES == 0).cumsum(1)
            with pytest.raises(SiteError, match=f"'{other}'"):
                model(IDS, **{other: told})


@pytest.mark.parametrize("sites", SITES, ids=str)
@pytest.mark.parametrize("name", STATES)
@torch.no_grad()
def test_a_state_that_is_given_is_counted_or_refused_by_name(name, sites):
    model = own("attention_mask", name)
    alone = put(model, sites, 6, 0)
    state = {}
    first = model(IDS[:, :5], LEFT[:, :5], **{name: state})
    found = torch.cat([first, model(IDS[:, 5:], LEFT, **{name: state})], 1)
    torch.testing.assert_close(found[1:], alone(IDS[1:]))
    torch.testing.assert_close(found[:1, 4:], alone(IDS[:1, 4:]))
    state = {}
    model(IDS[:, :5], **{name: state})
    with pytest.raises(SiteError, match=f"'{name}'"):
        model(IDS[:, 5:], **{name: copy.deepcopy(state)})


class Keeps(Decoder):
    """Keeps its mapping itself."""

    def __init__(self):
        super().__init__(dict)
        self.kept = {}

    def forward(self, tokens):
        return self.run(tokens, cache=self.kept)


@pytest.mark.parametrize("sites", SITES, ids=str)
@torch.no_grad()
def test_a_state_that_a_model_keeps_is_refused_in_its_second_call(sites):
    model = Keeps().eval()
    alone = put(model, sites, 2, 0)
    torch.testing.assert_close(model(IDS[:, :5]), alone(IDS[:, :5]))
    with pytest.raises(SiteError, match=r"after earlier tokens \('cache'\)|a mask or a cache"):
        model(IDS[:, 5:])


class ByLayer(Decoder):
    """Its state has a name of no state, and returns."""

    def forward(self, tokens, hist=None):
        state = {} if hist is None else dict(hist)
        return self.run(tokens, cache=state), state


@torch.no_grad()
def test_a_state_by_the_numbers_of_layers_is_refused_by_the_name_of_its_argument():
    model = ByLayer(dict).eval()
    alone = put(model, ["blocks.1.out"], 2, 0)
    out, state = model(IDS[:, :5])
    torch.testing.assert_close(out, alone(IDS[:, :5])[0])
    with pytest.raises(SiteError, match=r"as 'hist' may hold.*model.beside_tokens = \['hist'\]"):
        model(IDS[:, 5:], state)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.rnn = nn.Embedding(60, 16), nn.GRU(16, 16, batch_first=True)

    def forward(self, words, lengths=None, hx=None):
        return self.rnn(self.emb(words), hx)


@torch.no_grad()
def test_lengths_beside_the_state_of_a_recurrent_model_are_refused_by_name():
    model = Recurrent()
    alone = put(model, ["emb"], 2, 1)
    out, hx = model(IDS, torch.tensor([9, 9]))
    torch.testing.assert_close(out, alone(IDS)[0])
    with pytest.raises(SiteError, match="'lengths'"):
        model(IDS, torch.tensor([5, 9]))
    with pytest.raises(SiteError, match="'hx'"):
        model(IDS, hx=hx)
