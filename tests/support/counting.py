"""What several files count: operations, bytes and CPU time; and LoRAs on one linear."""

import contextlib
import gc
import time

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from opendelta import LoraModel
from opendelta._layers import low_rank as products
from support.nets import shake


@contextlib.contextmanager
def cpu_seconds():
    """Gives a list that gets the CPU time of what runs inside, in seconds.

    No garbage is collected inside: that of all tests before would count.
    """
    taken, was_enabled = [], gc.isenabled()
    gc.collect()
    gc.disable()
    start = time.process_time()
    try:
        yield taken
    finally:
        taken.append(time.process_time() - start)
        if was_enabled:
            gc.enable()


class Counted(TorchDispatchMode):
    """Counts the operations that run inside, by name."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))

    def of(self, *names):
        return sum(self.counts.get(name, 0) for name in names)


@contextlib.contextmanager
def each_by_itself():
    """The plain onion, with which the joined layers are compared."""
    products.ENABLED = False
    try:
        yield
    finally:
        products.ENABLED = True


def saved_bytes(model, x):
    """What autograd keeps of a forward beside the model's own tensors, each storage once."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(storage.nbytes() for storage in kept.values())


def loras(model, count, **options):
    return [
        shake(LoraModel(model, modified_modules=["0"], name=f"lora_{i}", **options), seed=i)
        for i in range(count)
    ]


def one_linear(bias=True, width=16, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width + 4, bias=bias)).to(dtype)
    return model.requires_grad_(False)
