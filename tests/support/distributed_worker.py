"""What two gloo processes check together; `ecosystem/test_distributed.py` starts them."""

import datetime
import functools
import itertools
import json
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
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import opendelta
from opendelta import (
    AdapterModel,
    CompacterModel,
    Delta,
    DeltaError,
    IA3Model,
    LoraModel,
    ParallelAdapterModel,
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


def assert_on_both(got: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-6) -> None:
    """Both processes hold the same tensors, and these are the expected ones."""
    for name, tensor in got.items():
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor.contiguous())
        assert torch.equal(*both), f"{name} differs between the ranks"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=atol)


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


@check()
def ddp_refuses_a_delta_inside(pair: Pair) -> None:
    model = network().requires_grad_(True)
    wrapped = DistributedDataParallel(model)
    before = opendelta.snapshot(wrapped)
    with pytest.raises(SiteError, match="attach to the module first, wrap it then"):
        LoraModel(wrapped, modified_modules=["q"])
    with pytest.raises(SiteError, match="attach to the module first, wrap it then"):
        AdapterModel(wrapped, modified_modules=["blocks.0"])
    with pytest.raises(SiteError, match="each rank would train another delta"):
        LoraModel(wrapped.module, modified_modules=["q"])
    opendelta.assert_pristine(wrapped, like=before)
    wrapped(*pair.inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ------------------------------------------------------------ FSDP2
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


@check(["block-wise", "leaf-wise"], ["before", "after"])
def fsdp_takes_layers_off_and_on(pair: Pair, how: str, attached: str) -> None:
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


@check()
def fsdp_refuses_to_merge_into_sharded_weights(pair: Pair) -> None:
    model = network()
    before = output(model)
    put_folding_deltas(model)
    shard(model, pair.mesh)
    with pytest.raises(SiteError, match=r"its weight is sharded; merge before sharding"):
        opendelta.composition(model).merge()
    with pytest.raises(SiteError, match=r"its weight is sharded; merge before sharding"):
        opendelta.composition(model).to_backbone()
    with opendelta.composition(model).only():
        torch.testing.assert_close(output(model), before)


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
            head_dim=8, intermediate_size=64, vocab_size=96,
        )  # fmt: skip
        torch.manual_seed(0)
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    dist.barrier()
    config = DistributedConfig(**parallelism) if parallelism else None
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, distributed_config=config)
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
def tensor_parallelism_refuses_split_modules(pair: Pair) -> None:
    model = causal_lm(pair, "Qwen3", tp_size=2)
    logits, before = model(IDS).logits, opendelta.snapshot(model)
    for name in ("q_proj", "o_proj", "down_proj", "lm_head"):
        with pytest.raises(SiteError, match="Choose a module that is not split"):
            LoraModel(model, modified_modules=[name])
    with pytest.raises(SiteError, match="Choose a module that is not split"):
        AdapterModel(model, modified_modules=["q_norm"])  # has all weights, sees half of the heads
    with pytest.raises(SiteError, match="is sharded"):
        AdapterModel(model, modified_modules=["layers.1"], modules_to_save=["layers.0.mlp"])
    opendelta.assert_pristine(model, like=before)
    assert torch.equal(model(IDS).logits, logits)


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
