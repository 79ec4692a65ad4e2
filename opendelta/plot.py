"""Pictures of deltas, by matplotlib; imported by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ._handles.delta import Delta
from ._handles.watching import Watched
from .errors import OptionError


def weights(
    seen: Watched, block: str | Delta | None = None, mask: Tensor | None = None, ax: Any = None
) -> Any:
    """Draw the mean weight of each delta of a block on each module; return matplotlib's axes.

    Args:
        seen: what `opendelta.watching` yields.
        block: the name of the block, or its handle. None: the only one.
        mask: [batch, length]: 0 or False for padding, which does not count. Rows of `route` that do
            not take the block do not count either.
        ax: the axes to draw on. None: new ones.

    Raises:
        OptionError: matplotlib is not installed, there are several blocks and none is named, or the
            mask is for other positions.
    """
    if block is None:
        if len(seen) != 1:
            raise OptionError(f"weights(block=...): name one of {list(seen)}")
        block = next(iter(seen))
    found = seen.counted(block, mask)
    rows = [each.weights.detach().float().mean(0).cpu().tolist() for each in found.values()]
    name = block.name if isinstance(block, Delta) else block
    return heat_map(rows, list(found), seen.names(block), f"mean weights of {name!r}", ax=ax)


def heat_map(
    values: Sequence[Sequence[float | None]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    *,
    signed: bool = False,
    ax: Any = None,
) -> Any:
    """Draw a table of numbers in colours; return matplotlib's axes.

    Args:
        values: the numbers of each row; None: a blank.
        rows, columns: their names.
        signed: the numbers are below and above 0, which gets the middle colour. Else 0 gets the
            darkest.
        ax: the axes to draw on. None: new ones.

    Raises:
        OptionError: matplotlib is not installed.
    """
    drawn = [[math.nan if value is None else value for value in row] for row in values]
    most = max((abs(value) for row in drawn for value in row if value == value), default=0.0)
    limits = {"vmin": -most, "vmax": most, "cmap": "RdBu_r"} if signed else {"vmin": 0}
    size = 2 + 0.8 * len(columns), 1.5 + 0.25 * len(rows)
    ax = _axes(size) if ax is None else ax
    ax.set_facecolor("lightgrey")  # of blanks
    image = ax.imshow(drawn, aspect="auto", **{"cmap": "viridis", **limits})
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    ax.set_yticks(range(len(rows)), rows, fontsize="small")
    ax.set_title(title)
    ax.figure.colorbar(image, ax=ax)
    return ax


def scores(report: Any, ax: Any = None) -> Any:
    """Draw the scores of a comparison against the number of parameters; return matplotlib's axes.

    Args:
        report: what `opendelta.compare` returns.
        ax: the axes to draw on. None: new ones.

    Raises:
        OptionError: matplotlib is not installed.
    """
    ax = _axes((7, 4.5)) if ax is None else ax
    for row in report.rows:
        ax.errorbar(row.parameters, row.score, yerr=row.spread, fmt="o", capsize=3)
        ax.annotate(
            row.deltas, (row.parameters, row.score), (6, 4), textcoords="offset points", fontsize=9
        )
    if report.baseline is not None:
        ax.axhline(report.baseline, color="gray", linestyle=":", label="largest class")
        ax.legend(loc="lower right")
    ax.set_xscale("log")
    ax.set_xlabel("parameters")
    ax.set_ylabel(report.unit)
    ax.set_title(report.task)
    ax.margins(x=0.2)
    return ax


def losses(report: Any, ax: Any = None) -> Any:
    """Draw the training losses of a comparison, the mean of the seeds; return matplotlib's axes.

    Args:
        report: what `opendelta.compare` returns.
        ax: the axes to draw on. None: new ones.

    Raises:
        OptionError: matplotlib is not installed.
    """
    ax = _axes((7, 4.5)) if ax is None else ax
    for row in report.rows:
        curves = [run.losses for run in report.runs if run.deltas == row.deltas]
        mean = [sum(each) / len(curves) for each in zip(*curves, strict=False)]
        at = [(i + 0.5) / len(mean) for i in range(len(mean))]
        ax.plot(at, _smoothed(mean), label=row.deltas)
    ax.set_xlabel("share of the training")
    ax.set_ylabel("training loss, smoothed")
    ax.set_title(report.task)
    ax.legend()
    return ax


def _smoothed(values: list[float]) -> list[float]:
    """Return the mean of each value and its neighbours, a fifth of the curve in all."""
    reach = max(1, len(values) // 10)
    near = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(each) / len(each) for each in near]


def _axes(size: tuple[float, float]) -> Any:
    """Return new axes of a size in inches."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise OptionError(
            "opendelta.plot needs matplotlib: pip install 'opendelta[plot]'"
        ) from None
    return plt.subplots(figsize=size, layout="constrained")[1]
