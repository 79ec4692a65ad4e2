"""Deltas on models that several processes share: DDP, FSDP2, tensor parallelism."""

import gc
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from support import distributed_worker as worker
from support.distributed_worker import (
    WIDTH,
    Block,
    attach_all,
    batch,
    detach_all,
    network,
    output,
    parameters,
    put_deltas,
    randomise,
    shard,
    train,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

import opendelta
from opendelta import AdapterModel, IA3Model, LoraModel, SiteError

pytestmark = pytest.mark.covers("Delta.attach", "Delta.detach")

WHEN = ["before", "after"]  # when the deltas are attached: before or after fully_shard


# ------------------------------------------------------------ two processes
@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """{check: what went wrong, or None}, from one start of two processes for all that is asked."""
    names = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and "outcomes" in item.fixturenames
    ]
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the folder around it is that of the whole run
        folder = folder.parent
    folder = folder / "pair"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            _start(folder, names)
    return {name: _outcome(folder, name) for name in names}


def _start(folder: Path, names: list[str]) -> None:
    (folder / "died").write_text("it never ran", encoding="utf-8")
    try:
        torch.multiprocessing.start_processes(
            worker.run, args=(folder, names), nprocs=2, start_method="spawn"
        )
    except (ProcessExitedException, ProcessRaisedException) as error:
        (folder / "died").write_text(f"it never ran, or did this: {error}", encoding="utf-8")


def _outcome(folder: Path, name: str) -> str | None:
    problems = []
    for rank in range(2):
        path = folder / f"outcomes{rank}"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        known = dict(map(json.loads, lines))
        problem = known[name] if name in known else (folder / "died").read_text(encoding="utf-8")
        if problem is not None:
            problems.append(f"process {rank}: {problem}")
    return "\n".join(problems) or None


@pytest.mark.distributed
@pytest.mark.parametrize("name", worker.CHECKS)
def test_two_processes(name: str, outcomes: dict) -> None:
    if outcomes[name] is not None:
        pytest.fail(outcomes[name], pytrace=False)


# ------------------------------------------------------------ FSDP2 on one process
@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def gradients(model: nn.Module, deltas: list) -> list[Tensor]:
    """The gradients of the deltas for one batch."""
    model(batch(0)).square().mean().backward()
    return [worker.whole(parameter.grad) for parameter in parameters(deltas)]


@pytest.mark.parametrize("how", ["block-wise", "leaf-wise"])
@pytest.mark.parametrize("when", WHEN)
def test_fsdp_computes_what_the_unsharded_model_does(mesh: DeviceMesh, how: str, when: str) -> None:
    reference, model = network(), network()
    others = randomise(put_deltas(reference))
    if when == "after":
        shard(model, mesh, how)
    deltas = randomise(put_deltas(model))
    if when == "before":
        shard(model, mesh, how)

    torch.testing.assert_close(output(model), output(reference))
    torch.testing.assert_close(gradients(model, deltas), gradients(reference, others))
    assert list(model.state_dict()) == list(reference.state_dict())
    assert opendelta.check(model, batch(0))

    detach_all(deltas)
    worker.assert_plain(model, network())
    attach_all(deltas)
    torch.testing.assert_close(output(model), output(reference))


@pytest.mark.covers("snapshot", "assert_pristine", "PristineError")
def test_detaching_from_a_sharded_model_leaves_no_trace(mesh: DeviceMesh) -> None:
    model = shard(network(), mesh, "leaf-wise")
    output(model)  # FSDP2 itself adds hooks in the first forward
    model.reshard()
    before = opendelta.snapshot(model)
    deltas = put_deltas(model)
    with pytest.raises(opendelta.PristineError):
        opendelta.assert_pristine(model)
    detach_all(deltas)
    opendelta.assert_pristine(model, like=before)
    with torch.no_grad():
        model.head.bias += 1
    with pytest.raises(opendelta.PristineError, match="head"):
        opendelta.assert_pristine(model, like=before)


def test_a_delta_that_was_off_while_the_model_was_sharded(mesh: DeviceMesh) -> None:
    model, reference = network(), network()
    deltas = randomise(put_deltas(model))
    randomise(put_deltas(reference))
    detach_all(deltas)
    shard(model, mesh)
    attach_all(deltas)
    assert all(isinstance(parameter, DTensor) for parameter in parameters(deltas))
    torch.testing.assert_close(output(model), output(reference))


def test_what_was_set_aside_from_collection_is_looked_through_once(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = network(), network()
    wrapped = nn.parallel.DistributedDataParallel(model.requires_grad_(True))
    gc.freeze()
    looks = []
    monkeypatch.setattr(gc, "unfreeze", lambda look=gc.unfreeze: (looks.append(1), look()))
    for _ in range(3):
        with pytest.raises(SiteError, match="would not synchronise"):
            LoraModel(model, modified_modules=["q"])
        LoraModel(other, modified_modules=["q"])
    assert len(looks) == 1
    assert wrapped.module is model


def test_a_module_whose_unit_has_no_parameters(mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(False), nn.Tanh(), Block(False)).requires_grad_(False)
    for block in (model[0], model[2]):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    delta = AdapterModel(model, modified_modules=["1"], bottleneck_dim=3)
    assert all(isinstance(parameter, DTensor) for parameter in delta.parameters())
    train(model, [delta], [batch(0)])


class Upcasting(nn.Module):
    """A block that computes its activation in float32, whatever the dtype of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.activation = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.k(self.q(x))
        return self.o(self.activation(h.float()).type_as(h))


def test_a_layer_casts_nothing_that_it_passes_on(mesh: DeviceMesh) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)

    def sharded(model: nn.Module) -> nn.Module:
        for block in model:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    outputs = {}
    for when in WHEN:
        torch.manual_seed(0)
        model = nn.Sequential(Upcasting(), Upcasting()).requires_grad_(False)
        if when == "after":
            sharded(model)
        deltas = [
            LoraModel(model, modified_modules=["q"]),
            AdapterModel(model, modified_modules=["activation"]),
        ]
        randomise(deltas)
        if when == "before":
            sharded(model)
        outputs[when] = output(model)
        train(model, deltas, [batch(0)])
    torch.testing.assert_close(outputs["after"], outputs["before"])


def test_a_delta_on_a_gathered_module_has_the_dtype_of_the_shards(mesh: DeviceMesh) -> None:
    model = shard(network(), mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    output(model)
    assert model.head.weight.dtype == torch.bfloat16
    delta = LoraModel(model, modified_modules=["head"])
    assert {parameter.dtype for parameter in delta.parameters()} == {torch.float32}


@pytest.mark.covers("DeltaConfig.dtype")
@pytest.mark.parametrize("when", WHEN)
def test_float32_deltas_on_a_16_bit_backbone(mesh: DeviceMesh, when: str) -> None:
    model = network().bfloat16()
    if when == "after":
        shard(model, mesh)
    delta = LoraModel(model, modified_modules=["q"], dtype="float32")
    if when == "before":
        shard(model, mesh)
    model(batch(0).bfloat16()).float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in delta.parameters()} == {torch.float32}


def two_dtypes(mesh: DeviceMesh | None, when: str, apart: bool = True) -> nn.Module:
    """A bfloat16 model whose blocks train biases of their own beside LoRAs of two dtypes."""
    model = network().bfloat16()
    model.blocks.requires_grad_(True)
    if mesh is not None and when == "after":
        shard(model, mesh)
    first = LoraModel(model, modified_modules=["q", "o"], unfrozen_modules=["o.bias"])
    second = LoraModel(model, modified_modules=["q", "o"], dtype="backbone")
    first.freeze_module()
    randomise([first, second])
    if mesh is not None and when == "before":
        if apart:
            first.shard(mesh=mesh)
        shard(model, mesh)
    return model


@pytest.mark.covers("Delta.shard", "DeltaConfig.dtype")
@pytest.mark.parametrize("when", WHEN)
def test_two_dtypes_train_side_by_side_in_groups_of_their_own(mesh: DeviceMesh, when: str) -> None:
    found: list[dict[str, Tensor]] = []
    for mine in (mesh, None):
        model, x = two_dtypes(mine, when), batch(0).bfloat16()
        assert opendelta.check(model, x)
        model(x).float().square().mean().backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        found.append({name: worker.whole(p.grad) for name, p in trained.items()})
    assert {grad.dtype for grad in found[0].values()} == {torch.float32, torch.bfloat16}
    torch.testing.assert_close(found[0], found[1], atol=0.005, rtol=0.05)


@pytest.mark.covers("check", "SiteError")
def test_check_names_a_group_of_two_dtypes(mesh: DeviceMesh) -> None:
    model = two_dtypes(mesh, "before", apart=False)
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        model(batch(0).bfloat16())
    model = two_dtypes(mesh, "before", apart=False)
    with pytest.raises(SiteError, match=r"lora_[AB]' .* train in one FSDP2 group.*delta\.shard"):
        opendelta.check(model, batch(0).bfloat16())


@pytest.mark.covers("DeltaConfig.modules_to_save")
def test_a_copy_of_two_dtypes_that_returns_is_sharded_apart(mesh: DeviceMesh) -> None:
    model = network().bfloat16()
    model.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3).bfloat16())
    options = {"modified_modules": ["q"], "modules_to_save": ["head"], "dtype": "backbone"}
    delta = LoraModel(model, **options)
    delta.freeze_module()
    delta.detach()
    shard(model.requires_grad_(False), mesh)
    delta.attach()
    model(batch(0).bfloat16()).float().square().mean().backward()
    dtypes = {p.grad.dtype for p in delta.layers["head"].parameters()}
    assert dtypes == {torch.float32, torch.bfloat16}
    assert all(isinstance(p, DTensor) for p in delta.parameters())


class InPlace(nn.Module):
    """A residual block that writes into the output of its last module."""

    def __init__(self) -> None:
        super().__init__()
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.o(x[None])  # with three axes, what F.linear returns is a view
        h += x
        return h.squeeze(0).clone()


def test_the_model_may_write_into_what_a_layer_passes_on(mesh: DeviceMesh) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(InPlace(), InPlace()).requires_grad_(False)

    def put(model: nn.Module) -> list:
        return randomise([IA3Model(model, modified_modules=["o"], feedforward_modules=["o"])])

    model, reference = build(), build()
    for block in model:
        fully_shard(block, mesh=mesh)
    deltas, others = put(model), put(reference)
    torch.testing.assert_close(gradients(model, deltas), gradients(reference, others))


@pytest.mark.covers("DeltaConfig.modules_to_save")
def test_modules_to_save_are_made_before_sharding(mesh: DeviceMesh) -> None:
    model = network()
    delta = LoraModel(model, modified_modules=["q"], modules_to_save=["head"])
    shard(model, mesh)
    train(model, [delta], [batch(0)])

    model = shard(network(), mesh, "leaf-wise")
    for name in ("blocks.0", "blocks.0.q", "head"):
        with pytest.raises(SiteError, match="make the delta before the model is sharded"):
            LoraModel(model, modified_modules=["blocks.1.q"], modules_to_save=[name])
    opendelta.assert_pristine(model)


@pytest.mark.covers("Delta.load_state_dict")
def test_a_state_dict_in_full_is_loaded_into_shards(mesh: DeviceMesh) -> None:
    model = shard(network(), mesh)
    delta = LoraModel(model, modified_modules=["q", "head"])
    output(model)  # leaves the tensors of the root gathered
    state = {name: torch.ones(tensor.shape) for name, tensor in delta.state_dict().items()}
    delta.load_state_dict(state)
    output(model)
    torch.testing.assert_close(worker.values([delta]), state)
    delta.load_state_dict(delta.state_dict())
    torch.testing.assert_close(worker.values([delta]), state)


@pytest.mark.usefixtures("mesh")
def test_the_first_fsdp_refuses_a_delta_inside() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it is of no use to one process
        model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with pytest.raises(SiteError, match="attach to the module first, wrap it then"):
        LoraModel(model, modified_modules=["q"])
    opendelta.assert_pristine(model)


def test_a_refused_delta_leaves_its_name_free(mesh: DeviceMesh) -> None:
    model = shard(network(reads=True), mesh)
    with pytest.raises(SiteError, match="attach before fully_shard") as refusal:
        LoraModel(model, modified_modules=["q"], reads=True)
    assert refusal.traceback  # whoever holds the error holds what was refused, too
    assert LoraModel(model, modified_modules=["o"]).name == "lora"


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init": "pissa"}, {"init": "olora"}])
def test_what_needs_the_whole_weight_is_attached_before_sharding(
    mesh: DeviceMesh, options: dict
) -> None:
    model = shard(network(), mesh)
    with pytest.raises(SiteError, match="weight whole, and it is sharded: attach before fully_sh"):
        LoraModel(model, modified_modules=["q"], **options)
    opendelta.assert_pristine(model)
    early = network()
    LoraModel(early, modified_modules=["q"], **options)
    shard(early, mesh)
    early(batch(0))
