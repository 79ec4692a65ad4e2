"""A model of one's own that calls a module in evaluation, and reads its weight in training."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import opendelta
from opendelta import AdapterModel, LoraModel, TiedWeightWarning, UnreachedWarning

pytestmark = pytest.mark.covers("unreached", "TiedWeightWarning")

IDS = torch.arange(12).view(2, 6)


class Chunked(nn.Module):
    """It computes its loss by the weight of its head, a part of the tokens at a time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.mlp = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.lm_head = nn.Linear(16, 40, bias=False)
        self.fails = False

    def forward(self, ids, targets=None):
        hidden = self.mlp(self.wte(ids)).relu()
        if targets is None:
            return self.lm_head(hidden)
        assert not self.fails
        parts = zip(hidden.flatten(0, 1).chunk(3), targets.flatten().chunk(3), strict=True)
        return sum(F.cross_entropy(F.linear(h, self.lm_head.weight), t) for h, t in parts)


class Features(Chunked):
    """Its training gives the features alone; the loss lies beside it."""

    def forward(self, ids, targets=None):
        hidden = self.mlp(self.wte(ids)).relu()
        return hidden if targets is not None else self.lm_head(hidden)


class InTurns(Chunked):
    """Two heads, the one of which trains at a time; both evaluate."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(16, 40, bias=False)

    def forward(self, ids, targets=None):
        hidden = self.mlp(self.wte(ids)).relu()
        if targets is None:
            return self.lm_head(hidden) + self.other(hidden)
        return F.cross_entropy(self.other(hidden).flatten(0, 1), targets.flatten())


def by_itself(model):
    return model(IDS, IDS)


def read_beside(model):
    return F.cross_entropy((model(IDS, IDS) @ model.lm_head.weight.T).flatten(0, 1), IDS.flatten())


def called_beside(model):
    loss = F.cross_entropy(model.lm_head(model(IDS, IDS)).flatten(0, 1), IDS.flatten())
    return loss + model.lm_head.weight.square().sum()


READING = {"by itself": (Chunked, by_itself), "beside it": (Features, read_beside)}


def attached(model, copied, **options):
    places = {"modules_to_save": ["lm_head"]} if copied else {}
    modified = ["mlp"] if copied else ["mlp", "lm_head"]
    delta = LoraModel(model, modified_modules=modified, **places, **options)
    delta.freeze_module()
    return delta


def told_in(model, step, steps=4, evaluations=1):
    """Return what is told of while a model is evaluated, and trained then."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            for _ in range(evaluations):
                with torch.no_grad():
                    model.eval()(IDS)
            step(model.train()).backward()
    return [str(each.message) for each in caught if each.category is UnreachedWarning]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", READING)
def test_a_weight_that_training_reads_is_told_after_an_evaluation(name, copied):
    model, step = READING[name][0](), READING[name][1]
    attached(model, copied)
    (text,) = told_in(model, step)
    assert "ran before" in text
    assert "lm_head.deltas.lora" in text
    assert "reads=True" in text


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", READING)
def test_it_is_told_after_a_first_forward_in_training_mode_too(name, copied):
    """A module is made in training mode, and its user may look at its output first."""
    model, step = READING[name][0](), READING[name][1]
    attached(model, copied)
    model(IDS)
    (text,) = told_in(model, step)
    assert "lm_head.deltas.lora" in text


@pytest.mark.parametrize("name", READING)
def test_it_is_told_where_nothing_else_trains(name):
    model, step = READING[name][0](), READING[name][1]
    LoraModel(model, modified_modules=["lm_head"]).freeze_module()

    def ends(model):
        loss = step(model)
        return loss if loss.requires_grad else torch.ones((), requires_grad=True)

    (text,) = told_in(model, ends)
    assert "lm_head.deltas.lora" in text


def test_an_adapter_is_told_of_with_a_way_that_works():
    model = Chunked()
    AdapterModel(model, modified_modules=["mlp", "lm_head"]).freeze_module()
    (text,) = told_in(model, by_itself)
    assert "Attach with a method that folds into the weight, and reads=True" in text


LOOKS = {
    "a mean": lambda weight: weight.abs().mean().item(),
    "a norm": torch.norm,
    "its class": lambda weight: isinstance(weight, nn.Parameter),
    "its id": id,
    "zeros like it": torch.zeros_like,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_at_a_weight_between_steps_is_no_use_of_it(look):
    model = InTurns()
    attached(model, copied=False)

    def step(model):
        look(model.lm_head.weight)
        loss = by_itself(model)
        loss.register_hook(lambda grad: None)
        return loss

    texts = []
    for _ in range(4):
        texts += told_in(model, step, steps=1)
        look(model.lm_head.weight)
    assert texts == []


def test_a_shown_weight_is_waited_for_until_the_model_trains():
    model, step = Features(), read_beside
    attached(model, copied=False, reads=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for _ in range(10):
            model.eval()(IDS, IDS)
    assert told_in(model, step) == []


@pytest.mark.parametrize("evaluations", [0, 1])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", READING)
def test_with_reads_it_trains_and_nothing_is_told(name, copied, evaluations):
    model, step = READING[name][0](), READING[name][1]
    attached(model, copied, reads=True)
    assert told_in(model, step, 15, evaluations) == []
    mine = [p for n, p in model.named_parameters() if p.requires_grad and "lm_head" in n]
    assert mine
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mine[-1:])


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("case", [(InTurns, by_itself), (Features, called_beside)])
def test_a_head_that_does_not_train_or_is_called_beside_is_not_told_of(case, copied):
    model, step = case[0](), case[1]
    attached(model, copied)
    assert told_in(model, step) == []
    assert opendelta.unreached(model) == []


def test_a_forward_that_fails_loses_no_note_of_what_ran():
    model = Chunked()
    attached(model, copied=False)
    with torch.no_grad():
        model.eval()(IDS)
    model.fails = True
    with pytest.raises(AssertionError):
        by_itself(model.train())
    model.fails = False
    assert len(told_in(model, by_itself, evaluations=0)) == 1
    assert opendelta.unreached(model) == []


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_told_too_and_a_detach_leaves_no_hook(way):
    model = Chunked()
    delta = attached(model, copied=False)
    with torch.no_grad():
        model.eval()(IDS)
    assert len(told_in(way(model), by_itself, evaluations=0)) == 1
    delta.detach()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_the_watch_ends_after_some_steps():
    model = InTurns()
    attached(model, copied=False)
    assert told_in(model, by_itself, steps=14) == []
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("copied", [False, True])
def test_a_shown_weight_that_nobody_reads_is_told_after_some_forwards(copied):
    class Unused(Features):
        def forward(self, ids):
            return self.mlp(self.wte(ids)).relu()

    model = Unused()
    attached(model, copied, reads=True)
    texts = []
    for _ in range(8):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(IDS)
        texts.append(" ".join(str(each.message) for each in caught))
    assert [bool(text) for text in texts] == [False] * 5 + [True] + [False] * 2
    assert "Nothing called the module or read its weight" in texts[5]
    assert "reads=True" not in texts[5]


class Items(nn.Module):
    """A recommender: it looks items up in a table, and scores all of them by the same table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.body = nn.Embedding(40, 16), nn.Linear(16, 16)

    def forward(self, ids):
        return self.body(self.table(ids)) @ self.table.weight.T


class Symmetric(nn.Module):
    """It multiplies by a weight, and by the transposed one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.body, self.table = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, ids):
        return self.table(self.body(self.emb(ids))) @ self.table.weight.T


def told_when_attaching(attach):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach()
    return [str(each.message) for each in caught if each.category is TiedWeightWarning]


COPY = {"modified_modules": ["body"], "modules_to_save": ["table"]}
BOTH = {
    Items: {**COPY, "reads": True},
    Symmetric: {"modified_modules": ["table"], "reads": True},
}


@pytest.mark.parametrize("cls", BOTH)
def test_a_weight_that_one_forward_calls_and_reads_is_told_when_attaching(cls):
    (text,) = told_when_attaching(lambda: LoraModel(cls(), modified_modules=["table"]))
    assert f"'lora' on 'table' acts in calls of it alone, and {cls.__name__} reads" in text
    assert ("modules_to_save=['table'] and reads=True" in text) == (cls is Items)
    (text,) = told_when_attaching(lambda: LoraModel(cls(), **COPY))
    assert "attach with reads=True" in text


@pytest.mark.parametrize(("cls", "options"), [*BOTH.items(), (Symmetric, BOTH[Items])])
def test_the_way_that_the_message_names_changes_both_uses(cls, options):
    model = cls()
    assert told_when_attaching(lambda: LoraModel(model, **options)) == []
    site, before = model.table, model.table.weight.detach().clone()
    own = getattr(site.deltas.lora, "module", None)
    with torch.no_grad():
        if own is None:
            site.deltas.lora.lora_B.fill_(0.1)
        else:
            own.weight.mul_(2)
    plain = cls()
    changed = before * 2 if own is not None else site.weight.detach()
    plain.table.weight.data.copy_(changed)
    assert not torch.equal(changed, before)
    torch.testing.assert_close(model(IDS), plain(IDS))


def test_an_adapter_and_modules_that_are_called_alone_are_not_told_of():
    adapter = lambda: AdapterModel(Symmetric(), modified_modules=["table"])  # noqa: E731
    assert told_when_attaching(adapter) == []
    assert told_when_attaching(lambda: LoraModel(Symmetric(), modified_modules=["body"])) == []


class Recomputing(Chunked):
    """Its loss is computed again in the backward, where gradients are on for the first time."""

    def forward(self, ids, targets=None):
        hidden = self.mlp(self.wte(ids)).relu()
        if targets is None:
            return self.lm_head(hidden)
        return checkpoint(self.loss, hidden, targets, use_reentrant=True)

    def loss(self, hidden, targets):
        return F.cross_entropy(
            F.linear(hidden, self.lm_head.weight).flatten(0, 1), targets.flatten()
        )


@pytest.mark.parametrize("copied", [False, True])
def test_a_read_that_is_computed_again_in_the_backward_is_told(copied):
    model = Recomputing()
    attached(model, copied)
    texts = told_in(model, by_itself, 6)
    assert len(texts) == 1
    assert "lm_head" in texts[0]
    assert "reads=True" in texts[0]
    model = Recomputing()
    attached(model, copied, reads=True)
    assert told_in(model, by_itself, 6) == []
