"""Join and split full names of modules; the name of the deltas' slot; names of wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterator

SLOT = "deltas"  # the child of a site that holds its delta layers
COMPUTING = "parametrizations"  # the child in which torch has the modules that compute a weight
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a step that is a number, as of a block
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def join(*steps: str) -> str:
    """Join steps to a full name; an empty step, as of the root, is left out."""
    return ".".join(filter(None, steps))


def dotted(name: str) -> str:
    """Return the start of the full names of all modules and tensors inside the module `name`.

    Example:
        >>> dotted("encoder"), dotted("")
        ('encoder.', '')
    """
    return f"{name}." if name else ""


def relative(name: str, where: str) -> str:
    """Return the name inside the module `where` of a module by its full name."""
    return name.removeprefix(where).removeprefix(".")


def is_inside(name: str, around: str) -> bool:
    """True if the module or tensor `name` is inside the module `around`, the root "" for example.

    Example:
        >>> is_inside("encoder.layer", "encoder"), is_inside("encoder", "encoder")
        (True, False)
    """
    return name != around and name.startswith(dotted(around))


def parent(name: str) -> str:
    """Return the full name of the module around the module `name`; "" for the root."""
    return name.rpartition(".")[0]


def last(name: str) -> str:
    """Return the last step of a full name."""
    return name.rpartition(".")[2]


def ancestors(name: str) -> Iterator[str]:
    """Yield `name` itself, then the names of all modules around it, without the root."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def computes_weight(name: str) -> bool:
    """True if the module `name` is inside torch's `parametrizations`, and no place of a model."""
    return COMPUTING in name.split(".")


def tails(name: str) -> Iterator[str]:
    """Yield `name` itself, then its last steps: each time without the first step.

    Example:
        >>> list(tails("encoder.layer.0"))
        ['encoder.layer.0', 'layer.0', '0']
    """
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def unnumbered(name: str) -> str:
    """Return a full name with "#" in the place of its first number: equal for alike blocks.

    Example:
        >>> unnumbered("layers.11.experts.3.up")
        'layers.#.experts.3.up'
    """
    return NUMBER.sub("#", name, count=1)


def unwrapped(name: str) -> str:
    """Return `name` without the steps that torch.compile, checkpointing and FSDP1 add to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
