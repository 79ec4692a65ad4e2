"""The checkpoints of tools come back, after `freeze_module()` with and without its defaults."""

import copy
import io

import lightning
import numpy as np
import pytest
import skorch
import torch
import transformers
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from support.models import build, logits, token_ids
from support.nets import shake
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import opendelta
from opendelta import AdapterModel, LoraModel, PrefixModel

pytestmark = pytest.mark.covers("Delta.freeze_module")

WAYS = {"default": {}, "True": {"set_state_dict": True}, "False": {"set_state_dict": False}}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def prepared(way, name="llama", acts=True):
    """A model with three deltas, the rest of which is frozen."""
    model = build(name)
    deltas = [LoraModel(model), AdapterModel(model), PrefixModel(model, prefix_token_num=2)]
    for delta in deltas if acts else ():
        shake(delta)
    deltas[0].freeze_module(**way)
    return model


def batches():
    rows = token_ids(rows=8)
    return DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=4)


class Lit(lightning.LightningModule):
    """A model with deltas as Lightning's users write one."""

    def __init__(self, way, acts=False):
        super().__init__()
        self.save_hyperparameters()
        self.model = prepared(way, acts=acts)

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def validation_step(self, batch, index):
        self.log("loss", self.model(**batch).loss)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=0.01)


def lightning_trainer(folder, **options):
    keeper = lightning.pytorch.callbacks.ModelCheckpoint(folder, monitor="loss")
    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[keeper], **options,
    )  # fmt: skip


@every_way
def test_lightning_loads_resumes_and_validates_its_checkpoints(way, tmp_path):
    trained = Lit(way)
    trainer = lightning_trainer(tmp_path, max_epochs=1)
    trainer.fit(trained, batches(), batches())
    path = trainer.checkpoint_callback.best_model_path
    best = logits(trained.model.eval())

    loaded = Lit.load_from_checkpoint(path, weights_only=False)
    assert torch.equal(logits(loaded.model.eval()), best)

    shake(next(iter(opendelta.composition(trained.model))))
    (found,) = trainer.validate(trained, batches(), ckpt_path="best", weights_only=False)
    assert torch.equal(logits(trained.model.eval()), best)
    assert found["loss"] == pytest.approx(float(trainer.checkpoint_callback.best_model_score))

    resumed = Lit(way)
    again = lightning_trainer(tmp_path / "again", max_epochs=2)
    again.fit(resumed, batches(), batches(), ckpt_path=path, weights_only=False)
    assert again.current_epoch == 2
    small = way.get("set_state_dict") is True
    keys = torch.load(path, weights_only=False)["state_dict"]
    assert len(keys) == len(trained.state_dict())
    assert any(".deltas." not in key for key in keys) != small


@every_way
def test_fabric_saves_and_loads(way, tmp_path):
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(prepared(way))
    fabric.save(tmp_path / "state.ckpt", {"model": model})
    fresh = fabric.setup(prepared(way, acts=False))
    fabric.load(tmp_path / "state.ckpt", {"model": fresh})
    assert torch.equal(logits(fresh.eval()), logits(model.eval()))


@every_way
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])  # the last two have tied weights
def test_accelerate_saves_and_loads_its_state(name, way, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = prepared(way, name)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model, optimizer = accelerator.prepare(model, optimizer)
    expected = logits(model.eval())
    accelerator.save_state(tmp_path)
    for delta in opendelta.composition(model):
        shake(delta)
    accelerator.load_state(tmp_path)
    assert torch.equal(logits(model.eval()), expected)


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, "cpu"),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device="cpu"),
    "dispatch": lambda model, folder: dispatch_model(
        model,
        dict.fromkeys(["model.deltas", "model.embed_tokens", "model.rotary_emb", "lm_head"], "cpu")
        | {"model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"},
        main_device="cpu",
        offload_dir=folder,
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("way", [{}, WAYS["False"]], ids=["default", "False"])
def test_accelerate_moves_the_whole_model_away_and_back(way, offload, tmp_path):
    model = prepared(way).eval()
    expected = logits(model)
    assert torch.equal(logits(offload(model, tmp_path)), expected)


@every_way
@pytest.mark.parametrize("ignore", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_torch_s_distributed_state_dicts(name, way, ignore):
    model, fresh = prepared(way, name), prepared(way, name, acts=False)
    options = StateDictOptions(ignore_frozen_params=ignore)
    state = get_model_state_dict(model, options=options)
    if ignore:  # of tied weights, torch leaves the second name
        assert all(".deltas." in key for key in state.keys() & dict(model.named_parameters()))
    set_model_state_dict(fresh, state, options=options)
    assert torch.equal(logits(fresh.eval()), logits(model.eval()))


@every_way
def test_skorch_saves_and_loads_its_parameters(way, tmp_path):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = prepared(way, "bert")

        def forward(self, input_ids):
            return self.body(input_ids=input_ids).logits[:, 0, :2]

    def net():
        return skorch.NeuralNetClassifier(
            Classifier, criterion=nn.CrossEntropyLoss, max_epochs=1, verbose=0,
            train_split=None, optimizer=torch.optim.Adam, optimizer__lr=0.01,
        )  # fmt: skip

    rows, labels = token_ids(rows=8).numpy(), np.array([0, 1] * 4)
    trained = net().fit(rows, labels)
    path = tmp_path / "parameters.pt"
    trained.save_params(f_params=path)
    fresh = net().initialize()
    fresh.load_params(f_params=path)
    assert np.array_equal(fresh.predict_proba(rows), trained.predict_proba(rows))


@every_way
def test_copies_of_state_dicts_and_moving_averages(way):
    model = prepared(way)
    expected = logits(model.eval())
    best = copy.deepcopy(model.state_dict())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for delta in opendelta.composition(model):
        shake(delta)
    average.update_parameters(model)
    average.update_parameters(model)
    file = io.BytesIO()
    torch.save(average.state_dict(), file)
    file.seek(0)
    twin = AveragedModel(prepared(way, acts=False))
    twin.load_state_dict(torch.load(file))
    assert torch.equal(logits(twin.module.eval()), logits(average.module.eval()))
    model.load_state_dict(best)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(average.module), expected)


def test_transformers_own_arguments_for_the_loading_of_a_folder(tmp_path):
    model = prepared({})
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(plain.eval()), logits(build("llama").eval()))
    opendelta.load(tmp_path, plain)
    assert torch.equal(logits(plain), expected)
