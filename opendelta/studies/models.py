"""The model and the tokenizer of a comparison, where they are given by name."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from .._backbone.backbone import Backbone
from .._modules.process import kept_random, seed_all
from ..demo import data, load_backbone
from ..demo.training import quiet_libraries
from ..errors import DeltaError, reason
from .conditions import still
from .tasks import Task, Texts
from .training import placed

MINILM, SMOLLM2 = "MiniLM", "SmolLM2"  # have packages of their own


def for_texts(model: nn.Module | str | os.PathLike, texts: Texts) -> tuple[nn.Module, Task]:
    """Return the model and the task of texts, as token ids.

    Raises:
        DeltaError: one of them cannot be had.
    """
    tokenizer = texts.tokenizer or tokenizer_of(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    task = texts.task(tokenizer)
    if not isinstance(model, nn.Module):
        model = by_name(model, task.labels, tokenizer.pad_token_id)
    if task.labels is None:
        _check_causal(model, task)
    return model, task


def _check_causal(model: nn.Module, task: Task) -> None:
    """Raise if the model sees later tokens: its loss on the next one would mean nothing."""
    batch = placed(task.collate(list(task.test[:1])), model)
    ids = batch["input_ids"]
    other = ids.clone()
    other[:, -1] = ids[:, 0] if (ids[:, -1] != ids[:, 0]).all() else ids[:, -1] - 1
    with still(Backbone.of(model)):
        one, two = (model(**{**batch, "input_ids": each}).logits[:, :-1] for each in (ids, other))
    noise = 50 * torch.finfo(one.dtype).eps * one.abs().max()
    if (one - two).abs().max() > noise:
        raise DeltaError(
            f"{type(model).__name__} sees later tokens, so it cannot learn to continue texts: give "
            "a causal model, or name the column of classes by label= (--label)"
        )


def tokenizer_of(model: nn.Module | str | os.PathLike) -> Any:
    from transformers import AutoTokenizer

    where: Any = model
    if isinstance(model, nn.Module):
        where = getattr(getattr(model, "config", None), "_name_or_path", "")
    options = {}
    if where in (MINILM, SMOLLM2):
        data.check_packages(where)
        where = data.locate(where)
        if where.is_file():
            where, options = where.parent, {"gguf_file": where.name}
    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    except Exception as error:  # whatever stands in its files
        raise DeltaError(
            f"no tokenizer for {str(where) or type(model).__name__!r}: {reason(error)}; in Python, "
            "give Texts(tokenizer=...)"
        ) from None


def by_name(
    name: str | os.PathLike, labels: int | None, pad_token_id: int | None = None
) -> nn.Module:
    """Return a model of transformers, with a new head for so many classes if there are any.

    A new head is always the same.

    Args:
        labels: the number of classes. None: a causal language model.
    """

    if (str(name), labels is None) in ((MINILM, True), (SMOLLM2, False)):
        raise DeltaError(f"{name} is for texts {'with' if labels is None else 'without'} classes")
    with kept_random(), quiet_libraries():
        seed_all()
        try:
            if str(name) == MINILM:
                data.check_packages(MINILM)
                return load_backbone(labels or 0)
            if str(name) == SMOLLM2:
                return smollm2()
            model = _pretrained(name, labels)
        except DeltaError:
            raise
        except Exception as error:  # whatever stands in its files
            raise DeltaError(f"no model {str(name)!r}: {reason(error)}") from None
    if model.config.pad_token_id is None:
        model.config.pad_token_id = pad_token_id
    return model


def _pretrained(name: str | os.PathLike, labels: int | None) -> Any:
    import transformers

    if labels is None:
        return transformers.AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=labels, trust_remote_code=False
    )


def smollm2() -> nn.Module:
    """Return SmolLM2-135M-Instruct in float32; it is unpacked from 4 bits, which takes a while."""
    import transformers

    data.check_packages(SMOLLM2)
    where = data.locate(SMOLLM2)
    return transformers.AutoModelForCausalLM.from_pretrained(
        where.parent,
        gguf_file=where.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
