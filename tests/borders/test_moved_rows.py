"""Models of somebody's own that put their rows, or the tokens, in another order before a module."""

import pytest
import torch
from torch import nn

import opendelta
from opendelta import GateModel, LoraModel, LoReftModel, SiteError

ROWS = {"sorted", "sorted up"}  # kinds of models that move the rows
TOKENS = {"turned", "moved right"}  # those that move the tokens inside
KEPT = {"plain", "shifted"}


class Net(nn.Module):
    """Embeds its tokens and puts them in order, before `fc`."""

    def __init__(self, order):
        super().__init__()
        self.order, self.is_causal = order, False
        self.embed = nn.Embedding(50, 16, padding_idx=0)
        self.fc, self.mixes = nn.Linear(16, 16), nn.GRU(16, 8, batch_first=True, bidirectional=True)

    def encode(self, ids, keep):
        if self.order.startswith("sorted"):
            chosen = keep.sum(1).argsort(descending=self.order == "sorted")
            ids = ids[chosen]
        elif self.order == "moved right":
            ids = ids.gather(1, keep.long().argsort(dim=1, stable=True))
        x = self.embed(ids)
        x = x.flip(1) if self.order == "turned" else x
        if self.order == "shifted":
            x = torch.cat([x[:, :1] * 0, x[:, :-1]], 1)
        return self.mixes(torch.tanh(self.fc(x)))[0]


class ByMask(Net):
    def forward(self, input_ids, attention_mask):
        return self.encode(input_ids, attention_mask)


class ByIds(Net):
    def forward(self, x):
        return self.encode(x, (x != 0).long())


class ByLengths(Net):
    def forward(self, tokens, lengths):
        return self.encode(tokens, torch.arange(tokens.size(1))[None] < lengths[:, None])


class ByPadding(Net):
    def forward(self, ids, key_padding_mask=None):
        return self.encode(ids, ~key_padding_mask if key_padding_mask is not None else ids != 0)


FORMS = [ByMask, ByIds, ByLengths, ByPadding]


def refused(moves, what, function):
    if not moves:
        return function()
    with pytest.raises(SiteError, match=f"puts the {what} of .* another order before 'fc'"):
        function()
    return None


def moved(order):
    return "rows" if order in ROWS else "tokens"


@pytest.mark.covers("LoReftModel", "GateModel", "SiteError")
@pytest.mark.parametrize("order", sorted(ROWS | TOKENS | KEPT))
@pytest.mark.parametrize("form", FORMS)
def test_what_chooses_tokens_is_refused_where_they_move(form, order):
    model = form(order).eval()
    names = list(model.state_dict())

    def reft(**chosen):
        return LoReftModel(model, modified_modules=["fc"], low_rank_dimension=2, **chosen)

    refused(order not in KEPT, moved(order), lambda: reft(first=2, last=1).detach())
    reft().detach()
    for name in "ab":
        LoraModel(model, modified_modules=["fc"], name=name)
    refused(order not in KEPT, moved(order), lambda: GateModel(model, ["a", "b"], per="sequence"))
    for name in opendelta.composition(model).names:
        opendelta.composition(model)[name].detach()
    assert list(model.state_dict()) == names
    opendelta.assert_pristine(model)


@pytest.mark.covers("route", "SiteError")
@pytest.mark.parametrize("order", sorted(ROWS | TOKENS | KEPT))
@pytest.mark.parametrize("form", FORMS)
def test_routes_are_refused_where_rows_move(form, order):
    model = form(order).eval()
    LoraModel(model, modified_modules=["fc"], name="a")

    def enter():
        with opendelta.route(model, ["a", None]):
            pass

    refused(order in ROWS, "rows", enter)
    model.order = "plain"  # not looked at again
    refused(order in ROWS, "rows", enter)


@pytest.mark.covers("route")
def test_rows_that_move_behind_the_module_are_routed():
    class Behind(ByMask):
        def forward(self, input_ids, attention_mask):
            x = torch.tanh(self.fc(self.embed(input_ids)))
            return x[attention_mask.sum(1).argsort(descending=True)]

    model = Behind("plain").eval()
    delta = LoraModel(model, modified_modules=["fc"], name="a")
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_()
    ids, mask = torch.tensor([[3, 4, 0], [5, 6, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    with torch.no_grad():
        on = model(ids, mask)
        with delta.disabled():
            off = model(ids, mask)
        with opendelta.route(model, ["a", None]):
            both = model(ids, mask)
    torch.testing.assert_close(both, torch.stack([off[0], on[1]]))
    assert not torch.allclose(on, off)
