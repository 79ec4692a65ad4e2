"""Random bytes, and random edits of good folders: each ends in DeltaLoadError or a correct load."""

import contextlib
import copy
import io
import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import corpus
from support.nets import IDS, net

import opendelta
from opendelta import AutoDeltaConfig
from opendelta._deltas.registry import METHODS
from opendelta.cli import looking
from opendelta.interop import legacy

pytestmark = pytest.mark.covers("load", "LoadReport")

FUZZ = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NASTY = st.sampled_from([
    "", "root", "linear", "head", "lora", "a/b", "..", "[r](a+)+$", "../x.safetensors", "float16",
    0, 1, -1, 2, 2_000_000, 2**40, 2**63 - 1, 10**30, 1e30, -1e30, float("nan"), float("inf"),
    None, True, False, [], {}, [[]], {"": []}, "\x1b[31m", "\ud800", "[/b]", "k" * 5_000,
    ["linear"], ["head"], ["norm", "linear"], {"linear": 3},
])  # fmt: skip
KEYS = st.text(max_size=5)
VALUES = st.recursive(
    NASTY | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """All paths into a JSON value."""
    yield path
    parts = value.items() if isinstance(value, dict) else []
    parts = enumerate(value) if isinstance(value, list) else parts
    for key, part in parts:
        yield from places(part, (*path, key))


def edited(draw, value):
    """A JSON value with another value, or without one, at some places."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        _, *some = places(value)
        if not some:
            return draw(VALUES)
        *path, last = draw(st.sampled_from(some))
        around = value
        for key in path:
            around = around[key]
        if draw(st.booleans()):
            around[last] = copy.deepcopy(draw(VALUES))  # of which a later edit may change a part
        elif isinstance(around, dict) and draw(st.booleans()):
            around[draw(KEYS)] = around.pop(last)
        else:
            del around[last]
    return value


def cut(draw, content):
    """Bytes with some of them changed, inserted or removed."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
    return bytes(content)


def loads_or_refuses(folder, files, model):
    """Load `files`; the backbone is as before, or has deltas that are whole."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    before = opendelta.snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", opendelta.DeltaWarning)
        report = opendelta.load(folder, model, strict=False)
    if report:
        assert all(p.isfinite().all() for d in opendelta.composition(model) for p in d.parameters())
        model(IDS)
        for delta in opendelta.composition(model):
            delta.detach()
    opendelta.assert_pristine(model, like=before)
    return report


def reads_or_refuses(folder):
    """What reads a folder without a model prints lines that print, or ends in an error of ours."""
    for read in (AutoDeltaConfig.from_finetuned, looking.show, legacy.config_of):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                read(str(folder) if read is looking.show else folder)
            except opendelta.DeltaError as error:
                print(error)
        assert out.getvalue().replace("\n", "").isprintable()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return net()


@pytest.mark.parametrize("kind", corpus.MAKE)
@FUZZ
@given(data=st.data())
def test_random_bytes(kind, data, model, tmp_path):
    files = dict.fromkeys(corpus.MAKE[kind](), b"")
    for name, good in corpus.MAKE[kind]().items():
        files[name] = data.draw(st.sampled_from([good, b"{}", b"[]"]) | st.binary(max_size=64))
    loads_or_refuses(tmp_path / "delta", files, model)


@pytest.mark.parametrize("kind", corpus.MAKE)
@FUZZ
@given(data=st.data())
def test_edited_bytes(kind, data, model, tmp_path):
    files = corpus.MAKE[kind]()
    name = data.draw(st.sampled_from(sorted(files)))
    content = cut(data.draw, files[name])
    if kind == "opendelta" and name != "config.json":
        files = corpus.ours(weights=content)  # with its sha256
    else:
        files[name] = content
    loads_or_refuses(tmp_path / "delta", files, model)


@pytest.mark.parametrize("kind", corpus.MAKE)
@FUZZ
@given(data=st.data())
def test_edited_json(kind, data, model, tmp_path):
    files = corpus.MAKE[kind]()
    (name,) = (name for name in files if name.endswith(".json"))
    facts = edited(data.draw, json.loads(files[name]))
    files[name] = json.dumps(facts).encode()
    loads_or_refuses(tmp_path / "delta", files, model)
    reads_or_refuses(tmp_path / "delta")


@FUZZ
@given(data=st.data())
def test_edited_headers(data, model, tmp_path):
    second = corpus.entry(shape=(8, 2), start=64, end=128)
    header = edited(data.draw, {corpus.A: corpus.entry(), corpus.B: second})
    content = corpus.raw(header, data.draw(st.binary(max_size=8)) + bytes(128))
    loads_or_refuses(tmp_path / "delta", corpus.ours(weights=content), model)


@settings(FUZZ, max_examples=100)
@given(data=st.data())
def test_options_of_every_method(data, model, tmp_path):
    method = METHODS[data.draw(st.sampled_from(sorted(METHODS)))]
    names = st.sampled_from(method.config_class.option_names())
    options = data.draw(st.dictionaries(names, VALUES, max_size=4))
    options.setdefault(
        "modified_modules", [data.draw(st.sampled_from(["linear", "attention", ""]))]
    )
    files = corpus.ours(corpus.config(method.delta_type, options=options))
    loads_or_refuses(tmp_path / "delta", files, model)
