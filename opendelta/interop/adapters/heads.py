"""Translate the prediction head that the adapters library saves beside an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..._backbone.backbone import Backbone
from ..._layers import labels
from ..._modules.tensors import stored
from ...errors import DeltaLoadError, UnsavedWarning, shown, warn
from ...names import ancestors
from .._draft import has_values
from .._files import read_json
from .terms import Part

CONFIG, WEIGHTS, PICKLE = "head_config.json", "model_head.safetensors", "pytorch_model_head.bin"
ONE = {"layers": 1}
TWO = {"layers": 2, "activation_function": "tanh", "use_pooler": False}
# {class of the model: [(fields that the head's config must have, our linear layers in order)]}
HEADS: dict[str, list[tuple[dict[str, Any], list[str]]]] = {
    "BertForSequenceClassification": [
        ({"head_type": "classification", **TWO}, ["bert.pooler.dense", "classifier"]),
        ({"head_type": "classification", **ONE, "use_pooler": True}, ["classifier"]),
    ],
    "RobertaForSequenceClassification": [
        ({"head_type": "classification", **TWO}, ["classifier.dense", "classifier.out_proj"]),
    ],
    **{
        f"{family}For{task}": [({"head_type": kind, **ONE}, [name])]
        for family in ("Bert", "Roberta")
        for task, kind, name in (
            ("TokenClassification", "tagging", "classifier"),
            ("QuestionAnswering", "question_answering", "qa_outputs"),
        )
    },
}
PLACES = (1, 4)  # indices of a head's linear layers among its dropouts and activations


def add(part: Part, given: dict[str, Tensor]) -> None:
    """Let the delta of `part` own the modules that the tensors of a saved head belong to.

    A head that is none of the backbone's modules is left out with a warning.

    Args:
        given: the head's tensors by the library's names.
    """
    config = read_json(part.folder / CONFIG)
    named = _named(part.backbone, config, given)
    own = {name: _tensor(part.backbone, name) for name in named}
    owners = {name: _owner(part.backbone, name) for name in named}
    if not named or None in own.values() or None in owners.values():
        form = config.get("config")
        kind = form.get("head_type") if isinstance(form, dict) else "prediction"
        made_for = shown(config.get("model_class"))
        warn(
            f"{part.folder}: the {shown(kind)} head of a {made_for} that is saved there is "
            f"none of this {type(part.backbone.model).__name__}'s modules, and is left out: "
            f"{shown([*given])}",
            UnsavedWarning,
        )
        return
    if all(has_values(t, named[name]) for name, t in own.items() if t is not None):
        return
    chosen = {*owners.values()}
    part.options["modules_to_save"] = [name for name in part.backbone.modules if name in chosen]
    for name, tensor in named.items():
        owner = str(owners[name])
        part.others[part.key(owner, f"module{name[len(owner) :]}")] = tensor
    part.options["num_labels"] = _count(part, named)


def _count(part: Part, named: dict[str, Tensor]) -> int | None:
    """Return the head's number of labels; None if no layer of it gives one value per label."""
    count = labels.count_of(part.backbone.model)
    for owner in part.options["modules_to_save"]:
        inside = labels.head_of(part.backbone.modules[owner], count)
        if inside is not None:
            weight = named.get(".".join(filter(None, (owner, inside, "weight"))))
            return count if weight is None else weight.size(0)
    return None


def _named(
    backbone: Backbone, config: dict[str, Any], given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the head's tensors by the backbone's names; {} if the backbone has no such head."""
    form = config.get("config")
    if form is None:  # a transformers model's own head
        return given
    heads = HEADS.get(type(backbone.model).__name__, []) if isinstance(form, dict) else []
    for wanted, layers in heads:
        if all(form.get(option) == value for option, value in wanted.items()):
            starts = {
                f"heads.{config.get('name')}.{place}.": f"{layer}."
                for place, layer in zip(PLACES, layers, strict=False)
            }
            return {_renamed(key, starts): tensor for key, tensor in given.items()}
    return {}


def _renamed(key: str, starts: dict[str, str]) -> str:
    start = next((start for start in starts if key.startswith(start)), "")
    return starts.get(start, "") + key.removeprefix(start)


def _tensor(backbone: Backbone, name: str) -> Tensor | None:
    """Return the backbone's own tensor with this full name, or None."""
    where, _, last = name.rpartition(".")
    module = backbone.modules.get(where)
    return None if module is None else stored(module, last)


def _owner(backbone: Backbone, name: str) -> str | None:
    """Return the outermost module around the tensor `name` that is not the base model, or None."""
    base = getattr(backbone.model, "base_model_prefix", "")
    around = [n for n in ancestors(name) if n in backbone.modules and n != base]
    return around[-1] if around else None


def read(folder: Path) -> Path | None:
    """Return the file with the weights of a head; None if no head was saved.

    Raises:
        DeltaLoadError: the folder has the head's config, but not its weights.
    """
    if not (folder / CONFIG).is_file():
        return None
    for name in (WEIGHTS, PICKLE):
        if (folder / name).is_file():
            return folder / name
    raise DeltaLoadError(f"{folder}: {CONFIG} is there, but neither {WEIGHTS} nor {PICKLE}")
