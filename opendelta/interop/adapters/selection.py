"""Compare the modules that an adapter's tensors name with those that its options select."""

from __future__ import annotations

from collections.abc import Collection

from ...errors import listed
from ...names import ancestors, last
from .terms import Part

FEEDFORWARD = ("ff.w1", "ff.gate"), ("ff.w2",)  # LoRA's intermediate and output; Mistral's reverse


def check_selection(part: Part, held: Collection[str]) -> None:
    """Raise if the file has no tensors for modules that the options select.

    These are the modules with the role of one in the file, and with a role that an option names,
    unless the options leave out their layer.

    Args:
        held: the modules that the file has tensors for, inside the library's if those have no role.
    """
    roles, left_out = _roles(part, held), _left_out(part)
    lacking = [
        name
        for name, role in part.roles.items()
        if role in roles and name not in held and _layer(name) not in left_out
    ]
    if lacking:
        raise part.error(
            f"it has no tensors for {len(lacking)} modules that its options select: "
            f"{listed(lacking)}; load it on the model that it was trained on"
        )


def _roles(part: Part, held: Collection[str]) -> set[str]:
    """Return the roles of the modules that the options select."""
    config, known = part.config, {*part.roles.values()}
    named: list[tuple[str, ...]] = []  # of each of these there is one at least
    if config.get("mh_adapter") is True:
        named.append(("attn.proj",))
    if config.get("output_adapter") is True:
        named.append(("ff.w2",))
    ends = [config.get(f"{end}_lora") is True for end in ("intermediate", "output")]
    named += FEEDFORWARD if all(ends) else [sum(FEEDFORWARD, ())] if any(ends) else []
    letters = config.get("attn_matrices")
    if config.get("selfattn_lora") is True and isinstance(letters, list):
        named += [(f"attn.{letter}", "attn.qkv") for letter in letters]
    found = {part.roles[name] for name in held if name in part.roles}
    lost = (roles for roles in named if found.isdisjoint(roles))
    return found | {next((role for role in roles if role in known), "") for roles in lost}


def _left_out(part: Part) -> set[str]:
    """Return the names of the layers that the options leave out.

    The library counts on from the encoder's to the decoder's, but not in an `EncoderDecoderModel`:
    a layer is left out if either number is listed.
    """
    given = part.left_out()
    layers = dict.fromkeys(filter(None, map(_layer, part.roles)))
    return {n for place, n in enumerate(layers) if place in given or int(last(n)) in given}


def _layer(name: str) -> str:
    """Return the name of the layer that a module is in: the first step that is a number ends it."""
    return next((n for n in reversed([*ancestors(name)]) if last(n).isdecimal()), "")
