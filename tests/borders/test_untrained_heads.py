"""A head with random values that is frozen is named when it is frozen, saved and checked."""

import copy
import pickle
import re
import warnings

import pytest
import torch
import transformers
from torch import nn

import opendelta
from opendelta import LoraModel
from opendelta.errors import UntrainedWarning

pytestmark = pytest.mark.covers("Delta.freeze_module", "Delta.save_finetuned", "UntrainedWarning")
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 99}
SMALL |= {"num_attention_heads": 2, "pad_token_id": 0}
WHISPER = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
HEADS = {
    "BertForSequenceClassification": ["classifier"],
    "BertForQuestionAnswering": ["qa_outputs"],
    "BertForMultipleChoice": ["classifier"],
    "RobertaForTokenClassification": ["classifier"],
    "DistilBertForSequenceClassification": ["pre_classifier", "classifier"],
    "LlamaForSequenceClassification": ["score"],
}
CROSS = [f"decoder.bert.encoder.layer.{number}.crossattention" for number in range(2)]
COMPOSITES = [
    ("VisionTextDualEncoder", "ViTModel", "BertModel", ["visual_projection", "text_projection"]),
    ("VisionEncoderDecoder", "ViTModel", "BertForMaskedLM", CROSS),
    ("EncoderDecoder", "BertForMaskedLM", "BertForMaskedLM", CROSS),
    ("EncoderDecoder", "BertModel", "BertModel", [*CROSS, "decoder.cls.predictions.transform"]),
]


def made(name):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = SMALL
    if "Distil" in name:
        config = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "vocab_size": 99}
    if "ViT" in name:
        config = SMALL | {"image_size": 16, "patch_size": 8}
    return kind(kind.config_class(**config))


def by_from_pretrained(name, folder):
    """The model with the weights of a checkpoint that has no head."""
    made(name).base_model.save_pretrained(folder)
    return getattr(transformers, name).from_pretrained(folder)


def by_state_dict(name, folder):
    model = made(name)
    model.base_model.load_state_dict(made(name).base_model.state_dict())
    return model


@pytest.mark.parametrize("load", [by_from_pretrained, by_state_dict])
@pytest.mark.parametrize("name", HEADS)
def test_it_is_named_when_it_is_frozen_and_when_the_delta_is_saved(name, load, tmp_path):
    delta = LoraModel(load(name, tmp_path))
    named = ", ".join(map(repr, HEADS[name]))
    with pytest.warns(UntrainedWarning, match=f"^{named} of {name} is frozen.*modules_to_save"):
        delta.freeze_module()
    with pytest.warns(UntrainedWarning, match=f"^{named} of {name} is not saved"):
        delta.save_finetuned(tmp_path / "delta")


def trained(model, heads, **options):
    """The model after two steps of its head, with a small learning rate."""
    own = [p for head in heads for p in model.get_submodule(head).parameters()]
    optimizer = torch.optim.AdamW(own, lr=1e-5, **options)
    for _ in range(2):
        for parameter in own:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return model


@pytest.mark.parametrize("load", [by_from_pretrained, by_state_dict])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("how", ["trains", "trained", "fused", "copied", "loaded", "random"])
def test_other_heads_are_not_named(how, name, load, tmp_path, recwarn):
    model, heads = load(name, tmp_path / "base"), HEADS[name]
    if how == "trained":
        trained(model, heads)
    if how == "fused":  # Trainer's default, and torch counts none of its steps
        trained(model, heads, fused=True)
    if how == "loaded":
        model.save_pretrained(tmp_path / "whole")
        model = type(model).from_pretrained(tmp_path / "whole")
    if how == "random":
        model = made(name)
    delta = LoraModel(model, modules_to_save=heads if how == "copied" else None)
    delta.freeze_module(exclude=["deltas", *(heads if how == "trains" else ())])
    delta.save_finetuned(tmp_path / "delta")
    assert [str(each.message) for each in recwarn if each.category is UntrainedWarning] == []


COPY = "classifier.deltas.x"


@pytest.mark.covers("check")
@pytest.mark.parametrize("labels", [None, 5])
@pytest.mark.parametrize("how", ["frozen", "trained", "fused", "loaded"])
def test_a_copy_of_a_random_head_is_named_until_it_was_trained(how, labels, tmp_path):
    model = by_state_dict("BertForSequenceClassification", None)
    x = LoraModel(model, modules_to_save=["classifier"], num_labels=labels, name="x")
    LoraModel(model, name="y")
    if how != "frozen":
        copied = [p for name, p in x.named_parameters() if name.startswith("classifier")]
        assert len(copied) == 2
        optimizer = torch.optim.AdamW(copied, lr=1e-3, fused=how == "fused")
        for parameter in copied:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    if how == "loaded":
        x.freeze_module(exclude=["x"])
        x.save_finetuned(tmp_path / "x")
        x.detach()
        composition = opendelta.load(tmp_path / "x", model)
        x = composition[composition.names[-1]]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x.freeze_module(exclude=["y"])
    told = [str(each.message) for each in caught if each.category is UntrainedWarning]
    report = opendelta.check(model, {"input_ids": torch.ones(1, 3).long()})
    assert report.untrained == ([COPY] if how == "frozen" else [])
    if how != "frozen":
        assert told == []
        return
    assert len(told) == 1
    assert told[0].startswith(f"'{COPY}' of BertForSequenceClassification")
    assert "exclude=['deltas']" in told[0]
    with pytest.warns(UntrainedWarning, match=f"^'{COPY}' of .* never trained"):
        x.save_finetuned(tmp_path / "x")


def test_a_head_that_a_fused_optimizer_reaches_later_is_not_named(recwarn):
    model = by_state_dict("BertForSequenceClassification", None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    delta = LoraModel(model)
    delta.freeze_module(exclude=["deltas", "bert.pooler", "classifier"])
    for parts in (["bert.pooler"], ["classifier"]):
        optimizer.zero_grad()
        for part in parts:
            for parameter in model.get_submodule(part).parameters():
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    delta.freeze_module()
    assert [str(each.message) for each in recwarn if each.category is UntrainedWarning] == []


@pytest.mark.parametrize("name", ["BertForMaskedLM", "LlamaForCausalLM", "BertModel"])
def test_a_language_model_is_not_named(name, tmp_path, recwarn):
    made(name).save_pretrained(tmp_path)
    LoraModel(getattr(transformers, name).from_pretrained(tmp_path)).freeze_module()
    assert [str(each.message) for each in recwarn if each.category is UntrainedWarning] == []


class Wrapped(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(self.encoder(ids).last_hidden_state[:, 0])


def test_a_head_of_one_s_own_is_named(tmp_path):
    made("BertModel").save_pretrained(tmp_path)
    model = Wrapped(transformers.BertModel.from_pretrained(tmp_path))
    delta = LoraModel(model)
    with pytest.warns(UntrainedWarning, match="^'head' of Wrapped is frozen"):
        delta.freeze_module()


def test_a_head_that_was_replaced_by_hand_is_named():
    body = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)]
    model = nn.Sequential(*body, nn.Linear(8, 4))
    model.load_state_dict(model.state_dict())
    LoraModel(model, modified_modules=["0"], name="first").freeze_module()
    model[3] = nn.Linear(8, 10)
    with pytest.warns(UntrainedWarning, match="^'3' of Sequential is frozen"):
        LoraModel(model, modified_modules=["0"]).freeze_module()


@pytest.mark.covers("check", "CheckReport")
def test_check_names_it(tmp_path):
    model = by_state_dict("BertForSequenceClassification", None).train()
    with pytest.warns(UntrainedWarning):
        LoraModel(model).freeze_module()
    report = opendelta.check(model, {"input_ids": torch.ones(1, 3).long()})
    assert report.untrained == ["classifier"]
    assert "classifier" in str(report)


def test_a_model_that_is_random_as_a_whole_is_not_named(recwarn):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    LoraModel(model, modified_modules=["0"]).freeze_module()
    assert list(recwarn) == []


class Tagger(nn.Module):
    """A head on the tokens of a base model whose checkpoint has no pooler."""

    def __init__(self, folder):
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(folder)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids):
        return self.head(self.encoder(input_ids).last_hidden_state)


@pytest.mark.parametrize("kind", ["Roberta", "Bert"])
def test_a_pooler_of_a_base_model_that_its_checkpoint_lacks_is_not_named(kind, tmp_path):
    made(f"{kind}ForTokenClassification").save_pretrained(tmp_path)
    model = Tagger(tmp_path)
    delta = LoraModel(model, modified_modules=["query"], modules_to_save=["head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta.freeze_module()
        delta.save_finetuned(tmp_path / "delta")
    assert not opendelta.check(model, {"input_ids": torch.tensor([[5, 6]])}).untrained


class Holding(transformers.PreTrainedModel):
    """A model of one's own, as transformers wants it, with a base model inside."""

    config_class = transformers.BertConfig

    def __init__(self, config, folder):
        super().__init__(config)
        self.encoder = transformers.AutoModel.from_pretrained(folder)
        self.head = nn.Linear(16, 3, bias=False)

    def forward(self, input_ids):
        return self.head(self.encoder(input_ids).last_hidden_state)


class Initialising(Holding):
    def __init__(self, config, folder):
        super().__init__(config, folder)
        self.post_init()


class WithHead(transformers.BertModel):
    """A base model of one's own that has a head."""

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(16, 3, bias=False)


def named(model):
    """The heads that `freeze_module` names."""
    delta = LoraModel(model, modified_modules=["query"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        delta.freeze_module()
    delta.detach()
    texts = [str(each.message) for each in caught if each.category is UntrainedWarning]
    return {name for text in texts for name in re.findall("'([^']+)'", text.partition(" of ")[0])}


@pytest.mark.parametrize("kind", [Holding, Initialising])
@pytest.mark.parametrize("source", ["BertModel", "BertForMaskedLM"])
def test_a_head_on_a_base_model_inside_is_named(kind, source, tmp_path):
    made(source).save_pretrained(tmp_path)
    model = kind(transformers.BertConfig(**SMALL), tmp_path)
    assert named(model) == {"head"}
    model.head.load_state_dict(nn.Linear(16, 3, bias=False).state_dict())
    assert not named(model)


def test_a_head_in_a_base_model_of_one_s_own_is_named_but_not_its_pooler(tmp_path):
    made("BertForMaskedLM").save_pretrained(tmp_path)
    assert named(WithHead.from_pretrained(tmp_path)) == {"head"}


def composite(kind, folder, left, right):
    paths = [folder / "left", folder / "right"]
    for name, path in zip((left, right), paths, strict=True):
        made(name).save_pretrained(path)
    if kind == "VisionTextDualEncoder":
        return transformers.VisionTextDualEncoderModel.from_vision_text_pretrained(*paths)
    model = getattr(transformers, f"{kind}Model")
    return model.from_encoder_decoder_pretrained(*paths)


@pytest.mark.parametrize(("kind", "left", "right", "random"), COMPOSITES)
def test_what_is_new_between_two_pretrained_models_is_named(kind, left, right, random, tmp_path):
    model = composite(kind, tmp_path, left, right)
    assert named(model) == {*random}
    model.save_pretrained(tmp_path / "whole")
    assert not named(type(model).from_pretrained(tmp_path / "whole"))


def test_the_head_of_a_model_that_names_no_base_is_named(tmp_path):
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in WHISPER.items()}
    config = transformers.WhisperConfig(
        **sizes, d_model=16, vocab_size=60, num_mel_bins=8, max_source_positions=10,
        max_target_positions=10, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, classifier_proj_size=8,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path)
    delta = LoraModel(transformers.WhisperForAudioClassification.from_pretrained(tmp_path))
    with pytest.warns(UntrainedWarning, match="^'projector', 'classifier' of Whisper"):
        delta.freeze_module()


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification"])
def test_a_head_that_its_model_draws_twice_is_named_until_it_has_other_values(task, tmp_path):
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, num_labels=3,
        decoder_start_token_id=0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    kind = getattr(transformers, f"T5For{task}")
    model = kind.from_pretrained(tmp_path, num_labels=3)
    with pytest.warns(UntrainedWarning, match=f"of T5For{task} is frozen"):
        LoraModel(model).freeze_module()
    (head,) = opendelta.check(model).untrained
    other = getattr(kind(config), head).state_dict()
    getattr(model, head).load_state_dict(other)
    assert not opendelta.check(model).untrained


MODERN = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
VISION = {k: SMALL[k] for k in SMALL if k not in ("vocab_size", "pad_token_id")}
VISION |= {"image_size": 16, "patch_size": 8}
HIERA = {"embed_dim": 8, "image_size": [16, 16], "depths": [1, 1], "num_heads": [1, 2]}
HIERA |= {f"patch_{key}": [n, n] for key, n in {"size": 4, "stride": 2, "padding": 1}.items()}
HIERA |= {"num_query_pool": 1, "query_stride": [2, 2], "masked_unit_size": [2, 2]}
DRAWN_MORE = {
    "ModernBertForSequenceClassification": (SMALL | MODERN, "'head', 'classifier'"),
    "Dinov2ForImageClassification": (VISION, "'classifier'"),
    "HieraForImageClassification": (HIERA, "'classifier'"),
}


@pytest.mark.parametrize("name", DRAWN_MORE)
def test_a_head_that_its_model_draws_in_several_writes_is_named_until_it_is_loaded(name, tmp_path):
    config, heads = DRAWN_MORE[name]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    config = kind.config_class(**config)
    kind(config).base_model.save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path)
    before = {n: p._version for n, p in model.named_parameters()}
    delta = LoraModel(model, modified_modules=[next(find_linear(model))])
    drawn = torch.get_rng_state()
    with pytest.warns(UntrainedWarning, match=f"^{heads} of {name} is frozen"):
        delta.freeze_module()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert {n: model.get_parameter(n)._version for n in before} == before
    model.classifier.load_state_dict(kind(config).classifier.state_dict())
    assert "classifier" not in opendelta.check(model).untrained


def find_linear(model):
    parts = model.base_model.named_modules(prefix=model.base_model_prefix)
    return (name for name, module in parts if isinstance(module, nn.Linear))


UNTIED = {"tie_word_embeddings": False}
RESIZES = {"mean": {}, "drawn": {"mean_resizing": False}, "padded": {"pad_to_multiple_of": 64}}


@pytest.mark.parametrize("how", [*RESIZES, "smaller"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_a_head_that_was_resized_for_other_tokens_is_not_named(name, how, tmp_path, recwarn):
    kind = getattr(transformers, name)
    kind(kind.config_class(**SMALL, **UNTIED)).save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path)
    model.resize_token_embeddings(90 if how == "smaller" else 103, **RESIZES.get(how, {}))
    LoraModel(model).freeze_module()
    assert [str(each.message) for each in recwarn if each.category is UntrainedWarning] == []


@pytest.mark.parametrize("resize", [False, True])
def test_a_language_head_that_the_checkpoint_lacked_is_named(resize, tmp_path):
    config = transformers.LlamaConfig(**SMALL, **UNTIED)
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    if resize:
        model.resize_token_embeddings(103)
    with pytest.warns(UntrainedWarning, match="^'lm_head' of LlamaForCausalLM is frozen"):
        LoraModel(model).freeze_module()


class Own(nn.Module):
    """A body with trained values, and a head as `draw` made it."""

    def __init__(self, draw=lambda head: None, head=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 8))
        self.head = head or nn.Linear(8, 3)
        draw(self.head)

    def forward(self, x):
        return self.head(self.body(x))

    def loaded(self, whole=False):
        given = Own(head=copy.deepcopy(self.head)).state_dict()
        given = {key: value for key, value in given.items() if whole or "head" not in key}
        self.load_state_dict(given, strict=False)
        return self


DRAWS = {
    "trunc_normal": lambda head: nn.init.trunc_normal_(head.weight, std=0.02),
    "xavier": lambda head: nn.init.xavier_uniform_(head.weight),
    "orthogonal": lambda head: nn.init.orthogonal_(head.weight),
    "twice": lambda head: [nn.init.normal_(head.weight) for _ in range(2)],
}


def told(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LoraModel(model, modified_modules=["body.0"]).freeze_module()
    return [str(each.message) for each in caught if each.category is UntrainedWarning]


@pytest.mark.parametrize("bias", [None, 0])
@pytest.mark.parametrize("draw", DRAWS)
def test_a_head_that_its_own_class_draws_is_named(draw, bias):
    model = Own(DRAWS[draw]).loaded()
    if bias is not None:
        nn.init.zeros_(model.head.bias)
    (text,) = told(model)
    assert text.startswith("'head' of Own is frozen")
    assert opendelta.check(model).untrained == ["head"]


def test_a_head_of_convolutions_is_named():
    head = nn.Sequential(nn.Unflatten(-1, (8, 1)), nn.Conv1d(8, 5, 1), nn.Flatten())
    (text,) = told(Own(head=head).loaded())
    assert text.startswith("'head' of Own is frozen")


def by_pickle(model, _):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize("keep", [by_pickle, by_torch_save])
@pytest.mark.parametrize("kind", ["Bert", "Llama"])
def test_a_head_of_a_pickled_model_is_named_by_its_bias(kind, keep, tmp_path, recwarn):
    name = f"{kind}ForSequenceClassification"
    model = by_from_pretrained(name, tmp_path)
    if kind == "Bert":
        random = keep(model, tmp_path)
        delta = LoraModel(random)
        with pytest.warns(UntrainedWarning, match="^'classifier' of Bert"):
            delta.freeze_module()
        recwarn.clear()
    model = keep(trained(model, HEADS[name]), tmp_path)
    LoraModel(model).freeze_module()
    assert [str(each.message) for each in recwarn if each.category is UntrainedWarning] == []


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(nn.LayerNorm(8), m)])
def test_a_head_of_a_copied_model_is_named_by_its_bias(wrap):
    head = nn.Linear(8, 3)
    nn.init.zeros_(head.bias)
    (text,) = told(copy.deepcopy(Own(head=wrap(head)).loaded()))
    assert text.startswith("'head")


def zero_shot(model):
    model.head.weight = nn.Parameter(torch.randn(3, 8))
    model.head.bias = nn.Parameter(torch.zeros(3))


def empty(model):
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)


def probe(model):
    optimizer = torch.optim.SGD(model.head.parameters(), 0.1)
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()


OTHERS = {
    "trained": probe,
    "of values": zero_shot,
    "of zeros": empty,  # it has no random values
    "loaded": lambda model: model.head.load_state_dict(Own().head.state_dict()),
}
LIKE_RANDOM = ("of values", True)


@pytest.mark.parametrize(
    ("how", "copied"),  # in a copied model nothing tells values of one's own from random ones
    [(how, copied) for how in OTHERS for copied in (False, True) if (how, copied) != LIKE_RANDOM],
)
def test_a_head_with_other_values_is_not_named(how, copied):
    model = Own().loaded()
    OTHERS[how](model)
    assert told(copy.deepcopy(model) if copied else model) == []


@pytest.mark.parametrize("copied", [False, True])
def test_biases_of_zeros_are_no_sign_where_most_layers_have_them(copied):
    model = Own().loaded(whole=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    assert told(copy.deepcopy(model) if copied else model) == []
