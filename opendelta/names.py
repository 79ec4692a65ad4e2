"""Join and split full names of modules; the name of the deltas' slot; names of wrappers."""

from __future__ import annotations

from collections.abc import Iterator

SLOT = "deltas"  # the child of a site that holds its delta layers
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


def unwrapped(name: str) -> str:
    """Return `name` without the steps that torch.compile, checkpointing and FSDP1 add to it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
