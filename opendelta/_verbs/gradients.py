"""Take the gradients of a whole forward, and find the parameters that get none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .._backbone.backbone import Backbone
from .._modules.calls import every, items_of
from .._modules.tensors import is_sharded


def no_backward(backbone: Backbone) -> str | None:
    """Return why no gradients of the model's parameters can be computed; None: they can."""
    own = list(backbone.model.parameters())
    if any(is_sharded(p) or type(p).__name__ == "FlatParameter" for p in own):
        return "the parameters are sharded, and a backward would leave its own behind"
    if not backbone.is_meta and any(p.is_meta and p.requires_grad for p in own):
        return "trainable parameters are offloaded"
    return None


def missing(output: Any, trainable: dict[str, nn.Parameter]) -> tuple[list[str], str | None]:
    """Return the trainable parameters without gradient, and why they are not known, or None."""
    loss = (items_of(output) or {}).get("loss")
    tensors = [loss] if isinstance(loss, Tensor) else list(every(Tensor, output, objects=True))
    if not tensors:
        return [], f"gradients: no tensor is in the output, a {type(output).__name__}"
    ends = [t for t in tensors if t.requires_grad and t.is_floating_point()]
    if not ends or not trainable:
        return list(trainable), None
    total = torch.stack([t.float().sum().to(ends[0].device) for t in ends]).sum()
    if _recomputes(total):
        return [], "gradients: reentrant checkpointing; use use_reentrant=False"
    try:
        # backward() would write into .grad, and let optimizers step that are hooked there.
        grads = torch.autograd.grad(total, list(trainable.values()), allow_unused=True)
    except RuntimeError as error:
        failed = (
            "failed on shapes; give check a batch" if isinstance(total, FakeTensor) else "failed"
        )
        return [], f"gradients: the backward {failed}: {str(error).strip().splitlines()[0]}"
    return [name for name, grad in zip(trainable, grads, strict=True) if grad is None], None


def not_finite(output: Any) -> list[str]:
    """Return the losses in an output that are infinite or no number, such as "loss = nan".

    A single number is a loss, alone or before other outputs. A loss may have a value per sample.
    """
    if isinstance(output, Tensor | tuple | list):
        first = output if isinstance(output, Tensor) else next(iter(output), None)
        items = {"loss": first} if isinstance(first, Tensor) and first.ndim == 0 else {}
    else:
        items = {n: value for n, value in (items_of(output) or {}).items() if "loss" in str(n)}
    found = []
    for name, loss in items.items():
        if isinstance(loss, Tensor) and not loss.is_meta:
            wrong = loss.detach()[~loss.detach().isfinite()]
            some = f" in {len(wrong)} of {loss.numel()} values" if loss.numel() > 1 else ""
            found += [f"{name} = {wrong[0].item()}{some}"] if len(wrong) else []
    return found


def _recomputes(end: Tensor) -> bool:
    """True if reentrant checkpointing hides a part of the graph from `torch.autograd.grad`."""
    todo: list[Any] = [end.grad_fn]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith("CheckpointFunction"):
            return True
        todo += [before for before, _ in node.next_functions]
    return False
