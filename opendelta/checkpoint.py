"""One delta in a folder: a JSON config and a safetensors file, safe against a crash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from . import sharding
from .addressing import ancestors, survey
from .delta import Delta
from .errors import AddressError, DeltaError, DeltaLoadError, OptionError, SiteError, UnsavedWarning
from .freezing import backbone_tensors
from .options import DeltaConfig
from .order import free_name, known_records
from .registry import method

CONFIG = "config.json"
FORMAT, SCHEMA = "opendelta", 1
# Keys of the JSON beside `delta_type` and the options.
FACTS = ("format", "schema_version", "opendelta_version", "backbone_class", "backbone_tensors")
FILES = ("weights", "sha256")


# ------------------------------------------------------------------------------------------- saving
def save(delta: Delta, folder: str | os.PathLike) -> None:
    """Write `delta` into `folder`; see `Delta.save_finetuned`."""
    _check_folder(Path(folder))
    parameters = _backbone_part(delta)
    tensors = {**delta.state_dict(), **parameters}
    whole = {name: sharding.full(tensor.detach()) for name, tensor in tensors.items()}
    plain = {name: tensor.cpu().contiguous().clone() for name, tensor in whole.items()}
    weights = safetensors.torch.save(plain, metadata={"format": "pt"})
    config = {
        "format": FORMAT,
        "schema_version": SCHEMA,
        "opendelta_version": own_version(),
        **delta.config.to_dict(),
        "name": delta.name,
        "backbone_class": type(delta.backbone_model).__name__,
        "backbone_tensors": sorted(parameters),
    }
    write_folder(Path(folder), config, weights)


def _check_folder(folder: Path) -> None:
    """Raise if `folder` holds the config of something else, which a save would destroy."""
    with contextlib.suppress(FileNotFoundError):
        try:
            given = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            return  # the remains of a damaged delta, as far as one can tell
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            raise DeltaError(
                f"{folder} has a {CONFIG} that is not a delta's, such as a transformers model's; "
                "save into a folder of its own"
            )


def own_version() -> str:
    """The installed version of opendelta."""
    with contextlib.suppress(PackageNotFoundError):
        return version("opendelta")
    return "unknown"


def _backbone_part(delta: Delta) -> dict[str, Tensor]:
    """The backbone tensors that are saved with the delta; warns of other trainable ones."""
    own = backbone_tensors(survey(delta.backbone_model))
    around = {*delta.unfrozen_modules, *delta.record.shared.excluded}
    named = {name: tensor for name, tensor in own.items() if around & {"", *ancestors(name)}}
    known = set(map(id, named.values()))
    others = {id(p): p for p in own.values() if p.requires_grad and id(p) not in known}
    if others and delta.attached:
        warnings.warn(
            f"{len(others)} trainable parameters of the backbone "
            f"({sum(p.numel() for p in others.values()):,} values) are not saved with "
            f"{delta.name!r}: freeze them with freeze_module(), or name those that belong to it in "
            "freeze_module(exclude=[...]) or unfrozen_modules=[...]",
            UnsavedWarning,
            stacklevel=4,
        )
    return named


def write_folder(folder: Path, config: dict[str, Any], weights: bytes) -> None:
    """Put config and weights into `folder`; at any moment it holds the old pair or the new one.

    The weights file is named by its content; the config, which names that file, is replaced last,
    and then the weights that the old one named go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(weights).hexdigest()
    name = f"delta-{digest[:16]}.safetensors"
    text = json.dumps({**config, "weights": name, "sha256": digest}, indent=2) + "\n"
    with _locked(folder):
        old = list(folder.glob("delta-*.safetensors"))
        _replace(folder / name, weights)
        _replace(folder / CONFIG, text.encode())
        for file in old:
            if file.name != name:
                file.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing into `folder`, where the system can."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step: a temporary file, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ------------------------------------------------------------------------------------------ loading
def load(
    folder: str | os.PathLike,
    model: nn.Module,
    name: str | None = None,
    expected: type[Delta] = Delta,
) -> Any:
    """Put the delta that `folder` holds on `model`.

    Everything is compared before the model is touched.

    Args:
        name: the delta's name here. None: its own, or the next free one.
        expected: the method that it must be of.

    Raises:
        DeltaLoadError: the folder is damaged, of another method, or does not fit `model`.
    """
    path = Path(folder)
    if not isinstance(model, nn.Module):
        raise OptionError(f"backbone_model must be a torch.nn.Module, not {model!r}")
    facts, config = read_config(path)
    cls = method(config.delta_type)
    if not issubclass(cls, expected):
        raise DeltaLoadError(
            f"{path} holds a {config.delta_type!r}, which {expected.__name__} is not; use "
            f"AutoDeltaModel.from_finetuned or {cls.__name__}.from_finetuned"
        )
    tensors = _read_weights(path, facts)
    saved_as = config.name or config.delta_type
    taken = {record.name for record in known_records(survey(model))}
    config.name = name or free_name(saved_as, taken)
    brought = facts["backbone_tensors"]
    config.unfrozen_modules = [*dict.fromkeys([*(config.unfrozen_modules or []), *brought])] or None
    delta = cls.__new__(cls)
    try:
        delta._prepare(model, config, as_named=True)
    except (AddressError, SiteError) as error:
        raise DeltaLoadError(
            f"{path}, saved from a {facts['backbone_class']}, does not fit this "
            f"{type(model).__name__}: {error}"
        ) from None
    own = backbone_tensors(survey(model))
    backbone: dict[str, Tensor] = {key: own[key] for key in brought}
    copy_into({**delta.state_dict(saved_as), **backbone}, tensors, str(path), allowed=backbone)
    delta._enter()
    copy_into(backbone, {key: tensors[key] for key in backbone}, str(path))
    return delta


def read_config(path: Path) -> tuple[dict[str, Any], DeltaConfig]:
    """The facts of a folder's JSON, and the options of its delta.

    Raises:
        DeltaLoadError: there is no such file, or it is not one of ours.
    """
    file = path / CONFIG
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeltaLoadError(
            f"no delta in {str(path)!r}: {CONFIG} is missing. Only folders are read; what is on "
            "the hub comes into one with huggingface_hub.snapshot_download"
        ) from None
    except (ValueError, RecursionError, OSError) as error:
        raise DeltaLoadError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise DeltaLoadError(f"{file} was not written by save_finetuned of opendelta 1.0 or later")
    if given.get("schema_version") != SCHEMA:
        raise DeltaLoadError(
            f"{file} has schema {given.get('schema_version')!r}; this version of opendelta reads "
            f"{SCHEMA}: update opendelta"
        )
    facts = {key: given.pop(key, None) for key in (*FACTS, *FILES)}
    if not _are_names(facts["backbone_tensors"]):
        raise DeltaLoadError(f"{file}: backbone_tensors must be a list of names")
    try:
        config = method(given.get("delta_type", "")).config_class.from_dict(given)
    except OptionError as error:
        raise DeltaLoadError(f"{file}: {error}") from None
    return facts, config


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _read_weights(path: Path, facts: dict[str, Any]) -> dict[str, Tensor]:
    name = facts["weights"]
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise DeltaLoadError(f"{path / CONFIG}: {name!r} is no safetensors file beside it")
    try:
        content = (path / name).read_bytes()
    except OSError as error:
        raise DeltaLoadError(f"{path / name} cannot be read: {error}") from None
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise DeltaLoadError(f"{path / name} is damaged: its sha256 is not the one in {CONFIG}")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise DeltaLoadError(f"{path / name} is no safetensors file: {error}") from None


def copy_into(
    own: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    source: str,
    allowed: Sequence[str] | Mapping[str, Tensor] = (),
) -> None:
    """Copy `given` tensors into `own` ones of the same names.

    Args:
        source: where `given` comes from, for the message.
        allowed: names that are compared and not copied.

    Raises:
        DeltaLoadError: names, shapes or kinds of numbers differ. Nothing is copied then.
    """
    problems = [
        *_some("missing", [key for key in own if key not in given]),
        *_some("unexpected", [key for key in given if key not in own]),
        *_some("of another shape", [
            f"{key}: {list(given[key].shape)} instead of {list(own[key].shape)}"
            for key in own if key in given and given[key].shape != own[key].shape
        ]),
        *_some("not floating", [
            f"{key}: {given[key].dtype}"
            for key in own
            if key in given and own[key].is_floating_point() and not given[key].is_floating_point()
        ]),
    ]  # fmt: skip
    if problems:
        raise DeltaLoadError(f"{source} does not fit: " + "; ".join(problems))
    with torch.no_grad():
        for key, tensor in own.items():
            if key not in allowed:
                tensor.copy_(sharding.spread(given[key], like=tensor))


def _some(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} {what}: {', '.join(sorted(names)[:3])}" + ", ..." * (len(names) > 3)]
