"""Models with deltas as ONNX files, and in lm-eval's harness."""

import numpy as np
import onnxruntime
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from support.models import FIVE, build, put_deltas, token_ids
from support.nets import IDS, net, places_of, put, shake
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import opendelta
from opendelta import LoraModel, PrefixModel
from opendelta._deltas.registry import METHODS

pytestmark = pytest.mark.covers("*Model")


class Logits(torch.nn.Module):
    """A model as an exporter takes it: one tensor in, one tensor out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        given = {"decoder_input_ids": ids} if self.model.config.is_encoder_decoder else {}
        return self.model(input_ids=ids, use_cache=False, **given).logits


@pytest.mark.parametrize("name", [name for name in FIVE if name != "t5"])  # not even when plain
def test_onnx_computes_what_the_deltas_do(name, tmp_path):
    model = build(name).eval()
    put_deltas(model, name)
    ids = token_ids()
    path = tmp_path / "model.onnx"
    torch.onnx.export(Logits(model), (ids,), path, dynamo=True, input_names=["ids"])
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {"ids": ids.numpy()})
    expected = Logits(model)(ids).detach().numpy()
    assert np.abs(found - expected).max() < 1e-4
    plain = Logits(build(name).eval())(ids).detach().numpy()
    assert np.abs(found - plain).max() > 1e-3


EVERY = {name: (method, places_of(method), {}) for name, method in sorted(METHODS.items())}
EVERY["dora"] = METHODS["lora"], ["linear"], {"use_dora": True}
EVERY["loreft at the ends"] = METHODS["loreft"], ["linear"], {"first": 1, "last": 1}


@pytest.mark.parametrize(("method", "places", "options"), EVERY.values(), ids=EVERY)
def test_onnx_computes_what_each_method_does(method, places, options, tmp_path):
    model = net().eval()
    for place in places:
        shake(put(method, model, place, **options))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (IDS,), path, dynamo=True, input_names=["ids"])
    (found,) = onnxruntime.InferenceSession(path).run(None, {"ids": IDS.numpy()})
    assert np.abs(found - model(IDS).detach().numpy()).max() < 1e-4
    assert np.abs(found - net()(IDS).detach().numpy()).max() > 1e-3


def test_lm_eval_scores_the_model_with_its_deltas():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w95")
    model = build("llama").eval()
    deltas = [LoraModel(model), PrefixModel(model, prefix_token_num=2)]
    for delta in deltas:
        shake(delta)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    request = Instance("loglikelihood", {}, ("w4 w5 w6", " w7 w8"), 0)
    ((score, _),) = harness.loglikelihood([request], disable_tqdm=True)
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    with torch.no_grad():
        logs = model(ids).logits.log_softmax(-1)[0]
    assert score == pytest.approx(float(logs[2, 7] + logs[3, 8]), abs=1e-4)
    with opendelta.composition(model).only():
        ((plain, _),) = harness.loglikelihood([request], disable_tqdm=True)
    assert abs(plain - score) > 1e-3
