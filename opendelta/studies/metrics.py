"""Batches and the metrics of a model's outputs on them, with errors that name the batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .._backbone.backbone import check_inputs
from .._backbone.inputs import of_samples
from .._modules.calls import every
from ..errors import OptionError, reason, shown

Metric = Callable[[Any, Any], Any] | str
LOSS = "loss"


def check(metric: Any, batches: Any) -> str:
    """Return the name of a metric for people.

    Raises:
        OptionError: it is neither "loss" nor a function; or `batches` is one batch, or no batches.
    """
    if metric != LOSS and not callable(metric):
        raise OptionError(
            f"metric={shown(metric)} must be a function metric(outputs, batch) that returns a "
            f'number, or "{LOSS}" for a model that returns one'
        )
    if isinstance(batches, Mapping | Tensor):
        raise OptionError(
            f"batches must be several batches, not one {type(batches).__name__}: pass a list, such "
            "as [batch]"
        )
    if isinstance(batches, str | bytes) or not isinstance(batches, Iterable):
        raise OptionError(f"batches={shown(batches)} must be a list of batches, or a DataLoader")
    return metric if metric == LOSS else getattr(metric, "__name__", type(metric).__name__)


def each(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield each batch.

    Raises:
        OptionError: there are none.
    """
    found = False
    for batch in batches:
        found = True
        yield batch
    if not found:
        raise OptionError(
            "batches is empty, as a generator is that was read before: pass a list of batches"
        )


@contextlib.contextmanager
def unchanged(batch: Any, where: str) -> Iterator[None]:
    """Raise if a tensor of the batch is written into: later runs would get other inputs.

    Raises:
        OptionError: the metric or the model writes into the batch.
    """
    tensors = [tensor for tensor in every(Tensor, batch) if not tensor.is_inference()]
    versions = [tensor._version for tensor in tensors]
    yield
    if versions != [tensor._version for tensor in tensors]:
        raise OptionError(
            f"the metric, or the model, wrote into the tensors of {where}, so that the next run "
            "would get other inputs: let it work on a copy"
        )


def rows_in(batch: Any) -> int:
    """Return the number of rows: the size of axis 0 of the first tensor that has axes, or 1."""
    return next((tensor.size(0) for tensor in every(Tensor, batch) if tensor.ndim), 1)


def run(model: nn.Module, batch: Any) -> Any:
    """Return the outputs of a model on a batch: its arguments by name, by position, or one tensor.

    Raises:
        OptionError: the batch is no arguments.
    """
    check_inputs("batch", batch)
    args, kwargs = of_samples(batch)
    return model(*args, **kwargs)


def measure(metric: Metric, outputs: Any, batch: Any, where: str) -> float:
    """Return the metric of a model's outputs on a batch.

    Args:
        where: the batch and the deltas that act, for messages.

    Raises:
        OptionError: the metric is no finite number.
    """
    if callable(metric):
        value, source = metric(outputs, batch), "metric(outputs, batch)"
    else:
        value, source = _loss_of(outputs, where), "the loss"
    sizes = tuple(getattr(value, "shape", ()))
    wrong = f"{source} gave {shown(value)} for {where}: it must be one finite number"
    if math.prod(sizes) != 1:
        raise OptionError(
            f"{source} gave a {type(value).__name__} {list(sizes)} for {where}: it must be one "
            "number, such as a mean"
        )
    if isinstance(value, str | bytes | None):
        raise OptionError(wrong)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{wrong} ({reason(error)})") from None
    if not math.isfinite(number):
        raise OptionError(wrong)
    return number


def _loss_of(outputs: Any, where: str) -> Any:
    own = outputs.get(LOSS) if isinstance(outputs, Mapping) else getattr(outputs, LOSS, None)
    if own is None and isinstance(outputs, Tensor) and outputs.ndim == 0:
        own = outputs
    if own is None:
        raise OptionError(
            f'metric="{LOSS}": the model returned a {type(outputs).__name__} without a loss for '
            f"{where}: put labels into the batches, or pass a function metric(outputs, batch)"
        )
    return own
