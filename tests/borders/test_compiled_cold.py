"""Models that are compiled before they ran once: two lengths, and again in a second thread."""

import copy
import threading

import pytest
import torch
from support.models import FAMILIES, put_default, token_ids
from support.nets import IDS, net, places_of, put, shake

from opendelta._deltas.registry import METHODS

pytestmark = pytest.mark.covers("*Model")

HANDING_OVER = ["prefix", "soft_prompt", "parallel_adapter"]  # a value from one site to another


def outputs(model, ids):
    """What `model` computes from two lengths, the longer one first."""
    with torch.no_grad():
        found = [model(input_ids=ids[:, :length]) for length in (ids.size(1), ids.size(1) - 1)]
    return [getattr(out, "logits", out) for out in found]


def assert_compiles_cold(make, ids):
    """A compiled model that never ran computes what another one computes, in two threads."""
    expected = outputs(make(), ids)
    torch.compiler.reset()
    fast = torch.compile(make(), backend="eager")
    here, there = outputs(fast, ids), []
    thread = threading.Thread(target=lambda: there.extend(outputs(fast, ids)))
    thread.start()
    thread.join()
    torch.testing.assert_close([here, there], [expected, expected], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_second_length_and_a_second_thread(method):
    def make():
        model, cls = net(), METHODS[method]
        shake(put(cls, model, *places_of(cls)))
        return model

    assert_compiles_cold(make, IDS)


@pytest.mark.parametrize(
    ("method", "name"), [*((method, "gpt2") for method in HANDING_OVER), ("prefix", "bert")]
)
def test_values_are_handed_over_in_compiled_models(method, name):
    def make():
        torch.manual_seed(0)
        config = copy.deepcopy(FAMILIES[name].config)
        config.num_hidden_layers = 1
        model = FAMILIES[name].model(config).eval()
        put_default(method, model, gate=True)
        return model

    assert_compiles_cold(make, token_ids())
