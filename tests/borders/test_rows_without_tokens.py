"""LoReFT's first and last tokens, and gates for each sequence, where a module gives [n, width]."""

import pytest
import torch
import torch.nn.functional as F
import transformers as T
from support.nets import shake
from torch import nn

from opendelta import GateModel, LoraModel, LoReftModel, SiteError

pytestmark = pytest.mark.covers("LoReftConfig.first", "LoReftConfig.last", "SiteError")

NOT_SHOWN = "nothing says that these are the tokens of one row"
SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip


def put(model, where, **ends):
    return shake(LoReftModel(model, modified_modules=where, low_rank_dimension=2, **ends))


class Squeezing(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.fc1, self.fc2 = nn.Conv2d(3, 8, 3), nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, image):
        x = self.stem(image)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))[:, :, None, None]


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.pre = nn.Embedding(20, 8), nn.Linear(8, 8)

    def forward(self, idx):
        return self.pre(self.table(idx).mean(1))


class Words(Pooled):
    def forward(self, input_ids):
        return self.pre(self.table(input_ids))


def tabular():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def vit():
    return T.ViTModel(T.ViTConfig(image_size=8, patch_size=4, **SIZES))


def bert():
    return T.BertModel(T.BertConfig(vocab_size=30, **SIZES))


POOLED = {  # where, the model's input, a part of the message
    "squeezing": (Squeezing, "fc2", torch.randn(3, 3, 8, 8), NOT_SHOWN),
    "tabular": (tabular, "0", torch.randn(3, 8), NOT_SHOWN),
    "one row": (tabular, "0", torch.randn(1, 8), NOT_SHOWN),
    "vit": (vit, "pooler.dense", torch.randn(3, 3, 8, 8), NOT_SHOWN),
    "ids": (Pooled, "pre", torch.randint(20, (3, 5)), NOT_SHOWN),
    "as many ids as rows": (Pooled, "pre", torch.randint(20, (5, 5)), NOT_SHOWN),
    "bert": (bert, "pooler.dense", torch.randint(30, (3, 5)), "does not show the tokens"),
    "as many tokens as rows": (
        bert, "pooler.dense", torch.randint(30, (5, 5)), "does not show the tokens"
    ),
}  # fmt: skip


@pytest.mark.parametrize("ends", [{"first": 1}, {"last": 1}])
@pytest.mark.parametrize("name", POOLED)
def test_rows_are_not_taken_for_tokens(name, ends):
    make, where, given, message = POOLED[name]
    model = make().eval()
    delta = put(model, [where], **ends)
    with pytest.raises(SiteError, match=f"first= and last=: '{where}' has an output.*{message}"):
        model(given)
    delta.detach()
    put(model, [where])
    model(given)


def test_a_row_alone_shows_its_tokens_by_an_axis_before_or_by_its_ids():
    model, frames = tabular(), torch.randn(4, 8)
    delta = put(model, ["2"], first=1)
    row = model(frames[None])[0]
    with delta.disabled():
        assert (row != model(frames)).any(-1).tolist() == [True, False, False, False]
    words, ids = Words(), torch.tensor([3, 4, 5])
    put(words, ["pre"], first=1)
    torch.testing.assert_close(words(ids), words(ids[None])[0])


@pytest.mark.covers("GateModel")
def test_a_gate_for_each_sequence_takes_no_mean_over_rows():
    model = tabular()
    model.is_causal = False
    for name in "ab":
        shake(LoraModel(model, modified_modules=["0"], name=name))
    GateModel(model, deltas=["a", "b"], per="sequence")
    with pytest.raises(SiteError, match=f'per="sequence": .*{NOT_SHOWN}'):
        model(torch.randn(3, 8))
    model(torch.randn(1, 3, 8))


def of_images():
    sizes = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    vision = T.Qwen2VLConfig(vision_config=sizes).vision_config
    model = T.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(vision)
    pixels, grid = torch.randn(32, 96), torch.tensor([[1, 4, 4]] * 2)
    return model, "blocks.0.mlp.fc2", lambda n: model(pixels[: 16 * n], grid[:n])


def of_sounds():
    sizes = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "n_window": 4}
    sizes |= {"encoder_ffn_dim": 24, "num_mel_bins": 8, "output_dim": 16}
    config = T.models.qwen2_5_omni.Qwen2_5OmniAudioEncoderConfig(**sizes)
    model = T.models.qwen2_5_omni.modeling_qwen2_5_omni.Qwen2_5OmniAudioEncoder(config)
    sound, ends = torch.randn(8, 16), torch.tensor([8, 8])
    return model, "layers.0.fc2", lambda n: model(sound[:, : 8 * n], ends[:n], ends[:n] // 2)


@pytest.mark.parametrize("make", [of_images, of_sounds])
def test_one_image_alone_is_one_row_and_several_are_refused(make):
    model, where, call = make()
    put(model, [where], first=1)
    call(1)
    with pytest.raises(SiteError, match="several images or sounds as one row"):
        call(2)
