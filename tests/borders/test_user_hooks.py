"""What hooks of somebody's own record is theirs: a trial leaves nothing in it, and needs none."""

import collections
import copy
import functools
import queue
import random
import threading
import time
from typing import ClassVar

import numpy
import pytest
import torch
import transformers as T
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import opendelta
from opendelta import AdapterModel, SoftPromptModel

pytestmark = pytest.mark.covers("Delta.attach")
IDS = torch.tensor([[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]])


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(9, 8), Mixer(), nn.LazyLinear(2)

    def forward(self, input_ids):
        return self.head(self.mix(self.table(input_ids)).mean(1))


def net():
    torch.manual_seed(0)
    model = Net()
    model(IDS)
    return model


SEEN, COUNT = [], 0


def in_the_file(module, args, output):
    global COUNT
    COUNT += 1
    SEEN.append(output)


class Recorder:
    seen_by_all: ClassVar = []

    def __init__(self, model=None):
        self.model, self.count, self.by_name = model, 0, collections.defaultdict(list)

    def __call__(self, module, args, output):
        self.count += 1
        self.by_name[type(module).__name__].append(output.detach())
        Recorder.seen_by_all.append(output)

    def state(self):
        lists = {name: len(each) for name, each in self.by_name.items()}
        return self.count, lists, len(Recorder.seen_by_all)


def closure(_):
    seen, count = collections.deque(maxlen=9), 0

    def hook(module, args, output):
        nonlocal count
        count += 1
        seen.append(output)
        hook.calls = count

    return hook, lambda: (len(seen), count, getattr(hook, "calls", 0))


def names(_):
    seen = set()
    hook = functools.partial(lambda into, module, args, output: into.add(output), seen)
    return hook, lambda: len(seen)


def object_of(model):
    recorder = Recorder(model)
    return recorder, recorder.state


def method(_):
    recorder = Recorder()
    return recorder.__call__, recorder.state


def on_the_model(model):
    model.kept = []
    return (lambda module, args, output: model.kept.append(output)), lambda: len(model.kept)


RECORDERS = {
    "list": lambda _: (lambda s: ((lambda m, a, o: s.append(o.detach())), lambda: len(s)))([]),
    "closure": closure,
    "partial": names,
    "file": lambda _: (in_the_file, lambda: (len(SEEN), COUNT)),
    "object": object_of,
    "method": method,
    "model": on_the_model,
}
VERBS = {
    "attach": lambda m: AdapterModel(m, modified_modules=["mix"], bottleneck_dim=2),
    "samples": lambda m: AdapterModel(
        m, modified_modules=["mix"], bottleneck_dim=2, sample_inputs=IDS
    ),
    "plan": lambda m: opendelta.plan(
        m, [opendelta.AdapterConfig(modified_modules=["mix"], bottleneck_dim=2)]
    ),
    "bias": lambda m: opendelta.BitFitModel(m, modified_modules=["proj"]),
    "check_on_shapes": opendelta.check,
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", RECORDERS)
def test_a_recorder_has_nothing_of_a_trial(name, verb):
    model = net()
    hook, state = RECORDERS[name](model)
    if "check" in verb:
        opendelta.LoraModel(model, modified_modules=["proj"]).freeze_module()
    for part in (model.table, model.mix, model.mix.proj):
        part.register_forward_hook(hook)
    model(IDS)
    before = state()
    VERBS[verb](model)
    assert state() == before
    model(IDS)
    assert state() != before


def test_a_hook_for_all_modules_has_nothing_of_a_trial():
    model, seen = net(), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, o: seen.append(o))
    try:
        VERBS["attach"](model)
    finally:
        handle.remove()
    assert not seen


def by_item(module, args, output):
    print(output.mean().item())


def in_pairs(module, args):
    assert args[0].shape[0] == 2, "two rows"


class ByItem:
    def __call__(self, module, args, output):
        self.last = output.mean().item()


@pytest.mark.parametrize("verb", ["attach", "samples", "plan"])
@pytest.mark.parametrize("hook", [by_item, in_pairs, ByItem(), lambda m, a, o: o.tolist() and None])
def test_a_hook_that_needs_values_or_a_batch_is_left_out_of_a_trial(hook, verb, capsys):
    model = net()
    before = [module.register_forward_pre_hook if hook is in_pairs else module.register_forward_hook
              for module in (model.mix, model.mix.proj)]  # fmt: skip
    handles = [register(hook) for register in before]
    VERBS[verb](model)
    assert capsys.readouterr().out == ""
    assert all(hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
               for m in (model.mix, model.mix.proj))  # fmt: skip
    assert len(handles) == 2
    if hook is in_pairs:
        with pytest.raises(AssertionError, match="two rows"):
            model(IDS[:1])


@pytest.mark.parametrize("rows", [IDS, None])
def test_a_hook_that_changes_the_output_is_not_left_out(rows):
    def narrowed(module, args, output):
        return output[..., :4] if output.mean().item() < 9 else output

    model = nn.Sequential(nn.Embedding(9, 8), Mixer(), nn.Sequential(nn.Linear(4, 2)))
    model[1].register_forward_hook(narrowed)
    AdapterModel(model, modified_modules=["1", "2"], bottleneck_dim=2, sample_inputs=rows)
    assert model(IDS).shape == (2, 5, 2)


@pytest.mark.parametrize("change", [
    lambda m: weight_norm(m.proj), lambda m: parametrizations.spectral_norm(m.proj),
    lambda m: prune.l1_unstructured(m.proj, "weight", 0.5),
    lambda m: m.register_forward_hook(lambda module, args, out: torch.cat([out, out], -1)),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_hooks_that_compute_do_so_in_a_trial(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), Mixer(), nn.LazyLinear(2))
    change(model[1])
    model(IDS)
    plain = model.eval()(IDS)
    AdapterModel(model, modified_modules=["1"], bottleneck_dim=2)
    assert torch.equal(model(IDS), plain)


class Draws(Mixer):
    def forward(self, x):
        random.random()
        numpy.random.rand()
        return super().forward(x) + torch.rand(1)


@pytest.mark.parametrize("verb", ["attach", "samples", "plan", "bias", "check_on_shapes"])
def test_a_trial_draws_no_random_numbers(verb):
    model = net()
    model.mix = Draws()
    if "check" in verb:
        opendelta.LoraModel(model, modified_modules=["proj"]).freeze_module()
    random.seed(0), numpy.random.seed(0)
    expected = random.random(), numpy.random.rand()
    random.seed(0), numpy.random.seed(0)
    VERBS[verb](model)
    assert (random.random(), numpy.random.rand()) == expected


def test_a_prompt_of_words_leaves_nothing_in_a_recorder():
    torch.manual_seed(0)
    config = T.LlamaConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model, seen = T.LlamaModel(config), []
    model.embed_tokens.register_forward_hook(lambda m, a, o: seen.append(o))
    SoftPromptModel(model, soft_token_num=2, token_init=[1, 2])
    assert not seen


class Counts:
    number = 0


@pytest.mark.parametrize("verb", ["attach", "samples", "plan", "bias"])
def test_counts_in_classes_and_arrays_stay_and_a_hook_that_removes_itself_is_there(verb):
    model, counts, seen = net(), numpy.zeros(3, int), []

    def count(module, args, output):
        Counts.number += 1
        counts[0] += 1

    def once(module, args, output):
        seen.append(output.detach())
        handle.remove()

    before = Counts.number
    model.table.register_forward_hook(count)
    handle = model.table.register_forward_hook(once)
    VERBS[verb](model)
    assert (Counts.number, counts[0], len(seen)) == (before, 0, 0)
    for _ in range(2):
        model(IDS)
    assert (Counts.number, counts[0], len(seen)) == (before + 2, 2, 1)


class Once(list):
    def extend(self, values):
        raise NotImplementedError

    def clear(self):
        raise NotImplementedError


@pytest.mark.parametrize("verb", ["attach", "samples"])
@pytest.mark.parametrize(
    ("kept", "note"),
    [
        (collections.Counter(a=2), lambda kept: kept.update(["a", "b"])),
        (collections.OrderedDict(b=1, a=2), lambda kept: kept.move_to_end("b")),
        (Once([3]), lambda kept: kept.append(4)),
        (collections.deque([1, 2], maxlen=2), lambda kept: kept.append(3)),
    ],
    ids=["Counter", "OrderedDict", "list of one's own", "deque"],
)
def test_containers_of_every_class_are_filled_as_they_were(kept, note, verb):
    model, kept, before = net(), copy.deepcopy(kept), kept
    model.table.register_forward_hook(lambda module, args, output: note(kept))
    VERBS[verb](model)
    assert kept == before
    model(IDS)
    assert kept != before


def test_a_thread_that_waits_at_a_hook_s_queue_is_not_forgotten():
    """It began to wait while a trial ran."""
    model, things, got, inside = net(), queue.Queue(), [], threading.Event()

    def hook(module, args, output):
        if not inside.is_set():
            inside.set()
            thread.start()
            while not things.not_empty._waiters:
                time.sleep(0.001)

    thread = threading.Thread(target=lambda: got.append(things.get(timeout=30)))
    model.table.register_forward_hook(hook)
    VERBS["attach"](model)
    assert inside.is_set()
    things.put(1)
    thread.join()
    assert got == [1]
