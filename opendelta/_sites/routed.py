"""Let the rows of a batch take different layers of a site.

Rows that take the same layers of the site are a group. The module's own forward runs once for all
rows. The layers of a group see the group's rows of the input and the output. Low-rank layers beside
a linear module are added to the rows of its output. If all their factors have one size, they are
added by a single batched product."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._layers import labels, low_rank
from .._layers.base import Acts, DeltaLayer
from .._layers.bound import Bound
from .._layers.low_rank import LowRank
from .._layers.runs import KeptFactors, pairs
from .._modules import arithmetic, calls
from .._modules.tensors import is_sharded
from .._texts import running
from ..errors import DeltaError, SiteError, quoted
from .blocks import has_blocks, in_place, watcher_of
from .rows import Groups, Handovers, Rows, ShapeError, SharedCall, cut, joined
from .stack import Stack, acting_on

EXPERTS = re.compile(r"(^|\.)experts\.")  # an expert sees some tokens of all rows
OWN_BATCH = "give such rows a batch of their own"


class Routed:
    """Takes the rows of a batch through one site inside `route`.

    Args:
        where: the full name of the site.
        rows: the deltas of each row; all sites of the model share it.
        holds_sites: there are other sites inside the site's module.
        in_shards: FSDP2 shards the model.
    """

    def __init__(self, where: str, rows: Rows, holds_sites: bool, in_shards: bool) -> None:
        self.where, self.rows, self.holds_sites = where, rows, holds_sites
        self.in_shards = in_shards

    def check_alike(self, acting: Sequence[DeltaLayer]) -> None:
        """Raise unless each of these layers is taken by all rows, or by none."""
        for layer in acting:
            self.check_common(layer, "acts on the weight that the module around it reads")

    def check_common(self, layer: DeltaLayer, why: str) -> None:
        """Raise unless all rows take the layer, or no row does."""
        if len(set(self.rows.takers(layer.record.name))) > 1:
            raise SiteError(
                f"{layer.record.name!r} on {quoted(self.where)} {why}, so that it acts on all rows "
                f"of a batch or on none: {OWN_BATCH}",
                where=self.where,
            )

    def check(self, stack: Stack, module: nn.Module) -> None:
        """Raise if the stack has layers that cannot act on some rows alone."""
        acting = acting_on(stack)
        blocks = {name: ly.record.name for ly in acting for name in ly.record.config.children}
        for layer in acting:
            if layer.acts is Acts.WITHIN and layer.record.name in blocks:
                inside = f"in the block {blocks[layer.record.name]!r}"
                self.check_common(layer, f"acts {inside}")
                for other in computing(acting):
                    self.check_common(other, f"acts beside {layer.record.name!r} {inside}")
            if EXPERTS.search(self.where):
                self.check_common(layer, "sees some tokens of all rows, mixed")
            if layer.for_all_rows is not None:
                self.check_common(layer, layer.for_all_rows)
            for other in computing(acting) if layer.stands_alone else ():
                self.check_common(other, f"acts beside {layer.record.name!r}, a prompt")
        heads = [layer for layer in acting if layer.labels is not None]
        if heads:
            self._check_labels(heads, labels.count_of(module))

    def _idle(self, stack: Stack) -> list[Tensor]:
        """Return the parameters of layers that train, and that no row of this process takes.

        Under DistributedDataParallel (without `find_unused_parameters`) and FSDP2 the other
        processes would wait for their gradients.

        Raises:
            DeltaError: they are sharded apart from the module, and not gathered.
        """
        if not torch.is_grad_enabled() or not torch.distributed.is_available():
            return []
        around: Any = torch.nn.parallel.DistributedDataParallel._active_ddp_module
        if not self.in_shards and (around is None or around.find_unused_parameters):
            return []
        found: list[Tensor] = []
        for layer in stack.values():
            if any(self.rows.takers(layer.record.name)):
                continue
            shared = layer.shared.parameters() if layer.shared is not None else ()
            own = [p for p in (*layer.parameters(), *shared) if p.requires_grad]
            if any(map(is_sharded, own)):
                raise DeltaError(
                    f"route(): {layer.record.name!r} trains, is sharded apart from "
                    f"{quoted(self.where)}, and no row of this process takes it: other processes "
                    "would wait for its gradients. Attach it before fully_shard, or let a row of "
                    "each process take it"
                )
            found += own
        return found

    def _check_labels(self, heads: list[DeltaLayer], own: int | None) -> None:
        counts = [own] * len(self.rows.taken)
        for layer in heads:  # the last one decides
            takes = self.rows.takers(layer.record.name)
            counts = [layer.labels if t else n for t, n in zip(takes, counts, strict=True)]
        if len(set(counts)) > 1:
            raise SiteError(
                f"the rows of route() have heads for {counts} labels, which fit into no one "
                f"batch: {OWN_BATCH}",
                where=self.where,
            )

    # ------------------------------------------------------------------------------- running
    def run(
        self,
        stack: Stack,
        acting: list[DeltaLayer],
        call: Callable[..., Any],
        module: nn.Module,
        raw: bool,
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run `call`, the forward of `module`, with each row's own layers around it."""
        idle = self._idle(stack)
        out = self._run(stack, acting, call, module, raw, args, kwargs)
        if not idle:
            return out

        def add_nothing(h: Tensor) -> Tensor:  # with gradients of 0
            return h + torch.stack([p.flatten()[:0].sum().to(h) for p in idle]).sum()

        return calls.change_hidden(out, calls.hidden(out).size(-1), add_nothing)

    def _run(
        self,
        stack: Stack,
        acting: list[DeltaLayer],
        call: Callable[..., Any],
        module: nn.Module,
        raw: bool,
        args: Any,
        kwargs: Any,
    ) -> Any:
        if not (acting := computing(acting)):
            return call(*args, **kwargs)
        x = next((x for x in calls.every(Tensor, [args, kwargs]) if x.ndim), None)
        if x is None:
            what = f"no rows to route: no tensor goes into {quoted(self.where)}"
            raise SiteError(what, where=self.where)
        grouped = self.rows.groups(acting, x, self.where)
        if len(grouped.groups) == 1:
            path = self.rows.layers(acting, grouped.groups[0])
            return stack.onion(path, call, module, raw)(*args, **kwargs)
        if has_blocks(stack) and (block := _as_one(stack, acting, grouped, x)) is not None:
            return block.around(call, module, (), raw)(*args, **kwargs)
        paths = [self.rows.layers(acting, group) for group in grouped.groups]
        runs, whole = _runs(stack, paths, grouped, x), []
        if runs is not None:
            out = call(*args, **kwargs)
            if type(out) is Tensor and out.dtype == x.dtype and out.is_contiguous():
                return add_rows(out, x, raw, grouped, runs, stack.frozen)
            whole.append(out)
        within = _for_themselves(acting)
        if within:  # these layers take all rows at once; see `opened`
            call = stack.onion(within, call, module, raw)
            if len(within) == len(acting):
                return call(*args, **kwargs)
        once = SharedCall(running.of_now(call), (args, kwargs), len(grouped.of_row), whole)
        inside = "a prefix" if within else "other deltas" if self.holds_sites else ""
        why = f"has {inside} inside" if inside else ""
        paths = [[layer for layer in path if layer not in within] for path in paths]
        around = functools.partial(stack.onion, module=module, raw=False)
        return self._in_groups(stack, around, grouped, paths, once, why)

    def _in_groups(
        self,
        stack: Stack,
        around: Callable[[list[DeltaLayer], Callable[..., Any]], Callable[..., Any]],
        grouped: Groups,
        paths: list[list[DeltaLayer]],
        once: SharedCall,
        whole: str,
    ) -> Any:
        """Run the layers of each group on the group's rows, and return the joined outputs.

        Args:
            around: puts layers around a call.
            paths: the layers of each group.
            whole: why the module cannot run on the rows of one group alone; "" if it can.
        """
        cells, parts = Handovers([layer for path in paths for layer in path]), []
        seen, weighings = watcher_of(stack), []
        others = once.has_other_rows()
        for group, path in zip(grouped.groups, paths, strict=True):
            alone = any(layer.acts in (Acts.BEFORE, Acts.INSTEAD) for layer in path)
            rows = slice(None) if alone and others else group.rows
            given = cut(once.given, once.batch, rows)
            if path and path[0].acts is Acts.INSTEAD:
                self._check_alone(path[0], given, _takes_states(path[0], once.given))
            check = functools.partial(self._check_alone, path[0] if path else None, given, whole)
            leave = all(layer.acts in (Acts.AFTER, Acts.BESIDE) for layer in path)
            inner = functools.partial(once.for_rows, rows, None if leave else given, check)
            cells.open(rows)
            with contextlib.nullcontext() if seen is None else seen.group(stack) as weighed:
                out = running.on_rows(rows, around(path, inner), *given[0], **given[1])
            parts.append(out if rows is group.rows else cut(out, once.batch, group.rows))
            cells.close(rows, group.rows, once.batch)
            if weighed is not None:
                weighings.append((rows, group.rows, weighed))
        if seen is not None:
            seen.put(stack, weighings, once.batch, calls.hidden(parts[0]).ndim)
        cells.leave()
        try:
            return joined(parts, grouped)
        except ShapeError as error:
            names = [[layer.record.name for layer in path] for path in paths]
            raise SiteError(
                f"rows with {names} get outputs of {quoted(self.where)} {error}, "
                f"which fit into no one batch: {OWN_BATCH}",
                where=self.where,
            ) from None

    def _check_alone(self, layer: Any, given: tuple, why: str) -> None:
        """Raise if the module cannot run on the rows of one group alone.

        Args:
            layer: the innermost of the group's layers.
            given: the arguments and keyword arguments for its rows.
            why: a known reason, or "".
        """
        args, kwargs = given
        if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
            why = "fills a KV cache"
        if why:
            raise SiteError(
                f"{layer.record.name!r} lets {quoted(self.where)} run on its rows by themselves, "
                f"but that {why}, for all rows at once: {OWN_BATCH}",
                where=self.where,
            )

    def opened(self, layer: DeltaLayer, logit: Tensor | None, key: Tensor) -> Tensor | None:
        """Return the log of a prefix's weight [batch, length or 1, 1]; -inf for rows without it.

        Args:
            logit: the log of the weight if all rows take the prefix; None: 0 everywhere.
            key: the keys [batch, ...].

        Returns:
            `logit` as it is if all rows take the prefix.
        """
        groups = self.rows.groups([layer], key, self.where).groups
        if all(group.path for group in groups):
            return logit
        closed = key.new_zeros(key.size(0), 1, 1)
        for group in groups:
            if not group.path:
                closed[group.rows] = float("-inf")
        return closed if logit is None else logit + closed


def computing(acting: list[DeltaLayer]) -> list[DeltaLayer]:
    return [layer for layer in acting if layer.computes]


def _takes_states(copied: DeltaLayer, given: tuple) -> str:
    """Return why a recurrent module, given states, does not run on some rows alone; or ""."""
    recurrent = any(isinstance(part, nn.RNNBase) for part in copied.modules())
    several = len(list(calls.every(Tensor, list(given)))) > 1
    return "takes states, in which the rows are no first axis" if recurrent and several else ""


def _as_one(stack: Stack, acting: list[DeltaLayer], grouped: Groups, x: Tensor) -> Bound | None:
    """Return a block that takes all rows at once, each with its own children.

    The result is None unless the block is all that acts on the module, its rule is a weighted sum
    of low-rank products, and all rows that take one of its children take the block.
    """
    runs = in_place(stack, acting)
    if len(runs) != 1 or not runs[0].is_block or not low_rank.is_eager(x):
        return None
    block: Bound = runs[0]
    if not block.is_product:
        return None
    places = {layer: place for place, layer in enumerate(acting)}
    takes: list[list[bool]] = []
    for group in grouped.groups:
        weights = dict(group.path)
        takes.append([places[child] in weights for _, child in block.children])
        alone = any(takes[-1]) and places[block.layer] not in weights
        if alone or any(weight != 1 for weight in weights.values()):
            return None
    each = torch.tensor([takes[number] for number in grouped.of_row], device=x.device)
    return block.for_rows(each.view(x.size(0), *[1] * (x.ndim - 2), -1))


def _for_themselves(acting: list[DeltaLayer]) -> list[DeltaLayer]:
    """Return the layers that find by themselves the rows that take them, and are in no block."""
    named = {name for layer in acting for name in layer.record.config.children}
    return [ly for ly in acting if ly.routes_itself and ly.record.name not in named]


def _runs(
    stack: Stack, paths: list[list[DeltaLayer]], grouped: Groups, x: Tensor
) -> list[LowRank | None] | None:
    """Return the factors of each group's layers as one pair, or None for a group without layers.

    The result is None if `add_rows` cannot compute all layers of the site.
    """
    if not low_rank.is_eager(x):
        return None
    kept = stack.frozen
    found: list[LowRank | None] = []
    for path in paths:
        run, count = (pairs(path, 0), len(path)) if kept is None else kept.run(path, 0)
        if count < len(path) or (len(run) > 1 if kept is not None else len(run) < len(path)):
            return None
        pair = low_rank.side_by_side(run, x.dtype) if run else None
        if pair is not None and pair.dropout:
            return None
        found.append(pair)
    return None if torch.is_grad_enabled() and not _alike(found, grouped) else found


def _alike(runs: Sequence[LowRank | None], grouped: Groups) -> bool:
    """True if all factors have one rank, and there are more groups than half the rows."""
    sizes = {pair.A.size(0) for pair in runs if pair is not None}
    return len(sizes) == 1 and 2 * len(runs) > len(grouped.of_row)


def add_rows(
    out: Tensor,
    x: Tensor,
    raw: bool,
    grouped: Groups,
    runs: list[LowRank | None],
    frozen: KeptFactors | None,
) -> Tensor:
    """Return `out` with the products of each group's factors added to the group's rows.

    Args:
        out: the module's output [batch, ..., out_features].
        x: its input [batch, ..., in_features].
        raw: `out` may be written to.
        runs: the factors of each group; None for a group without layers.
        frozen: the site's `KeptFactors`, or None.
    """
    batch, traced = len(grouped.of_row), torch.is_grad_enabled()
    out = out if raw or traced else out.clone()
    rows, y = x.reshape(batch, -1, x.size(-1)), out.view(batch, -1, out.size(-1))
    if _alike(runs, grouped):
        pairs = [runs[number] for number in grouped.of_row]
        A, B, scale = _stacked(pairs) if frozen is None else frozen.once(pairs, _stacked)
        h = torch.bmm(low_rank.like(A, x), rows.mT)  # on a CPU up to a third faster than x A^T
        add = torch.baddbmm if traced else Tensor.baddbmm_
        return add(y, h.mT, low_rank.like(B, x).mT, alpha=scale).view_as(out)
    for group, pair in zip(grouped.groups, runs, strict=True):
        if pair is not None:
            B = low_rank.like(pair.B, x)
            h = arithmetic.linear(rows[group.rows].flatten(0, 1), pair.A)
            if isinstance(group.rows, slice):
                y[group.rows].flatten(0, 1).addmm_(h, B.t(), alpha=pair.scale)
            else:
                change = torch.mm(h, B.t()).view(group.count, *y.shape[1:])
                y.index_add_(0, group.rows, change, alpha=pair.scale)
    return out


def _stacked(pairs: Sequence[LowRank | None]) -> tuple[Tensor, Tensor, float]:
    """Return A [batch, rank, in_features], B [batch, out_features, rank] and the common scale."""
    known = nothing = next(pair for pair in pairs if pair is not None)
    if None in pairs:
        nothing = known._replace(A=known.A.detach(), B=torch.zeros_like(known.B.detach()))
    each = [nothing if pair is None else pair for pair in pairs]
    A, B = torch.stack([pair.A for pair in each]), torch.stack([pair.B for pair in each])
    if all(pair.scale == known.scale for pair in each):
        return A, B, known.scale
    wide = torch.promote_types(B.dtype, torch.float32)
    scales = torch.tensor([pair.scale for pair in each], dtype=wide, device=B.device)
    return A, B * scales[:, None, None], 1.0
