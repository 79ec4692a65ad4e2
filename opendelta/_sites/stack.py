"""The ordered delta layers of one module.

    f0 = the module's own forward;  f(i+1) = layer_i around f_i;  the module computes f_n

The stack is data, an ordered mapping: any layer may leave, return or move at any time.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .._layers import low_rank, runs
from .._layers.base import Acts, DeltaLayer, Params
from .._layers.bound import arranged
from .._layers.record import check_same
from .._layers.selection import CURRENT, OpenBlock, Selection, in_context, within
from .._modules import tensors
from .._modules.process import eager
from ..errors import DeltaError, SiteError, to_the_end
from ..names import SLOT
from .blocks import has_blocks, in_place, note_blocks
from .marks import Mark

MERGED = "_extra_state"  # the end of the key of what says which layers are merged
LONGEST_NAME = 64
NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_NAME}}}")


def _step_aside(*_: Any) -> None:
    """Do nothing: because of this hook, torch's fused paths call the children of a module."""


@dataclass(eq=False)
class Step:
    """One merging of layers into the weights of their module.

    Attributes:
        layers: the layers by name, the innermost first.
        originals: {name of a parameter: its old values, as `tensors.kept` returns them}.
        marks: {name of a parameter: the mark of its new values}.
    """

    layers: dict[str, DeltaLayer] = field(default_factory=dict)
    originals: dict[str, Any] = field(default_factory=dict)
    marks: dict[str, Mark] = field(default_factory=dict)


class Stack(nn.ModuleDict):
    """The ordered delta layers of one site; the first is the innermost.

    With an empty stack the module computes the same as without a stack.

    Attributes:
        ran: the names of the layers that have run outside of compiled code; replicas of
            DataParallel share it.
        steps: the merges so far; merged layers do not act.
        routed: the `Routed` that takes the rows of a batch through the site inside `route()` of
            this thread and task, else None.
    """

    ran: set[str]
    steps: list[Step]
    routed = in_context(lambda _, own: CURRENT.get().routers.get(own))

    def __init__(self) -> None:
        super().__init__()
        # not by nn.Module.__setattr__, which is slow
        self.__dict__.update(ran=set(), steps=[])
        note_blocks(self)
        self.register_forward_pre_hook(_step_aside)

    def _acting(self, selection: Selection, ran: set[str]) -> list[DeltaLayer]:
        """Return the layers that act outside of compiled code; add their names to `ran`."""
        acting: list[Any] = []
        chosen, steps = selection.active, self.steps
        for name, layer in self._modules.items():
            record: Any = layer.record
            active = chosen.get(record) if chosen else record.enabled
            if active is None:
                active = selection.acts(record)
            if active and not (steps and self.holds(name)):
                acting.append(layer)
                ran.add(name)
        if selection.then is not None:
            for layer in self._modules.values():
                check_same(layer.record, selection)  # type: ignore[arg-type]
        return acting

    @property
    def frozen(self) -> runs.KeptFactors | None:
        """Return the joined factors inside `frozen()` of this thread and task, else None."""
        return CURRENT.get().factors.get(self)

    def values(self) -> Any:
        """Return the layers, the innermost first."""
        return self._modules.values()

    def holds(self, name: str) -> bool:
        """True if the layer of this name is merged into the module's weights."""
        return any(name in step.layers for step in self.steps)

    def merged(self) -> list[str]:
        """Return the names of the layers that are merged into the weights, the innermost first."""
        return [name for step in self.steps for name in step.layers]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Add a tensor that says which layers are merged.

        Its key is torch's for what is no parameter and no buffer, so that tools let it through.
        torch.export, which takes its tensors with `keep_vars`, would not.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.steps and not keep_vars:
            mark = merge_mark(self)
            destination[prefix + MERGED] = torch.tensor(mark, dtype=torch.uint8, device="cpu")

    def forward(self, input: Any) -> Any:
        """Return `input`: modules such as Sequential call all their children."""
        return input

    def __prepare_scriptable__(self) -> None:  # torch.jit.script asks each module for it
        raise DeltaError(
            "torch.jit.script cannot compile a model that carries deltas: torch.export.export can, "
            "and composition(model).to_backbone() gives a plain model that has them in its weights"
        )

    def in_order(self) -> list[tuple[str, DeltaLayer]]:
        """Return (name of the delta, layer) of each layer, the innermost first."""
        return list(self._modules.items())  # type: ignore[arg-type]

    def around(
        self, call: Callable[..., Any], module: nn.Module, raw: bool = False
    ) -> Callable[..., Any]:
        """Return `call`, the forward of `module`, with all active layers around it.

        Args:
            raw: `call` is the forward of a Linear or Conv1D.
        """
        acting, router = now(self)
        if router is not None:
            return functools.partial(router.run, self, acting, call, module, raw)
        return self.onion(acting, call, module, raw)

    def onion(
        self, acting: list[DeltaLayer], call: Callable[..., Any], module: nn.Module, raw: bool
    ) -> Callable[..., Any]:
        """Return `call` with these layers around it; the first is the innermost."""
        index, depth, total = 0, 0, len(acting)
        many = total > FEW
        steps: list[tuple[Any, list[Any]]] = []  # what runs one after the other on an output
        # compiled code must not depend on the kept factors
        kept = None if torch.compiler.is_compiling() else self.frozen
        combines = has_blocks(self)
        if combines:
            depth = BLOCK * sum(layer.is_block for layer in acting)
            _check_compiled(depth, total, module)
            acting = in_place(self, acting)
        while index < len(acting):
            layer = acting[index]
            if kept is None:
                run = runs.pairs(acting, index)
                count = len(run)
            else:
                run, count = kept.run(_plain(acting, index) if combines else acting, index)
            count = count if run else _in_turn(acting, index)
            if many and index and count:
                steps.append((run, acting[index : index + count]))
                index += count
                continue
            if steps:
                call, steps = functools.partial(_run_steps, call, module, steps), []
                depth += 1
            if run:
                call = functools.partial(low_rank.add, call, run, raw and index == 0)
            elif count > 1:
                call = functools.partial(_run_in_turn, call, module, acting[index : index + count])
            else:
                count, depth = 1, depth + (not layer.is_block)
                call = layer.around(call, module, acting[:index], raw and index == 0)
            index += count
        if steps:
            call = functools.partial(_run_steps, call, module, steps)
        return _guarded(call, module, total, depth) if many or depth > FEW else call

    def fold(self, params: Params) -> Params:
        """Return `params` with all active layers folded in; a module's copy gives its own."""
        acting = shown_on(self)
        for layer in arranged(acting) if has_blocks(self) else acting:
            if layer.stand_in is None:
                params = layer.fold(params)
            else:
                own = tensors.stored_params(layer.stand_in)
                params = {key: value.to(params["weight"].dtype) for key, value in own.items()}
        return params

    def _replicate_for_data_parallel(self) -> Any:
        """Return a replica with the selection of this thread; DataParallel runs it in another."""
        if self.routed is not None:
            raise SiteError("route() does not know which rows DataParallel gives to which device")
        replica: Any = super()._replicate_for_data_parallel()
        blocks = CURRENT.get().blocks
        if blocks:
            replica.__dict__["fold"] = within(blocks, replica.fold)
            replica.__dict__["around"] = functools.partial(_within_call, blocks, replica.around)
        return replica

    def sort(self) -> None:
        """Put the layers into the total order; layers that act INSTEAD come first.

        The mapping object itself stays the same.
        """
        ordered = sorted(
            self.in_order(),
            key=lambda item: (item[1].acts is not Acts.INSTEAD, item[1].record.rank),
        )
        if [name for name, _ in ordered] != list(self._modules):
            to_the_end(functools.partial(_refill, self._modules, ordered))


def _guarded(
    call: Callable[..., Any], module: nn.Module, total: int, depth: int
) -> Callable[..., Any]:
    """Return `call`, of so many layers, which says so if they lie too deep inside each other."""
    _check_compiled(depth, total, module)
    return functools.partial(_nested, call, module, total, depth > FEW)


def _nested(
    call: Callable[..., Any], module: nn.Module, count: int, deep: bool, /, *args: Any, **kw: Any
) -> Any:
    """Run `call`; say so if its layers lie deeper inside each other than Python goes.

    Args:
        deep: they lie deeper than the compiler goes.
    """
    try:
        with eager() if deep else contextlib.nullcontext():
            return call(*args, **kw)
    except RecursionError:
        raise _too_deep(count, module, "", "sys.setrecursionlimit") from None


def _check_compiled(depth: int, count: int, module: nn.Module) -> None:
    if depth > FEW and torch.compiler.is_compiling():
        raise _too_deep(count, module, "in compiled code", "the model without torch.compile")


def _too_deep(count: int, module: nn.Module, where: str, other: str) -> SiteError:
    return SiteError(
        f"{count} deltas act on one {type(module).__name__}, the one around the other, and "
        f"Python's limit of {sys.getrecursionlimit():,} calls is reached{where and ' ' + where}: "
        f"let fewer act at once, such as by composition(model).only(...), or call {other}"
    )


def _within_call(
    blocks: tuple[OpenBlock, ...], around: Callable[..., Any], *given: Any, **options: Any
) -> Callable[..., Any]:
    """Return the callable that `around` makes; it is made and run with these blocks open."""
    return within(blocks, lambda *args, **kwargs: around(*given, **options)(*args, **kwargs))


def _refill(mapping: dict[str, Any], items: list[tuple[str, Any]]) -> None:
    mapping.clear()
    mapping.update(items)


def acting_on(stack: Stack) -> list[DeltaLayer]:
    """Return the layers that are active and not merged, the innermost first."""
    if torch.compiler.is_compiling():
        return [ly for n, ly in stack.in_order() if ly.record.active and not stack.holds(n)]
    return stack._acting(CURRENT.get(), set())


def shown_on(stack: Stack) -> list[DeltaLayer]:
    """Return the layers that act where other code reads the module's weight, the innermost first.

    Raises:
        SiteError: some rows of the batch take a layer, and others do not.
    """
    compiling = torch.compiler.is_compiling()
    acting = acting_on(stack) if compiling else stack._acting(CURRENT.get(), stack.ran)
    if stack.routed is not None:
        stack.routed.check_alike(acting)
    return acting


def now(stack: Stack) -> tuple[list[DeltaLayer], Any]:
    """Return the layers that act in this call, and the `Routed` of its rows or None."""
    if torch.compiler.is_compiling():  # a note would add a guard to the graph
        return acting_on(stack), stack.routed
    selection = CURRENT.get()
    return stack._acting(selection, stack.ran), selection.routers.get(stack)


def _in_turn(acting: list[DeltaLayer], start: int) -> int:
    """Count the layers from `start` on that only change or add to the output of those beneath."""
    count = 0
    for layer in acting[start:]:
        alone = layer.sees_module or layer.runs_as_factors or layer.handover is not None
        alone = alone or layer.is_block
        if alone or layer.acts not in (AFTER, BESIDE):
            break
        count += 1
    return count


def _plain(acting: list[Any], start: int) -> list[Any]:
    """Return the layers up to the first block from `start` on."""
    stop = next((i for i in range(start, len(acting)) if acting[i].is_block), len(acting))
    return acting[:stop]


def _run_in_turn(
    call: Callable[..., Any],
    module: nn.Module,
    layers: list[DeltaLayer],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run layers one after the other on the output of `call`, however many they are."""
    out = call(*args, **kwargs)
    for layer in layers:
        out = layer.around(functools.partial(_given, out), module, ())(*args, **kwargs)
    return out


def _run_steps(
    call: Callable[..., Any],
    module: nn.Module,
    steps: list[tuple[Any, list[DeltaLayer]]],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run joined factors, or layers, one after the other on the output of `call`."""
    out = call(*args, **kwargs)
    for run, layers in steps:
        given = functools.partial(_given, out)
        if run:
            out = low_rank.add(given, run, False, *args, **kwargs)
        else:
            out = _run_in_turn(given, module, layers, *args, **kwargs)
    return out


def _given(out: Any, *args: Any, **kwargs: Any) -> Any:
    """Return an output that is known."""
    return out


FEW = 50  # so many layers are never too deep
BLOCK = 4  # a block takes as many calls as so many layers
AFTER, BESIDE = Acts.AFTER, Acts.BESIDE
# No delta has the name of an attribute. A further attribute would refuse folders that were saved.
RESERVED = frozenset(name for name in dir(Stack()) if NAME.fullmatch(name))


def stack_of(module: nn.Module) -> Stack | None:
    """Return the stack that `module` carries, or None. A stack may be empty."""
    children: Any = module.__dict__["_modules"]  # what a site shows in its forward lacks the stack
    child = children[SLOT] if SLOT in children else None  # noqa: SIM401  a ScriptModule has no get
    return child if isinstance(child, Stack) else None


def merge_mark(stack: Stack) -> list[int]:
    """Return the values of the tensor in a state dict that says which layers are merged."""
    return list(", ".join(stack.merged()).encode())


def check_name(name: str) -> None:
    """Raise unless `name` can be the key of a layer in any stack."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SiteError(f"{name!r} is no name for a delta: use 1 to 64 letters, digits, '_' or '-'")
    if name in RESERVED:
        raise SiteError(
            f"{name!r} is no name for a delta: torch.nn.ModuleDict has an attribute of that name; "
            f"use another, such as '{name}_delta'"
        )
