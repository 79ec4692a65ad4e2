"""A module that is used otherwise than by calling it gets no merge that would change its use."""

import copy
import dataclasses
import functools
import pickle
import warnings

import pytest
import torch
import transformers
from support.nets import shake
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import prune

import opendelta
from opendelta import LoraModel, SiteError, UnreachedWarning

pytestmark = pytest.mark.covers("Composition.merge", "Composition.to_backbone", "unreached")

X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
VERBS = ["merge", "to_backbone"]


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.out = nn.Linear(6, 6), nn.Linear(6, 6)
        self.keep(self.q)

    def keep(self, q):
        pass

    def forward(self, x):
        return self.out(self.use(x))


class OfItsClass(Around):
    def use(self, x):
        return nn.Linear.forward(self.q, x)


class BoundMethod(Around):
    def keep(self, q):
        self.project = q.forward

    def use(self, x):
        return self.project(x)


class Partial(BoundMethod):
    def keep(self, q):
        self.project = functools.partial(nn.Linear.forward, q)


class Helper:
    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return F.linear(x, self.module.weight)


class AnObject(BoundMethod):
    def keep(self, q):
        self.project = Helper(q)


@dataclasses.dataclass
class Parts:
    named: dict


class ADataclass(Around):
    def keep(self, q):
        self.parts = Parts({"q": [q.weight]})

    def use(self, x):
        return x @ self.parts.named["q"][0]


class AClosure(BoundMethod):
    def keep(self, q):
        self.project = lambda x: x @ q.weight


class AHook(Around):
    def keep(self, q):
        self.out.register_forward_hook(lambda _module, _args, output: output @ q.weight)

    def use(self, x):
        return x


class AHookOnTheWhole(AHook):
    def keep(self, q):
        self.register_forward_hook(lambda _module, _args, output: output @ q.weight)


def read_by(module, x):
    return F.linear(x, module.weight)


class AHookOnItself(Around):
    """The hook is given the module, and holds it nowhere."""

    def keep(self, q):
        q.register_forward_hook(lambda module, args, y: y + F.linear(args[0], module.weight))

    def use(self, x):
        return self.q(x)


class AHookBefore(AHookOnItself):
    def keep(self, q):
        q.register_forward_pre_hook(lambda module, args: (args[0] + args[0] @ module.weight,))


class AHookThatCallsAnother(AHookOnItself):
    def keep(self, q):
        def hook(more, module, args, kwargs, y):
            return y + more * read_by(module, args[0])

        q.register_forward_hook(functools.partial(hook, 2), with_kwargs=True)


class AHookOfTheWholeByName(AHookOnItself):
    def keep(self, q):
        self.register_forward_hook(lambda module, _args, y: y @ module.q.weight)


class AnObjectAsHook(AHookOnItself):
    def keep(self, q):
        class Hook:
            def __call__(self, module, args, y):
                return y + read_by(module, args[0])

        q.register_forward_hook(Hook())


HOOKS = [AHookOnItself, AHookBefore, AHookThatCallsAnother, AHookOfTheWholeByName, AnObjectAsHook]


class InsideAFunction(Around):
    def __init__(self):
        super().__init__()
        weight = self.q.weight

        class Uses(nn.Module):
            def forward(self, x):
                return x @ weight

        self.uses = Uses()

    def use(self, x):
        return self.uses(x)


SILENT = [OfItsClass, BoundMethod, Partial, AnObject, ADataclass, AClosure, AHook]
SILENT += [AHookOnTheWhole, InsideAFunction]


class AndCalled:
    def use(self, x):
        return super().use(x) + self.q(x)


BOTH = [type(f"{cls.__name__}AndCalled", (AndCalled, cls), {}) for cls in SILENT]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize("net", [*SILENT, *BOTH, *HOOKS])
def test_a_merge_that_would_change_its_use_is_refused(net, ran, verb):
    model = net()
    delta = shake(LoraModel(model, modified_modules=["q"]))
    if ran:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreachedWarning)
            model(X)
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match=r"'q' \(Linear\): "):
        getattr(opendelta.composition(model), verb)()
    assert opendelta.snapshot(model) == before
    delta.disable()
    opendelta.composition(model).to_backbone()


def looks(module, args, y):
    assert y.dtype == module.weight.dtype


def test_a_hook_that_only_looks_hinders_no_merge():
    model = AHookOnItself()
    model.q._forward_hooks.clear()
    model.q.register_forward_hook(looks)
    shake(LoraModel(model, modified_modules=["q"]))
    before = model(X)
    opendelta.composition(model).merge()
    torch.testing.assert_close(model(X), before)


class OnNoShapes:
    def forward(self, x):
        if x.shape != (2, 3, 6):
            raise ValueError("the input must be [2, 3, 6]")
        return super().forward(x)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("net", SILENT)
def test_what_a_forward_missed_is_refused_where_no_run_tells(net, verb):
    model = type("OnNoShapes", (OnNoShapes, net), {})()
    shake(LoraModel(model, modified_modules=["q"]))
    with pytest.warns(UnreachedWarning):
        model(X)
    with pytest.raises(SiteError, match=r"'q' \(Linear\): 'lora' has not run, .*reach it"):
        getattr(opendelta.composition(model), verb)()


@pytest.mark.parametrize("verb", VERBS)
def test_a_hook_that_may_read_is_refused_where_no_run_tells(verb):
    model = type("OnNoShapes", (OnNoShapes, AHookOnItself), {})()
    shake(LoraModel(model, modified_modules=["q"]))
    model(X)
    with pytest.raises(SiteError, match=r"may read \(no run on shapes tells\) its weight"):
        getattr(opendelta.composition(model), verb)()


class Experts(nn.Module):
    """No run on shapes finds out which of them run."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        return self.experts[int(x.sum() < -1e9)](x)


@pytest.mark.parametrize("verb", VERBS)
def test_an_expert_that_a_forward_missed_is_merged(verb):
    model = Experts().eval()  # in training, the warning waits for more forwards
    shake(LoraModel(model, modified_modules=["0", "1"]))
    with pytest.warns(UnreachedWarning):
        before = model(X)
    made = getattr(opendelta.composition(model), verb)()
    torch.testing.assert_close((model if verb == "merge" else made)(X), before)


class CalledAside(BoundMethod):
    """What is held is called as it should be."""

    def keep(self, q):
        self.kept = [q]

    def use(self, x):
        return self.kept[0](x)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("ran", [True, False])
def test_a_module_that_is_held_aside_and_called_is_merged(ran, verb):
    model = CalledAside()
    shake(LoraModel(model, modified_modules=["q"]))
    before = model(X) if ran else None
    made = getattr(opendelta.composition(model), verb)()
    after = (model if verb == "merge" else made)(X)
    assert before is None or torch.allclose(after, before, atol=1e-5)


class InADict(CalledAside):
    def keep(self, q):
        self.kept = {"weight": q.weight}

    def use(self, x):
        return self.q(x) + x @ self.kept["weight"]


class AsFunction(Around):
    def use(self, x):
        return functional_call(self.q, {"weight": 2 * self.q.weight}, (x,))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("net", [InADict, ADataclass, InsideAFunction, AsFunction, *BOTH[4:5]])
def test_a_weight_that_is_had_otherwise_than_shown_is_refused(net, verb):
    model = net()
    shake(LoraModel(model, modified_modules=["q"], reads=True))
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match=r"'q' \(Linear\): .*where reads=True does not act"):
        getattr(opendelta.composition(model), verb)()
    assert opendelta.snapshot(model) == before


def test_a_weight_that_is_lent_unchanged_is_merged():
    class Same(Around):
        def use(self, x):
            return functional_call(self.q, {"weight": self.q._parameters["weight"]}, (x,))

    model = Same()
    shake(LoraModel(model, modified_modules=["q"]))
    before = model(X)
    opendelta.composition(model).merge()
    torch.testing.assert_close(model(X), before)


RUNS = []


class Counted(Around):
    def use(self, x):
        RUNS.append(x.shape)
        return self.q(x)


@pytest.mark.parametrize("merged", [True, False])
def test_a_layer_that_could_not_run_is_merged_without_another_run(merged):
    model = Counted()
    delta = shake(LoraModel(model, modified_modules=["q"]))
    composed = opendelta.composition(model)
    rest, back = (composed.merge, composed.unmerge) if merged else (delta.disable, delta.enable)
    rest()
    model(X)  # the first forward, in which the layer itself does not run
    back()
    RUNS.clear()
    composed.merge()
    assert not RUNS


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def by_sampling(model, delta):
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)


def by_training(model, delta):
    model.train()(torch.tensor([[5, 6, 7]])).logits.sum().backward()


def by_a_check(model, delta):
    opendelta.check(model, {"input_ids": torch.tensor([[5, 6, 7]])})


def by_another_stage(model, delta):
    other = LoraModel(model, modified_modules=["q_proj"], name="other")
    with opendelta.composition(model).only(other):
        by_training(model, delta)
    other.detach()


@pytest.mark.parametrize("before", [by_sampling, by_training, by_a_check, by_another_stage])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("reads", [False, True])
def test_a_loss_that_reads_the_head_is_told_whatever_ran_before(copied, reads, before):
    model = tiny_llama()
    places = {"modules_to_save": ["lm_head"]} if copied else {"modified_modules": ["lm_head"]}
    delta = LoraModel(model, reads=reads, **places)
    delta.freeze_module()
    ids = torch.tensor([[5, 6, 7]])
    before(model, delta)
    whole = model.forward

    def forward(input_ids, fused=False):
        if not fused:
            return whole(input_ids)
        states = model.model(input_ids).last_hidden_state
        return torch.nn.functional.linear(states, model.lm_head.weight)

    model.forward = forward
    model.train()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        outs = [model(ids, fused=True) for _ in range(2)]
    assert all(out.requires_grad == reads for out in outs) or copied
    told = [str(each.message) for each in told if each.category is UnreachedWarning]
    assert len(told) == (not reads)
    assert all("did not run in" in text for text in told)


def test_a_head_that_trains_after_sampling_is_not_told_of():
    model = tiny_llama()
    LoraModel(model, modified_modules=["lm_head"])
    ids = torch.tensor([[5, 6, 7]])
    model.generate(ids, max_new_tokens=2, do_sample=False)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model(ids).logits.sum().backward()
        model.eval()(ids)
    assert not opendelta.unreached(model)
    copy.deepcopy(model)(ids).logits.sum().backward()
    opendelta.composition(model)["lora"].detach()
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


class Policy(torch.nn.Module):
    """A language model with a value head, of which a loop calls the parts."""

    def __init__(self):
        super().__init__()
        self.lm, self.value = tiny_llama(), torch.nn.Linear(16, 1)

    def forward(self, input_ids):
        states = self.lm(input_ids, output_hidden_states=True).hidden_states[-1]
        return self.value(states)


def reading(lm, states):
    return torch.nn.functional.linear(states, lm.lm_head.weight)


def calling(lm, states):
    return lm.lm_head(states)


def calling_in_parts(lm, states):
    return torch.cat([lm.lm_head(part) for part in states.split(1, 1)], 1)


def by_parts(lm, head, passes=1):
    """Train as a loop does that calls the parts of a model, maybe for several texts at once."""
    ids = torch.tensor([[5, 6, 7]])
    states = [lm.model(ids + n).last_hidden_state for n in range(passes)]
    sum(head(lm, each).square().sum() for each in states).backward()


def told_of(function):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        function()
    return [str(each.message) for each in told if each.category is UnreachedWarning]


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_loop_over_parts_that_reads_the_head_is_told(wrapped, reads, copied, passes):
    model = Policy() if wrapped else tiny_llama()
    lm = model.lm if wrapped else model
    places = {"modules_to_save": ["lm_head"]} if copied else {"modified_modules": ["lm_head"]}
    LoraModel(model, reads=reads, **places).freeze_module(exclude=["deltas", "norm"])
    assert not told_of(lambda: by_parts(model.eval() and lm, reading, passes))
    model.train()
    told = told_of(lambda: [by_parts(lm, reading, passes) for _ in range(2)])
    assert len(told) == (not reads)
    where = "lm.lm_head" if wrapped else "lm_head"
    assert all(f"LlamaModel that trains: {where}.deltas.lora" in text for text in told)


@pytest.mark.parametrize("head", [calling, calling_in_parts])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_loop_over_parts_that_calls_the_head_is_not_told(head, passes):
    model = tiny_llama().train()
    delta = LoraModel(model, modified_modules=["lm_head"])
    assert not told_of(lambda: [by_parts(model, head, passes) for _ in range(2)])
    with delta.disabled():
        assert not told_of(lambda: by_parts(model, reading))
    assert not told_of(lambda: by_parts(model, head))


def by_its_states(model):
    states = model(IDS, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
    reading(model, states).sum().backward()


def by_a_weight_kept(model):
    weight = model.lm_head.weight
    (model.model(IDS).last_hidden_state @ weight.T).sum().backward()


def by_a_compiled_loss(model):
    loss = torch.compile(lambda states: reading(model, states).sum(), backend="eager")
    loss(model.model(IDS).last_hidden_state).backward()


@pytest.mark.parametrize("step", [by_its_states, by_a_weight_kept, by_a_compiled_loss])
@pytest.mark.parametrize("reads", [False, True])
def test_a_loss_that_reads_the_head_is_told_also_if_the_head_ran(step, reads):
    model = tiny_llama().train()
    delta = LoraModel(model, modified_modules=["lm_head"], reads=reads)
    delta.freeze_module(exclude=["deltas", "norm"])
    told = told_of(lambda: [step(model) for _ in range(2)])
    assert len(told) == (not reads)
    assert all("got no gradient in a backward pass through LlamaModel" in text for text in told)


def beside_its_loss(model):
    loss = model(IDS, labels=IDS).loss
    (loss + model.model(IDS).last_hidden_state.mean(1).square().sum()).backward()


def before_its_loss(model):
    aside = model.model(IDS).last_hidden_state.mean(1).square().sum()
    (aside + model(IDS, labels=IDS).loss).backward()


def after_its_loss(model):
    model(IDS, labels=IDS).loss.backward()
    model.model(IDS).last_hidden_state.sum().backward()


def of_its_states_alone(model):
    model(IDS, output_hidden_states=True).hidden_states[-1].sum().backward()


def by_a_compiled_head(model):
    head = torch.compile(model.lm_head, backend="eager")
    head(model.model(IDS).last_hidden_state).sum().backward()


def by_the_forward_of_the_head(model):
    model.lm_head.forward(model.model(IDS).last_hidden_state).sum().backward()


def after_looks(model):
    size = model.lm_head.weight.shape[0] + model.lm_head.weight.detach().norm().item()
    size += model.lm_head.weight.detach().cpu().sum() + model.lm_head.weight.data.sum()
    with torch.no_grad():
        size += model.lm_head.weight.abs().sum()
    after_its_loss(model)
    assert isinstance(model.lm_head.weight, nn.Parameter)
    assert size


@pytest.mark.parametrize("copied", [False, True])
def test_a_weight_that_is_fetched_before_the_body_runs_is_told(copied):
    model = tiny_llama().train()
    places = {"modules_to_save": ["lm_head"]} if copied else {"modified_modules": ["lm_head"]}
    LoraModel(model, **places)
    model.requires_grad_(True)
    model(IDS, labels=IDS).loss.item()  # a look, without a step
    assert not told_of(lambda: [model(IDS, labels=IDS).loss.backward() for _ in range(2)])
    assert len(told_of(lambda: [by_a_weight_kept(model) for _ in range(2)])) == 1


class InTurns(transformers.LlamaForCausalLM):
    """A model with two heads, of which each step trains one."""

    def __init__(self, config):
        super().__init__(config)
        self.score = nn.Linear(16, 2)
        self.post_init()

    def forward(self, input_ids, score=False):
        states = self.model(input_ids).last_hidden_state
        return self.score(states) if score else self.lm_head(states)


@pytest.mark.parametrize("copied", [False, True])
def test_heads_that_train_in_turns_are_told_of_in_the_first_forward_alone(copied):
    model = InTurns(tiny_llama().config).train()
    heads = ["lm_head", "score"]
    places = {"modules_to_save": heads} if copied else {"modified_modules": heads}
    LoraModel(model, **places).freeze_module()
    (text,) = told_of(lambda: [model(IDS, score=n % 2).sum().backward() for n in range(6)])
    assert "did not run in the first forward of InTurns: score.deltas.lora" in text


LOSSES = [
    beside_its_loss, before_its_loss, after_its_loss, of_its_states_alone, by_a_compiled_head,
    by_the_forward_of_the_head, after_looks,
]  # fmt: skip


@pytest.mark.parametrize("step", LOSSES)
def test_a_loss_of_hidden_states_is_not_told_of_a_head_that_nobody_reads(step):
    model = tiny_llama().train()
    LoraModel(model, modified_modules=["q_proj", "lm_head"]).freeze_module()
    assert not told_of(lambda: [step(model) for _ in range(2)])


def test_a_weight_that_was_read_in_one_step_is_not_told_in_the_next():
    model = tiny_llama().train()
    delta = LoraModel(model, modified_modules=["q_proj", "lm_head"])
    delta.freeze_module(exclude=["deltas", "norm"])
    with delta.disabled():
        by_parts(model, reading)
    assert not told_of(lambda: after_its_loss(model))


def test_a_head_that_reads_its_weight_s_dtype_in_its_model_is_not_told_of():
    config = transformers.MambaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.MambaForCausalLM(config).train()
    LoraModel(model, modified_modules=["in_proj", "lm_head"]).freeze_module()

    def steps():
        model(IDS, labels=IDS).loss.backward()
        model.backbone(IDS).last_hidden_state.sum().backward()

    assert not told_of(steps)


class TwoTasks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bert = bert().bert
        self.a, self.b = torch.nn.Linear(16, 2), torch.nn.Linear(16, 3)

    @property
    def base_model(self):
        return self.bert

    def forward(self, input_ids, task):
        return getattr(self, task)(self.bert(input_ids).pooler_output)


def roberta():
    config = transformers.RobertaConfig(**SMALL, intermediate_size=24)
    return transformers.RobertaForSequenceClassification(config)


def deep(model):
    model.classifier = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 2))
    return model


def normed(model):
    torch.nn.utils.parametrizations.weight_norm(model.classifier)
    return model


HEADS = {
    "roberta": roberta,
    "deep": lambda: deep(bert()),
    "weight_norm": lambda: normed(bert()),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_any_kind_is_not_told_of_in_plain_training(name):
    model = HEADS[name]().train()
    if name == "weight_norm":
        LoraModel(model, modified_modules=["classifier"])
    LoraModel(model, modified_modules=["query"], modules_to_save=["classifier"]).freeze_module()
    assert not told_of(lambda: [model(IDS).logits.sum().backward() for _ in range(2)])


def masked(kind, **settings):
    config = getattr(transformers, f"{kind}Config")(
        **SMALL, intermediate_size=24, tie_word_embeddings=False, **settings
    )
    return getattr(transformers, f"{kind}ForMaskedLM")(config)


class OfALanguageModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lm = tiny_llama().model
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 50))

    @property
    def base_model(self):
        return self.lm

    def forward(self, input_ids):
        return self.head(self.lm(input_ids).last_hidden_state)


OF_PARTS = {  # {name: (model, its head, the part whose weight a loss reads)}
    "bert": (lambda: masked("Bert"), "cls", lambda m: m.get_output_embeddings()),
    "its part": (lambda: masked("Bert"), "cls.predictions", lambda m: m.cls.predictions.decoder),
    "roberta": (lambda: masked("Roberta"), "lm_head", lambda m: m.get_output_embeddings()),
    "sequential": (OfALanguageModel, "head", lambda m: m.head[-1]),
    "iterated": (OfALanguageModel, "head", lambda m: [*m.head][-1]),
}


def outputs(model):
    return getattr(out := model(IDS), "logits", out)


@pytest.mark.parametrize("name", OF_PARTS)
@pytest.mark.parametrize("reads", [False, True])
def test_a_loss_that_reads_a_part_of_a_copied_head_is_told(name, reads):
    make, head, part = OF_PARTS[name]
    torch.manual_seed(0)
    model = make().train()
    delta = LoraModel(model, modified_modules=[], modules_to_save=[head], reads=reads)
    model.requires_grad_(True)

    def by_calling():
        states = model.base_model(IDS)[0]
        model.get_submodule(head)(states).square().sum().backward()

    def by_reading():
        (model.base_model(IDS)[0] @ part(model).weight.T).square().sum().backward()

    def plain():
        outputs(model).square().sum().backward()

    assert not told_of(lambda: [step() for step in (plain, by_calling) * 2])
    assert part(model).weight.shape[0] == 50
    told = told_of(lambda: [by_reading() for _ in range(2)])
    assert len(told) == (not reads)
    assert all(f"{head}.deltas.lora" in text and "reads=True" in text for text in told)
    assert not told_of(lambda: [plain(), by_calling()])
    with delta.disabled():
        model.eval()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(outputs(compiled), outputs(model))


def by_weight_norm(head):
    torch.nn.utils.weight_norm(head)
    torch.nn.utils.remove_weight_norm(head)


def by_parametrizing(head):
    torch.nn.utils.parametrizations.weight_norm(head)
    torch.nn.utils.parametrize.remove_parametrizations(head, "weight")


def by_deleting(head):
    weight = head.weight
    del head.weight
    assert not hasattr(head, "weight")
    head.weight = weight


def by_pruning(head):
    prune.random_unstructured(head, "weight", 0.5)
    prune.remove(head, "weight")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", [by_weight_norm, by_parametrizing, by_deleting, by_pruning])
@pytest.mark.parametrize(("copied", "reads"), [(False, False), (True, False), (True, True)])
def test_the_weight_of_a_watched_head_can_be_changed(copied, reads, change):
    model = tiny_llama().train()
    places = {"modules_to_save": ["lm_head"]} if copied else {"modified_modules": ["lm_head"]}
    shake(LoraModel(model, reads=reads, **places))
    change(model.lm_head)
    assert model(IDS).logits.requires_grad
    assert isinstance(model.lm_head.weight, torch.Tensor)


def by_an_early_exit(model):
    states = model(IDS, output_hidden_states=True).hidden_states[0]
    reading(model, model.model.norm(states)).sum().backward()


def test_a_loss_on_any_hidden_state_that_reads_the_head_is_told():
    model = tiny_llama().train()
    LoraModel(model, modified_modules=["lm_head"])
    model.requires_grad_(True)
    model(IDS).logits.sum().backward()
    assert len(told_of(lambda: [by_an_early_exit(model) for _ in range(2)])) == 1


def test_a_copy_of_the_whole_model_is_watched_too():
    model = tiny_llama().train()
    LoraModel(model, modified_modules=["lm_head"])
    model(IDS)
    twin = copy.deepcopy(model)
    assert len(told_of(lambda: [by_parts(twin, reading) for _ in range(2)])) == 1
    assert not told_of(lambda: by_parts(model, calling))


def test_outputs_of_a_watched_head_are_plain_tensors(tmp_path):
    model = tiny_llama().train()
    LoraModel(model, modified_modules=["lm_head"])
    logits = model(IDS).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(logits, tmp_path / "logits.pt")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


def test_heads_of_tasks_in_turn_are_told_of_once():
    model = TwoTasks().train()
    LoraModel(model, modified_modules=["query"], modules_to_save=["a", "b"]).freeze_module()
    told = told_of(lambda: [model(IDS, task).sum().backward() for task in "abab"])
    assert len(told) == 1


def test_a_head_that_is_watched_is_copied_pickled_and_left_as_it_was():
    model = tiny_llama().train()
    before = opendelta.snapshot(model)
    delta = shake(LoraModel(model, modified_modules=["lm_head"]))
    expected = model(IDS).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS).logits, expected)
        assert twin.lm_head.weight is twin.lm_head._parameters["weight"]
    delta.detach()
    opendelta.assert_pristine(model, like=before)
    assert type(model.lm_head) is nn.Linear


def test_a_part_alone_takes_no_head_along():
    model = tiny_llama().train()
    LoraModel(model, modified_modules=["lm_head"])
    for part in (copy.deepcopy(model.model), pickle.loads(pickle.dumps(model.model))):
        assert part.train()(torch.tensor([[5, 6, 7]])).last_hidden_state.requires_grad
        (watch,) = part._forward_hooks.values()
        assert vars(watch) == vars(type(watch)())


SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 50}
IDS = torch.tensor([[5, 6, 7]])


def t5():
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_heads=2, num_layers=1, vocab_size=50,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def opt():
    config = transformers.OPTConfig(
        **SMALL, ffn_dim=24, word_embed_proj_dim=16, tie_word_embeddings=False
    )
    return transformers.OPTForCausalLM(config)


def bert():
    config = transformers.BertConfig(**SMALL, intermediate_size=24)
    return transformers.BertForSequenceClassification(config)


def decoded(model):
    return model.decoder(IDS, encoder_hidden_states=model.encoder(IDS)[0])[0]


LOOPS = {  # {name: (model, head, what a loop computes of its parts)}
    "encoder and decoder": (t5, "lm_head", decoded),
    "a part of the base": (opt, "lm_head", lambda m: m.model.decoder(IDS)[0]),
    "classifier": (bert, "classifier", lambda m: m.bert(IDS).pooler_output),
}


@pytest.mark.filterwarnings("ignore::opendelta.TiedWeightWarning")  # T5's
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_over_any_parts_is_told_if_it_reads_the_head_alone(loop):
    make, head, states = LOOPS[loop]
    torch.manual_seed(0)
    model = make().train()
    LoraModel(model, modified_modules=[head])

    def by_calling():
        getattr(model, head)(states(model)).sum().backward()

    def by_reading():
        (states(model) @ getattr(model, head).weight.T).sum().backward()

    model.requires_grad_(True)
    assert not told_of(by_calling)
    (text,) = told_of(lambda: [by_reading() for _ in range(2)])
    assert f"that trains: {head}.deltas.lora. If a loss" in text
    assert not told_of(by_calling)


def test_parts_of_two_towers_train_apart():
    small = {**SMALL, "intermediate_size": 24}
    image = {**small, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=small, vision_config=image, projection_dim=8)
    model = transformers.CLIPModel(config).train()
    LoraModel(model, modified_modules=["text_projection", "visual_projection"])

    def look():
        images = model.get_image_features(torch.randn(1, 3, 16, 16))
        texts = model.get_text_features(IDS)
        (images.pooler_output * texts.pooler_output).sum().backward()

    assert not told_of(look)
