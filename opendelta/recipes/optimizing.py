"""Parameter groups for optimizers: a learning rate of its own for each delta, and LoRA+."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .._handles.composition import Composition
from .._handles.delta import Delta
from ..errors import OptionError, nearest

BACKBONE, RATIO = "backbone", "lora_plus_ratio"
Groups = list[dict[str, Any]]


def optimizer_groups(
    model: nn.Module,
    options: Mapping[Any, Mapping[str, Any]] | None = None,
    **by_name: Mapping[str, Any],
) -> Groups:
    """Return a group of parameters for each delta and one for what else trains, for an optimizer.

    Each group has the options that are given for it, and the optimizer's own where none are:
    `AdamW(optimizer_groups(model, lora={"lr": 2e-4, "weight_decay": 0.1}), lr=1e-4)`. The `lr` of
    a delta alone has another default, the `default_learning_rate` of its method, which was measured
    on the tasks of `opendelta demo`: docs/reference/learning_rates.md. So the optimizer's own `lr`,
    1e-3 for AdamW, is that of what trains beside the deltas: a head that no delta owns, for
    instance. Each parameter that trains is in one group. A group has the key `name` too.

    Args:
        options: {a delta or its name: options of its group, such as `lr` and `weight_decay`}; the
            name "backbone" is for what trains beside the deltas. For LoRAs there is one more
            option, `lora_plus_ratio`: B gets a group of its own, whose learning rate is so many
            times that of A. 16 is the paper's value. arXiv:2402.12354.
        by_name: the same, as keyword arguments.

    Raises:
        OptionError: a name is of no delta on the model, or `lora_plus_ratio` is given without `lr`,
            for another method, or for a LoRA whose A does not train.

    Example:
        >>> import torch, opendelta
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> lora = opendelta.LoraModel(model, modified_modules=["0"], lora_r=2)
        >>> lora.freeze_module()
        >>> groups = opendelta.optimizer_groups(model, lora={"lr": 1e-4, "lora_plus_ratio": 16})
        >>> [(group["name"], group["lr"], len(group["params"])) for group in groups]
        [('lora', 0.0001, 1), ('lora.B', 0.0016, 1)]
        >>> opendelta.optimizer_groups(model)[0]["lr"] == opendelta.LoraModel.default_learning_rate
        True
    """
    all_of = Composition(model)
    deltas = {delta.name: delta for delta in all_of}
    given = {n if isinstance(n, str) else all_of[n].name: o for n, o in (options or {}).items()}
    given |= by_name
    for name in given.keys() - {*deltas, BACKBONE}:
        near = nearest(name, [*deltas, BACKBONE])
        raise OptionError(
            f"optimizer_groups: no delta {name!r} is on this {type(model).__name__}; there are: "
            f"{', '.join(near or deltas) or 'none'}"
        )
    groups: Groups = []
    seen: set[int] = set()
    for name, delta in deltas.items():
        groups += _of_delta(delta, dict(given.get(name, {})), seen)
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in seen]
    groups.append({"params": others, "name": BACKBONE, **given.get(BACKBONE, {})})
    return [group for group in groups if group["params"]]


def _of_delta(delta: Delta, options: dict[str, Any], seen: set[int]) -> Groups:
    """Return the groups of a delta's parameters that train and are not in `seen`, and add them."""
    ratio = options.pop(RATIO, None)
    own = {n: p for n, p in delta.named_parameters() if p.requires_grad and id(p) not in seen}
    seen |= set(map(id, own.values()))
    if ratio is None:
        options = {"lr": delta.default_learning_rate, **options}
        return [{"params": list(own.values()), "name": delta.name, **options}]
    up = {name: p for name, p in own.items() if name.endswith(".lora_B")}
    down = {name: p for name, p in own.items() if name.endswith(".lora_A")}
    if delta.delta_type != "lora" or not (up and down):
        raise OptionError(
            f"{RATIO} is for LoRAs whose A and B train, not for {delta.name!r} ({delta.delta_type})"
        )
    if "lr" not in options or not isinstance(ratio, int | float) or not ratio > 0:
        raise OptionError(
            f"{delta.name!r}: {RATIO}={ratio!r} must be a number above 0, beside an lr"
        )
    rest = [p for name, p in own.items() if name not in up]
    fast = {**options, "lr": options["lr"] * ratio}
    return [
        {"params": rest, "name": delta.name, **options},
        {"params": list(up.values()), "name": f"{delta.name}.B", **fast},
    ]
