"""Run a model that no table knows on a few tokens, to see what it makes of them.

The run changes nothing of the model. Where it fails, nothing is known.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._modules.calls import every
from .._modules.devices import device_and_dtype
from .._modules.faking import Restoring
from .._modules.process import eager, kept_random
from .._modules.tensors import is_sharded, lasting
from .._modules.trials import at_rest

ROWS, LENGTH = 2, 6
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # 16 bits: 5e-2


def is_own(module: nn.Module) -> bool:
    """True if a module's forward is not one of transformers', which the tables know."""
    forward: Any = getattr(type(module), "forward", None)  # TorchScript's class has none
    forward = inspect.unwrap(forward)
    return not (getattr(forward, "__module__", None) or "").startswith("transformers")


def embeds(module: nn.Module, name: str, scale: float) -> bool | None:
    """True if a module computes the same of token ids and of their embeddings by its child `name`.

    None: it does not run on ids alone, or on embeddings alone.

    Args:
        scale: the factor of the embeddings that the module applies to ids alone.
    """

    def runs(made: nn.Module, ids: Tensor) -> Iterator[dict[str, Any]]:
        yield {"input_ids": ids}
        yield {"inputs_embeds": made.get_submodule(name)(ids) * scale}

    of_ids, of_embeddings = _outputs(module, runs) or (None, None)
    if not of_ids or not of_embeddings or len(of_ids) != len(of_embeddings):
        return None
    return all(map(_near, of_ids, of_embeddings))


def sees_no_later(module: nn.Module) -> bool:
    """True if each token of a module's output depends on earlier tokens, and on no later ones."""

    def runs(made: nn.Module, ids: Tensor) -> Iterator[dict[str, Any]]:
        for place in (-1, 0, None):
            other = ids.clone()
            if place is not None:
                other[:, place] += 1
            yield {"input_ids": other}

    found = _outputs(module, runs)
    if not found:
        return False
    pairs = [three for three in zip(*found, strict=False) if three[0].shape[:2] == (ROWS, LENGTH)]
    return (
        bool(pairs)
        and all(_near(last[:, :-1], plain[:, :-1]) for last, _, plain in pairs)
        and any(not _near(first[:, -1], plain[:, -1]) for _, first, plain in pairs)
    )


Runs = Callable[[nn.Module, Tensor], Iterator[dict[str, Any]]]


@lasting()
@torch.no_grad()
def _outputs(module: nn.Module, runs: Runs) -> list[list[Tensor]]:
    """Return the floating tensors of each run's output; []: one failed."""
    if any(p.is_meta or is_sharded(p) for p in module.parameters()):
        return []
    tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    padding = {getattr(getattr(module, "config", None), "pad_token_id", None)}
    padding |= {table.padding_idx for table in tables}
    device, _ = device_and_dtype([module])
    # The largest table may be one of positions, or of another vocabulary.
    for size in sorted({table.num_embeddings for table in tables}, reverse=True):
        with eager(), kept_random(), Restoring():
            torch.manual_seed(0)
            try:
                chosen = [i for i in torch.randperm(size - 1).tolist() if not {i, i + 1} & padding]
                ids = torch.tensor((chosen * LENGTH)[: ROWS * LENGTH], device=device)
                return _run(module, ids.view(ROWS, LENGTH), runs)
            except Exception:  # whatever a forward of somebody's own raises on such an input
                continue
    return []


def _run(module: nn.Module, ids: Tensor, runs: Runs) -> list[list[Tensor]]:
    made = at_rest(module)
    forward = type(made).forward
    mask = inspect.signature(forward).parameters.get("attention_mask")
    more = {"attention_mask": torch.ones_like(ids)} if mask and mask.default is mask.empty else {}
    todo, outputs = runs(made, ids), []
    with drawing_alike(made) as again:
        while again() and (given := next(todo, None)) is not None:
            outputs.append(forward(made, **{**more, **given}))
    return [
        [t for t in every(Tensor, out, objects=True) if t.is_floating_point() and t.ndim > 1]
        for out in outputs
    ]


@contextlib.contextmanager
def drawing_alike(made: nn.Module) -> Iterator[Callable[[], bool]]:
    """Yield a function after which the same random numbers are drawn as after its last call.

    Inside `kept_random`. It returns true. A generator that a module holds is left as it was.
    """
    held = [g for part in made.modules() for g in vars(part).values() if _is_generator(g)]
    states = [generator.get_state() for generator in held]

    def again() -> bool:
        torch.manual_seed(0)
        random.seed(0)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(0)
        for generator, state in zip(held, states, strict=True):
            generator.set_state(state)
        return True

    try:
        yield again
    finally:
        again()


def _is_generator(value: Any) -> bool:
    return isinstance(value, torch.Generator)


def _near(one: Tensor, other: Tensor) -> bool:
    most = TOLERANCE.get(one.dtype, 5e-2)
    return one.shape == other.shape and bool(
        (one.float() - other.float()).norm() <= most * other.float().norm()
    )
