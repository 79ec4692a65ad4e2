"""What two gloo processes check together; `ecosystem/test_distributed.py` starts them."""

import datetime
import functools
import gc
import itertools
import json
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import opendelta
from opendelta import (
    AdapterModel,
    AverageModel,
    BitFitModel,
    CompacterModel,
    Delta,
    DeltaError,
    FourierFTModel,
    FuseModel,
    GateModel,
    HRAModel,
    IA3Model,
    LohaModel,
    LokrModel,
    LoraModel,
    LoReftModel,
    LowRankAdapterModel,
    OFTModel,
    ParallelAdapterModel,
    PrefixModel,
    SiteError,
    VeraModel,
)

WIDTH = 8


# ------------------------------------------------------------ what is sharded
class Block(nn.Module):
    """A residual block; with `reads` it uses the weight of `q` instead of calling it."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        q = F.linear(x, self.q.weight, self.q.bias) if self.reads else self.q(x)
        return x + self.o(torch.tanh(q))


class Net(nn.Module):
    """Two blocks and a head; `reentrant` chooses the kind of gradient checkpointing, if any."""

    def __init__(self, reads: bool = False, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(reads), Block(reads)])
        self.head = nn.Linear(WIDTH, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.reentrant is None or not torch.is_grad_enabled():
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def network(**options: Any) -> Net:
    """A frozen network, the same at every call."""
    torch.manual_seed(0)
    return Net(**options).requires_grad_(False)


def shard(model: Net, mesh: DeviceMesh, how: str = "block-wise", **options: Any) -> Net:
    """Apply FSDP2 to each block, or first to each projection of it."""
    for block in model.blocks:
        if how == "leaf-wise":
            fully_shard(block.q, mesh=mesh, **options)
            fully_shard(block.o, mesh=mesh, **options)
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def put_deltas(model: nn.Module, seed: int = 3) -> list[Delta]:
    """Deltas beside, before and after modules, on leaves, on blocks, around several, and shared."""
    torch.manual_seed(seed)
    shared = {"shared_phm_rule": True, "hypercomplex_division": 2, "reduction_factor": 2}
    return [
        LoraModel(model, modified_modules=["q", "head"], lora_r=2, lora_alpha=2),
        IA3Model(model, modified_modules=["q", "o"], feedforward_modules=["o"]),
        AdapterModel(model, modified_modules=["blocks.0", "blocks.1"], bottleneck_dim=3),
        ParallelAdapterModel(model, modified_modules=["q", "o"], bottleneck_dim=3),
        CompacterModel(model, modified_modules=["blocks.0", "blocks.1"], **shared),
        VeraModel(model, modified_modules=["o", "head"], r=3),
    ]


def put_folding_deltas(model: nn.Module) -> list[Delta]:
    """Deltas on modules whose weight is read by the parent."""
    return [
        LoraModel(model, modified_modules=["q"], lora_r=2, lora_alpha=2, reads=True),
        IA3Model(model, modified_modules=["q"], feedforward_modules=[], reads=True),
    ]


def randomise(deltas: Iterable[Delta]) -> list[Delta]:
    """Let the deltas act: they start as the identity."""
    deltas, generator = list(deltas), torch.Generator().manual_seed(1)
    for delta in deltas:
        start = 1.0 if isinstance(delta, IA3Model) else 0.0
        state = {
            name: start + 0.2 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in delta.state_dict().items()
        }
        delta.load_state_dict(state)
    return deltas


def batch(rank: int) -> Tensor:
    """The inputs of one rank. Without a gradient for them, reentrant checkpointing gives none."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randn(6, WIDTH, generator=generator).requires_grad_()


def output(model: nn.Module) -> Tensor:
    """What `model` computes for the first rank's inputs."""
    with torch.no_grad():
        return model(batch(0))


def whole(tensor: Tensor) -> Tensor:
    """`tensor` without its shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def values(deltas: Iterable[Delta]) -> dict[str, Tensor]:
    """The tensors of all deltas, as one process would hold them."""
    return {n: whole(t).clone() for delta in deltas for n, t in delta.state_dict().items()}


def parameters(deltas: Iterable[Delta]) -> list[nn.Parameter]:
    return [parameter for delta in deltas for parameter in delta.parameters()]


def train(
    model: nn.Module, deltas: Sequence[Delta], inputs: Sequence[Tensor], steps: int = 3
) -> dict[str, Tensor]:
    """The tensors of the deltas after some steps of SGD on the mean loss over `inputs`."""
    optimizer = torch.optim.SGD(parameters(deltas), lr=0.05)
    for _ in range(steps):
        (sum(model(x).square().mean() for x in inputs) / len(inputs)).backward()
        assert all(parameter.grad is not None for parameter in parameters(deltas))
        optimizer.step()
        optimizer.zero_grad()
    return values(deltas)


def detach_all(deltas: Iterable[Delta]) -> None:
    for delta in deltas:
        delta.detach()


def attach_all(deltas: Iterable[Delta]) -> None:
    for delta in deltas:
        delta.attach()


# ------------------------------------------------------------ the two processes
@dataclass(frozen=True)
class Pair:
    """One of two processes, as a check sees it.

    Attributes:
        rank: which one.
        folder: a folder that both share.
    """

    rank: int
    folder: Path

    @property
    def mesh(self) -> DeviceMesh:
        return init_device_mesh("cpu", (2,))

    @property
    def inputs(self) -> list[Tensor]:
        """This process's half of the batch."""
        return [batch(self.rank)]


CHECKS: dict[str, Callable[[Pair], None]] = {}


def check(*variants: Sequence[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function of a pair, once for each combination of its further arguments."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for chosen in itertools.product(*variants):
            name = f"{function.__name__}[{', '.join(chosen)}]" if chosen else function.__name__
            CHECKS[name] = functools.partial(_call, function, chosen)
        return function

    return register


def _call(function: Callable[..., None], chosen: Sequence[str], pair: Pair) -> None:
    function(pair, *chosen)


def run(rank: int, folder: Path, names: Sequence[str]) -> None:
    """Run the checks called `names` and write what came out of each.

    Each has a process group of its own: where one process fails, the group ends with its check, and
    the other one does not wait for ever or fail in a later check.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # hqq, which transformers imports where it is installed, compiles as it is imported.
    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
    for number, name in enumerate(names):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/group{number}",
            rank=rank,
            world_size=2,
            timeout=datetime.timedelta(seconds=60),
        )
        error = None
        try:
            CHECKS[name](Pair(rank, folder))
        except BaseException:
            error = traceback.format_exc()
        finally:
            dist.destroy_process_group()
        with open(folder / f"outcomes{rank}", "a", encoding="utf-8") as file:
            file.write(json.dumps([name, error]) + "\n")


def assert_on_both(
    got: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6, rtol: float = 1e-4
) -> None:
    """Both processes hold the same tensors, and these are the expected ones."""
    for name, tensor in got.items():
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor.contiguous())
        assert torch.equal(*both), f"{name} differs between the ranks"
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def assert_plain(model: nn.Module, plain: nn.Module) -> None:
    """`model` computes what `plain` does and has its keys; an empty stack may have stayed."""
    torch.testing.assert_close(output(model), output(plain))
    assert list(model.state_dict()) == list(plain.state_dict())
    opendelta.assert_pristine(model)


def in_one_process(steps: int = 3) -> tuple[Net, dict[str, Tensor]]:
    """A network whose acting deltas were trained on both halves of the batch, and their tensors."""
    model = network()
    deltas = randomise(put_deltas(model))
    return model, train(model, deltas, [batch(0), batch(1)], steps)


# ------------------------------------------------------------ DDP
@check()
def ddp_trains_as_one_process_does(pair: Pair) -> None:
    model = network()
    deltas = randomise(put_deltas(model))
    wrapped = DistributedDataParallel(model)
    deltas[0].detach()
    deltas[0].attach()  # its parameters are known
    trained = train(wrapped, deltas, pair.inputs)
    assert_on_both(trained, in_one_process()[1])


def put_blocks(model: nn.Module) -> list[Delta]:
    """A block in a block: experts of which a token takes one, beside an adapter."""
    torch.manual_seed(5)
    experts: list[Delta] = [
        LoraModel(model, modified_modules=["q", "o"], lora_r=2, name=name) for name in "ab"
    ]
    adapter = AdapterModel(model, modified_modules=["o"], bottleneck_dim=3, name="c")
    moe = GateModel(model, deltas=["a", "b"], top_k=1, name="moe")
    average = AverageModel(model, deltas=["moe", "c"], learn=True, name="average")
    return [*experts, adapter, moe, average, FuseModel(model, deltas=["average"], name="fuse")]


def blocks_in_one_process() -> dict[str, Tensor]:
    model = network()
    return train(model, randomise(put_blocks(model)), [batch(0), batch(1)])


@check()
def ddp_trains_blocks(pair: Pair) -> None:
    model = network()
    deltas = randomise(put_blocks(model))
    trained = train(DistributedDataParallel(model), deltas, pair.inputs)
    assert_on_both(trained, blocks_in_one_process())


@check(["before", "after"])
def fsdp_trains_blocks(pair: Pair, attached: str) -> None:
    model = network()
    if attached == "after":
        shard(model, pair.mesh)
        output(model)
    deltas = randomise(put_blocks(model))
    if attached == "before":
        shard(model, pair.mesh)
    assert_on_both(train(model, deltas, pair.inputs), blocks_in_one_process())
    detach_all(deltas)
    assert_plain(model, network())


@check()
def ddp_refuses_a_delta_inside(pair: Pair) -> None:
    model = network().requires_grad_(True)
    wrapped = DistributedDataParallel(model)
    before = opendelta.snapshot(wrapped)
    with pytest.raises(SiteError, match="attach to the module first, wrap it then"):
        LoraModel(wrapped, modified_modules=["q"])
    with pytest.raises(SiteError, match="attach to the module first, wrap it then"):
        AdapterModel(wrapped, modified_modules=["blocks.0"])
    with pytest.raises(SiteError, match="each rank would have other values"):
        LoraModel(wrapped.module, modified_modules=["q"])
    opendelta.assert_pristine(wrapped, like=before)
    wrapped(*pair.inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ------------------------------------------------------------ FSDP2
class Around(nn.Module):
    """A root of its own around some modules of a model."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


@check(["DDP around another root", "FSDP1"])
def what_is_around_the_modules_refuses_a_delta(pair: Pair, how: str) -> None:
    model: Any = network().requires_grad_(True)
    if how.startswith("DDP"):
        engine: nn.Module = DistributedDataParallel(Around(model.blocks))
    else:
        engine = FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu")
        )
        model = engine.module
    kind = type(engine).__name__
    for put in (LoraModel, AdapterModel):
        with pytest.raises(
            SiteError, match=rf"is inside {kind}, .*each rank would have other values"
        ):
            put(model, modified_modules=["blocks.0.q"])
    assert opendelta.composition(model).names == []


@check()
def ddp_refuses_to_train_what_was_frozen_as_it_wrapped(pair: Pair) -> None:
    model = network().requires_grad_(True)
    first = LoraModel(model, modified_modules=["q"], name="first")
    second = LoraModel(model, modified_modules=["o"], name="second")
    first.freeze_module(exclude=["first"])
    wrapped = DistributedDataParallel(model)
    for train_second in (
        lambda: second.freeze_module(exclude=["second"]),
        lambda: second.requires_grad_(True),
    ):
        with pytest.raises(SiteError, match="attach and unfreeze first, wrap or initialize then"):
            train_second()
    assert not any(p.requires_grad for p in second.parameters())
    assert not opendelta.check(model, batch(0)).unsynchronised
    for parameter in second.parameters():
        parameter.requires_grad_(True)  # by hand
    told = opendelta.check(wrapped, batch(0))
    assert {name.rpartition(".deltas.")[2].split(".")[0] for name in told.unsynchronised} == {
        "second"
    }
    assert "not synchronised by what is around the model" in str(told)
    first.freeze_module(exclude=["first"])
    with pytest.raises(SiteError, match="attach and unfreeze first, wrap or initialize then"):
        first.freeze_module(exclude=["first", "blocks.0.q.weight"])
    model.blocks[0].q.weight.requires_grad_(True)
    assert opendelta.check(wrapped, batch(0)).unsynchronised == ["blocks.0.q.weight"]
    model.blocks[0].q.weight.requires_grad_(False)
    wrapped(*pair.inputs).sum().backward()
    assert all(p.grad is not None for p in first.parameters())
    gc.freeze()  # as before processes are forked
    try:
        with pytest.raises(SiteError, match="is inside DistributedDataParallel"):
            LoraModel(model, modified_modules=["q"], name="third")
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


@check()
def ddp_refuses_to_train_the_backbone_after_a_delta_left_and_came_back(pair: Pair) -> None:
    model = network().requires_grad_(True)
    delta = LoraModel(model, modified_modules=["q", "o"])
    delta.freeze_module(exclude=["deltas", "blocks.1.o"])
    wrapped = DistributedDataParallel(model)
    delta.detach()
    delta.attach()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(SiteError, match="attach and unfreeze first, wrap or initialize then"):
        delta.freeze_module(exclude=["deltas", "blocks.0.q.weight"])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    delta.freeze_module(model.blocks[1], exclude=["deltas", "blocks.1.o"])  # that one is known
    delta.freeze_module(exclude=["deltas", "blocks.1.o"])
    assert not opendelta.check(wrapped, batch(0)).unsynchronised


@check(["block-wise", "leaf-wise"])
def fsdp_trains_deltas_attached_before(pair: Pair, how: str) -> None:
    model = network()
    deltas = randomise(put_deltas(model))
    expected, tensors = in_one_process()
    shard(model, pair.mesh, how)
    assert_on_both(train(model, deltas, pair.inputs), tensors)

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    torch.testing.assert_close(state, dict(expected.state_dict()), rtol=1e-4, atol=1e-6)

    detach_all(deltas)
    assert_plain(model, network())
    attach_all(deltas)
    torch.testing.assert_close(output(model), output(expected))


@check(["block-wise before", "leaf-wise after"])
def fsdp_takes_layers_off_and_on(pair: Pair, way: str) -> None:
    how, attached = way.split()
    model = network()
    if attached == "after":
        shard(model, pair.mesh, how)
    deltas = randomise(put_deltas(model))
    if attached == "before":
        shard(model, pair.mesh, how)
    output(model)  # FSDP2 leaves the tensors of the root gathered after it
    reference = network()
    for delta, other in zip(deltas, randomise(put_deltas(reference)), strict=True):
        delta.detach()
        other.detach()
        torch.testing.assert_close(output(model), output(reference))
        delta.attach()
        other.attach()
        torch.testing.assert_close(output(model), output(reference))
    for delta in deltas:
        delta.detach()
        delta.attach()
    assert_on_both(train(model, deltas, pair.inputs), in_one_process()[1])


@check(["block-wise", "leaf-wise"], ["before the first forward", "after a step of the base"])
def fsdp_attaches_after_sharding(pair: Pair, how: str, when: str) -> None:
    reference = network()
    others = put_deltas(reference)
    tensors = train(reference, others, [batch(0), batch(1)], steps=5)

    model = shard(network().requires_grad_(True), pair.mesh, how)
    if when == "after a step of the base":
        model(*pair.inputs).sum().backward()
        model.zero_grad()
    model.requires_grad_(False)
    before = opendelta.snapshot(model)
    deltas = put_deltas(model, seed=3 + pair.rank)
    assert all(isinstance(parameter, DTensor) for parameter in parameters(deltas))

    assert_on_both(train(model, deltas, pair.inputs, steps=5), tensors)
    assert_on_both({"output": output(model)}, {"output": output(reference)})
    assert not torch.allclose(output(model), output(network()), atol=1e-3)

    detach_all(deltas)
    assert_plain(model, network())
    model.reshard()
    if when == "after a step of the base":  # FSDP2 adds hooks in the first forward
        opendelta.assert_pristine(model, like=before)

    shards = parameters(deltas)
    attach_all(deltas)
    assert all(one is other for one, other in zip(shards, parameters(deltas), strict=True))
    tensors = train(reference, others, [batch(0), batch(1)])
    assert_on_both(train(model, deltas, pair.inputs), tensors)


@check(["reentrant", "non-reentrant"], ["before", "after"])
def fsdp_checkpoints_gradients(pair: Pair, kind: str, attached: str) -> None:
    model = network(reentrant=kind == "reentrant")
    if attached == "after":
        shard(model, pair.mesh)
    deltas = randomise(put_deltas(model))
    if attached == "before":
        shard(model, pair.mesh)
    assert_on_both(train(model, deltas, pair.inputs), in_one_process()[1])


@check()
def fsdp_shards_over_two_dimensions(pair: Pair) -> None:
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model = shard(network(), mesh)
    deltas = put_deltas(model, seed=3 + pair.rank)
    reference = network()
    tensors = train(reference, put_deltas(reference), [batch(0), batch(1)])
    assert_on_both(train(model, deltas, pair.inputs), tensors)


@check()
def fsdp_shows_folded_weights(pair: Pair) -> None:
    reference, model = network(reads=True), network(reads=True)
    others = randomise(put_folding_deltas(reference))
    deltas = randomise(put_folding_deltas(model))
    shard(model, pair.mesh)
    torch.testing.assert_close(output(model), output(reference))
    assert_on_both(
        train(model, deltas, pair.inputs), train(reference, others, [batch(0), batch(1)])
    )
    detach_all(deltas)
    assert_plain(model, network(reads=True))


@check()
def fsdp_takes_folding_layers_off_and_on(pair: Pair) -> None:
    reference, model = network(reads=True), network(reads=True)
    randomise(put_folding_deltas(reference))
    deltas = randomise(put_folding_deltas(model))
    shard(model, pair.mesh)
    detach_all(deltas)
    attach_all(deltas)
    torch.testing.assert_close(output(model), output(reference))


@check()
def fsdp_refuses_folded_weights_after_sharding(pair: Pair) -> None:
    model = shard(network(reads=True), pair.mesh)
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match="attach before fully_shard"):
        put_folding_deltas(model)
    opendelta.assert_pristine(model, like=before)
    torch.testing.assert_close(output(model), output(network(reads=True)))


@check(["before", "after"])
def fsdp_saves_and_loads_a_delta(pair: Pair, attached: str) -> None:
    model = network()
    if attached == "after":
        shard(model, pair.mesh)
    lora = randomise(put_deltas(model))[0]
    if attached == "before":
        shard(model, pair.mesh)
    output(model)
    folder = pair.folder / attached / str(pair.rank)
    lora.save_finetuned(folder)

    plain = network()
    loaded = LoraModel.from_finetuned(folder, plain)  # the values of the weights are compared
    assert_on_both(values([loaded]), values([lora]))
    sharded = shard(network(), pair.mesh)
    again = LoraModel.from_finetuned(folder, sharded)
    assert all(isinstance(parameter, DTensor) for parameter in again.parameters())
    torch.testing.assert_close(output(sharded), output(plain))
    other = network()
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    with pytest.raises(opendelta.DeltaLoadError, match="differ"):
        LoraModel.from_finetuned(folder, shard(other, pair.mesh))


@check(["before", "after"])
def fsdp_state_dicts_go_through_torch_s_checkpoints(pair: Pair, attached: str) -> None:
    def prepared() -> tuple[Net, list[Delta]]:
        model = network()
        if attached == "after":
            shard(model, pair.mesh)
        deltas = put_deltas(model)
        deltas[0].freeze_module()
        if attached == "before":
            shard(model, pair.mesh)
        return model, deltas

    (model, deltas), (fresh, _) = prepared(), prepared()
    randomise(deltas)
    for ignore in (False, True):
        options = StateDictOptions(ignore_frozen_params=ignore, strict=not ignore)
        state = get_model_state_dict(model, options=options)
        dcp.save({"model": state}, checkpoint_id=pair.folder / f"{attached}-{ignore}")
        empty = get_model_state_dict(fresh, options=options)
        dcp.load({"model": empty}, checkpoint_id=pair.folder / f"{attached}-{ignore}")
        set_model_state_dict(fresh, empty, options=options)
        torch.testing.assert_close(output(fresh), output(model))
        for parameter in parameters(list(opendelta.composition(fresh))):
            parameter.detach().zero_()


def routed_alone(inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """What one process trains where the rows of each rank take another delta."""
    model = network()
    deltas = two_loras(model)
    rows = [name for name, part in zip("ab", inputs, strict=True) for _ in part]
    for _ in range(3):
        with opendelta.route(model, rows):
            model(torch.cat(list(inputs))).pow(2).sum().mul(0.5).backward()
        step(deltas)
    return values(deltas)


def two_loras(model: nn.Module) -> list[Delta]:
    made = [LoraModel(model, modified_modules=["q"], lora_r=2, name=name) for name in "ab"]
    deltas = randomise(made)
    deltas[0].freeze_module()
    return deltas


def step(deltas: Iterable[Delta]) -> None:
    for parameter in parameters(deltas):
        if parameter.grad is not None:
            parameter.data.add_(parameter.grad, alpha=-0.01)
            parameter.grad = None


@check(["ddp", "unused", "fsdp"])
def each_rank_routes_to_a_delta_of_its_own(pair: Pair, how: str) -> None:
    model = network()
    deltas = two_loras(model)
    if how == "fsdp":
        run: nn.Module = shard(model, pair.mesh)
    else:
        run = DistributedDataParallel(model, find_unused_parameters=how == "unused")
    mine = pair.inputs[0]
    for _ in range(3):
        with opendelta.route(model, ["ab"[pair.rank]] * len(mine)):
            run(mine).pow(2).sum().backward()
        step(deltas)
    assert_on_both(values(deltas), routed_alone([batch(0), batch(1)]), atol=1e-5)


@check()
def fsdp_refuses_to_route_around_a_delta_that_is_sharded_apart(pair: Pair) -> None:
    model = shard(network(), pair.mesh)
    two_loras(model)
    mine, other = "ab"[pair.rank], "ba"[pair.rank]
    with (
        pytest.raises(DeltaError, match=f"'{other}' trains, is sharded apart .*before fully_shard"),
        opendelta.route(model, [mine] * 6),
    ):
        model(batch(0))
    with torch.no_grad(), opendelta.route(model, [["a", "b"]] * 6):
        model(batch(0))


@check(["block-wise", "leaf-wise"])
def fsdp_refuses_to_merge_into_sharded_weights(pair: Pair, how: str) -> None:
    model = network()
    before = output(model)
    deltas = put_folding_deltas(model)
    shard(model, pair.mesh, how)
    for refused in (
        opendelta.composition(model).merge,
        opendelta.composition(model).to_backbone,
        lambda: opendelta.combine(model, {deltas[0].name: 1.0}),
    ):
        with pytest.raises(SiteError, match=r"its weight is sharded; merge before sharding"):
            refused()
    with opendelta.composition(model).only():
        torch.testing.assert_close(output(model), before)


# ------------------------------------------------------------ tensor parallelism by torch
def parallel(model: Net, mesh: DeviceMesh, head: bool = True) -> Net:
    """Split each `q` by its outputs, each `o` by its inputs, and the head, which is gathered."""
    plan: dict[str, Any] = {"head": ColwiseParallel(output_layouts=Replicate())} if head else {}
    for block in ("blocks.0", "blocks.1"):
        plan |= {f"{block}.q": ColwiseParallel(), f"{block}.o": RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


QO = {"modified_modules": ["q", "o"]}
QOH = {"modified_modules": ["q", "o", "head"]}
ON_SPLIT: dict[str, Callable[[nn.Module], Delta]] = {
    "lora": lambda model: LoraModel(model, lora_r=2, lora_alpha=2, **QOH),
    "gated lora": lambda model: LoraModel(model, lora_r=2, gate=True, **QOH),
    "vera": lambda model: VeraModel(model, r=3, **QOH),
    "loha": lambda model: LohaModel(model, **QOH),
    "lokr": lambda model: LokrModel(model, **QO),
    "fourierft": lambda model: FourierFTModel(model, n_frequency=5, **QO),
    "ia3": lambda model: IA3Model(model, feedforward_modules=["o"], **QO),
    "oft": lambda model: OFTModel(model, **QO),
    "hra": lambda model: HRAModel(model, r=2, **QO),
    "bitfit": lambda model: BitFitModel(model, **QOH),
    "adapter": lambda model: AdapterModel(model, bottleneck_dim=3, **QOH),
    "parallel adapter": lambda model: ParallelAdapterModel(model, bottleneck_dim=3, **QO),
    "low-rank adapter": lambda model: LowRankAdapterModel(model, reduction_factor=2, **QO),
    "loreft": lambda model: LoReftModel(model, **QO),
    "compacter": lambda model: CompacterModel(
        model, shared_phm_rule=True, hypercomplex_division=2, reduction_factor=2, **QO
    ),
}


def far(deltas: Iterable[Delta]) -> list[Delta]:
    """Move the values from their start, so that the deltas act."""
    deltas, generator = list(deltas), torch.Generator().manual_seed(1)
    for parameter in parameters(deltas):
        parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return deltas


def learn(model: nn.Module, deltas: Sequence[Delta], steps: int = 2) -> dict[str, Tensor]:
    """What Adam leaves, the last gradients, and outputs with and without gradients."""
    x, optimizer = batch(0).double().detach(), torch.optim.Adam(parameters(deltas), lr=0.01)
    x.requires_grad_()
    for _ in range(steps):
        optimizer.zero_grad()
        out = model(x)
        out.square().sum().backward()
        optimizer.step()
    found = {name: p.grad for delta in deltas for name, p in delta.named_parameters()}
    found = {f"gradient of {name}": grad for name, grad in found.items()}
    found |= {"out": out.detach(), "in": x.grad, "plain": double_output(model)}
    return {**found, **values(deltas)}


@check(list(ON_SPLIT))
def split_modules_train_as_whole_ones(pair: Pair, method: str) -> None:
    whole, model = network().double(), parallel(network().double(), pair.mesh)
    torch.manual_seed(pair.rank)
    deltas = far([ON_SPLIT[method](model)])
    torch.manual_seed(0)
    others = far([ON_SPLIT[method](whole)])
    assert_on_both(learn(model, deltas), learn(whole, others), atol=1e-11, rtol=1e-9)

    folder = pair.folder / f"split {method}"
    deltas[0].save_finetuned(folder)
    others[0].save_finetuned(pair.folder / f"whole {method} {pair.rank}")
    saved = [json.loads((at / "config.json").read_text())["fingerprint"]
             for at in (folder, pair.folder / f"whole {method} {pair.rank}")]  # fmt: skip
    assert saved[0] == saved[1]
    for fresh in (network().double(), parallel(network().double(), pair.mesh)):
        opendelta.load(folder, fresh)
        assert_on_both(values(opendelta.composition(fresh)), values(deltas), atol=0, rtol=0)
        torch.testing.assert_close(double_output(fresh), double_output(model))
    detach_all(deltas)
    plain = double_output(parallel(network().double(), pair.mesh))
    assert torch.equal(double_output(model), plain)
    opendelta.assert_pristine(model)


def double_output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(0).double())


@check()
def split_modules_take_deltas_from_before(pair: Pair) -> None:
    whole, model = network().double(), network().double()
    deltas, others = ([*far([ON_SPLIT["lora"](m), ON_SPLIT["ia3"](m)])] for m in (model, whole))
    for delta, other in zip(deltas, others, strict=True):
        other.load_state_dict(delta.state_dict())
    with pytest.raises(SiteError, match=r"lora on this Linear .* call detach\(\), parallel"):
        parallel(model, pair.mesh)
    detach_all(deltas)
    parallel(model, pair.mesh)
    attach_all(deltas)
    assert_on_both(learn(model, deltas), learn(whole, others), atol=1e-11, rtol=1e-9)


@check()
def split_modules_refuse_what_reads_the_weight(pair: Pair) -> None:
    model = parallel(network(), pair.mesh)
    before = opendelta.snapshot(model)
    with pytest.raises(SiteError, match="use_dora needs the module's weight whole"):
        LoraModel(model, modified_modules=["q"], use_dora=True)
    with pytest.raises(SiteError, match="init='pissa' needs the module's weight whole"):
        LoraModel(model, modified_modules=["q"], init="pissa")
    with pytest.raises(SiteError, match=r"its parent reads \.weight"):
        LoraModel(model, modified_modules=["q"], reads=True)
    lora = LoraModel(model, modified_modules=["q"])
    with pytest.raises(SiteError, match="its weight is sharded"):
        opendelta.composition(model).merge()
    lora.detach()
    opendelta.assert_pristine(model, like=before)


@check()
def split_modules_take_deltas_by_rows(pair: Pair) -> None:
    whole, model = network().double(), parallel(network().double(), pair.mesh)
    outputs = []
    for each in (whole, model):
        torch.manual_seed(0)
        far([ON_SPLIT["lora"](each), ON_SPLIT["adapter"](each)])
        with opendelta.route(each, [["lora"], [], ["adapter"]] * 2):
            outputs.append(double_output(each))
    torch.testing.assert_close(outputs[0], outputs[1])


@check(["1", "2"])
def split_modules_are_sharded_further(pair: Pair, replicas: str) -> None:
    size = int(replicas)
    mesh = init_device_mesh("cpu", (size, 2 // size), mesh_dim_names=("data", "tensor"))
    model = parallel(network(), mesh["tensor"], head=False)  # its output would be a view
    deltas = randomise(put_split_deltas(model))
    shard(model, mesh["data"])
    reference = network()
    others = randomise(put_split_deltas(reference))
    inputs = [batch(0), batch(1)]
    trained = train(model, deltas, pair.inputs if size == 2 else inputs)
    assert_on_both(trained, train(reference, others, inputs))
    with pytest.raises(SiteError, match="attach before fully_shard"):
        LoraModel(model, modified_modules=["q"])


def put_split_deltas(model: nn.Module) -> list[Delta]:
    torch.manual_seed(0)
    return [ON_SPLIT["lora"](model), ON_SPLIT["adapter"](model)]


# ------------------------------------------------------------ transformers' own parallelism
IDS = torch.arange(16).view(2, 8)


def causal_lm(pair: Pair, family: str, **parallelism: int) -> nn.Module:
    """A tiny frozen Llama or Qwen3, whole or spread over both processes."""
    import transformers
    from transformers.distributed import DistributedConfig

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = pair.folder / family
    if pair.rank == 0 and not folder.exists():
        config = getattr(transformers, f"{family}Config")(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
            head_dim=8, intermediate_size=64, vocab_size=96, initializer_range=0.3,
            attention_bias=family == "Llama",
        )  # fmt: skip
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for bias in (p for name, p in model.named_parameters() if name.endswith("bias")):
            nn.init.normal_(bias)
        model.save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(**parallelism) if parallelism else None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=config, dtype=torch.float64
    )
    return model.requires_grad_(False)


def put_block_deltas(model: nn.Module, seed: int) -> list[Delta]:
    torch.manual_seed(seed)
    norms = ["input_layernorm", "post_attention_layernorm", "model.norm"]
    return [
        AdapterModel(model, modified_modules=["layers.0", "layers.1", *norms], bottleneck_dim=4),
        AdapterModel(model, modified_modules=["self_attn", "mlp"], bottleneck_dim=4),
    ]


def put_deltas_everywhere(model: nn.Module, seed: int) -> list[Delta]:
    deltas = put_block_deltas(model, seed)
    return [*deltas, LoraModel(model, modified_modules=["q_proj", "down_proj", "lm_head"])]


def assert_same_gradients(
    model: nn.Module,
    deltas: Sequence[Delta],
    ids: Tensor,
    reference: nn.Module,
    others: Sequence[Delta],
    all_ids: Tensor,
) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    reference(input_ids=all_ids, labels=all_ids).loss.backward()
    names = [name for delta in deltas for name, _ in delta.named_parameters()]
    got = [whole(parameter.grad) for parameter in parameters(deltas)]
    expected = [parameter.grad for parameter in parameters(others)]
    assert_on_both(
        dict(zip(names, got, strict=True)), dict(zip(names, expected, strict=True)), atol=1e-5
    )


@check()
def transformers_parallelism_refuses_what_sees_a_slice(pair: Pair) -> None:
    model = causal_lm(pair, "Qwen3", tp_size=2)
    logits, before = model(IDS).logits, opendelta.snapshot(model)
    with pytest.raises(SiteError, match="AdapterLayer would see a slice"):
        AdapterModel(model, modified_modules=["q_norm"])  # has all weights, sees half of the heads
    with pytest.raises(SiteError, match="PrefixLayer acts among its parts"):
        PrefixModel(model)
    with pytest.raises(SiteError, match="is sharded"):
        AdapterModel(model, modified_modules=["layers.1"], modules_to_save=["layers.0.mlp"])
    opendelta.assert_pristine(model, like=before)
    assert torch.equal(model(IDS).logits, logits)
    biased = causal_lm(pair, "Llama", tp_size=2)
    with pytest.raises(SiteError, match="its bias is added after AdapterLayer has seen the output"):
        AdapterModel(biased, modified_modules=["o_proj"])


@check(["Llama", "Qwen3"], ["LoraModel", "IA3Model", "AdapterModel", "SoftPromptModel"])
def transformers_parallelism_trains_as_one_process(pair: Pair, family: str, method: str) -> None:
    names = ["q_proj", "v_proj", "up_proj", "lm_head"]
    if family == "Qwen3" or method == "LoraModel":  # Llama adds its biases later
        names += ["o_proj", "down_proj"]
    given = {} if method == "SoftPromptModel" else {"modified_modules": names}
    model, whole = causal_lm(pair, family, tp_size=2), causal_lm(pair, family)
    torch.manual_seed(pair.rank)
    deltas = [getattr(opendelta, method)(model, **given)]
    torch.manual_seed(0)
    others = [getattr(opendelta, method)(whole, **given)]
    assert_on_both(values(deltas), values(others))
    randomise(deltas)
    randomise(others)
    for grad in (False, True):  # transformers has a way of its own without gradients
        with torch.set_grad_enabled(grad):
            logits = {"logits": model(IDS).logits.detach()}
            assert_on_both(logits, {"logits": whole(IDS).logits.detach()})
    assert_same_gradients(model, deltas, IDS, whole, others, IDS)
    folder = pair.folder / family / method
    deltas[0].save_finetuned(folder)
    again = getattr(opendelta, method).from_finetuned(folder, causal_lm(pair, family))
    assert_on_both(values([again]), values(deltas), atol=0)


@check()
def tensor_parallelism_trains_deltas_around_split_modules(pair: Pair) -> None:
    model, reference = causal_lm(pair, "Llama", tp_size=2), causal_lm(pair, "Llama")
    plain = model(IDS).logits
    deltas = put_block_deltas(model, seed=3 + pair.rank)
    others = put_block_deltas(reference, seed=3)
    assert_on_both(values(deltas), values(others))
    randomise(deltas)
    randomise(others)
    detach_all(deltas)
    torch.testing.assert_close(model(IDS).logits, plain)
    attach_all(deltas)
    logits = {"logits": model(IDS).logits.detach()}
    assert_on_both(logits, {"logits": reference(IDS).logits.detach()})
    assert opendelta.check(model, {"input_ids": IDS})
    assert_same_gradients(model, deltas, IDS, reference, others, IDS)


@check()
def fsdp_by_transformers(pair: Pair) -> None:
    model, reference = causal_lm(pair, "Llama", fsdp_size=2), causal_lm(pair, "Llama")
    deltas = put_deltas_everywhere(model, seed=3 + pair.rank)
    others = put_deltas_everywhere(reference, seed=3)
    assert_on_both(values(deltas), values(others))
    randomise(deltas)
    randomise(others)
    own = IDS[pair.rank : pair.rank + 1]
    assert_same_gradients(model, deltas, own, reference, others, IDS)


# ------------------------------------------------------------ stages of a pipeline
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "distributed.md"


def build() -> nn.Sequential:
    """Four blocks in double precision, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(False) for _ in range(4))).double().requires_grad_(False)


@check()
def pipeline_stages_train_save_and_load_as_the_page_shows(pair: Pair) -> None:
    whole = build()
    torch.manual_seed(0)
    lora = LoraModel(whole, modified_modules=["q", "o"], lora_r=2, lora_alpha=2)
    far([lora])
    lora.save_finetuned(pair.folder / "start" / str(pair.rank))
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    x = torch.cat([batch(0), batch(1)])[:8].double().detach()
    names = {
        "rank": pair.rank, "build": build, "x": x, "loss_fn": lambda y, t: (y - t).square().mean(),
        "target": x.flip(0), "start": pair.folder / "start" / str(pair.rank),
        "folder": pair.folder / "stages",
    }  # fmt: skip
    exec(compile(example, "distributed.md", "exec"), names)

    whole(x)
    optimizer = torch.optim.SGD(lora.parameters(), lr=0.1)
    (whole(x) - x.flip(0)).square().mean().backward()
    optimizer.step()
    expected = values([lora])
    stage, mine = names["model"], names["composition"]
    for name, tensor in values(mine).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12)
    assert {name.split(".")[0] for name in values(mine)} == {*"01"} if pair.rank == 0 else {*"23"}

    dist.barrier()
    merged = build()
    for rank in range(2):
        opendelta.load(pair.folder / "stages" / str(rank), merged)
    assert opendelta.composition(merged).names == ["lora", "lora_1"]
    with torch.no_grad():
        torch.testing.assert_close(merged(x), whole(x), rtol=0, atol=1e-12)
    lora.save_finetuned(pair.folder / "end" / str(pair.rank))
    end, others = pair.folder / "end" / str(pair.rank), names["others"]
    opendelta.composition(stage)["lora"].detach()
    plain = opendelta.snapshot(stage)
    with pytest.raises(opendelta.DeltaLoadError, match=f"no module matches '{others[0]}"):
        opendelta.load(end, stage)
    with pytest.raises(opendelta.DeltaLoadError, match="holds nothing on a module '7'"):
        opendelta.load(end, stage, absent=[*others, "7"])
    with pytest.raises(opendelta.DeltaLoadError, match=r"holds deltas on .* only"):
        opendelta.load(end, stage, absent=[*"0123"])
    opendelta.assert_pristine(stage, like=plain)
    again = opendelta.load(end, stage, absent=others)
    for name, tensor in values(again).items():
        assert torch.equal(tensor, values([lora])[name])
