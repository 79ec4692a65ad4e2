"""`only()`, `disabled()`, `route()` and `frozen()` in several threads and tasks at once."""

import asyncio
import contextlib
import contextvars
import functools
import gc
import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from support.models import build, token_ids
from support.nets import COPIES, IDS, copied, net, places_of, put, replica_of, shake
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import opendelta
from opendelta import AdapterModel, DeltaError, LoraModel, composition
from opendelta._deltas.registry import METHODS
from opendelta._layers.selection import CURRENT

pytestmark = pytest.mark.covers(
    "Composition.only", "Composition.frozen", "Delta.disabled", "route", "Composition.merge"
)
X = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Checkpointed(nn.Sequential):
    """A linear module, and another that is run again in the backward."""

    mode = None  # True: reentrant; None: not checkpointed

    def forward(self, x):
        x = torch.tanh(self[0](x))
        if self.mode is None:
            return self[1](x)
        return checkpoint(self[1], x, use_reentrant=self.mode)


def loras(model):
    for name in "abc":
        delta = LoraModel(model, modified_modules=["0", "1"], lora_r=2, name=name)
        for parameter in delta.parameters():
            nn.init.normal_(parameter)
    return model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return loras(Checkpointed(nn.Linear(6, 6), nn.Linear(6, 4)).double())


@pytest.fixture
def counter():
    torch._dynamo.reset()
    return CompileCounterWithBackend("eager")


def by_hand(model, names, x=X):
    """The output with these LoRAs, computed by their equation."""
    for place, module in enumerate(model):
        out = x @ module.weight.T + module.bias
        for name in names:
            layer = composition(model)[name].layers[str(place)]
            out = out + layer.scaling * (x @ layer.lora_A.T @ layer.lora_B.T)
        x = torch.tanh(out) if place == 0 else out
    return x


def rows_by_hand(model, rows):
    return torch.cat([by_hand(model, names, X[i : i + 1]) for i, names in enumerate(rows)])


def choices(model):
    """Blocks that choose other deltas, each with the output inside it, by hand."""
    composed = composition(model)
    every = list("abc")
    rows = ["a", [], ["b", "c"]], ["c", "b", []]
    return [
        *((lambda n=n: composed.only(n), by_hand(model, [n])) for n in every),
        (composed.only, by_hand(model, [])),
        (composed["a"].disabled, by_hand(model, ["b", "c"])),
        (composed["c"].disabled, by_hand(model, ["a", "b"])),
        *((lambda r=r: opendelta.route(model, r), rows_by_hand(model, r)) for r in rows),
    ]


def close(one, other):
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def in_thread(function, *args):
    """What `function` returns in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


# -------------------------------------------------------------------------------- threads and tasks
@pytest.mark.parametrize("grad", [True, False])
def test_each_thread_gets_the_deltas_of_its_own_blocks(model, grad):
    expected, wanted = by_hand(model, "abc"), choices(model)
    start = threading.Barrier(len(wanted) + 1)

    def work(block, right):
        wrong = 0
        start.wait()
        with torch.set_grad_enabled(grad):
            for _ in range(50):
                with block() if block else contextlib.nullcontext():
                    wrong += not close(model(X), right)
        return wrong

    with ThreadPoolExecutor(len(wanted) + 1) as pool:
        wrong = list(pool.map(lambda pair: work(*pair), [*wanted, (None, expected)]))
    assert wrong == [0] * len(wrong)
    assert close(model(X), expected)
    assert all(delta.active for delta in composition(model))


def test_each_task_gets_the_deltas_of_its_own_blocks(model):
    expected, wanted = by_hand(model, "abc"), choices(model)

    async def request(number, block, right):
        await asyncio.sleep(0)
        for _ in range(3):
            with block():
                await asyncio.sleep(0.001 * (number % 3))
                assert close(model(X), right)
                inside = await asyncio.to_thread(model, X)
                assert close(inside, right)
                child = asyncio.create_task(asyncio.to_thread(model, X))
            assert close(await child, right)
            assert close(model(X), expected)

    async def main():
        await asyncio.gather(*(request(n, *pair) for n, pair in enumerate(wanted)))

    asyncio.run(main())
    assert close(model(X), expected)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_acts_in_the_tasks_that_chose_it_alone(name):
    model, names = net(), ("a", "b")
    method = METHODS[name]
    deltas = {n: put(method, model, *places_of(method), name=n) for n in names}
    for seed, delta in enumerate(deltas.values()):
        shake(delta, seed=seed)
    expected = {"": net()(IDS)}
    for n in names:
        for other in names:
            (deltas[other].attach if n == other else deltas[other].detach)()
        expected[n] = model(IDS)
    deltas["a"].attach(before="b")
    assert not close(expected["a"], expected["b"])

    async def request(n):
        for _ in range(2):
            with composition(model).only(*n):
                await asyncio.sleep(0.001)
                assert torch.allclose(model(IDS), expected[n], atol=1e-5)

    async def main():
        await asyncio.gather(*map(request, expected))

    asyncio.run(main())


def test_each_task_sees_the_labels_of_its_own_head():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=2,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    for count in (3, 5):
        options = {"modules_to_save": ["classifier"], "num_labels": count, "name": f"of_{count}"}
        LoraModel(model, **options)

    async def request(count):
        with composition(model).only(*([f"of_{count}"] if count > 2 else [])):
            await asyncio.sleep(0.001)
            assert model.num_labels == model.config.num_labels == count
            assert model(token_ids(1) % 32).logits.shape[1] == count
            inside = await asyncio.to_thread(lambda: model.config.num_labels)
            assert inside == count

    async def main():
        await asyncio.gather(*map(request, (2, 3, 5)))

    asyncio.run(main())


def test_blocks_of_one_thread_may_end_in_any_order(model):
    composed, expected = composition(model), by_hand(model, "abc")
    with torch.no_grad():
        for order in itertools.permutations(range(4)):
            blocks = [
                composed.only("b"), composed.frozen(), opendelta.route(model, ["a", "b", "c"]),
                composed["a"].disabled(),
            ]  # fmt: skip
            for block in blocks:
                block.__enter__()
            for index in order:
                blocks[index].__exit__(None, None, None)
            assert close(model(X), expected)
            assert all(delta.active for delta in composed)


def test_a_block_that_stays_open_keeps_nothing_of_those_inside(model):
    with composition(model).frozen():
        (outer,) = CURRENT.get().blocks
        for _ in range(20):
            with composition(model).only("a"):
                composition(model)["b"].enable()
        assert len(outer.holders) == 1


def test_the_last_block_that_is_open_decides(model):
    composed = composition(model)
    first, second = composed.only("a"), composed.only("b")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert close(model(X), by_hand(model, "b"))
    with composed["b"].disabled():
        second.__exit__(None, None, None)
        assert close(model(X), by_hand(model, "ac"))
    assert close(model(X), by_hand(model, "abc"))


def test_switching_inside_a_block_lasts_as_long_as_the_block_and_is_its_threads_own(model):
    a, b, _ = composition(model)
    with composition(model).only("a"):
        a.disable()
        b.enable()
        assert close(model(X), by_hand(model, "b"))
        assert close(in_thread(model, X), by_hand(model, "abc"))
        with a.disabled():
            b.disable()
        assert close(model(X), by_hand(model, ""))
    assert close(model(X), by_hand(model, "abc"))
    with a.disabled():
        b.disable()  # the block is about another delta
        assert close(in_thread(model, X), by_hand(model, "ac"))
    assert close(model(X), by_hand(model, "ac"))


@pytest.mark.parametrize("verb", ["only", "route"])
def test_a_block_tells_that_another_thread_detached_what_it_chose(model, verb):
    c, told = composition(model), []

    def block():
        return c.only("b") if verb == "only" else opendelta.route(model, [["b"], [], ["a", "b"]])

    def request():
        with model[1].register_forward_pre_hook(lambda *_: in_thread(c["b"].detach)):
            try:
                with block():
                    model(X)
            except DeltaError as error:
                told.append(str(error))

    def in_thread(function):
        thread = threading.Thread(target=function)
        thread.start()
        thread.join()

    b = c["b"]
    in_thread(request)
    assert "b was detached outside of this block, by another thread or task" in told[0]
    b.attach()
    with block():
        model(X)  # as if nothing had been
    with block():
        b.detach()  # by whoever opened the block
    b.attach()

    def wrong():
        with block():
            in_thread(b.detach)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # an error of one's own comes first
        wrong()


def in_another(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@pytest.mark.parametrize(
    "block",
    [
        lambda c: c.only("b"),
        lambda c: c["a"].disabled(),
        lambda c: opendelta.route(c.model, [["b"], [], ["b"]]),
    ],
    ids=["only", "disabled", "route"],
)
def test_a_block_tells_that_another_thread_merged_while_it_was_open(model, block):
    c = composition(model)
    before = model(X)
    told = r"^deltas were merged or unmerged outside of this block, by another thread or task"
    with pytest.raises(DeltaError, match=told), block(c):
        in_another(lambda: c.merge("a"))
    in_another(c.unmerge)
    with block(c):
        in_another(c.unmerge)  # there is nothing to unmerge
        model(X)
    with c.only("a"):
        c.merge("a")  # by whoever opened the block
        c.unmerge()
    torch.testing.assert_close(model(X), before)


def test_a_block_tells_that_a_delta_left_and_came_back(model):
    b = composition(model)["b"]
    with pytest.raises(DeltaError, match="b was detached outside"), composition(model).only("b"):
        in_another(lambda: (b.detach(), b.attach()))


def test_a_decorated_coroutine_function_runs_inside_the_block(model):
    c = composition(model)

    def answer_with(name):
        @c.only(name)
        async def answer():
            await asyncio.sleep(0)
            return model(X)

        return answer()

    async def both():
        return await asyncio.gather(answer_with("a"), answer_with("b"), answer_with("a"))

    for out, name in zip(asyncio.run(both()), "aba", strict=True):
        with c.only(name):
            torch.testing.assert_close(out, model(X))


class Handler:
    def __init__(self, model):
        self.model = model

    async def __call__(self):
        return self.model(X)


def test_what_returns_a_coroutine_or_a_generator_is_seen_when_it_is_called(model):
    c = composition(model)

    def stream():
        yield model(X)

    for function in (Handler(model), functools.partial(Handler(model).__call__), lambda: later()):

        async def later():
            return model(X)

        out = asyncio.run(c.only("a")(function)())
        with c.only("a"):
            torch.testing.assert_close(out, model(X))
    for function in (lambda: stream(), functools.partial(stream)):
        with pytest.raises(DeltaError, match=r"only\(\) cannot decorate .*, a generator"):
            c.only("a")(function)()


def test_a_generator_function_cannot_be_decorated(model):
    def stream():
        yield model(X)

    async def later():
        yield model(X)

    for function in (stream, later):
        with pytest.raises(DeltaError, match=rf"only\(\) cannot decorate {function.__qualname__}"):
            composition(model).only("a")(function)


ASKED = []  # functions that each forward of `Asking` calls in another thread


class Asking(nn.Module):
    """A block whose width no table knows."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        for request in [ASKED.pop() for _ in ASKED[:]]:
            in_another(request)
        return self.norm(self.fc(x))


@pytest.mark.covers("AdapterModel", "check")
@pytest.mark.parametrize("verb", ["attach", "check"])
def test_a_run_on_shapes_is_not_seen_by_requests_in_other_threads(verb):
    model = nn.Sequential(nn.Linear(6, 6), Asking()).eval()
    shake(LoraModel(model, modified_modules=["0"], name="a"))
    x, answers = torch.randn(3, 6), []
    wanted, state = model(x), {key: value.clone() for key, value in model.state_dict().items()}

    def request():
        with torch.no_grad():
            answers.append(model(x))

    ASKED.append(request)
    ends = threading.Event()
    server = threading.Thread(target=ends.wait)  # it gives requests to threads of their own
    server.start()
    try:
        if verb == "attach":
            AdapterModel(model, modified_modules=["1"], sample_inputs=x).detach()
        else:
            opendelta.check(model, sample_inputs=x)
    finally:
        ends.set()
        server.join()
    (answer,) = answers
    torch.testing.assert_close(answer, wanted)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_delta_that_left_inside_blocks_keeps_nothing_of_them(model):
    b = composition(model)["b"]
    with opendelta.watching(model), composition(model).only("b"):
        blocks = [weakref.ref(block) for block in CURRENT.get().blocks]
        b.detach()
    gc.collect()
    assert [block() for block in blocks] == [None, None]


@pytest.mark.parametrize("verb", ["only", "route"])
def test_a_delta_that_another_thread_attaches_does_not_act_in_a_block(model, counter, verb):
    def attach(name):
        delta = LoraModel(model, modified_modules=["0", "1"], lora_r=2, name=name)
        for parameter in delta.parameters():
            nn.init.normal_(parameter)
        return delta

    fast = torch.compile(model, fullgraph=True, backend=counter)
    composed = composition(model)
    block = composed.only("a") if verb == "only" else opendelta.route(model, ["a"] * 3)
    with block:
        other = in_thread(attach, "other")
        assert not other.active
        assert close(model(X), by_hand(model, ["a"]))
        assert close(fast(X), by_hand(model, ["a"]))
        assert close(in_thread(model, X), by_hand(model, ["a", "b", "c", "other"]))
        if verb == "only":
            attach("own")
            assert close(model(X), by_hand(model, ["a", "own"]))
            with composed["own"].disabled(), composed["b"].disabled():
                assert close(model(X), by_hand(model, ["a"]))
            other.enable()
            assert close(fast(X), by_hand(model, ["a", "other", "own"]))
    assert close(model(X), by_hand(model, composed.names))


def test_an_asynchronous_generator_that_another_task_closes_ends_its_block(model):
    async def stream():
        with composition(model).only("a"):
            while True:
                yield model(X)

    async def main():
        chunks = stream()
        assert close(await anext(chunks), by_hand(model, "a"))
        await asyncio.create_task(chunks.aclose())
        return model(X)

    assert close(asyncio.run(main()), by_hand(model, "abc"))


# ----------------------------------------------------------------------- what starts inside a block
def test_a_thread_started_inside_takes_the_block_with_a_copy_of_the_context(model):
    go, found = threading.Event(), {}

    def late(key):
        go.wait()
        found[key] = model(X)

    with composition(model).only("b"):
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(late, "copied")),
            threading.Thread(target=late, args=("plain",)),
        ]
        for thread in threads:
            thread.start()
    go.set()  # the block has ended by now
    for thread in threads:
        thread.join()
    assert close(found["copied"], by_hand(model, "b"))
    assert close(found["plain"], by_hand(model, "abc"))


def test_text_streams_from_a_thread_that_takes_the_block():
    model = build("llama")
    delta = LoraModel(model, lora_r=4)
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    ids = token_ids(1)
    options = {"max_new_tokens": 5, "do_sample": False}
    with composition(model).only():
        expected = model.generate(ids, **options)
    assert not torch.equal(expected, model.generate(ids, **options))

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens.append(value.reshape(-1))

        def end(self):
            pass

    streamer = Streamer()
    with composition(model).only():
        thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(model.generate, ids),
            kwargs={"streamer": streamer, **options},
        )
        thread.start()
        thread.join()
    assert torch.equal(torch.cat(streamer.tokens), expected[0])


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_inside_acts_as_its_model_does_there(model, how):
    with composition(model).only("b"):
        twin = copied(model, how)
        assert close(twin(X), by_hand(model, "b"))
    assert close(twin(X), by_hand(model, "b"))
    composition(twin)["a"].enable()
    assert close(twin(X), by_hand(model, "ab"))
    assert close(model(X), by_hand(model, "abc"))


def test_a_folder_saved_inside_keeps_the_choice_of_the_block(model, tmp_path):
    composed = composition(model)
    for module in model:
        module.weight.requires_grad_(False)
        module.bias.requires_grad_(False)
    with composed.only("b"):
        composed.save(tmp_path / "only")
    with composed["a"].disabled():
        composed.save(tmp_path / "disabled")
    for folder, acting in (("only", "b"), ("disabled", "bc")):
        twin = Checkpointed(nn.Linear(6, 6), nn.Linear(6, 4)).double()
        twin.load_state_dict(model.state_dict(), strict=False)
        opendelta.load(tmp_path / folder, twin)
        assert close(twin(X), by_hand(model, acting))


def test_a_delta_that_is_merged_inside_a_block_stays_merged_and_active(model):
    composed, expected = composition(model), by_hand(model, "ab")
    composed["a"].disable()
    composed["c"].disable()
    with composed.only("a"):
        composed.merge("a")
    assert composed["a"].active
    assert close(model(X), expected)
    composed.unmerge()
    assert close(model(X), expected)


# ------------------------------------------------------------------------------------------- frozen
def test_a_thread_trains_while_another_is_frozen(model):
    composed, expected = composition(model), by_hand(model, "abc")
    with torch.no_grad(), composed.frozen():
        assert close(model(X), expected)
        assert in_thread(lambda: model(X).requires_grad)

    def change():
        with torch.no_grad():
            composed["a"].layers["0"].lora_A.mul_(2)

    def frozen():
        with torch.no_grad(), composed.frozen():
            model(X)
            in_thread(change)

    with pytest.raises(opendelta.DeltaError, match="changed inside frozen"):
        frozen()


def test_a_frozen_block_ends_for_its_own_thread_alone(model):
    outer = composition(model).frozen()
    with torch.no_grad():
        outer.__enter__()
        with composition(model).frozen():
            model(X)
            in_thread(lambda: composition(model).frozen().__enter__())
        outer.__exit__(None, None, None)
    assert model(X).requires_grad


# ----------------------------------------------------------------------------------------- compiled
def test_a_thread_never_uses_the_graph_of_another(model, counter):
    fast = torch.compile(model, fullgraph=True, backend=counter)
    pairs, expected = choices(model), by_hand(model, "abc")
    for block, right in pairs[:4]:
        with block():
            assert close(fast(X), right)
            assert close(in_thread(fast, X), expected)
            run = contextvars.copy_context().run
            assert close(in_thread(run, fast, X), right)
    assert counter.frame_count == 5

    one_at_a_time = threading.Lock()  # torch's own guards are not safe between threads

    def run():
        with one_at_a_time:
            return fast(X)

    def work(pair):
        block, right = pair
        wrong = 0
        for _ in range(50):
            with block():
                wrong += not close(run(), right)
            wrong += not close(run(), expected)
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, pairs[:4])) == [0] * 4
    assert counter.frame_count == 5


@pytest.mark.parametrize("verb", ["only", "route"])
def test_a_task_never_uses_the_graph_of_another(model, counter, verb):
    fast = torch.compile(model, fullgraph=True, backend=counter)
    pairs = choices(model)[:3] if verb == "only" else choices(model)[-2:]

    async def request(block, right):
        for _ in range(4):
            with block():
                await asyncio.sleep(0.001)
                assert close(fast(X), right)

    async def main():
        await asyncio.gather(*(request(*pair) for pair in pairs))
        assert close(fast(X), by_hand(model, "abc"))

    asyncio.run(main())
    assert counter.frame_count == len(pairs) + 1


def test_blocks_that_choose_nothing_new_compile_nothing_new(model, counter):
    other = loras(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)).double())
    fast = torch.compile(model, fullgraph=True, backend=counter)
    composed = composition(model)
    fast(X)
    with composed.only(*"cab"):
        fast(X)
    with composition(other).only("a"):
        fast(X)
        with composed.only("a"), composition(other).only("b"):
            fast(X)
    with composed.only("b"), composed.only("a"):
        fast(X)
    with composed["b"].disabled(), composed["c"].disabled():
        fast(X)
    composed["b"].disable()
    with composed["c"].disabled():
        assert close(fast(X), by_hand(model, "a"))
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["adapter", "parallel_adapter"])
def test_compiled_methods_act_in_the_threads_that_chose_them_alone(name, counter):
    model, names, method = net(), ("a", "b"), METHODS[name]
    for seed, n in enumerate(names):
        shake(put(method, model, *places_of(method), name=n), seed=seed)
    fast = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        for n in ("a", "b", ""):
            with composition(model).only(*n):
                expected = model(IDS)
                run = contextvars.copy_context().run
                assert torch.allclose(in_thread(run, fast, IDS), expected, atol=1e-5)
            assert torch.allclose(fast(IDS), model(IDS), atol=1e-5)
    assert counter.frame_count == 4


# --------------------------------------------------------------------------------------- recomputed
def gradients(model, backward, block=contextlib.nullcontext):
    """The gradients of all parameters after a forward inside `block`."""
    model.zero_grad(set_to_none=True)
    with block():
        loss = model(X.clone().requires_grad_()).pow(2).sum()
        if backward is None:
            loss.backward()
    if backward is not None:
        backward(loss)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def after(loss):
    loss.backward()


def elsewhere(loss):
    in_thread(loss.backward)


def inside_another(model):
    def backward(loss):
        with composition(model).only("c"), composition(model)["c"].disabled():
            loss.backward()

    return backward


@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_that_runs_again_has_the_selection_of_the_first(model, reentrant, number):
    block, right = choices(model)[number]
    found = torch.autograd.grad(right.pow(2).sum(), list(model.parameters()), allow_unused=True)
    pairs = zip(model.parameters(), found, strict=True)
    expected = [torch.zeros_like(p) if g is None else g for p, g in pairs]
    model.mode = reentrant
    for backward in (None, after, elsewhere, inside_another(model)):
        assert all(map(close, gradients(model, backward, block), expected))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_forward_outside_of_blocks_runs_again_outside_of_blocks(model, reentrant):
    expected = gradients(model, after)
    model.mode = reentrant
    assert all(map(close, gradients(model, inside_another(model)), expected))


CHANGES = {
    "disable": lambda delta: delta.disable(),
    "scale": lambda delta: setattr(delta, "scale", 3.0),
    "merge": lambda delta: composition(delta.backbone_model).merge(),
    "attach": lambda delta: LoraModel(delta.backbone_model, modified_modules=["1"], lora_r=2),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_changed_before_the_forward_runs_again_is_refused(model, change, reentrant):
    model.mode = reentrant

    def backward(loss):
        CHANGES[change](composition(model)["b"])
        loss.backward()

    with pytest.raises(DeltaError, match="between a forward and its backward"):
        gradients(model, backward)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_state_that_is_as_before_or_of_another_model_changes_no_gradient(model, reentrant):
    expected = gradients(model, after)
    other = loras(Checkpointed(nn.Linear(6, 6), nn.Linear(6, 4)).double())
    model.mode = reentrant
    composed = composition(model)

    def backward(loss):
        composition(other)["a"].disable()
        composition(other)["b"].scale = 2.0
        composed["a"].disable()
        composed["b"].scale = 5.0
        model(X)
        composed["a"].enable()
        composed["b"].scale = 1.0
        composed.merge()
        composed.unmerge()
        loss.backward()

    assert all(map(close, gradients(model, backward), expected))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_block_around_the_forward_outlasts_a_change_of_what_it_chose(model, reentrant):
    model.mode = reentrant
    right = torch.autograd.grad(
        by_hand(model, "a").pow(2).sum(), list(model.parameters()), allow_unused=True
    )
    pairs = zip(model.parameters(), right, strict=True)
    expected = [torch.zeros_like(p) if g is None else g for p, g in pairs]

    def backward(loss):
        composition(model)["a"].disable()
        loss.backward()

    assert all(
        map(close, gradients(model, backward, lambda: composition(model).only("a")), expected)
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_transformers_model_trains_with_checkpoints_and_a_backward_after_the_block(reentrant):
    model = build("llama").train()
    for name in "ab":
        delta = AdapterModel(model, bottleneck_dim=4, name=name)
        for parameter in delta.parameters():
            nn.init.normal_(parameter, std=0.3)
    ids, composed = token_ids(2), composition(model)
    model.enable_input_require_grads()
    own = list(composed["a"].parameters())

    def run(backward):
        with composed.only("a"):
            loss = model(ids, use_cache=False).logits.pow(2).mean()
        model.zero_grad()
        backward(loss)
        return [p.grad.clone() for p in own]

    expected = run(after)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for backward in (after, elsewhere):
        torch.testing.assert_close(run(backward), expected)


def test_checkpoints_inside_checkpoints_have_the_selection_of_the_first_run(model):
    def inner(x):
        return checkpoint(model[1], torch.tanh(checkpoint(model[0], x, use_reentrant=False)),
                          use_reentrant=False)  # fmt: skip

    with composition(model).only("a"):
        loss = checkpoint(inner, X, use_reentrant=False).pow(2).sum()
    weights = [model[0].weight, composition(model)["a"].layers["0"].lora_A]
    expected = torch.autograd.grad(by_hand(model, "a").pow(2).sum(), weights)
    found = in_thread(lambda: torch.autograd.grad(loss, weights))
    assert all(map(close, found, expected))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_device_thread_runs_a_forward_again_with_the_selection_of_the_first(model, reentrant):
    model.cuda()

    def run(mode, backward):
        model.mode = mode
        model.zero_grad()
        with composition(model).only("a"):
            loss = model(X.cuda().requires_grad_()).pow(2).sum()
            if backward is None:
                loss.backward()
        if backward is not None:
            backward(loss)
        return [p.grad.clone() for p in composition(model)["a"].parameters()]

    expected = run(None, None)
    for backward in (None, after, elsewhere, inside_another(model)):
        torch.testing.assert_close(run(reentrant, backward), expected)


# ------------------------------------------------------------------------------------- DataParallel
def test_data_parallel_replicas_take_the_selection_of_their_caller(model):
    with composition(model).only("b"):
        replica = replica_of(model)
        assert close(in_thread(replica, X), by_hand(model, "b"))
    assert close(in_thread(replica_of(model), X), by_hand(model, "abc"))
    with torch.no_grad(), composition(model)["a"].disabled(), composition(model).frozen():
        assert close(in_thread(replica_of(model), X), by_hand(model, "bc"))
    with (
        opendelta.route(model, ["a", "b", "c"]),
        pytest.raises(opendelta.SiteError, match="DataParallel"),
    ):
        replica_of(model)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel_computes_what_one_device_does(model):
    expected = by_hand(model, "b")
    model.cuda()
    with composition(model).only("b"):
        assert close(nn.DataParallel(model)(X.cuda()).cpu(), expected)


def test_frozen_keeps_nothing_of_a_run_with_other_parameters(model):
    c = composition(model)
    own = {name: 2 * p for name, p in model.named_parameters() if "deltas" in name}
    stacked = {name: torch.stack([p, 3 * p]) for name, p in own.items()}
    call = functools.partial(torch.func.functional_call, model)
    with torch.no_grad():
        wanted = model(X), call(own, (X,)), torch.func.vmap(lambda o: call(o, (X,)))(stacked)
        with c.frozen():
            for _ in range(2):
                found = model(X), call(own, (X,)), torch.func.vmap(lambda o: call(o, (X,)))(stacked)
                for one, other in zip(found, wanted, strict=True):
                    torch.testing.assert_close(one, other)
