"""Small plain networks for tests, one for each kind of module, and deltas that visibly act."""

import contextlib
import copy
import io
import math
import pickle

import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

import opendelta

WIDTH = 8


class Pair(nn.Module):
    """Returns a tuple whose first item is the hidden states."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.inner(x), x.sum()


class Attention(nn.Module):
    """Self-attention with two heads that finds its function as transformers' modules do."""

    is_causal = False

    def __init__(self):
        super().__init__()
        self.config = transformers.PreTrainedConfig()
        self.config._attn_implementation = "sdpa"
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, hidden_states, attention_mask=None):
        shape = (*hidden_states.shape[:-1], 3, 2, WIDTH // 2)
        query, key, value = self.qkv(hidden_states).view(shape).permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, weights = attend(self, query, key, value, attention_mask)
        return out.flatten(-2), weights


class Net(nn.Module):
    """A network with every kind of module; it takes token ids or their embeddings."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.bare = nn.Linear(WIDTH, WIDTH, bias=False)
        self.conv1d = Conv1D(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.pair = Pair()
        self.attention = Attention()
        self.conv2d = nn.Conv2d(1, 3, (3, 3), padding=1)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        x = x + self.conv1d(torch.tanh(self.bare(torch.tanh(self.linear(x)))))
        x = x + self.attention(x)[0]
        x = self.norm(self.pair(x)[0])
        x = x + self.conv2d(x[:, None]).mean(1)
        return self.head(x)


class Conv1D(nn.Module):
    """A linear layer that stores its weight as (in, out), like transformers' own of that name."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf) * 0.3)

    def forward(self, x):
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


# kind of module -> its name in Net
PLACES = {
    "linear": ["linear", "bare", "conv1d"],
    "embedding": ["embedding"],
    "norm": ["norm"],
    "conv2d": ["conv2d"],
    "other": ["pair"],
    "attention": ["attention"],
    "stack": [""],
}

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 10]])


def net(seed=0):
    """A network in evaluation mode with fixed weights."""
    torch.manual_seed(seed)
    return Net().eval()


def places_of(method):
    """The modules of Net that a method takes, by its layer's kinds."""
    return [name for kind in method.layer_class.kinds for name in PLACES[kind]]


def put(method, model, *places, **options):
    """A delta on the modules called `places`; branches go from each of them to itself."""
    names = [p for p in places for _ in range(1 + method.layer_class.paired)]
    return method(model, modified_modules=names, **options)


def shake(delta, seed=1, scale=0.3):
    """Give a delta other values than those it starts with, so that it acts."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise * scale).to(parameter.dtype))
    return delta


def filled(*deltas, scale=0.3):
    """Give all of these deltas values of one sequence of random numbers."""
    generator = torch.Generator().manual_seed(7)
    for delta in deltas:
        for p in delta.parameters():
            p.data.copy_(torch.randn(p.shape, generator=generator) * scale)


COPIES = ["deepcopy", "pickle", "torch.save"]


def copied(model, how):
    """A copy of `model` in one of the ways in `COPIES`."""
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@contextlib.contextmanager
def untouched(model):
    """The model is, bit for bit, the same after the block as before."""
    before = opendelta.snapshot(model)
    yield
    opendelta.assert_pristine(model, like=before)


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))  # what small() takes


def small():
    """Two linear modules, the same every time; one bias is frozen."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    model[0].bias.requires_grad_(False)
    return model


def replica_of(model, factor=None):
    """A replica as `nn.DataParallel` makes it in the thread that calls it.

    With a factor its tensors are others, as on another device: those of the model times `factor`.
    """
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in copies.items():
        for key, child in module._modules.items():
            setattr(replica, key, copies[child])
        for key, tensor in module._parameters.items():
            own = tensor if factor is None or tensor is None else tensor.detach() * factor
            setattr(replica, key, own)
    return copies[model]


class Scaled(nn.Module):
    """W x / sqrt(d): CPM-Bee's linear layer, written by hand."""

    def __init__(self, width, out):
        super().__init__()
        self.in_features, self.out_features = width, out
        self.weight = nn.Parameter(torch.randn(out, width))

    def forward(self, x):
        return nn.functional.linear(x, self.weight) / math.sqrt(self.in_features)


def times_weight(module, x):
    """Read the weight of a module's child."""
    return x @ module.fc.weight


def first_parameter(module):
    return next(module.parameters())
