"""Arguments of somebody's own models that tell of tokens under names that nobody can know."""

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
    "who sees whom": SEES,
    "who sees whom in each head": SEES[:, None],
    "added to the scores of pairs": torch.where(SEES, 0.0, -1e9)[:, None],
}
DOCUMENTS = {
    "numbers that begin again": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]),
    "numbers of all rows": torch.tensor([0, 1, 2, 0, 1]),
    "ends": torch.tensor([0, 3, 5]),
    "blocks of pairs": PARTS,
    "blocks of pairs, causal": PARTS & CAUSAL,
}
IN_RUNS = {
    "runs": torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]),
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


@pytest.mark.parametrize("put", [with_ends, lambda model: SoftPromptModel(model, soft_token_num=2)])
def test_a_model_says_that_an_argument_tells_nothing_of_its_tokens(put):
    model, told = Net(), Net()
    told.load_state_dict(model.state_dict())
    told.beside_tokens = ["genre"]
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
