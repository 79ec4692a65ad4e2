"""What a module, or the code around it, does in another mode, otherwise, or with more arguments."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from support.nets import shake, untouched
from torch import nn

import opendelta
from opendelta import LoraModel, SiteError, composition

pytestmark = pytest.mark.covers("Composition.merge", "Composition.to_backbone")
VERBS = ["merge", "to_backbone"]
X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class TakesMore(nn.Linear):
    def forward(self, x, scale=1.0):
        return F.linear(x, self.weight, self.bias) * scale


class ByMode(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * (0.5 if self.training else 1.0)


class Drops(nn.Linear):
    def forward(self, x):
        return F.linear(F.dropout(x, 0.5, self.training), self.weight, self.bias)


class Passes(nn.Linear):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("cls", [TakesMore, ByMode])
def test_a_forward_that_one_weight_does_not_describe_is_refused(cls, verb):
    model = nn.Sequential(cls(6, 4)).eval()
    delta = shake(LoraModel(model, modified_modules=["0"]))
    changed = model(X)
    with pytest.raises(SiteError, match=r"'0' .*from its input alone and in training too"):
        getattr(composition(model), verb)()
    assert torch.equal(model(X), changed)
    delta.detach()


@pytest.mark.parametrize("cls", [Drops, Passes])
def test_dropout_and_arguments_that_are_handed_on_are_no_obstacle(cls):
    model = nn.Sequential(cls(6, 4)).eval()
    shake(LoraModel(model, modified_modules=["0"]))
    changed = model(X)
    torch.testing.assert_close(composition(model).to_backbone()(X), changed)
    composition(model).merge()
    torch.testing.assert_close(model(X), changed)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.out = nn.Linear(6, 6), nn.Linear(6, 4)


class ReadsInTraining(Around):
    def forward(self, x):
        return self.out(F.linear(x, self.q.weight) if self.training else self.q(x))


class CallsAndReads(Around):
    def forward(self, x):
        return self.out(self.q(x) + F.linear(x, self.q.weight))


class ReadsByName(Around):
    def forward(self, x):
        own = dict(self.named_parameters())
        return self.out(F.linear(x, own["q.weight"], own["q.bias"]))


class ReadsTheTable(Around):
    def forward(self, x):
        return self.out(F.linear(x, self.q._parameters["weight"]) + self.q(x))


@pytest.mark.filterwarnings("ignore::opendelta.TiedWeightWarning")
@pytest.mark.parametrize("verb", VERBS)
def test_a_weight_that_is_read_in_the_other_mode_is_not_merged(verb):
    for training in (False, True):
        model = ReadsInTraining().train(training)
        shake(LoraModel(model, modified_modules=["q"]))
        with pytest.raises(SiteError, match=r"'q' .*reads its weight besides calling it"):
            getattr(composition(model), verb)()


@pytest.mark.filterwarnings("ignore::opendelta.UnreachedWarning")
@pytest.mark.covers("DeltaConfig.reads")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("cls", [ReadsByName, ReadsTheTable])
def test_reads_is_no_leave_to_merge_what_is_read_otherwise(cls, verb):
    model = cls()
    shake(LoraModel(model, modified_modules=["q"], reads=True))
    before = model(X)
    with pytest.raises(SiteError, match="otherwise than by the attribute"):
        getattr(composition(model), verb)()
    assert torch.equal(model(X), before)


def test_reads_of_the_attribute_are_merged_as_ever():
    model = CallsAndReads()
    shake(LoraModel(model, modified_modules=["q"], reads=True))
    changed = model(X)
    composition(model).merge()
    torch.testing.assert_close(model(X), changed)


@pytest.mark.filterwarnings("ignore::opendelta.TiedWeightWarning")
@pytest.mark.covers("DeltaConfig.modules_to_save")
def test_a_copy_of_a_module_whose_weight_is_read_is_in_no_plain_model():
    model = CallsAndReads()
    delta = LoraModel(model, modified_modules=["out"], modules_to_save=["q"])
    shake(delta)
    with pytest.raises(SiteError, match=r"'q' .*those of the copy in modules_to_save.*reads=True"):
        composition(model).to_backbone()
    delta.detach()
    both = LoraModel(model, modified_modules=["out"], modules_to_save=["q"], reads=True)
    shake(both)
    torch.testing.assert_close(composition(model).to_backbone()(X), model(X))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_tensor_that_a_module_computed_is_copied_along():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 4))
    shake(LoraModel(model, modified_modules=["1"]))
    out = model(X)
    out.sum().backward()
    torch.testing.assert_close(composition(model).to_backbone()(X), out)


# ---------------------------------------------------------------------------------- rows and tokens
@pytest.mark.covers("LoReftConfig.first", "LoReftConfig.last")
def test_a_mask_that_a_model_does_not_hand_on_says_where_tokens_are():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}
    model = transformers.RwkvForCausalLM(transformers.RwkvConfig(vocab_size=97, **sizes)).eval()
    shake(opendelta.LoReftModel(model, low_rank_dimension=2, first=0, last=2))
    row, padded = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    with torch.no_grad():
        alone, beside = model(row).logits, model(padded, attention_mask=mask).logits[:, :4]
    torch.testing.assert_close(beside, alone)


def test_the_tokens_of_a_single_row_may_come_without_an_axis_of_rows():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.inner = nn.Embedding(9, 6), nn.Linear(6, 6)

        def forward(self, input_ids, attention_mask=None):
            x = self.words(input_ids)
            return self.inner(x.flatten(0, 1)).view_as(x)

    model, ids = Flat(), torch.tensor([[1, 2, 3]])
    plain = model(ids)
    shake(opendelta.LoReftModel(model, modified_modules=["inner"], first=1, low_rank_dimension=2))
    changed = model(ids)
    assert torch.equal(changed[:, 1:], plain[:, 1:])
    assert not torch.allclose(changed[:, 0], plain[:, 0])
    with pytest.raises(SiteError, match="does not show the tokens"):
        model(ids.expand(2, 3))


@pytest.mark.covers("SoftPromptModel")
def test_a_prompt_of_float16_runs_under_autocast_to_bfloat16():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=97, intermediate_size=48, **sizes)
    model = transformers.LlamaForCausalLM(config).half().eval()
    opendelta.SoftPromptModel(model, soft_token_num=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 97)


# ------------------------------------------------------------------------------------------- files
@pytest.mark.covers("VeraConfig.save_projection", "load")
def test_matrices_that_are_saved_are_loaded_and_not_drawn_again(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6))

    model, other = net(), net()
    delta = opendelta.VeraModel(model, modified_modules=["0"], r=4, save_projection=True)
    shake(delta)
    with torch.no_grad():
        for buffer in (b for layer in delta.layers.values() for b in layer.buffers()):
            buffer.copy_(torch.linspace(-1, 1, buffer.numel()).view_as(buffer))
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    opendelta.load(tmp_path, other)
    assert torch.equal(other(X), model(X))


# ------------------------------------------------------------------------------------------ errors
@pytest.mark.covers("combine")
def test_options_of_combine_are_of_their_kinds_and_deltas_may_be_given():
    model = nn.Sequential(nn.Linear(6, 4))
    a, b = (LoraModel(model, modified_modules=["0"], name=name) for name in "ab")
    for wrong in (
        {"how": "svd", "rank": "x"}, {"how": "svd", "rank": 2.5}, {"how": "ties", "density": "x"},
        {"how": "dare_ties", "density": 0.5, "seed": 1.5},
    ):  # fmt: skip
        with pytest.raises(opendelta.OptionError, match=f"combine.{[*wrong][-1]}=.* must be a"):
            opendelta.combine(model, {"a": 1.0, "b": 1.0}, **wrong)
    assert opendelta.combine(model, {a: 0.7, b: -0.3}).name == "a_b"


@pytest.mark.covers("roles", "shared_copy", "Delta.freeze_module", "LoraConfig.use_dora")
def test_what_is_no_model_and_what_is_no_list_is_refused_by_name():
    for verb in (opendelta.roles, opendelta.shared_copy):
        with pytest.raises(opendelta.OptionError, match=r"model must be a torch.nn.Module, not 3"):
            verb(3)
    model = nn.Sequential(nn.Embedding(9, 6))
    with pytest.raises(opendelta.AddressError, match="a text or a list of texts, not 3"):
        LoraModel(model, modified_modules=["0"]).freeze_module(exclude=3)
    model = nn.Sequential(nn.Embedding(9, 6))
    with untouched(model), pytest.raises(SiteError, match="'lora' as DoraLayer"):
        LoraModel(model, modified_modules=["0"], use_dora=True)


def test_factors_of_a_method_from_elsewhere_have_three_parts(monkeypatch):
    methods = opendelta._deltas.registry.METHODS
    for name in ("factors_1", "factors_2", "factors_3"):  # they are gone after the test
        monkeypatch.setitem(methods, name, None)
        del methods[name]
    names = iter(("factors_1", "factors_2", "factors_3"))
    from opendelta.author import WeightLayer

    def method(order):
        class Factors(WeightLayer):
            def __init__(self, site, config):
                super().__init__(site)
                self.A, self.B = site.parameter(2, site.in_features), site.parameter(4, 2)

            def delta_weight(self):
                return self.B @ self.A

            def factors(self):
                return order(self.A, self.B)

        class Config(opendelta.DeltaConfig):
            pass

        parts = {"delta_type": next(names), "config_class": Config, "layer_class": Factors}
        return type("FactorsModel", (opendelta.Delta,), {**parts, "default_modified_modules": ()})

    for order in (lambda A, B: (A, B), lambda A, B: (B, A, 1.0)):
        with pytest.raises(opendelta.OptionError, match=r"factors must return A \[rank, 6\], B"):
            method(order)(nn.Sequential(nn.Linear(6, 4)), modified_modules=["0"])
    model = nn.Sequential(nn.Linear(6, 4))
    method(lambda A, B: (A, B, 1.0))(model, modified_modules=["0"])
    assert model(X).shape == (2, 4)
