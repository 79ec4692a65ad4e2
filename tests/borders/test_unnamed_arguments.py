"""Arguments of somebody's own models that tell of tokens under names that nobody can know."""

import types

import pytest
import torch
from support.nets import shake
from torch import nn

from opendelta import LoReftModel, SiteError, SoftPromptModel

pytestmark = pytest.mark.covers("LoReftModel", "SoftPromptModel")
IDS = torch.randint(0, 30, (2, 5), generator=torch.Generator().manual_seed(0))
SHOWN = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
CAUSAL = torch.ones(5, 5).tril().bool()
SEES = CAUSAL & SHOWN.bool()[:, None]
PARTS = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).bool()

PADDING = {
    "counts in a list": [3, 5],
    "counts": torch.tensor([3, 5]),
    "counts as a column": torch.tensor([[3], [5]]),
    "booleans": SHOWN.bool(),
    "rows of a list": SHOWN.tolist(),
    "an array": SHOWN.numpy(),
    "ones": SHOWN.float(),
    "ones of keys": SHOWN[:, None, None],
    "added to scores": (1 - SHOWN.float()) * -1e9,
    "numbers behind padding": torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]),
    "numbers that go on": torch.tensor([[7, 8, 9, 10, 11]]),
    "of one channel": SHOWN[..., None],
    "of each channel": SHOWN[..., None].expand(2, 5, 3).bool(),
    "shares": torch.tensor([0.6, 1.0]),
    "something of each row": [{"n": 3}, {"n": 5}],
    "a count in an object": types.SimpleNamespace(n=torch.tensor([3, 5])),
    "who sees whom": SEES,
    "who sees whom in each head": SEES[:, None],
    "added to the scores of pairs": torch.where(SEES, 0.0, -1e9)[:, None],
}
DOCUMENTS = {
    "numbers that begin again": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]),
    "numbers of all rows": torch.tensor([0, 1, 2, 0, 1]),
    "ends": torch.tensor([0, 3, 5]),
    "ends in a tuple": (torch.tensor([0, 3, 5]), 3),
    "bounds": [(0, 3), (3, 5)],
    "numbers as floats": torch.tensor([[0.0, 1.0, 2.0, 0.0, 1.0]]),
    "blocks of pairs": PARTS,
    "blocks of pairs, causal": PARTS & CAUSAL,
}
IN_RUNS = {
    "runs": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]),
    "runs as floats": torch.tensor([[1.0, 1.0, 1.0, 2.0, 2.0]]),
    "flags where parts begin": torch.tensor([[1, 0, 1, 0, 1], [1, 0, 0, 0, 0]]),
    "lengths of parts": torch.tensor([3, 2, 5]),
}
NOTHING = {
    "a causal mask": CAUSAL,
    "a causal mask of each row": CAUSAL.expand(2, 1, 5, 5),
    "a window": torch.ones(5, 5).tril().triu(-2).bool(),
    "biases": torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0)),
    "all": torch.ones(2, 5),
    "numbers from 0": torch.arange(5),
    "numbers from 1": torch.arange(1, 6).expand(2, 5),
    "kinds of words": torch.tensor([[3, 7, 1, 3, 9], [2, 2, 8, 1, 0]]),
    "full lengths": torch.tensor([5, 5]),
    "words": ["a", "b"],
    "names of rows": torch.tensor([100, 230]),
    "a vector of each row": torch.ones(2, 8),
    "a flag": True,
    "a number": 3,
}


def cases(*tables):
    return pytest.mark.parametrize(
        "given", [pytest.param(v, id=k) for t in tables for k, v in t.items()]
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.block = nn.Embedding(30, 8), nn.Linear(8, 8)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, **more):
        h = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        return self.block(h)


def with_ends(model):
    return shake(LoReftModel(model, modified_modules=["block"], first=1, last=1))


@cases(PADDING, DOCUMENTS, IN_RUNS)
def test_numbers_that_may_tell_of_the_tokens_are_refused_under_any_name(given):
    model = Net()
    with_ends(model)
    with pytest.raises(SiteError, match=r"'genre'.*model.beside_tokens = \['genre'\]"):
        model(IDS, genre=given)
    model(IDS, genre=given, position_ids=torch.arange(5)[None])


@cases(DOCUMENTS)
def test_documents_may_be_told_beside_a_mask(given):
    model = Net()
    with_ends(model)
    with pytest.raises(SiteError, match="'genre'"):
        model(IDS, SHOWN.flip(0) * 0 + 1, genre=given)


@cases(PADDING)
def test_a_mask_says_the_padding(given):
    model = Net()
    with_ends(model)
    torch.testing.assert_close(model(IDS, SHOWN, genre=given), model(IDS, SHOWN))


def test_shares_of_a_row_are_lengths():
    model = Net()
    with_ends(model)
    with pytest.raises(SiteError, match="'wav_lens'"):
        model(IDS, wav_lens=torch.tensor([0.6, 1.0]))
    torch.testing.assert_close(model(IDS, wav_lens=torch.ones(2)), model(IDS))


@cases(NOTHING)
@pytest.mark.parametrize("put", [with_ends, lambda model: SoftPromptModel(model, soft_token_num=2)])
def test_numbers_that_tell_nothing_of_the_tokens_pass(given, put):
    model = Net()
    put(model)
    along = isinstance(given, torch.Tensor) and 5 in given.shape
    if not along or put is with_ends:  # a prompt must know a value for each of its own rows
        torch.testing.assert_close(model(IDS, genre=given), model(IDS))


@cases(PADDING, DOCUMENTS, IN_RUNS)
def test_a_prompt_is_not_put_beside_numbers_that_may_tell_of_the_tokens(given):
    model = Net()
    SoftPromptModel(model, soft_token_num=2)
    with pytest.raises(SiteError, match=r"'genre'.*model.beside_tokens"):
        model(IDS, genre=given)


@pytest.mark.parametrize("value", [4, torch.tensor(4)])
@pytest.mark.parametrize("name", ["prefix_len", "num_tokens", "query_length"])
def test_a_prompt_is_not_put_beside_one_number_of_tokens(name, value):
    model = Net()
    SoftPromptModel(model, soft_token_num=2)
    with pytest.raises(SiteError, match=rf"'{name}'.*model.beside_tokens"):
        model(IDS, **{name: value})
    for passes in ({name: 0}, {name: 99}, {name: 0.5}, {f"max_{name}": 4}, {f"min_{name}": 4}):
        torch.testing.assert_close(model(IDS, **passes), model(IDS))


@pytest.mark.parametrize("names", [["genre"], "genre"])
@pytest.mark.parametrize("put", [with_ends, lambda model: SoftPromptModel(model, soft_token_num=2)])
def test_a_model_says_that_an_argument_tells_nothing_of_its_tokens(put, names):
    model, told = Net(), Net()
    told.load_state_dict(model.state_dict())
    told.beside_tokens = names
    for each in (model, told):
        torch.manual_seed(0)
        put(each)
    torch.testing.assert_close(told(IDS, genre=torch.tensor([3, 1])), model(IDS))


@pytest.mark.parametrize(
    "name", ["label", "targets", "y", "task_id", "t", "timesteps", "user", "speaker", "class_ids"]
)
def test_names_that_say_something_else_are_believed(name):
    model = Net()
    with_ends(model)
    torch.testing.assert_close(model(IDS, **{name: torch.tensor([1, 2])}), model(IDS))


class Carries(Net):
    def __init__(self, writes):
        super().__init__()
        self.writes = writes

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, ring=None):
        h = super().forward(input_ids, inputs_embeds=inputs_embeds)
        if self.writes:
            ring[:, 0] = h[:, -1]
            return h
        return h, h[:, -1:] + (0 if ring is None else ring)


@pytest.mark.parametrize("writes", [False, True])
def test_what_an_earlier_call_returned_or_wrote_to_holds_earlier_tokens(writes):
    model = Carries(writes)
    delta = with_ends(model)
    ring = torch.zeros(2, 1, 8)
    with torch.no_grad():
        out = model(IDS, ring=ring)
        held = ring if writes else out[1].detach()[:, :]
        with pytest.raises(SiteError, match=r"'ring', which an earlier call returned or wrote to"):
            model(IDS[:, :1], ring=held)
        model(IDS, ring=torch.zeros(2, 1, 8))
        delta.detach()
        model(IDS[:, :1], ring=held)


def test_what_a_prompted_call_wrote_to_holds_the_prompt():
    model = Carries(writes=True)
    SoftPromptModel(model, soft_token_num=2)
    ring = torch.zeros(2, 1, 8)
    with torch.no_grad():
        model(IDS, ring=ring)
        with pytest.raises(SiteError, match="'ring', which may hold earlier tokens"):
            model(IDS[:, :1], ring=ring)


@pytest.mark.parametrize("change", [torch.clone, lambda h: h[[1, 0]], lambda h: h * 1])
def test_a_copy_of_what_a_call_returned_holds_earlier_tokens(change):
    model = Carries(writes=False)
    with_ends(model)
    with torch.inference_mode(), pytest.raises(SiteError, match="'ring'"):
        model(IDS[:, :1], ring=change(model(IDS)[1]))


def test_a_buffer_that_a_call_in_inference_mode_wrote_to_holds_earlier_tokens():
    model = Carries(writes=True)
    with_ends(model)
    with torch.inference_mode():
        ring = torch.zeros(2, 1, 8)
        model(IDS, ring=ring)
        with pytest.raises(SiteError, match="'ring'"):
            model(IDS[:, :1], ring=ring)


class Sounds(nn.Module):
    """Its tokens are frames of whatever it is given."""

    def __init__(self):
        super().__init__()
        self.block = nn.Linear(2, 2)

    def forward(self, sound, **more):
        if isinstance(sound, tuple | list):
            sound = sound[0] if isinstance(sound[0], torch.Tensor) else torch.ones(2, 10)
        return self.block(sound.reshape(2, 5, 2))


SOUND = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("args", "more"), [
    ((SOUND,), {"attention_mask": SHOWN}), ((SOUND,), {"wav_lens": torch.tensor([6, 10])}),
    ((SOUND,), {"sound_lengths": [6, 10]}), ((SOUND,), {"k": torch.tensor([6, 10])}),
    (((SOUND, torch.tensor([6, 10])),), {}), (([SOUND, SOUND[:, :6]],), {}),
    ((["one", "two"],), {}),
])  # fmt: skip
def test_what_may_tell_the_padding_of_tokens_in_no_known_form_is_refused(args, more):
    model = Sounds()
    with_ends(model)
    with pytest.raises(SiteError, match=r"may say by '(sound|\w*mask|\w*len\w*|k)'"):
        model(*args, **more)


def test_tokens_in_no_known_form_are_all_tokens_where_nothing_tells_otherwise():
    model = Sounds()
    with_ends(model)
    torch.testing.assert_close(model(SOUND, labels=torch.tensor([1, 0])), model(SOUND))
    model(SOUND[:, None], t=torch.tensor([1, 0]), temperature=0.5)


@pytest.mark.parametrize("name", ["audio_lengths", "audio_mask"])
def test_names_that_begin_like_the_tokens_speak_of_them(name):
    class Audio(Sounds):
        def forward(self, audio, **more):
            return self.block(audio)

    model = Audio()
    with_ends(model)
    with pytest.raises(SiteError, match=name):
        model(SOUND.view(2, 5, 2), **{name: SHOWN if name.endswith("k") else torch.tensor([3, 5])})


def test_an_int_mask_is_no_text_beside_frames():
    model = Sounds()
    with_ends(model)
    with pytest.raises(SiteError, match="'keep'"):
        model(SOUND.view(2, 5, 2), keep=SHOWN)


@pytest.mark.parametrize("ids", [[[1, 1, 1, 2, 2, 2]], [[2, 3, 4, 5, 6]], [[5]], [[0, 0, 1, 1]]])
def test_token_ids_are_no_mask_of_themselves(ids):
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8))
    shake(LoReftModel(model, modified_modules=["0"], first=1))
    model(torch.tensor(ids))


class Torchs(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, src, src_mask):
        return self.encoder(self.table(src), mask=src_mask, is_causal=True)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("where", ["table", "encoder.layers.0", "encoder.layers.0.linear2"])
def test_a_causal_mask_tells_of_no_padding_however_many_rows_there_are(where, batch):
    model = Torchs()
    ids, mask = IDS[:1].expand(batch, -1), nn.Transformer.generate_square_subsequent_mask(5)
    shake(LoReftModel(model, modified_modules=[where], first=2))
    torch.testing.assert_close(model(ids, mask), model(ids[:1], mask).expand(batch, -1, -1))


def test_a_module_that_may_be_given_a_state_says_what_is_none():
    class Forecast(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(8, 8)

        def forward(self, x, past_covariates):
            return self.block(x + past_covariates)

    x = torch.randn(2, 5, 8)
    model = Forecast()
    with_ends(model)
    with pytest.raises(SiteError, match=r"model.beside_tokens = \['past_covariates'\]"):
        model(x, x)
    model = Forecast()
    model.beside_tokens = ["past_covariates"]
    with_ends(model)
    model(x, x)


def test_the_advice_names_the_module_that_has_the_argument():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, ids, genre):
            return self.net(ids, genre=genre)

    model = Around()
    shake(LoReftModel(model, modified_modules=["block"], first=1))
    with pytest.raises(SiteError, match=r"set model\.net\.beside_tokens = \['genre'\]"):
        model(IDS, torch.tensor([3, 5]))


def test_labels_beside_a_prompt_are_for_outside():
    model = Net()
    SoftPromptModel(model, soft_token_num=2)
    with pytest.raises(SiteError, match="compute that outside of the model"):
        model(IDS, labels=IDS)


class Hides(nn.Module):
    """Finds padding by its id."""

    def __init__(self, pools):
        super().__init__()
        self.table, self.pools = nn.Embedding(30, 8, padding_idx=0), pools
        self.block = nn.Linear(8, 8)
        self.rnn = nn.GRU(8, 8, batch_first=True, bidirectional=True)

    def forward(self, user, ids):
        lengths = (ids != 0).sum(1)
        h = self.block(self.table(ids))
        packed = nn.utils.rnn.pack_padded_sequence(h, lengths, True, False)
        h = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], True, total_length=ids.size(1))[0]
        h = h + user[:, None, None]
        return (h * (ids != 0)[..., None]).sum(1) / lengths[:, None] if self.pools else h


@pytest.mark.parametrize("pools", [False, True])
def test_padding_by_id_is_found_behind_the_tokens_and_where_rows_are_pooled(pools):
    torch.manual_seed(0)
    model, user = Hides(pools), torch.tensor([3, 4])
    shake(LoReftModel(model, modified_modules=["block"], last=1))
    ids = torch.tensor([[4, 5, 6, 7, 8], [9, 8, 7, 0, 0]])
    together, alone = model(user, ids)[1:], model(user[1:], ids[1:, :3])
    torch.testing.assert_close(together if pools else together[:, :3], alone)


class Both(nn.Module):
    """Torch's own encoder and decoder, with masks of padding made inside."""

    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(30, 8, 0), nn.Embedding(30, 8, 0)
        self.both = nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True)

    def forward(self, src, tgt):
        pads = {"src_key_padding_mask": src == 0, "tgt_key_padding_mask": tgt == 0}
        pads |= {"memory_key_padding_mask": src == 0}
        return self.both(self.source(src), self.target(tgt), **pads)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@pytest.mark.parametrize("where", ["source", "target"])
def test_two_texts_with_padding_by_id_are_refused(where):
    model, ids = Both(), torch.tensor([[4, 5, 6, 7, 8], [9, 8, 7, 0, 0]])
    shake(LoReftModel(model, modified_modules=[where], last=1))
    with pytest.raises(SiteError, match="several texts"):
        model(ids, ids)
