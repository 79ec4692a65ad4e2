"""Load a backbone of transformers and the deltas on it, in one call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from .. import interop
from .._checkpoint import hub
from .._checkpoint.pretrained import check_beside, has_model
from .._checkpoint.source import opened
from ..errors import DeltaLoadError, OptionError, reason, shown
from .load import load


def from_pretrained(
    folder: str | os.PathLike,
    backbone: str | os.PathLike | None = None,
    *,
    download_backbone: bool = False,
    check_backbone: bool = True,
    local_files_only: bool = False,
    **options: Any,
) -> nn.Module:
    """Return a transformers model with its weights and, on them, the deltas in `folder`.

    Args:
        folder: what `save_pretrained` of a model with deltas wrote, a checkpoint of Trainer, or a
            folder of deltas; or "user/name" on the hub.
        backbone: the folder of the model, or its name on the hub. None: the model in `folder`, or
            else the one that the deltas were trained on, if their folder names it.
        download_backbone: let a model that only the folder of the deltas names come from the hub.
            False: take it from this machine. A `backbone` that is given may always come from there.
        check_backbone: raise if the weights under the deltas differ from the weights that they were
            trained on. A few values of each weight are compared.
        local_files_only: use only files that were downloaded from the hub before.
        options: options of the model's own `from_pretrained`, such as `dtype` and `device_map`.

    Raises:
        OptionError: `backbone` is a model instead of its name.
        DeltaLoadError: the folder is damaged, does not say what its backbone is, the backbone is
            not to be had, or the deltas do not fit.

    Example:
        >>> import tempfile, transformers, opendelta
        >>> sizes = dict(n_embd=8, n_head=2, n_layer=1, vocab_size=9, n_positions=9)
        >>> model = transformers.GPT2Model(transformers.GPT2Config(**sizes))
        >>> lora = opendelta.LoraModel(model)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save_pretrained(folder)
        ...     again = opendelta.from_pretrained(folder)
        >>> opendelta.composition(again).names
        ['lora']
    """
    if not isinstance(backbone, str | os.PathLike | None):
        raise OptionError(
            f"backbone={shown(type(backbone).__name__)} must be a folder or a name on the hub; for "
            "a model that is loaded: opendelta.load(folder, model)"
        )
    path = hub.folder_of(folder, local_files_only)
    facts = _facts_of(path)
    asked = backbone is not None or download_backbone
    beside = backbone is None and has_model(path)
    if beside:
        check_beside(path)
    if backbone is None:
        backbone = path.parent if beside else facts.get("backbone_path")
    if not backbone:
        raise DeltaLoadError(
            f"{folder} does not say what model its deltas are for"
            + f" (a {facts['backbone_class']})" * bool(facts.get("backbone_class"))
            + ": give it, as in from_pretrained(folder, backbone='user/name')"
        )
    options["local_files_only"] = local_files_only or not asked
    model = _built(str(backbone), facts, asked, beside, options)
    load(path, model, check_backbone=check_backbone)
    return model.eval()


def _facts_of(path: Path) -> dict[str, Any]:
    """Return the JSON of a folder of ours; {} for another library's."""
    if interop.reader_of(path) is not None:
        return {}
    with opened(path, nn.Module()) as source:
        return source.facts


def _built(
    name: str, facts: dict[str, Any], asked: bool, beside: bool, options: dict[str, Any]
) -> nn.Module:
    try:
        import transformers
    except ModuleNotFoundError:
        raise DeltaLoadError(
            "from_pretrained makes models of transformers, which is not installed; for another "
            "model: opendelta.load(folder, model)"
        ) from None
    try:
        config = transformers.AutoConfig.from_pretrained(
            name, local_files_only=options["local_files_only"]
        )
        cls = _class_of(transformers, facts.get("backbone_class"), config)
        if beside:
            _check_whole(name, cls.__name__, config.architectures)
        if labels := facts.get("backbone_labels"):
            of_labels = {name: number for number, name in enumerate(labels)}
            options = {"id2label": dict(enumerate(labels)), "label2id": of_labels, **options}
        return cls.from_pretrained(name, **options)
    except OSError as error:
        hint = "" if asked else "; to download it, pass download_backbone=True"
        raise DeltaLoadError(
            f"the backbone {name!r} cannot be loaded from this machine{hint}: {reason(error)}"
        ) from None


def _check_whole(name: str, wanted: str, found: list[str] | None) -> None:
    """Raise if the model beside deltas is not the one that they are on, but a part of it."""
    if found and wanted not in found:
        raise DeltaLoadError(
            f"{name} holds a {' or '.join(found)}, and the deltas are on a {wanted}: what that has "
            f"more is in no file. Save the whole {wanted}, or name a model: pass backbone="
        )


def _class_of(transformers: Any, wanted: str | None, config: Any) -> Any:
    """Return the class that the deltas were saved from; if unknown, the one in the config."""
    names = (wanted,) if wanted else (config.architectures or ())
    for name in names:
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    raise DeltaLoadError(
        f"the deltas are for a {' or '.join(names) or config.model_type}, which is no class of "
        "transformers: make the model, and call opendelta.load(folder, model)"
    )
