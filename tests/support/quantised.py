"""Small models that bitsandbytes and torchao quantise, for real, and their input."""

import warnings

import torch
from torch import nn

with warnings.catch_warnings():  # they warn of optional parts that are not there
    warnings.simplefilter("ignore")
    import bitsandbytes
    import torchao.quantization as torchao

X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def with_bitsandbytes(bits):
    torch.manual_seed(0)
    model = Block()
    for name, plain in list(model.named_children()):
        sizes = plain.in_features, plain.out_features
        if bits == 8:
            new = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
            new.load_state_dict(plain.state_dict())
        else:
            new = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
            new.weight = bitsandbytes.nn.Params4bit(
                plain.weight.data, requires_grad=False, quant_type="nf4"
            )
            new.bias = plain.bias
        setattr(model, name, new)
    return model.to("cpu")


def with_torchao(config):
    torch.manual_seed(0)
    model = Block()
    torchao.quantize_(model, config)
    return model


BACKBONES = {
    "bitsandbytes 8 bit": lambda: with_bitsandbytes(8),
    "bitsandbytes nf4": lambda: with_bitsandbytes(4),
    "torchao int8": lambda: with_torchao(torchao.Int8WeightOnlyConfig()),
    "torchao int4": lambda: with_torchao(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4)),
}
