"""Make the transformers model that MODEL names, on the meta device or with its weights."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .._files.reading import parsed, readable
from ..errors import DeltaError, nearest, reason

NO_MODEL = re.compile(r"^Auto|Config|Tokenizer|Process|Extractor|Output|Pipeline|Onnx|_|^[a-z]")
MOST_MODULES = 500_000  # the largest model, Switch-C of 2,048 experts, has 307,845
# {ends of the keys in a config that count things: far more than any model has of them}
MOST_OF = {
    re.compile(r"(layers?|depths?|blocks?|stages?)$"): 2_000,
    re.compile(r"(experts?|groups?|codebooks?|quantizers?|repeats?)$"): 20_000,
    re.compile(r"(labels|classes)$"): 1_000_000,
}
HUB_NAME = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")


def without_weights(model: str, class_name: str | None = None, saved_from: str = "") -> nn.Module:
    """Return MODEL on the meta device.

    Args:
        class_name: its class. None: `saved_from`, else the class in the config, else AutoModel.
        saved_from: the class that a checkpoint was saved from.

    Raises:
        DeltaError: there is no such model, or no such class.
    """
    config = _config(model)
    cls = _class_of(config, class_name, saved_from)
    try:
        with torch.device("meta"), _no_more_than(MOST_MODULES):
            if cls is None:
                return _transformers().AutoModel.from_config(config, trust_remote_code=False)
            return cls._from_config(config)
    except Exception as error:  # whatever a config makes a model raise
        raise DeltaError(f"no model can be made of {model!r}: {reason(error)}") from None


@contextlib.contextmanager
def _no_more_than(most: int) -> Iterator[None]:
    """Let a config ask for so many modules, and not for memory without end."""
    count = itertools.count(1)

    def counted(module: nn.Module, name: str, child: nn.Module | None) -> None:
        if next(count) > most:
            raise DeltaError(f"its config asks for more than {most:,} modules")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def with_weights(model: str, class_name: str | None = None, saved_from: str = "") -> nn.Module:
    """Return MODEL with its weights, in evaluation mode; arguments as for `without_weights`.

    Raises:
        DeltaError: there is no such model, it has no weights, or there is no such class.
    """
    if is_config(model):
        raise DeltaError(f"{model} is a config, and the weights are needed: give the folder")
    cls = _class_of(_config(model), class_name, saved_from) or _transformers().AutoModel
    try:
        return cls.from_pretrained(model, trust_remote_code=False).eval()
    except Exception as error:  # whatever stands in a file of weights
        raise DeltaError(f"the weights of {model!r} cannot be read: {reason(error)}") from None


def is_config(model: str) -> bool:
    """True if MODEL is a file, which has no weights."""
    with readable(Path(model)):
        return Path(model).is_file()


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError:
        raise DeltaError(
            "a MODEL needs transformers; install with: pip install transformers"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _config(model: str) -> Any:
    path = Path(model)
    with readable(path):
        is_folder, there = path.is_dir(), path.exists()
    if is_folder and not (path / "config.json").exists():
        raise DeltaError(f"{model} has no config.json, so it is no folder of a model")
    if there:
        _check_json(path / "config.json" if is_folder else path)
    elif not HUB_NAME.fullmatch(model):
        raise DeltaError(f"no model {model!r}: there is no such folder or file")
    try:
        _check_counts(_transformers().PreTrainedConfig.get_config_dict(model)[0])
        return _transformers().AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # whatever stands in a config
        what = "" if there else "there is no such folder or file here, and the hub says: "
        raise DeltaError(f"no model {model!r}: {what}{reason(error)}") from None


def _check_json(path: Path) -> None:
    given = parsed(path)
    if not isinstance(given, dict) or "model_type" not in given:
        raise DeltaError(f"{path} is no config of a transformers model: it has no model_type")


def _check_counts(config: Any, name: str = "") -> None:
    """Raise for a number in a config that would take time and memory without end."""
    if isinstance(config, dict):
        for key in config.keys() - {"label2id"}:  # its keys are a user's labels
            _check_counts(config[key], f"{name}.{key}" if name else str(key))
        return
    most = next((most for ends, most in MOST_OF.items() if ends.search(name)), math.inf)
    for count in config if isinstance(config, list) else [config]:
        if isinstance(count, int) and count > most:
            raise DeltaError(f"its config has {name}={count:,}, and no model has over {most:,}")


def _class_of(config: Any, class_name: str | None, saved_from: str) -> Any:
    """Return the class to make; None: let AutoModel choose."""
    transformers = _transformers()
    if class_name is not None:
        cls = getattr(transformers, class_name, None)
        if not isinstance(cls, type) or not hasattr(cls, "from_pretrained"):
            raise _no_model(class_name, "transformers has no such model")
        if not issubclass(cls, transformers.PreTrainedModel):
            raise _no_model(class_name, "it is a class of transformers, but of no model")
        return cls
    for name in (saved_from, *(config.architectures or ())):
        cls = getattr(transformers, str(name), None)
        if getattr(cls, "config_class", None) is type(config):
            return cls
    return None


def _no_model(class_name: str, what: str) -> DeltaError:
    """Return the error that a `--class` is none, with the nearest names of models."""
    alike = [name for name in dir(_transformers()) if name[:4] == class_name[:4]]
    near = nearest(class_name, [name for name in alike if not NO_MODEL.search(name)])
    hint = f"; nearest: {', '.join(near)}" if near else "; give one such as BertForMaskedLM"
    return DeltaError(f"--class {class_name!r}: {what}{hint}")
