"""What a process has only once is as before, however verbs in several threads overlap."""

import contextlib
import functools
import itertools
import logging
import random
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import opendelta
from opendelta import AdapterConfig, LoraModel
from opendelta._modules import process
from opendelta.errors import UnsavedWarning, UnusedWarning, kept_warnings, warn

WAITS = {}  # {name: events (to set, to wait for) of the next forward}


class Waiting(nn.Module):
    """A block whose width no table knows, so that attaching runs it on shapes."""

    def __init__(self, name):
        super().__init__()
        self.name, self.fc, self.norm = name, nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        if self.name in WAITS:
            begun, ended = WAITS.pop(self.name)
            begun.set()
            assert ended.wait(60)
        return self.norm(self.fc(x))


def overlapping(first, second):
    """Run both, of which each has to run `Waiting`; the first ends while the second runs."""
    begun, inside, ended = threading.Event(), threading.Event(), threading.Event()
    WAITS.update(first=(begun, inside), second=(inside, ended))
    failures = []

    def run(verb):
        try:
            verb()
        except BaseException as failure:
            failures.append(failure)

    one, other = (threading.Thread(target=run, args=(verb,)) for verb in (first, second))
    one.start()
    assert begun.wait(60)
    other.start()
    one.join()
    ended.set()
    other.join()
    assert not failures, failures
    assert not WAITS


def model_of(name):
    return nn.Sequential(Waiting(name), nn.Linear(6, 4)).eval()


def check(model):
    LoraModel(model, modified_modules=["1"])
    opendelta.check(model, sample_inputs=torch.randn(2, 6))


@pytest.mark.covers("check")
def test_compiled_functions_compile_after_overlapping_verbs():
    torch._dynamo.reset()
    models = model_of("first"), model_of("second")
    overlapping(lambda: check(models[0]), lambda: check(models[1]))
    counter, x = CompileCounter(), torch.randn(3)
    torch.compile(torch.cos, backend=counter)(x)
    torch.compile(lambda x: x.sin() + 1, backend=counter)(x)
    assert counter.frame_count
    assert not logging.getLogger("torch._subclasses.fake_tensor").disabled


def draw():
    random.random()
    np.random.rand()
    torch.rand(1)


def state():
    return (
        random.getstate(),
        np.random.get_state(),
        torch.random.get_rng_state().tolist(),
        [str(each) for each in warnings.filters],
        torch._dynamo.eval_frame._stance,
        logging.getLogger("torch._subclasses.fake_tensor").disabled,
    )


BLOCKS = [process.kept_random, process.ignored_warnings, process.silent_fakes, process.eager]


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_of_threads_put_back_what_there_was_in_any_order_of_their_ends(block):
    before = state()
    for order in itertools.permutations(range(3)):
        blocks = [block() for _ in order]
        with contextlib.ExitStack() as stack:
            threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in order]
            for each, thread in zip(blocks, threads, strict=True):
                thread.submit(each.__enter__).result()
                draw()
            assert state() != before
            for which in order:
                threads[which].submit(blocks[which].__exit__, None, None, None).result()
        put_back(block, before)


def put_back(block, before):
    if block is not process.kept_random:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(torch.tensor(before[2], dtype=torch.uint8))
    assert [repr(each) for each in state()] == [repr(each) for each in before]


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_inside_others_put_back_what_there_was(block):
    before = state()
    with block():
        draw()
        inside = state()
        with block():
            draw()
        if block is process.kept_random:
            assert repr(state()) == repr(inside)
        assert state()[3:] == inside[3:]
    put_back(block, before)


def test_a_block_that_cannot_begin_changes_nothing():
    def fails():
        raise RuntimeError("no")

    block = process.Together(fails)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"), block():
            raise AssertionError("never here")


@pytest.mark.covers("plan")
def test_a_plan_keeps_no_warnings_of_another_thread():
    """`warnings.catch_warnings` would keep those of all."""
    plans, before = [], list(warnings.filters)

    def plan():
        config = AdapterConfig(modified_modules=["0"], exclude_modules=["none"])
        found = opendelta.plan(model_of("first"), config, sample_inputs=torch.randn(2, 6))
        plans.append(found.deltas[0].warnings)

    def attach():
        with pytest.warns(UnusedWarning, match=r"'others' has no effect"):
            LoraModel(model_of("other"), modified_modules=["1"], exclude_modules=["others"])
        check(model_of("second"))

    overlapping(plan, attach)
    assert warnings.filters == before
    ((text,),) = plans
    assert "'none' has no effect" in text


def test_kept_warnings_are_of_one_thread_and_kind():
    shown = []

    def warn_elsewhere():
        with pytest.warns(UnusedWarning, match="elsewhere"):
            warn("elsewhere", UnusedWarning)
        shown.append(True)

    with kept_warnings(UnusedWarning) as texts:
        warn("kept", UnusedWarning)
        with pytest.warns(UnsavedWarning, match="other kind"):
            warn("other kind", UnsavedWarning)
        thread = threading.Thread(target=warn_elsewhere)
        thread.start()
        thread.join()
    assert texts == ["kept"]
    assert shown


@pytest.fixture
def switching():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(*verbs):
    """Call all at once, each in its own thread."""
    barrier = threading.Barrier(len(verbs), timeout=60)

    def run(verb):
        barrier.wait()
        return verb()

    with ThreadPoolExecutor(len(verbs)) as pool:
        return [each.result() for each in [pool.submit(run, verb) for verb in verbs]]


@pytest.mark.usefixtures("switching")
@pytest.mark.covers("Delta.attach", "Delta.detach", "DeltaConfig.name")
def test_threads_put_deltas_on_one_model_and_take_them_off():
    for _ in range(15):
        model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
        before, everywhere = opendelta.snapshot(model), [str(i) for i in range(12)]
        make = functools.partial(LoraModel, model, modified_modules=everywhere)
        deltas = together(make, make, make, make)
        assert {delta.name for delta in deltas} == {"lora", "lora_1", "lora_2", "lora_3"}
        assert all(len(delta.layers) == 12 for delta in deltas)
        one, two, *rest = deltas
        together(one.detach, two.detach, functools.partial(make, name="new"), make)
        assert len(opendelta.composition(model)) == 4
        together(one.attach, two.attach, *(each.detach for each in rest))
        assert len(opendelta.composition(model)) == 4
        together(*(each.detach for each in opendelta.composition(model)))
        opendelta.assert_pristine(model, like=before)
