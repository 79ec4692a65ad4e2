"""Options of OpenDelta 0.3 that are none here: accepted where nothing changes, else refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DeltaLoadError, OptionError, UnusedWarning, listed, nearest, shown, warn


@dataclass(frozen=True)
class Former:
    """An option of OpenDelta 0.3.

    Attributes:
        as_here: the values that ask for what happens here.
        instead: what to do in the place of other values.
        methods: the methods that had the option; empty: all.
    """

    as_here: tuple[Any, ...]
    instead: str
    methods: tuple[str, ...] = ()


FORMER = {
    "backend": Former(
        ("hf", None),
        "only 'hf' is known, a plain model, which FSDP2 or DeepSpeed ZeRO may shard; no BMTrain",
    ),
    "default_exclude_modules": Former((None, ["lm_head"]), "use exclude_modules"),
    "bottleneck_dim": Former(
        (None, 32), "OpenDelta 0.3 did not heed it either; use reduction_factor", ("compacter",)
    ),
    "sequential": Former(
        (True, None),
        "ParallelAdapterModel is the adapter beside a module",
        ("adapter", "compacter", "low_rank_adapter"),
    ),
}


def of(delta_type: str) -> list[str]:
    """Return the former options of a method that are no options here."""
    return [n for n, old in FORMER.items() if not old.methods or delta_type in old.methods]


def replaced(delta_type: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` without former ones.

    Raises:
        OptionError: a former option asks for what is not here.
    """
    names = of(delta_type)
    for name in options.keys() & {*names}:
        old = FORMER[name]
        if options[name] not in old.as_here:
            raise OptionError(f"{delta_type!r}: {name}={shown(options[name])}: {old.instead}")
    return {name: value for name, value in options.items() if name not in names}


def by_position(names: list[str], given: Sequence[Any]) -> list[str]:
    """Return the options by position, with "backend" where it is given: behind the common options.

    Args:
        given: the values by position.
    """
    place = names.index("interactive_modify") + 1 if "interactive_modify" in names else len(names)
    is_backend = any(value is None or isinstance(value, str) for value in given[place : place + 1])
    return [*names[:place], *["backend"] * is_backend, *names[place:]]


def check_former(delta_type: str, names: Iterable[str], values: Iterable[Any]) -> None:
    """Raise unless these former options of a method ask for what happens here."""
    replaced(delta_type, dict(zip(names, values, strict=True)))


def check_checkpoint(verb: str, given: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise unless OpenDelta 0.3's arguments of a checkpoint ask for what happens here.

    Args:
        given: {argument: (its value, the value that does)}.
    """
    for name, (value, as_here) in given.items():
        if value is not None and value is not as_here:
            raise OptionError(
                f"{verb}({name}={shown(value)}): a delta writes and reads files of its own, for "
                "its own backbone: leave it out"
            )


def check_state(source: str, state: Mapping[str, Any]) -> None:
    """Raise if a state dict is that of a delta of OpenDelta 0.3, which lacks names of modules.

    Raises:
        DeltaLoadError: it is.
    """
    if number := next((key for key in state if key.startswith("delta_modules.")), None):
        raise DeltaLoadError(
            f"{source}: OpenDelta 0.3 numbered the layers of a delta, as in {number!r}, so which "
            "modules they are for is not known: in 0.3 save the delta by save_finetuned, or "
            "model.state_dict(), which both load here"
        )


def check_loading(given: Mapping[str, Any]) -> None:
    """Raise for arguments that OpenDelta 0.3's `from_finetuned` had, and for unknown ones.

    Raises:
        OptionError: an argument is unknown, or asks for what is not here.
    """
    for name, value in given.items():
        if name != "state_dict":
            raise OptionError(
                f"from_finetuned has no argument {name!r}; it loads the options that were saved"
            )
        if value is not None:
            raise OptionError(
                "from_finetuned(state_dict=...): load the folder, then give these tensors to "
                "delta.load_state_dict(state, strict=False)"
            )


# Arguments of 0.3's save_finetuned, in its order: {name: values that ask for what happens here}.
SAVING = {"save_config": (True,), "state_dict": (None,), "save_function": (None, torch.save)}
FOR_DELTACENTER = (
    "push_to_dc", "center_args", "center_args_pool", "list_tags", "dict_tags", "delay_push",
    "test_result", "usage",
)  # fmt: skip


def check_saving(by_position: Sequence[Any], by_name: Mapping[str, Any]) -> str:
    """Check arguments that OpenDelta 0.3's `save_finetuned` had.

    Args:
        by_position: those after the folder.

    Returns:
        A text that says why the delta cannot be sent to DeltaCenter if that is asked for, else "".

    Warns:
        UnusedWarning: there are others for DeltaCenter.

    Raises:
        OptionError: an argument is unknown, or asks for what is not here.
    """
    names = [*SAVING, *FOR_DELTACENTER]
    if len(by_position) > len(names):
        raise OptionError(f"save_finetuned takes a folder and {len(names)} others by position")
    given = {**dict(zip(names, by_position, strict=False)), **by_name}
    for name, value in given.items():
        if name not in names:
            near = nearest(name, ["finetuned_delta_path", "push_to_hub", *SAVING])
            raise OptionError(
                f"save_finetuned has no argument {name!r}"
                + (f"; nearest: {', '.join(near)}" if near else "")
            )
        if name in SAVING and value not in SAVING[name]:
            raise OptionError(
                f"save_finetuned({name}={shown(value)}): a delta saves its own tensors and options "
                "as safetensors and JSON; for anything else use delta.state_dict()"
            )
    gone = "DeltaCenter is closed: use push_to_hub='user/name'"
    if given.get("push_to_dc"):
        return f"push_to_dc=True: {gone}"
    if unused := [name for name in given if name in FOR_DELTACENTER and given[name]]:
        warn(f"save_finetuned ignores {listed(unused, most=9)}: {gone}", UnusedWarning)
    return ""
