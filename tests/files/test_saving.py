"""One delta in a folder: what is in it, what goes back, and what is refused."""

import hashlib
import json
import os

import pytest
import safetensors.torch
import torch
from support.nets import IDS, net, shake, untouched

import opendelta
from opendelta import AdapterModel, AutoDeltaConfig, AutoDeltaModel, LoraModel
from opendelta._files.folder import write, write_tensors
from opendelta.interop import legacy, peft

pytestmark = pytest.mark.covers(
    "Delta.save_finetuned", "Delta.from_finetuned", "AutoDeltaModel", "DeltaLoadError"
)


@pytest.fixture
def saved(tmp_path):
    """A folder with a LoRA delta, and the output it must give."""
    model = net()
    delta = shake(LoraModel(model, modified_modules=["linear", "bare"], lora_r=2))
    delta.freeze_module()
    delta.save_finetuned(tmp_path / "delta")
    return tmp_path / "delta", model(IDS)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def rewrite(folder, tensors=None, delta=None, options=None, **changes):
    """Save the folder again with other tensors or another config, consistently."""
    config = {**config_of(folder), **changes}
    for first in config["deltas"][:1]:
        first.update(delta or {})
        first["options"].update(options or {})
    tensors = tensors_of(folder) if tensors is None else tensors
    for key in ("weights", "sha256"):
        del config[key]
    write(folder, config, tensors)


def tensors_of(folder):
    return safetensors.torch.load_file(folder / config_of(folder)["weights"])


def refuses(folder, message, error=opendelta.DeltaLoadError):
    model = net()
    with untouched(model), pytest.raises(error, match=message):
        AutoDeltaModel.from_finetuned(folder, backbone_model=model)


def test_the_folder_holds_one_json_and_one_safetensors_file(saved):
    folder, _ = saved
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    config = config_of(folder)
    assert config["deltas"][0]["delta_type"] == "lora"
    assert config["deltas"][0]["options"]["lora_r"] == 2
    assert config["deltas"][0]["options"]["lora_alpha"] == 16
    assert config["deltas"][0]["options"]["modified_modules"] == ["linear", "bare"]
    assert config["deltas"][0]["name"] == "lora"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5_000


def test_tensors_that_share_memory_and_transposed_ones_are_saved(tmp_path):
    whole = torch.arange(12.0)
    given = {"a": whole[:6], "b": whole[6:], "a.again": whole[:6], "t": whole.view(3, 4).T}
    given["none"] = torch.zeros(0, 2)
    (tmp_path / "file").touch(0o640)
    write_tensors(tmp_path / "file", given)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    back = safetensors.torch.load_file(tmp_path / "file")
    assert {key: tensor.tolist() for key, tensor in back.items()} == {
        key: tensor.tolist() for key, tensor in given.items()
    }


def test_a_save_that_fails_leaves_no_folder_and_no_file(tmp_path):
    delta = shake(LoraModel(net(), modified_modules=["linear"]))
    delta.freeze_module()
    with torch.no_grad():
        delta.layers["linear"].lora_B[0, 0] = float("nan")
    with pytest.raises(opendelta.DeltaError, match=r"lora_B.*Nothing was saved"):
        delta.save_finetuned(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(opendelta.DeltaError, match="Nothing was saved"):
        delta.save_finetuned(tmp_path / "old")
    assert not any((tmp_path / "old").iterdir())
    delta.layers["linear"].lora_B = torch.nn.Parameter(torch.empty(8, 8, device="meta"))
    for save in (delta.save_finetuned, lambda folder: peft.save(delta, folder)):
        with pytest.raises(opendelta.DeltaError, match=r"1 tensors have no values.*lora_B"):
            save(tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_loading_runs_no_pattern(saved):
    folder, expected = saved
    model = net()
    model.add_module("extra", torch.nn.Module())
    model.extra.linear = torch.nn.Linear(8, 8)  # the pattern "linear" would select this one too
    delta = AutoDeltaModel.from_finetuned(folder, backbone_model=model)
    assert delta.modified_modules == ["linear", "bare"]
    assert torch.equal(model(IDS), expected)
    rewrite(folder, options={"modified_modules": ["[r](x+x+)+y"]})
    refuses(folder, r"'\[r\]\(x\+x\+\)\+y' is a pattern, where a saved delta has full names")


@pytest.mark.covers("AutoDeltaConfig")
def test_each_way_of_loading_gives_the_same(saved):
    folder, expected = saved
    for load in (AutoDeltaModel.from_finetuned, LoraModel.from_finetuned):
        model = net()
        load(str(folder), model, local_files_only=True)
        assert torch.equal(model(IDS), expected)
    config = AutoDeltaConfig.from_finetuned(folder)
    assert (config.delta_type, config.lora_r) == ("lora", 2)
    delta = LoraModel(net(), modified_modules=["head"])
    model = net()
    delta.from_finetuned(folder, model)
    assert torch.equal(model(IDS), expected)
    with pytest.raises(
        opendelta.DeltaLoadError, match=r"holds a 'lora', which AdapterModel is not"
    ):
        AdapterModel.from_finetuned(folder, net())


@pytest.mark.covers("AutoDeltaConfig")
def test_a_config_makes_the_same_delta_on_another_backbone(saved):
    folder, _ = saved
    config = AutoDeltaConfig.from_finetuned(folder)
    delta = AutoDeltaModel.from_config(config, backbone_model=net())
    assert delta.modified_modules == ["linear", "bare"]
    other = AutoDeltaModel.from_config(config, backbone_model=net(), lora_r=3, name="other")
    assert (other.config.lora_r, other.name) == (3, "other")
    third = AutoDeltaModel.from_config(config.to_dict(), backbone_model=net())
    assert third.config == delta.config
    with pytest.raises(opendelta.OptionError, match=r"takes a config or a dict, not list"):
        AutoDeltaModel.from_config([config], backbone_model=net())


@pytest.mark.parametrize("name", [3, "", "a b", ["x"], "x" * 65, "\x1b[31m"])
def test_a_new_name_that_is_none_is_refused(saved, name):
    model = net()
    with untouched(model), pytest.raises(opendelta.DeltaError, match="is no name for a delta: use"):
        AutoDeltaModel.from_finetuned(saved[0], model, name=name)


def test_a_second_delta_of_a_taken_name_gets_the_next_free_one(saved):
    folder, _ = saved
    model = net()
    first = AutoDeltaModel.from_finetuned(folder, backbone_model=model)
    second = AutoDeltaModel.from_finetuned(folder, backbone_model=model)
    third = AutoDeltaModel.from_finetuned(folder, backbone_model=model, name="style")
    assert opendelta.composition(model).names == ["lora", "lora_1", "style"]
    for other in (second, third):
        pairs = zip(first.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    third.freeze_module()
    third.save_finetuned(folder / "again")
    fourth = AutoDeltaModel.from_finetuned(folder / "again", backbone_model=net())
    assert fourth.name == "style"


def test_a_detached_delta_can_be_saved(saved, tmp_path):
    folder, expected = saved
    model = net()
    delta = AutoDeltaModel.from_finetuned(folder, backbone_model=model)
    delta.detach()
    delta.save_finetuned(tmp_path / "other")
    fresh = net()
    AutoDeltaModel.from_finetuned(tmp_path / "other", backbone_model=fresh)
    assert torch.equal(fresh(IDS), expected)


# ----------------------------------------------------------------- backbone parameters
@pytest.mark.covers("DeltaConfig.unfrozen_modules")
@pytest.mark.parametrize("how", ["unfrozen_modules", "exclude"])
def test_backbone_tensors_trained_by_name_are_saved_and_go_back(how, tmp_path):
    model = net()
    options = {"unfrozen_modules": ["head"]} if how == "unfrozen_modules" else {}
    delta = shake(LoraModel(model, modified_modules=["linear"], **options))
    delta.freeze_module(exclude=["deltas"] if options else ["deltas", "head"])
    assert model.head.weight.requires_grad
    with torch.no_grad():
        model.head.weight.add_(1)
    expected = model(IDS)
    delta.save_finetuned(tmp_path)
    assert config_of(tmp_path)["backbone_tensors"] == ["head.bias", "head.weight"]
    fresh = net()
    loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert torch.equal(fresh(IDS), expected)
    loaded.freeze_module()
    assert fresh.head.weight.requires_grad
    loaded.save_finetuned(tmp_path)
    again = net()
    AutoDeltaModel.from_finetuned(tmp_path, backbone_model=again)
    assert torch.equal(again(IDS), expected)


def test_tensors_trained_by_name_are_saved_though_they_are_frozen_by_now(tmp_path):
    model = net()
    delta = shake(LoraModel(model, modified_modules=["linear"]))
    delta.freeze_module(exclude=["deltas", "head"])
    with torch.no_grad():
        model.head.weight.add_(1)
    model.requires_grad_(False)
    delta.save_finetuned(tmp_path)
    fresh = net()
    AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert torch.equal(fresh(IDS), model(IDS))


@pytest.mark.parametrize("how", ["unfrozen_modules", "exclude"])
def test_buffers_of_unfrozen_modules_are_saved_too(how, tmp_path):
    def with_batch_norm():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))

    model = with_batch_norm()
    options = {"unfrozen_modules": ["1"]} if how == "unfrozen_modules" else {}
    delta = LoraModel(model, modified_modules=["0"], **options)
    delta.freeze_module(exclude=["deltas"] if options else ["deltas", "1"])
    model(torch.randn(9, 4) * 3 + 1)
    model.eval()
    delta.save_finetuned(tmp_path)
    fresh = with_batch_norm().eval()
    AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    x = torch.randn(5, 4)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.covers("UnsavedWarning")
def test_other_trainable_parameters_are_counted_in_a_warning(tmp_path):
    model = net()
    delta = LoraModel(model, modified_modules=["linear"])
    values = sum(p.numel() for p in net().parameters())
    count = len(list(net().parameters()))
    message = rf"{count} trainable parameters of the backbone \({values:,} values\) are not saved"
    with pytest.warns(opendelta.UnsavedWarning, match=message) as warned:
        delta.save_finetuned(tmp_path)
    assert warned[0].filename == __file__
    assert config_of(tmp_path)["backbone_tensors"] == []
    delta.freeze_module(exclude=["deltas", "head"])
    model.norm.bias.requires_grad_(True)
    with pytest.warns(opendelta.UnsavedWarning, match=r"1 trainable parameters .* \(8 values\)"):
        delta.save_finetuned(tmp_path)


# ----------------------------------------------------------------------------- refused
def test_missing_unexpected_and_misshaped_tensors_are_named(saved):
    folder, _ = saved
    good = tensors_of(folder)
    first, *others = good
    rewrite(folder, {k: good[k] for k in others})
    refuses(folder, rf"1 missing: {first}")
    rewrite(folder, {**good, "bogus": torch.zeros(1)})
    refuses(folder, "1 unexpected: bogus")
    rewrite(folder, {**good, "head.weight": torch.zeros(3, 8)})
    refuses(folder, "1 unexpected: head.weight")
    rewrite(folder, {**good, first: torch.zeros(3, 3)})
    refuses(folder, rf"1 of another shape: {first}: \[3, 3\] instead of \[2, 8\]")
    rewrite(folder, {**good, first: good[first].to(torch.int8)})
    refuses(folder, rf"1 not floating: {first}: I8")


@pytest.mark.covers("load", "LoadReport")
def test_a_report_tells_by_name_what_does_not_fit(saved):
    folder, expected = saved
    good = tensors_of(folder)
    first, second, third, _ = good
    other = torch.full_like(good[second], 2, dtype=torch.int8)
    changed = {first: torch.zeros(3, 3), second: other, "bogus": torch.zeros(1)}
    rewrite(folder, {**good, **changed})
    (folder / config_of(folder)["weights"]).rename(folder / "kept")
    model = net()
    with untouched(model):
        report = opendelta.load(folder, model, strict=False)
        assert not report
        assert "is missing, though" in report.problem
        (folder / "kept").rename(folder / config_of(folder)["weights"])
        report = opendelta.load(folder, model, strict=False)
    assert (report.names, report.missing, report.unexpected) == ([], [], ["bogus"])
    assert str(report) == f"nothing was loaded: {report.problem}"
    assert report.misshaped == {first: ([3, 3], list(good[first].shape))}
    assert report.other_kind == {second: "I8"}
    assert "1 unexpected: bogus; 1 of another shape" in report.problem
    rewrite(folder, {key: value for key, value in good.items() if key != third})
    assert opendelta.load(folder, model, strict=False).missing == [third]
    rewrite(folder, {**good, third: good[third] * float("nan")})
    assert opendelta.load(folder, model, strict=False).not_finite == [third]
    rewrite(folder, good)
    report = opendelta.load(folder, model, strict=False)
    assert report
    same = ["linear.weight", "bare.weight"]
    assert report == opendelta.LoadReport(["lora"], saved_from="Net", same=same)
    assert str(report) == "loaded lora, saved from a Net"
    assert torch.equal(model(IDS), expected)


def test_a_backbone_that_does_not_fit_is_refused(saved):
    folder, _ = saved
    with pytest.raises(opendelta.DeltaLoadError, match=r"saved from a Net, .* no module matches"):
        AutoDeltaModel.from_finetuned(folder, backbone_model=torch.nn.Sequential())
    model = net()
    model.bare = torch.nn.Linear(9, 8)
    with untouched(model), pytest.raises(opendelta.DeltaLoadError, match=r"of another shape"):
        AutoDeltaModel.from_finetuned(folder, backbone_model=model)


def test_the_error_for_a_part_of_a_model_and_for_the_whole_of_one_tells_where_it_fits(saved):
    folder, output = saved
    part = net()
    whole = torch.nn.ModuleDict({"inner": part})
    with untouched(whole), pytest.raises(opendelta.DeltaLoadError, match=r"use model\.inner inst"):
        opendelta.load(folder, whole)
    opendelta.load(folder, whole["inner"])
    assert torch.equal(part(IDS), output)
    opendelta.composition(part)["lora"].detach()
    delta = LoraModel(whole, modified_modules=["linear"])
    delta.freeze_module()
    delta.save_finetuned(folder)
    part = net()
    with untouched(part), pytest.raises(opendelta.DeltaLoadError, match="whose 'inner' is such a"):
        opendelta.load(folder, part)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"delta": {"delta_type": "lroa"}}, "no method 'lroa'; nearest: lora"),
        ({"delta": {"active": 1}}, "active=1 must be a bool"),
        ({"delta": {"frozen": "all"}}, "frozen='all' must be a list"),
        ({"delta": {"more": 1}}, "each of deltas must have just delta_type, name, active"),
        ({"deltas": []}, "deltas must be a list of at least one"),
        ({"options": {"lora_rank": 3}}, "no option 'lora_rank'; nearest: lora_r"),
        ({"options": {"lora_r": "8"}}, "lora_r='8' must be int"),
        ({"schema_version": 2}, "has schema 2.*update opendelta"),
        ({"format": "peft"}, "was not written by opendelta"),
        ({"backbone_tensors": 3}, "must be a list of names"),
        ({"backbone_tensors": ["heed.weight"]}, r"no name matches 'heed.weight'"),
    ],
)
def test_a_config_that_is_not_right_is_refused(saved, changes, message):
    folder, _ = saved
    rewrite(folder, **changes)
    refuses(folder, message, opendelta.DeltaError)


def test_damage_is_noticed(saved, tmp_path):
    folder, _ = saved
    config = config_of(folder)
    weights = folder / config["weights"]
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refuses(folder, "is damaged: its sha256")
    weights.unlink()
    refuses(folder, "is missing, though config.json names it")
    for name in ("../x.safetensors", "/etc/passwd", "a.bin", 3, None):
        (folder / "config.json").write_text(json.dumps({**config, "weights": name}))
        refuses(folder, "no safetensors file beside it")
    (folder / "config.json").write_text("{")
    refuses(folder, "cannot be read as JSON")
    (folder / "config.json").write_text("[]")
    refuses(folder, "was not written by")
    (folder / "config.json").unlink()
    refuses(folder, "config.json is missing")


def test_a_pickle_is_never_read(saved):
    folder, _ = saved
    config = config_of(folder)
    torch.save({"a": torch.zeros(1)}, folder / config["weights"])
    digest = hashlib.sha256((folder / config["weights"]).read_bytes()).hexdigest()
    (folder / "config.json").write_text(json.dumps({**config, "sha256": digest}))
    refuses(folder, "is no safetensors file")


def test_saving_again_replaces_the_old_content(saved):
    folder, expected = saved
    model = net()
    delta = AutoDeltaModel.from_finetuned(folder, backbone_model=model)
    delta.freeze_module()
    shake(delta, seed=9)
    delta.save_finetuned(folder)
    fresh = net()
    AutoDeltaModel.from_finetuned(folder, backbone_model=fresh)
    assert torch.equal(fresh(IDS), model(IDS))
    assert not torch.equal(fresh(IDS), expected)
    assert len(list(folder.iterdir())) == 2


def test_saving_again_mends_damaged_weights(saved):
    folder, expected = saved
    model = net()
    delta = AutoDeltaModel.from_finetuned(folder, backbone_model=model)
    delta.freeze_module()
    weights = folder / config_of(folder)["weights"]
    weights.write_bytes(weights.read_bytes()[:20])
    delta.save_finetuned(folder)
    fresh = net()
    AutoDeltaModel.from_finetuned(folder, backbone_model=fresh)
    assert torch.equal(fresh(IDS), expected)


def test_the_config_of_another_library_is_not_overwritten(saved):
    folder, _ = saved
    (folder / "config.json").write_text('{"model_type": "bert"}')
    delta = LoraModel(net(), modified_modules=["linear"])
    with pytest.raises(opendelta.DeltaError, match=r"config.json that is not a delta's"):
        delta.save_finetuned(folder)
    assert (folder / "config.json").read_text() == '{"model_type": "bert"}'


def test_a_path_is_no_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("./nowhere", "../nowhere", "/no/where", "~/nowhere", "nowhere"):
        refuses(path, "there is no such folder. Give")


def test_swapped_arguments_are_said_to_be_swapped(saved):
    folder, _ = saved
    for load in (opendelta.load, AutoDeltaModel.from_finetuned, LoraModel.from_finetuned):
        with pytest.raises(opendelta.OptionError, match="the folder comes first, then the model"):
            load(net(), folder)


class Odd(os.PathLike):
    def __fspath__(self):
        return b"folder"


@pytest.mark.covers("Delta.save_finetuned", "Composition.save", "AutoDeltaConfig")
@pytest.mark.parametrize("path", [3, None, b"folder", ["folder"], Odd(), ""])
def test_a_path_that_is_none_is_refused_by_the_name_of_its_argument(path):
    model = net()
    delta = LoraModel(model, modified_modules=["linear"])
    calls = {
        "folder": [
            opendelta.composition(model).save,
            lambda given: opendelta.load(given, model),
            lambda given: peft.save(delta, given),
        ],
        "finetuned_delta_path": [
            delta.save_finetuned,
            AutoDeltaConfig.from_finetuned,
            lambda given: AutoDeltaModel.from_finetuned(given, model),
            lambda given: LoraModel.from_finetuned(given, model),
        ],
        "path": [lambda given: legacy.load_state_dict(model, given)],
    }
    kind = "empty" if path == "" else type(path).__name__
    for argument, verbs in calls.items():
        for verb in verbs:
            with pytest.raises(
                opendelta.OptionError, match=f"^{argument}=.* must be a path.*{kind}"
            ):
                verb(path)


class Place(os.PathLike):
    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return str(self.path)


def test_a_path_may_be_of_any_class_that_has_one(tmp_path):
    delta = shake(LoraModel(net(), modified_modules=["linear"]))
    delta.freeze_module()
    delta.save_finetuned(Place(tmp_path))
    for path in (tmp_path, str(tmp_path), Place(tmp_path)):
        assert opendelta.load(path, net()).names == ["lora"]
    with pytest.raises(opendelta.OptionError, match="repo_id=3 must be 'user/name'"):
        delta.push_to_hub(3)


def test_a_save_between_reading_the_config_and_the_weights_is_no_damage(saved, monkeypatch):
    folder, _ = saved
    model = net()
    delta = AutoDeltaModel.from_finetuned(folder, backbone_model=model)
    delta.freeze_module()
    shake(delta, seed=9)
    real, old = opendelta._files.folder.read_config, config_of(folder)["weights"]

    def read_config(path):
        config = real(path)
        if config["weights"] == old:
            delta.save_finetuned(folder)
        return config

    monkeypatch.setattr(opendelta._files.folder, "read_config", read_config)
    fresh = net()
    AutoDeltaModel.from_finetuned(folder, backbone_model=fresh)
    assert torch.equal(fresh(IDS), model(IDS))
    assert not (folder / old).exists()


def test_a_failing_save_leaves_the_old_content(saved, monkeypatch):
    folder, expected = saved
    model = net()
    delta = AutoDeltaModel.from_finetuned(folder, backbone_model=model)
    delta.freeze_module()
    shake(delta, seed=9)
    for failing in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, failing, lambda *a: (_ for _ in ()).throw(OSError(28, "no space")))
            with pytest.raises(OSError, match=r"no space"):
                delta.save_finetuned(folder)
        fresh = net()
        AutoDeltaModel.from_finetuned(folder, backbone_model=fresh)
        assert torch.equal(fresh(IDS), expected)
        assert not list(folder.glob(".*"))


def test_modules_that_torch_wrapped_since_are_saved_under_their_own_names(tmp_path):
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.nn.ReLU())

    model, x = net(), torch.ones(2, 8)
    LoraModel(model, modified_modules=["0.0"]).freeze_module()
    opendelta.composition(model)["lora"].layers["0.0"].lora_B.data.fill_(0.1)
    wrappers.apply_activation_checkpointing(model, check_fn=lambda part: part is model[0])
    opendelta.composition(model).save(tmp_path)
    plain = net()
    report = opendelta.load(tmp_path, plain)
    assert report.names == ["lora"]
    assert torch.equal(plain(x), model(x))
