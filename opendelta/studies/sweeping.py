"""Find the learning rates of a composition: one factor on those of its methods."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from ..errors import DeltaError
from .tasks import Task

SHARE = 10  # a tenth of the examples to learn from measures the trials
FIRST = (1.0, 0.3, 3.0, 0.1, 10.0)


def best_factor(task: Task, trials: int, score: Callable[[float, Task], float]) -> float:
    """Return the best of so many factors, measured on examples that are left out of the learning.

    Args:
        score: trains with a factor on a task, and returns the score on its held-out examples.
    """
    if not trials:
        return 1.0
    count = len(task.train) // SHARE
    if not count:
        raise DeltaError(
            f"sweep needs at least {SHARE} examples to learn from, not {len(task.train)}"
        )
    part = dataclasses.replace(task, train=task.train[count:], test=task.train[:count])
    sign = 1 if task.higher_is_better else -1
    found: dict[float, float] = {}

    def tried(factor: float) -> float:
        value = sign * score(factor, part)
        found[factor] = value if math.isfinite(value) else -math.inf
        return found[factor]

    for factor in FIRST[:trials]:
        tried(factor)
    if trials > len(FIRST):
        _search(tried, found, trials - len(FIRST))
    return max(found, key=lambda factor: found[factor])


def _search(tried: Callable[[float], float], found: dict[float, float], trials: int) -> None:
    """Try more factors: where Optuna thinks best, or without it beside the best one so far."""
    try:
        import optuna
    except ImportError:
        for _ in range(trials):
            best = max(found, key=lambda factor: found[factor])
            at = sorted(found).index(best)
            beside = sorted(found)[max(at - 1, 0) : at] + sorted(found)[at + 1 : at + 2]
            tried(round(math.sqrt(best * max(beside, key=lambda f: found[f])), 6))
        return
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=0)
    )
    space: dict[str, Any] = {"factor": optuna.distributions.FloatDistribution(0.1, 10.0, log=True)}
    lowest = min([v for v in found.values() if math.isfinite(v)], default=0.0)
    for factor, value in found.items():
        study.add_trial(
            optuna.trial.create_trial(
                params={"factor": factor}, distributions=space, value=max(value, lowest)
            )
        )
    for _ in range(trials):
        trial = study.ask(space)
        study.tell(trial, max(tried(round(trial.params["factor"], 6)), lowest))
