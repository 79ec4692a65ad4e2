"""Blocks: several deltas in one place of a stack, combined by a rule.

With h the module's output with all layers beneath the block, and z_i the change that child i alone
makes to it, a block computes

    y = h + s rule(x, h, z_1, ..., z_n)

A block is a delta: it has a name, a place, switches, options and maybe parameters. It knows its
children by name. While it acts they act inside of it; without it they act by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._modules import calls
from ..errors import OptionError, SiteError, shown
from . import costs, weighted
from .base import Acts, Call, DeltaLayer, times
from .beneath import Beneath, Child
from .costs import Flops
from .low_rank import LowRank
from .low_rank import add as add_low_rank
from .runs import pairs
from .seen import Weighing, spread
from .weighted import as_tensor


class Chosen:
    """The children of a block that act in one forward.

    Attributes:
        numbers: their places in the option `deltas`, from 0.
        total: the number of all children.
        takes: for each row of the batch and each of them, if the row takes it: [batch, 1, ..., n];
            None: all rows take all.
        logits, kept: those of the last `softmax`, and the places of its best [..., best]; or None.
        watcher: takes the weights, for `watching`; or None.
        given: the arguments and keyword arguments of the module's call.
    """

    def __init__(
        self,
        numbers: list[int],
        total: int,
        takes: Tensor | None = None,
        watcher: Callable[[Weighing], None] | None = None,
    ) -> None:
        self.numbers, self.total, self.takes, self.watcher = numbers, total, takes, watcher
        self.logits: Tensor | None = None
        self.kept: Tensor | None = None
        self.given: tuple[tuple, dict[str, Any]] = (), {}

    def of(self, values: Tensor) -> Tensor:
        """Return the rows of `values` [total, ...] that belong to the children that act."""
        return values if len(self.numbers) == self.total else values[self.numbers]

    def softmax(self, logits: Tensor, best: int | None = None) -> Tensor:
        """Return the softmax [..., n], in float32, over the children that a row takes.

        Args:
            logits: [..., n].
            best: at each position only so many children have a weight. None: all have.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.takes is not None:
            logits = logits.masked_fill(~self.takes, torch.finfo(logits.dtype).min)
        self.logits, self.kept = logits, None
        if best is not None and best < len(self.numbers):
            values, self.kept = logits.topk(best, -1)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, self.kept, values)
        weights = logits.softmax(-1)
        return weights if self.takes is None else weights * self.takes

    def note(self, weights: Tensor | list[float], like: Tensor) -> None:
        """Show the weights of the children to `watching`; numbers in the dtype of `like`."""
        if self.watcher is None:
            return
        g, logits, chosen = as_tensor(weights, like), self.logits, None
        taken = torch.ones_like(g[..., :1], dtype=torch.bool)
        if self.takes is not None:
            taken = taken & self.takes.any(-1, keepdim=True)
        if logits is not None:
            if self.takes is not None:
                logits = logits.masked_fill(~self.takes, -torch.inf)
            chosen = spread(self._chosen(logits), self.numbers, self.total, False)
            logits = spread(logits, self.numbers, self.total, -torch.inf)
        self.watcher(Weighing(spread(g, self.numbers, self.total, 0.0), logits, chosen, taken))

    def _chosen(self, logits: Tensor) -> Tensor:
        """Return booleans [..., n]: the best of each position, or its first if it takes all."""
        acts = logits != -torch.inf
        none = torch.zeros_like(acts)
        first = none.scatter(-1, logits.argmax(-1, keepdim=True), True) & acts
        if self.kept is None:
            return first
        best = none.scatter(-1, self.kept, True)
        return torch.where(acts.sum(-1, keepdim=True) > self.kept.size(-1), best, first)


class BlockLayer(DeltaLayer):
    """A rule that combines several deltas on one module; the base class of the rules.

    A subclass takes `(site, config)`. It writes `weights` if its rule is a weighted sum, whose
    low-rank children then run as one product; else it writes `combine`.

    Attributes:
        reads: what `weights` looks at: the module's "input", its "output", or nothing, "".
        constant: the rule is a weighted sum with weights that depend on no input.
    """

    kinds: tuple[str, ...] = ("linear", "embedding", "norm", "attention", "other")
    is_block = True
    writes = "weights"
    scales = True
    identity = False
    gates_itself = True
    why_not = "a block folds if its weights are constants and all deltas in it fold"
    reads: str = ""
    constant: ClassVar[bool] = False

    # ------------------------------------------------------------- methods that authors write
    def weights(self, u: Tensor | None, chosen: Chosen) -> Tensor | list[float]:
        """Return a weight for each child that acts: numbers, [n], or [..., n] for each position.

        Args:
            u: what the rule reads.
            chosen: the children that act.
        """
        raise NotImplementedError

    def combine(self, x: Any, h: Tensor, z: Sequence[Tensor], chosen: Chosen) -> Tensor:
        """Return the change [..., width] that takes the place of the changes z.

        Args:
            x: the module's first input.
            h: its hidden states without the block.
            z: the change of each child that acts.
        """
        return self.weigh(self._given(x, h, chosen), z, chosen)

    # ------------------------------------------------------ methods that the library calls
    @property
    def names(self) -> list[str]:
        """Return the names of the children, in the order of the option `deltas`."""
        return self.record.config.deltas

    @classmethod
    def is_sum(cls) -> bool:
        """True if the rule is a weighted sum: it writes no `combine`."""
        return cls.combine is BlockLayer.combine

    @classmethod
    def check_written(cls) -> tuple[str, ...]:
        own = cls.weights is not BlockLayer.weights
        if not cls.is_sum() and (own or cls.constant):
            extra = "weights" if own else "constant = True"
            raise OptionError(
                f"{cls.__name__} has `{extra}`, which only a weighted sum uses, and `combine`, "
                "which any other rule writes: leave out one of the two"
            )
        _check_reads(cls.__name__, cls.reads, cls.constant)
        return super().check_written() if cls.is_sum() else ()

    def check_made(self) -> None:
        _check_reads(type(self).__name__, self.reads, self.constant)

    @property
    def shows_in_weight(self) -> bool:
        return self.constant and self.gate is None

    @property
    def weighs(self) -> bool:
        """True if the rule is a weighted sum, with no gate of the block around it."""
        return self.gate is None and self.is_sum()

    def weigh(self, g: Tensor | list[float], z: Sequence[Tensor], chosen: Chosen) -> Tensor:
        """Return sum_i g_i z_i; `watching` shows the weights.

        Args:
            g: as `weights` returns them.
        """
        self.check_weights(g, len(z), z[0])
        chosen.note(g, z[0])
        total: Any = None
        for index, each in enumerate(z):
            if isinstance(g, list):
                part = g[index] * each
            elif g.ndim == 1:
                part = g[index].type_as(each) * each
            else:
                part = g[..., index, None].type_as(each) * each
            total = part if total is None else total + part
        return total

    def _weights(self, x: Any, h: Tensor | None, chosen: Chosen) -> Tensor | list[float]:
        g, like = self._given(x, h, chosen), x if h is None else h
        self.check_weights(g, len(chosen.numbers), like)
        if chosen.takes is None:
            return g
        return as_tensor(g, like) * chosen.takes

    def _given(self, x: Any, h: Tensor | None, chosen: Chosen) -> Tensor | list[float]:
        reads = {"": None, "input": x, "output": h}
        return self.weights(reads[self.reads], chosen)

    def check_weights(self, g: Any, count: int, like: Tensor | None) -> None:
        """Raise unless there is a weight for each of `count` deltas, or so at each position.

        Args:
            like: what has the positions. None: the weights are the same everywhere.
        """
        sizes: tuple[int, ...] = g.shape if isinstance(g, Tensor) else ()
        if isinstance(g, list):
            fits = len(g) == count and all(isinstance(each, int | float) for each in g)
        else:
            fits = bool(sizes) and sizes[-1] == count and (like is not None or len(sizes) == 1)
        if not fits:
            given = f"[{', '.join(map(str, sizes))}]" if sizes else shown(g)
            what = "weights returned" if self.is_sum() else "combine gave to weigh"
            raise SiteError(
                f"{self.record.name!r}: {type(self).__name__}.{what} {given} for {count} "
                f"deltas that act: it must be a list of {count} numbers, or a tensor "
                f"[{count}]" + f" or [..., {count}]" * (like is not None)
            )
        if len(sizes) > 1 and like is not None:
            _check_positions(self.record.name, g, like)

    def around(
        self, call: Call, module: nn.Module, acting: Sequence[Any], raw: bool = False
    ) -> Call:
        raise NotImplementedError(f"{type(self).__name__} acts as a Bound, with its children")

    def forward(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the block, or only its change; `call` is `(beneath, children, chosen, out)`.

        `out` is None, or what `beneath` gives: then the result is the change of it.
        """
        beneath, children, chosen, out = call
        if out is not None:
            return self.change(beneath, children, chosen, out, args, kwargs)
        run = _factors(children) if self.weighs and self.reads != "output" else None
        if run is not None:
            return self._as_product(beneath, children, run, chosen, args, kwargs)
        if any(child.layer.acts is Acts.WITHIN for child in children):
            beneath.keep_caches(args, kwargs)
        out = beneath(*args, **kwargs)
        change = self.change(beneath, children, chosen, out, args, kwargs)
        if all(child.layer.enters for child in children):
            x = calls.first_input(args, kwargs)
            args, kwargs = calls.replace_input(args, kwargs, x + change.type_as(x))
            return beneath(*args, **kwargs)
        width = calls.hidden(out).size(-1)
        return calls.change_hidden(out, width, lambda h: h + change.type_as(h))

    def change(
        self,
        beneath: Beneath,
        children: Sequence[Child],
        chosen: Chosen,
        out: Any,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Return what the block adds to `out`, or to the input if all children add to that."""
        chosen.given = args, kwargs
        x, h = calls.first_given(args, kwargs), calls.hidden(out)
        run = _factors(children) if self.weighs else None
        if run is not None:
            g = self._weights(x, h, chosen)
            chosen.note(g, h)
            return weighted.change(x, run, g, self.strength())
        enters = all(child.layer.enters for child in children)
        z = [child.change(out, args, kwargs, enters) for child in children]
        change = self.combine(x, h, z, chosen)
        if not isinstance(change, Tensor) or change.shape != z[0].shape:
            given = list(change.shape) if isinstance(change, Tensor) else shown(change)
            raise SiteError(
                f"{self.record.name!r}: {type(self).__name__}.combine returned {given}, "
                f"not a change of the form {list(z[0].shape)}"
            )
        return self._gated(times(self.strength(), change), x, h)

    def _gated(self, change: Tensor, x: Any, h: Tensor) -> Tensor:
        return change if self.gate is None else self.gate(x if self.gate.on_input else h) * change

    def _as_product(
        self,
        beneath: Beneath,
        children: Sequence[Child],
        run: list[LowRank],
        chosen: Chosen,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """Compute a weighted sum of low-rank products as one pair of products."""
        chosen.given = args, kwargs
        x = calls.first_input(args, kwargs)
        g = self._weights(x, None, chosen)
        chosen.note(g, x)
        strength = self.strength()
        if isinstance(g, list) and beneath.kept is None:
            scaled = [
                pair._replace(scale=pair.scale * weight * strength)
                for pair, weight in zip(run, g, strict=True)
            ]
            return add_low_rank(beneath.call, scaled, beneath.raw, *args, **kwargs)
        whole = None
        if beneath.kept is not None:
            joined, count = beneath.kept.run([child.layer for child in children], 0)
            whole = joined[0] if count == len(children) and len(joined) == 1 else None
        return weighted.add(beneath.call, run, g, strength, whole, beneath.raw, *args, **kwargs)

    def formula_of(self, name: str, inner: str, children: Sequence[tuple[int, str]]) -> str:
        """Return the formula of the block.

        Args:
            name: what the block is called in it.
            inner: the formula beneath.
            children: the number of each acting child, and the formula of it around `inner`.
        """
        return f"{name}({', '.join(text for _, text in children)})"

    def flops(self, module: nn.Module) -> Flops:
        """Count the operations of the rule; those of the deltas in it are counted with them."""
        count = len(self.names)
        floats = (p.dtype for p in self.parameters() if p.is_floating_point())

        def run(bare: nn.Module, x: Tensor, out: Tensor) -> None:
            self.combine(x, out, [out] * count, Chosen(list(range(count)), count))

        dtype = next(floats, torch.get_default_dtype())
        return costs.around(module, run, getattr(self, "width", None), None, dtype)


def _check_reads(name: str, reads: Any, constant: bool) -> None:
    """Raise unless a rule reads what there is, and nothing if its weights are constant."""
    if isinstance(reads, property):
        return
    if reads not in ("", "input", "output"):
        raise OptionError(f'{name}.reads={reads!r} must be "input", "output" or "" for nothing')
    if constant and reads:
        raise OptionError(
            f"{name}.constant = True says that its weights depend on no input, but it reads the "
            f'{reads}: set reads = "", or leave constant out'
        )


def _factors(children: Sequence[Child]) -> list[LowRank] | None:
    """Return the factors of all children without dropout, or None if one has none."""
    found = pairs([child.layer for child in children], 0)
    if len(found) < len(children) or any(pair.dropout for pair in found):
        return None
    return found


def _check_positions(name: str, g: Tensor, z: Tensor) -> None:
    """Raise unless there are weights for each position of a change."""
    sizes = zip(g.shape[:-1], z.shape[:-1], strict=False)
    if g.ndim != z.ndim or any(one not in (1, other) for one, other in sizes):
        raise SiteError(
            f"{name!r} weighs each position of its input, [{', '.join(map(str, g.shape[:-1]))}], "
            f"but the module gives other positions, [{', '.join(map(str, z.shape[:-1]))}]: put the "
            "block on other modules"
        )
