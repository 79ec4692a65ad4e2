"""Look at the code of functions: at the names in it, and the weights that it reads."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType

ATTRIBUTES = ("LOAD_ATTR", "LOAD_METHOD")
LOOK = ""
ALL = {"parameters", "named_parameters", "state_dict", "get_parameter"}
ANY = {*ALL, "forward"}  # a class's, as in `nn.Linear.forward(module, x)`
RAW = {*ALL, "_parameters", "functional_call", "__getattr__", "parameters_to_vector"}
READ = {*RAW, "weight", "bias"}
LOOKS = {"dtype", "device", "shape", "size", "requires_grad", "is_meta", "ndim"}  # no values


def chains_in(code: CodeType) -> Iterator[tuple[str, str | None, int]]:
    """Yield (attribute, attribute of that one or None, offset of the second) in a code.

    The second is `LOOK` if the code looks at a weight or a bias, and at none of its values.
    """
    steps = list(dis.get_instructions(code))
    for number, step in enumerate(steps[:-1]):
        if step.opname not in ATTRIBUTES:
            continue
        after = steps[number + 1]
        beyond = steps[number + 2].argval if number + 2 < len(steps) else None
        asked = number > 1 and steps[number - 2].argval == "isinstance"
        if after.opname not in ATTRIBUTES:
            yield step.argval, None, after.offset
        elif after.argval in ("weight", "bias") and (beyond in LOOKS or asked):
            yield step.argval, LOOK, after.offset
        else:
            yield step.argval, after.argval, after.offset


def reads_unnamed(code: CodeType) -> bool:
    """True if a code reads a weight of something that is no attribute of `self`."""
    steps = list(dis.get_instructions(code))
    for number, step in enumerate(steps[:-1]):
        if step.argval != "weight" or steps[number + 1].argval in LOOKS:
            continue
        if step.opname == "LOAD_CONST":
            return True
        if step.opname in ATTRIBUTES:
            before = [each.argval for each in steps[max(0, number - 2) : number]]
            own = before[-1:] == ["self"]
            named = before[:1] == ["self"] and steps[number - 1].opname in ATTRIBUTES
            if not own and not named:
                return True
    return False
