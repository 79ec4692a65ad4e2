"""Full names of modules: how they are joined and taken apart, the slot of the deltas, wrappers."""

from __future__ import annotations

from collections.abc import Iterator

SLOT = "deltas"  # the child of a site that holds its delta layers
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def join(*steps: str) -> str:
    """The full name that these steps make; the root's step is empty and leaves no dot."""
    return ".".join(step for step in steps if step)


def inside(name: str) -> str:
    """The start of the names of all that is inside the module called `name`.

    Example:
        >>> inside("encoder"), inside("")
        ('encoder.', '')
    """
    return f"{name}." if name else ""


def parent(name: str) -> str:
    """The full name of the module around the one called `name`; the root's is empty."""
    return name.rpartition(".")[0]


def last(name: str) -> str:
    """The last step of a full name."""
    return name.rpartition(".")[2]


def ancestors(name: str) -> Iterator[str]:
    """`name` itself, then the names of all modules that contain it, without the root."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def unwrapped(name: str) -> str:
    """`name` without the steps that torch.compile, checkpointing and FSDP1 put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
