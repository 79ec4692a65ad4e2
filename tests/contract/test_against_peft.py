"""References that are not our own code: PEFT's outputs, once its tensors are copied over."""

import copy

import peft
import pytest
import torch
import transformers
from support.nets import shake

import opendelta
from opendelta import IA3Model, LoraModel

pytestmark = pytest.mark.covers(
    "LoraModel", "LoraConfig.lora_r", "LoraConfig.lora_alpha", "IA3Model",
    "IA3Config.feedforward_modules",
)  # fmt: skip

TINY = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, vocab_size=60,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=32)
    ),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            vocab_size=60, max_position_embeddings=40, initializer_range=0.3,
        )
    ),
}  # fmt: skip
IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def tiny(kind):
    torch.manual_seed(0)
    return TINY[kind]().eval()


def copy_from_peft(delta, peft_model, renames):
    """Give our delta the tensors of PEFT's only adapter; some differ in layout."""
    theirs = dict(peft_model.base_model.model.named_parameters())
    state = {}
    for name, own in delta.state_dict().items():
        module, _, tensor = name.partition(".deltas.")
        tensor = tensor.partition(".")[2]
        given = next(theirs[f"{module}.{n}"] for n in renames[tensor] if f"{module}.{n}" in theirs)
        state[name] = given.detach().reshape(own.shape)
    delta.load_state_dict(state)


LORA = {
    "lora_A": ["lora_A.default.weight", "lora_embedding_A.default"],
    "lora_B": ["lora_B.default.weight", "lora_embedding_B.default"],
}
IA3 = {"ia3_l": ["ia3_l.default"]}


@pytest.mark.covers("statistics")
@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out.*:UserWarning")
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"]),
        ("llama", ["embed_tokens"]),
        ("gpt2", ["c_attn", "c_proj"]),
        ("roberta", ["query", "value"]),
    ],
)
def test_lora_gives_the_logits_of_peft(kind, targets):
    base = tiny(kind)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, lora_dropout=0.1
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    delta = LoraModel(base, 4, 6, 0.1, modified_modules=targets)
    copy_from_peft(delta, theirs, LORA)
    assert opendelta.statistics(base).delta_parameters == sum(
        p.numel() for n, p in theirs.named_parameters() if "lora_" in n
    )
    expected = theirs(input_ids=IDS).logits
    assert not torch.allclose(expected, tiny(kind)(input_ids=IDS).logits, atol=1e-3)
    assert torch.allclose(base(input_ids=IDS).logits, expected, atol=1e-5)


def test_lora_on_a_convolution_gives_the_output_of_peft():
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Conv2d(3, 5, (3, 2), stride=2, padding=1))
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    delta = LoraModel(base, 4, 6, modified_modules=["0"])
    copy_from_peft(delta, theirs, LORA)
    x = torch.randn(2, 3, 9, 9)
    assert torch.allclose(base(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_lora_heeds_padding_stride_and_dilation_of_a_convolution(mode):
    """PEFT 0.21 leaves the dilation out, so the change of the weight is the reference."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, (3, 2), (1, 2), (1, 2), (1, 2), padding_mode=mode)
    )
    delta = shake(LoraModel(model, modified_modules=["0"]))
    x = torch.randn(2, 3, 9, 9)
    expected = model(x)
    delta.detach()
    with torch.no_grad():
        change = delta.layers["0"].fold({"weight": model[0].weight})["weight"]
        model[0].weight.copy_(change)
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "targets", "feedforward"),
    [
        ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        ("gpt2", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
        ("roberta", ["key", "value", "output.dense"], ["output.dense"]),
    ],
)
def test_ia3_gives_the_logits_of_peft(kind, targets, feedforward):
    base = tiny(kind)
    config = peft.IA3Config(
        target_modules=targets, feedforward_modules=feedforward, init_ia3_weights=False,
        fan_in_fan_out=kind == "gpt2",
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    delta = IA3Model(base, modified_modules=targets, feedforward_modules=feedforward)
    copy_from_peft(delta, theirs, IA3)
    expected = theirs(input_ids=IDS).logits
    assert not torch.allclose(expected, tiny(kind)(input_ids=IDS).logits, atol=1e-3)
    assert torch.allclose(base(input_ids=IDS).logits, expected, atol=1e-5)
