"""Sizes of modules are found on every architecture, by itself or on the user's `sample_inputs`."""

import gc
import re
import weakref

import pytest
import torch
import transformers as T
from support.nets import shake
from torch import nn
from transformers.models.phi4_multimodal import modeling_phi4_multimodal

import opendelta
from opendelta import (
    AdapterModel,
    AutoDeltaModel,
    LoraModel,
    OptionError,
    ParallelAdapterModel,
    PrefixModel,
    SiteError,
)
from opendelta._backbone.backbone import Backbone
from opendelta._backbone.shapes import widths
from opendelta._sequences.prefix import eager_function

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
BOTH = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip
SOUND = {
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
TOKENS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 8}
IDS, PIXELS = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, 16, 16)
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2]}


def two_towers(model, config):
    text = {**SIZES, **TOKENS, "max_position_embeddings": 20}
    return model(config(text_config=text, vision_config=IMAGE))


def qwen():
    text = {**SIZES, **TOKENS, "num_key_value_heads": 2, "rope_parameters": ROPE}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    return T.Qwen2VLForConditionalGeneration(
        T.Qwen2VLConfig(text_config=text, vision_config=vision)
    )


def llava():
    vision, text = T.CLIPVisionConfig(**IMAGE), T.LlamaConfig(**SIZES, **TOKENS)
    config = T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    return T.LlavaForConditionalGeneration(config)


def whisper():
    sizes = {"max_source_positions": 20, "max_target_positions": 20, "decoder_start_token_id": 1}
    return T.WhisperForConditionalGeneration(T.WhisperConfig(**BOTH, **TOKENS, **sizes))


def idefics2():
    text = {"model_type": "mistral", **SIZES, "num_key_value_heads": 2, "vocab_size": 64}
    perceiver = {
        "hidden_size": 16, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2,
        "resampler_head_dim": 8, "num_key_value_heads": 1,
    }  # fmt: skip
    return T.Idefics2ForConditionalGeneration(
        T.Idefics2Config(
            text_config=text, vision_config=IMAGE, perceiver_config=perceiver, image_token_id=63
        )
    )


def sam():
    vision = {**SIZES, "mlp_dim": 32, "image_size": 16, "patch_size": 8, "output_channels": 8,
              "window_size": 2, "global_attn_indexes": [0], "num_pos_feats": 4}  # fmt: skip
    prompt = {"hidden_size": 8, "image_size": 16, "patch_size": 8, "mask_input_channels": 4}
    mask = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16,
            "iou_head_hidden_dim": 8}  # fmt: skip
    return T.SamModel(
        T.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=mask)
    )


SPECTRUM = {
    "spec_size": 32, "num_mel_bins": 8, "patch_size": 2, "patch_stride": [2, 2], "window_size": 4,
    "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [1, 2],
}  # fmt: skip
MODELS = {  # (model, inputs, sites of a prefix, sites of parallel adapters at default places)
    "clip": (lambda: two_towers(T.CLIPModel, T.CLIPConfig),
             {"input_ids": IDS, "pixel_values": PIXELS}, 2, 6),
    "siglip": (lambda: two_towers(T.SiglipModel, T.SiglipConfig),
               {"input_ids": IDS, "pixel_values": PIXELS}, 2, 6),
    "whisper": (whisper, {"input_features": torch.ones(1, 80, 40), "decoder_input_ids": IDS}, 2, 6),
    "wav2vec2": (lambda: T.Wav2Vec2Model(T.Wav2Vec2Config(**SIZES, **SOUND)),
                 {"input_values": torch.randn(1, 800)}, 1, 3),
    "wavlm": (lambda: T.WavLMModel(T.WavLMConfig(**SIZES, **SOUND)),
              {"input_values": torch.randn(1, 800)}, 0, 3),
    "ast": (lambda: T.ASTModel(T.ASTConfig(**SIZES, max_length=32)),
            {"input_values": torch.ones(1, 32, 128)}, 1, 3),
    "clap": (lambda: T.ClapAudioModel(T.ClapAudioConfig(**{**SIZES, **SPECTRUM})),
             {"input_features": torch.ones(1, 1, 128, 8)}, 0, 6),
    "patchtst": (lambda: T.PatchTSTModel(T.PatchTSTConfig(
        d_model=16, num_attention_heads=2, num_hidden_layers=1, ffn_dim=32, context_length=32,
        patch_length=4)), {"past_values": torch.randn(1, 32, 1)}, 1, 3),
    "timeseries": (lambda: T.TimeSeriesTransformerModel(
        T.TimeSeriesTransformerConfig(**BOTH, **SERIES)), {
            "past_values": torch.rand(1, 10), "past_observed_mask": torch.ones(1, 10),
            "past_time_features": torch.ones(1, 10, 0), "future_values": torch.rand(1, 4),
            "future_time_features": torch.ones(1, 4, 0)}, 2, 6),
    "decision": (lambda: T.DecisionTransformerModel(T.DecisionTransformerConfig(
        hidden_size=16, n_layer=1, n_head=2, state_dim=3, act_dim=2)), {
            "states": torch.ones(1, 3, 3), "actions": torch.ones(1, 3, 2),
            "rewards": torch.ones(1, 3, 1), "returns_to_go": torch.ones(1, 3, 1),
            "timesteps": torch.arange(3)[None], "attention_mask": torch.ones(1, 3)}, 1, 3),
    "llava": (llava, {"input_ids": torch.tensor([[5, 63, 63, 63, 63, 6]]),
                      "pixel_values": PIXELS}, 2, 6),
    "qwen2_vl": (qwen, None, 2, 6),
    "idefics2": (idefics2, {"input_ids": torch.tensor([[5, 63, 63, 6]]),
                            "pixel_values": torch.randn(1, 1, 3, 16, 16)}, 3, 9),
    "sam": (sam, {"pixel_values": torch.randn(1, 3, 16, 16),
                  "input_points": torch.ones(1, 1, 2, 2)}, 1, 6),
}  # fmt: skip


def outputs(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    return [t for t in out.values() if isinstance(t, torch.Tensor)]


@pytest.mark.covers("Delta")
@pytest.mark.parametrize("cls", [PrefixModel, ParallelAdapterModel])
@pytest.mark.parametrize("name", MODELS)
def test_default_places_are_found_run_and_act(name, cls):
    build, inputs, *counts = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    expected = counts[cls is ParallelAdapterModel]
    if not expected:
        pytest.skip("its attention does not use the attention interface: refused by name")
    plain = outputs(model, inputs) if inputs else []  # transformers' first forward leaves hooks
    before = opendelta.snapshot(model)
    delta = cls(model)
    sites = [where for where in delta.layers if "deltas" not in where]
    helps = ("SharedTensors", "Places")
    assert len([w for w in sites if type(delta.layers[w]).__name__ not in helps]) == expected
    if inputs is not None:
        shake(delta)
        changed = outputs(model, inputs)
        assert any(not torch.equal(a, b) for a, b in zip(plain, changed, strict=True))
        assert not opendelta.unreached(model)
    delta.detach()
    opendelta.assert_pristine(model, like=before)


def windows():
    """Return a model whose attention on images goes by the lengths that it is given."""
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32,
              "out_hidden_size": 16, "patch_size": 4, "window_size": 16}  # fmt: skip
    text = {**SIZES, **TOKENS, "num_key_value_heads": 2, "rope_parameters": ROPE}
    return T.Qwen2_5_VLForConditionalGeneration(
        T.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    )


def rt_detr():
    """Return a model that looks for infinite values while it trains."""
    backbone = T.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    return T.RTDetrModel(T.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[8] * 3,
        encoder_ffn_dim=16, encoder_attention_heads=2, d_model=32, num_queries=5,
        decoder_in_channels=[32] * 3, decoder_ffn_dim=16, decoder_n_points=2, decoder_layers=2,
        decoder_attention_heads=2,
    ))  # fmt: skip


ON_META = {  # in train() or eval()
    "windows": windows,
    "rt_detr": rt_detr,
    "moshi": lambda: T.MoshiModel(T.MoshiConfig(
        **SIZES, vocab_size=64, ffn_dim=32, num_key_value_heads=2, head_dim=8, num_codebooks=2)),
    "layoutlmv3": lambda: T.LayoutLMv3Model(T.LayoutLMv3Config(
        **SIZES, **TOKENS, coordinate_size=2, shape_size=4, input_size=16, patch_size=8,
        max_2d_position_embeddings=32, max_position_embeddings=20)),
    "wavlm": MODELS["wavlm"][0],
}  # fmt: skip


@pytest.mark.covers("plan")
@pytest.mark.parametrize("config", [opendelta.PrefixConfig, opendelta.ParallelAdapterConfig])
@pytest.mark.parametrize("name", ON_META)
def test_a_plan_on_the_meta_device_finds_what_one_with_weights_does(name, config):
    if config is opendelta.PrefixConfig and name in ("layoutlmv3", "wavlm"):
        pytest.skip("its attention does not use the attention interface: refused by name")
    with torch.device("meta"):
        bare = ON_META[name]()
    model = ON_META[name]().eval()
    plan = str(opendelta.plan(model, [config()]))
    assert str(opendelta.plan(bare, [config()])) == plan
    assert str(opendelta.plan(bare.eval(), [config()])) == plan
    assert str(opendelta.plan(model.train(), [config()])) == plan
    assert all(part.training for part in model.modules())


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # TimesFM does
def test_a_prefix_acts_where_the_eager_function_has_another_name():
    """TimesFM has another one than its kin, and so has a part of Phi-4."""
    torch.manual_seed(0)
    config = T.TimesFmConfig(
        patch_length=4, context_length=16, horizon_length=4, num_hidden_layers=1, head_dim=8,
        hidden_size=16, intermediate_size=16, num_attention_heads=2,
    )  # fmt: skip
    model = T.TimesFmModelForPrediction(config).eval()
    inputs = {"past_values": [torch.randn(16), torch.randn(12)], "freq": torch.tensor([0, 0])}
    plain = outputs(model, inputs)[0]
    delta = PrefixModel(model)
    shake(delta)
    fused = outputs(model, inputs)[0]
    model.set_attn_implementation("eager")
    assert torch.allclose(fused, outputs(model, inputs)[0], atol=1e-5)
    assert not torch.allclose(fused, plain, atol=1e-2)
    delta.detach()
    assert torch.allclose(plain, outputs(model, inputs)[0], atol=1e-5)
    names = {"Phi4MultimodalVisionAttention": "simple_", "Phi4MultimodalAttention": ""}
    for name, word in names.items():
        cls = getattr(modeling_phi4_multimodal, name)
        assert eager_function(cls).__name__ == f"{word}eager_attention_forward"


def test_a_class_without_an_eager_function_is_refused_by_path():
    with pytest.raises(SiteError, match=r"'a\.b' .Linear. names no .*choose other modules"):
        eager_function(nn.Linear, "a.b")


@pytest.mark.parametrize("name", ["clip", "whisper", "wav2vec2", "ast", "timeseries"])
def test_a_check_without_a_batch_runs(name):
    model = MODELS[name][0]().eval()
    delta = opendelta.LoraModel(model, modified_modules=["q_proj"])
    delta.freeze_module()
    report = opendelta.check(model)
    assert report, str(report)


class ByValues(nn.Module):
    """A forward that goes by its second argument's values: it runs on no shapes alone."""

    def __init__(self):
        super().__init__()
        self.inner = Inner()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x, *, length):
        self.calls += 1
        return self.inner(x[: int(length)], mode=length)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x, *, mode):
        return self.fc(x) * mode.item()


SAMPLES = {"x": torch.randn(5, 4), "length": torch.tensor(3)}


@pytest.mark.covers("plan")
def test_on_the_meta_device_whole_numbers_in_sample_inputs_have_their_values():
    with torch.device("meta"):
        model = ByValues()
    config = opendelta.AdapterConfig(modified_modules=["inner"], bottleneck_dim=2)
    with pytest.raises(SiteError, match="sample_inputs"):
        opendelta.plan(model, [config])
    assert "inner" in str(opendelta.plan(model, [config], sample_inputs=SAMPLES))


class Turned(nn.Module):
    """A block that gets angles, which the model keeps as a plain attribute."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, angles):
        return x + self.inner(x) * angles.real


class Angles(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.block = nn.Embedding(9, 8), Turned()
        self.angles = torch.polar(torch.ones(16, 8), torch.rand(16, 8))

    def forward(self, input_ids):
        return self.block(self.table(input_ids), self.angles[: input_ids.shape[1]])


@pytest.mark.covers("plan")
def test_on_the_meta_device_tensors_that_are_no_buffers_are_on_one_device_with_the_rest():
    with torch.device("meta"):
        model = Angles()
    config = opendelta.AdapterConfig(modified_modules=["block"], bottleneck_dim=2)
    assert str(opendelta.plan(model, [config])) == str(opendelta.plan(Angles(), [config]))
    assert model.angles.is_meta


@pytest.mark.covers("plan", "check", "AutoDeltaModel", "load")
def test_sample_inputs_are_taken_by_each_verb(tmp_path):
    model = ByValues()
    before, drawn = opendelta.snapshot(model), torch.get_rng_state()
    with pytest.raises(SiteError, match=r"'inner' .*sample_inputs=.*ByValues.forward"):
        AdapterModel(model, modified_modules=["inner"])
    sizes = widths(Backbone.of(model, SAMPLES), ["inner"])["inner"]
    assert (sizes.input, sizes.output) == (4, 6)
    assert torch.equal(drawn, torch.get_rng_state())
    assert model.calls == 0
    delta = AdapterModel(model, modified_modules=["inner"], sample_inputs=SAMPLES)
    delta.freeze_module()
    assert opendelta.check(model, sample_inputs=SAMPLES)
    delta.save_finetuned(tmp_path)
    config = delta.config
    delta.detach()
    opendelta.assert_pristine(model, like=before)

    plan = opendelta.plan(model, config, sample_inputs=SAMPLES)
    assert [module.name for module in plan.deltas[0].modules] == ["inner"]
    model = ByValues()
    AutoDeltaModel.from_config(config, model, sample_inputs=SAMPLES)
    for read in (AdapterModel.from_finetuned, AutoDeltaModel.from_finetuned, opendelta.load):
        read(tmp_path, model, check_backbone=False, sample_inputs=SAMPLES)
    assert len(opendelta.composition(model).names) == 4


@pytest.mark.covers("plan", "check", "AutoDeltaModel", "load")
@pytest.mark.parametrize("wrong", [5, 2.5, "tokens", {3: torch.zeros(2)}, {"x"}, object()])
def test_what_are_no_inputs_is_refused_by_each_verb(tmp_path, wrong):
    model = ByValues()
    delta = AdapterModel(model, modified_modules=["inner"], sample_inputs=SAMPLES)
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    config, more = delta.config, {"check_backbone": False, "sample_inputs": wrong}
    fresh = ByValues()
    before = opendelta.snapshot(fresh)
    calls = [
        lambda: AdapterModel(fresh, modified_modules=["inner"], sample_inputs=wrong),
        lambda: AdapterModel.from_config(config, fresh, sample_inputs=wrong),
        lambda: AutoDeltaModel.from_config(config, fresh, sample_inputs=wrong),
        lambda: AdapterModel.from_finetuned(tmp_path, fresh, **more),
        lambda: AutoDeltaModel.from_finetuned(tmp_path, fresh, **more),
        lambda: opendelta.load(tmp_path, fresh, **more),
        lambda: opendelta.plan(fresh, config, sample_inputs=wrong),
        lambda: opendelta.check(model, sample_inputs=wrong),
    ]
    for call in calls:
        with pytest.raises(OptionError, match=r"sample_inputs=.* must be the arguments of the mod"):
            call()
    with pytest.raises(OptionError, match=r"batch=.* must be the arguments of the model's forward"):
        opendelta.check(model, wrong)
    opendelta.assert_pristine(fresh, like=before)


@pytest.mark.parametrize(
    "samples", [torch.zeros(2, 3), [torch.zeros(2, 3)], {"x": torch.zeros(2, 3)}]
)
def test_sample_inputs_come_by_keyword_by_position_or_alone(samples):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 5))

        def forward(self, x):
            return self.inner(x) if x.size(-1) == 3 and x.size(0) != 1 else x["no"]

    delta = AdapterModel(Net(), modified_modules=["inner"], sample_inputs=samples)
    assert delta.layers["inner"].width == 5


def test_a_run_ends_with_the_modules_that_matter():
    ran = []

    class After(nn.Module):
        def forward(self, x):
            ran.append(1)
            return x

    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6)), After())
    assert widths(Backbone.of(model), ["0"])["0"].output == 6
    assert not ran


def test_a_module_that_the_run_misses_is_run_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.other = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 7))

        def forward(self, x, both=False):
            return self.other(x) if both else self.used(x)

    assert AdapterModel(Net(), modified_modules=["other"]).layers["other"].width == 7


def test_hooks_that_a_forward_installs_are_not_installed_twice():
    model = T.BertModel(T.BertConfig(**SIZES, vocab_size=64)).eval()
    AdapterModel(model, modified_modules=["encoder.layer.0.attention.self"])
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 2


def scaled(module, x):
    return module.weight * x


class Norm(nn.Module):
    """A function beside it reads the weight of what it is given: the code alone does not tell."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return scaled(self, x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class OfTwo(nn.Module):
    """It runs on two arguments, which nobody could guess."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(20, 8), Norm(), nn.Linear(8, 8)

    def forward(self, ids, mask):
        if mask.shape != ids.shape:
            raise ValueError("a mask must be of the shape of the ids")
        return self.head(self.norm(self.embed(ids) * mask[..., None]))


class ReadsIt(OfTwo):
    def forward(self, ids, mask):
        return super().forward(ids, mask) + scaled(self.head, self.embed(ids)[..., None, :]).sum(-1)


class ByValue(OfTwo):
    def forward(self, ids, mask):
        return super().forward(ids[:, : int(mask.sum(1).max())], mask)


TWO = [torch.arange(10).view(2, 5), torch.ones(2, 5)]


@pytest.mark.covers("Composition.merge", "Composition.to_backbone")
@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
@pytest.mark.parametrize("net", [OfTwo, ByValue])
def test_a_merge_tries_the_inputs_that_were_given_at_attaching(net, verb):
    model = net().eval()
    delta = shake(LoraModel(model, modified_modules=["head"]))
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match=r"'head' .*no run on shapes tells.*sample_inputs="):
        getattr(opendelta.composition(model), verb)()
    assert opendelta.snapshot(model) == before
    delta.detach()
    shake(LoraModel(model, modified_modules=["head"], sample_inputs=TWO))
    expected = model(*TWO)
    made = getattr(opendelta.composition(model), verb)()
    torch.testing.assert_close((model if verb == "merge" else made)(*TWO), expected)


@pytest.mark.covers("Composition.merge", "Composition.to_backbone")
@pytest.mark.parametrize("verb", ["merge", "to_backbone"])
def test_a_merge_is_refused_where_they_show_that_the_weight_is_read(verb):
    model = ReadsIt().eval()
    shake(LoraModel(model, modified_modules=["head"], sample_inputs=TWO))
    with pytest.raises(SiteError, match=r"'head' .*other code reads its weight"):
        getattr(opendelta.composition(model), verb)()


def test_a_model_that_is_gone_leaves_no_inputs():
    model, samples = OfTwo(), [TWO[0].clone(), TWO[1]]
    given = weakref.ref(samples[0])
    LoraModel(model, modified_modules=["head"], sample_inputs=samples)
    del model, samples
    gc.collect()
    assert given() is None


def hiera():
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 1, 2, 2]}
    image = {"image_size": [64, 64], "masked_unit_size": [8, 8]}
    return T.HieraForImageClassification(T.HieraConfig(**sizes, **image, mlp_ratio=2.0)).eval()


class Pools(nn.Module):
    """Attention of its own that halves the tokens."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(x[:, ::2])


def test_a_branch_around_a_module_that_changes_the_tokens_is_refused_when_attaching():
    model, images = hiera(), torch.randn(1, 3, 64, 64)
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match=r"around 'hiera.*same rows and tokens") as caught:
        ParallelAdapterModel(model)
    opendelta.assert_pristine(model, like=before)
    left_out = re.findall(r"'(hiera\.\S+)'", str(caught.value).rpartition("exclude_modules")[2])
    assert "hiera.encoder.stages.3.layers.0.attn" in left_out
    delta = ParallelAdapterModel(model, exclude_modules=left_out)
    assert "hiera.encoder.stages.1.layers.1.attn" in delta.modified_modules
    plain = model(images).logits
    shake(delta)
    assert not torch.allclose(model(images).logits, plain)


def test_only_a_branch_asks_for_the_same_tokens():
    model, x = nn.Sequential(nn.Linear(4, 8), Pools(), nn.Linear(8, 2)), torch.randn(2, 6, 4)
    why = r"its output is \[2, 3, width\], its input \[2, 6, width\].*exclude_modules=\['1'\]"
    with pytest.raises(SiteError, match=why):
        ParallelAdapterModel(model, modified_modules=["1", "1"], sample_inputs=x)
    AdapterModel(model, modified_modules=["1"], sample_inputs=x)
    assert model(x).shape == (2, 3, 2)
