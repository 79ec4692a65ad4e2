"""Rows of one batch that take different deltas: what `route` sets up, and how a site follows it.

At a site, rows that take the same of its layers are a group. The module's own forward runs once for
all rows, and each group's layers see its rows of what went in and came out. Low-rank layers beside
a linear module are added to the rows of its output, and rows with factors of one size in a single
batched product.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import labels, layers, merging, neighbours, products
from .addressing import ancestors, survey
from .attention import PrefixLayer
from .bases import DeltaLayer, OwnedModule, SharedTensors
from .blocks import block
from .composition import Composition
from .errors import DeltaError, SiteError, called
from .labels import LabelsLayer
from .products import LowRank
from .prompting import CrossMask, PromptLayer, Strip
from .rows import Cells, Groups, Once, Rows, ShapeError, cut, joined

if TYPE_CHECKING:
    from .delta import Delta
    from .record import Record
    from .site import Stack

SILENT = (SharedTensors, LabelsLayer)  # they compute nothing
PROMPTS = (PromptLayer, CrossMask, Strip)
EXPERTS = re.compile(r"(^|\.)experts\.")  # they see some tokens of all rows
OWN_BATCH = "give such rows a batch of their own"


class Routed:
    """How the rows of a batch go through one site while `route` lasts.

    A copy of it, by deepcopy or pickle, is None: the copy of a model is not routed.

    Args:
        where: the full name of the site.
        rows: what all sites of the model share.
        holds_sites: whether there are other sites inside the site's module.
    """

    def __init__(self, where: str, rows: Rows, holds_sites: bool) -> None:
        self.where, self.rows, self.holds_sites = where, rows, holds_sites

    def __reduce__(self) -> tuple:
        return type(None), ()

    def check_alike(self, acting: Sequence[DeltaLayer]) -> None:
        """Raise unless all rows take the same of these layers."""
        for layer in acting:
            self.check_common(layer, "acts on the weight that the module around it reads")

    def check_common(self, layer: DeltaLayer, why: str) -> None:
        """Raise unless all rows take the layer, or none does."""
        if len(set(self.rows.takers(layer.record.name))) > 1:
            raise SiteError(
                f"{layer.record.name!r} on {called(self.where)} {why}, so that it acts on all rows "
                f"of a batch or on none: {OWN_BATCH}"
            )

    def check(self, stack: Stack, module: nn.Module) -> None:
        """Raise if the stack has layers that cannot act on some rows alone."""
        acting: list[Any] = [
            layer
            for name, layer in stack._modules.items()
            if layer.record.active and not (stack.steps and stack.holds(name))  # type: ignore
        ]
        for layer in acting if EXPERTS.search(self.where) else ():
            self.check_common(layer, "sees some tokens of all rows, mixed")
        for layer in [ly for ly in acting if isinstance(ly, PROMPTS)]:
            self.check_common(layer, "changes the length of the rows that take it")
            for other in _computing(acting):
                self.check_common(other, f"acts beside {layer.record.name!r}, a prompt")
        for layer in [ly for ly in acting if ly.flow == "within"]:
            if not isinstance(layer, PrefixLayer):
                self.check_common(layer, "acts inside the module")
        heads = [layer for layer in acting if isinstance(layer, LabelsLayer)]
        if heads:
            self._check_labels(heads, labels.count_of(module))

    def _check_labels(self, heads: list[LabelsLayer], own: int | None) -> None:
        counts = [own] * len(self.rows.names)
        for layer in heads:  # the last one decides
            takes = self.rows.takers(layer.record.name)
            counts = [layer.count if t else n for t, n in zip(takes, counts, strict=True)]
        if len(set(counts)) > 1:
            raise SiteError(
                f"the rows of route() have heads for {counts} labels, which fit into no one "
                f"batch: {OWN_BATCH}"
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
        """`call`, the forward of `module`, with each row's own of the acting layers around it."""
        acting = _computing(acting)
        if not acting:
            return call(*args, **kwargs)
        if "_is_replica" in module.__dict__:
            raise SiteError("route() does not know which rows DataParallel gives to which device")
        x = next((x for x in layers.every(Tensor, [args, kwargs]) if x.ndim), None)
        if x is None:
            raise SiteError(f"no rows to route: no tensor goes into {called(self.where)}")
        grouped = self.rows.groups(acting, x, self.where)
        if len(grouped.groups) == 1:
            path = [acting[index] for index in grouped.groups[0].path]
            return stack.onion(path, call, module, raw)(*args, **kwargs)
        runs, whole = _runs(stack, acting, grouped, x), []
        if runs is not None:
            out = call(*args, **kwargs)
            if type(out) is Tensor and out.dtype == x.dtype and out.is_contiguous():
                return add_rows(out, x, raw, grouped, runs, stack.frozen)
            whole.append(out)
        within: list[Any] = [layer for layer in acting if isinstance(layer, PrefixLayer)]
        if within:  # they know all rows; see `opened`
            call = stack.onion(within, call, module, raw)
        once = Once(call, (args, kwargs), len(grouped.of_row), whole)
        why = "has other deltas inside" if self.holds_sites else ""
        why = "has a prefix inside" if within else why
        paths = [[acting[index] for index in group.path] for group in grouped.groups]
        paths = [[layer for layer in path if layer not in within] for path in paths]
        around = functools.partial(stack.onion, module=module, raw=False)
        return self._in_groups(around, grouped, paths, once, why)

    def _in_groups(
        self,
        around: Callable[[list[DeltaLayer], Callable[..., Any]], Callable[..., Any]],
        grouped: Groups,
        paths: list[list[DeltaLayer]],
        once: Once,
        whole: str,
    ) -> Any:
        """What the layers of each group make of its rows, put together.

        Args:
            around: puts layers around a call.
            paths: the layers of each group.
            whole: why the module cannot run on the rows of one group alone, if so.
        """
        cells, parts = Cells([layer for path in paths for layer in path]), []
        for group, path in zip(grouped.groups, paths, strict=True):
            given = cut(once.given, once.batch, group.rows)
            if path and isinstance(path[0], OwnedModule):
                self._check_alone(path[0], given, "")
            check = functools.partial(self._check_alone, path[0] if path else None, given, whole)
            inner = functools.partial(once.for_rows, group.rows, given, check)
            cells.open(group.rows)
            parts.append(around(path, inner)(*given[0], **given[1]))
            cells.close(group.rows, once.batch)
        cells.leave()
        try:
            return joined(parts, grouped)
        except ShapeError as error:
            names = [[layer.record.name for layer in path] for path in paths]
            raise SiteError(
                f"rows with {names} get outputs of {called(self.where)} of the shapes {error}, "
                f"which fit into no one batch: {OWN_BATCH}"
            ) from None

    def _check_alone(self, layer: Any, given: tuple, why: str) -> None:
        """Raise if the module cannot run on the rows of one group alone.

        Args:
            layer: the innermost of the group's layers.
            given: the arguments and keyword arguments for its rows.
            why: a reason that is known, if any.
        """
        args, kwargs = given
        if any(hasattr(value, "get_seq_length") for value in (*args, *kwargs.values())):
            why = "fills a KV cache"
        if why:
            raise SiteError(
                f"{layer.record.name!r} lets {called(self.where)} run on its rows by themselves, "
                f"but that {why}, for all rows at once: {OWN_BATCH}"
            )

    def opened(self, layer: DeltaLayer, logit: Tensor | None, key: Tensor) -> Tensor | None:
        """The log of what weighs a prefix [batch, length or 1, 1], 0 for rows without it.

        Args:
            logit: the same for rows that all take it; None: 0 everywhere.
            key: the keys [batch, ...].
        """
        groups = self.rows.groups([layer], key, self.where).groups
        if all(group.path for group in groups):
            return logit
        closed = key.new_zeros(key.size(0), 1, 1)
        for group in groups:
            if not group.path:
                closed[group.rows] = float("-inf")
        return closed if logit is None else logit + closed


def _computing(acting: list[DeltaLayer]) -> list[DeltaLayer]:
    return [layer for layer in acting if not isinstance(layer, SILENT)]


def _as_lists(rows: Any) -> list[Any]:
    """The deltas of each row, as a list."""
    if isinstance(rows, str | Mapping) or not isinstance(rows, Collection) or not rows:
        raise DeltaError(
            f"route(model, rows) takes one entry for each row of the batch, such as "
            f"[['fr'], ['de', 'legal'], []] or ['fr', 'de', None], not {rows!r}"
        )
    several = (list, tuple, set, frozenset)
    return [[] if row is None else list(row) if isinstance(row, several) else [row] for row in rows]


# -------------------------------------------------------------------------------- low-rank products
def _runs(
    stack: Stack, acting: list[DeltaLayer], grouped: Groups, x: Tensor
) -> list[LowRank | None] | None:
    """The factors of each group as one pair, None for no layers; None if `add_rows` is not all."""
    if not products._is_eager(x):
        return None
    pairs = neighbours.pairs(acting, 0) if stack.frozen is None else []
    if stack.frozen is None and len(pairs) < len(acting):
        return None
    found: list[LowRank | None] = []
    for group in grouped.groups:
        path = group.path
        if stack.frozen is not None and path:
            run, count = stack.frozen.run([acting[index] for index in path], 0)
            if count < len(path) or len(run) > 1:
                return None
            pair: LowRank | None = run[0]
        elif len(path) > 1:
            pair = products.side_by_side([pairs[index] for index in path])
        else:
            pair = pairs[path[0]] if path else None
        if pair is not None and pair.dropout:
            return None
        found.append(pair)
    return None if torch.is_grad_enabled() and not _alike(found, grouped) else found


def _alike(runs: Sequence[LowRank | None], grouped: Groups) -> bool:
    """Whether the rows' factors are of one size, and not the same for several rows each."""
    sizes = {(pair.A.size(0), pair.scale) for pair in runs if pair is not None}
    return len(sizes) == 1 and 2 * len(runs) > len(grouped.of_row)


def add_rows(
    out: Tensor,
    x: Tensor,
    raw: bool,
    grouped: Groups,
    runs: list[LowRank | None],
    frozen: neighbours.Frozen | None,
) -> Tensor:
    """`out` with the products of each group's factors added to its rows.

    Args:
        out: what the module gave [batch, ..., out_features].
        x: its input [batch, ..., in_features].
        raw: `out` may be written to.
        runs: the factors of each group; None: it has none.
        frozen: what keeps them, if anything does.
    """
    batch, traced = len(grouped.of_row), torch.is_grad_enabled()
    out = out if raw or traced else out.clone()
    rows, y = x.reshape(batch, -1, x.size(-1)), out.view(batch, -1, out.size(-1))
    if _alike(runs, grouped):
        pairs = [runs[number] for number in grouped.of_row]
        A, B, scale = _stacked(pairs) if frozen is None else frozen.once(pairs, _stacked)
        h = torch.bmm(products._like(A, x), rows.mT)  # on a CPU up to a third faster than x A^T
        add = torch.baddbmm if traced else Tensor.baddbmm_
        return add(y, h.mT, products._like(B, x).mT, alpha=scale).view_as(out)
    for group, pair in zip(grouped.groups, runs, strict=True):
        if pair is not None:
            B = products._like(pair.B, x)
            h = layers.linear(rows[group.rows].flatten(0, 1), pair.A)
            if isinstance(group.rows, slice):
                y[group.rows].flatten(0, 1).addmm_(h, B.t(), alpha=pair.scale)
            else:
                change = torch.mm(h, B.t()).view(group.count, *y.shape[1:])
                y.index_add_(0, group.rows, change, alpha=pair.scale)
    return out


def _stacked(pairs: Sequence[LowRank | None]) -> tuple[Tensor, Tensor, float]:
    """A [batch, rank, in_features], B [batch, out_features, rank] and the scale of all rows."""
    known = nothing = next(pair for pair in pairs if pair is not None)
    if None in pairs:
        nothing = known._replace(A=known.A.detach(), B=torch.zeros_like(known.B.detach()))
    each = [nothing if pair is None else pair for pair in pairs]
    A, B = torch.stack([pair.A for pair in each]), torch.stack([pair.B for pair in each])
    return A, B, known.scale


# ---------------------------------------------------------------------------------------- the verb
@block
def route(
    model: nn.Module,
    rows: Sequence[str | Delta | Collection[str | Delta] | None],
    repeats: int = 1,
) -> Iterator[Composition]:
    """Let each row of a batch take its own deltas inside a `with` block, in training too.

    Row i is computed as if just the deltas of `rows[i]` were enabled, in the composition's order,
    and its gradients reach just those. A row is a row of axis 0 of what goes into each module with
    deltas: a module that takes the sequence first, as torch's do by default, is not for it. The
    model's own forward runs once for all rows, as far as the deltas leave what goes into their
    modules as it is.

    A delta that is disabled outside is enabled for the rows that name it; one that is switched off
    inside acts on no row. Another `route` inside takes the place of this one until it ends. Like
    all switches it is the model's, and so seen by all threads; `shared_copy` gives each its own
    model. With activation checkpointing call `backward()` inside, as it runs the model again.

    Args:
        rows: for each row the names or handles of its attached deltas, or just one; [] or None is
            the plain backbone.
        repeats: how many rows in a row a batch may have for each of those too: `num_beams` or
            `num_return_sequences` of `generate()`, whichever is more.

    Raises:
        DeltaError: no such delta is attached; one is merged, and not all rows take it; or one
            cannot act on some rows alone, such as a soft prompt or a head for other labels. Later,
            from the forward: the batch has another number of rows.

    Example:
        >>> import torch
        >>> import opendelta
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> fr = opendelta.LoraModel(model, modified_modules=["0"], name="fr")
        >>> de = opendelta.LoraModel(model, modified_modules=["0"], name="de")
        >>> with opendelta.route(model, ["fr", ["fr", "de"], None]):
        ...     out = model(torch.ones(3, 8))
    """
    if not isinstance(repeats, int) or repeats < 1:
        raise DeltaError(f"route(repeats={repeats!r}) must be a whole number of at least 1")
    composed = Composition(model)
    records = composed._records()
    lists = _as_lists(rows)
    named = iter(composed._named([name for row in lists for name in row], records))
    taken = [{next(named) for _ in row} for row in lists]
    chosen = set().union(*taken)
    for record in records:
        if any(record not in row for row in taken):
            merging.check_apart(record, "cannot route rows around")
    names = [frozenset(record.name for record in row) for row in taken]
    shared = Rows(names, frozenset(record.name for record in records), repeats)
    found = survey(model)
    before = [(record, record.active) for record in records]
    around = {name for site in found.stacks for name in ("", *ancestors(site)) if name != site}
    kept = [(stack, stack.routed) for stack in found.stacks.values()]
    for record in records:
        record.active = record in chosen
    for where, stack in found.stacks.items():
        stack.__dict__["routed"] = Routed(where, shared, where in around)
    try:
        for where, stack in found.stacks.items():
            stack.routed.check(stack, found.modules[where])  # type: ignore[union-attr]
        yield composed
    finally:
        _leave(shared, kept, before)


def _leave(
    own: Rows, kept: list[tuple[Stack, Routed | None]], before: list[tuple[Record, bool]]
) -> None:
    """End a block: everything is as before it.

    Args:
        own: what the block set up.
        kept: the stacks, and what they followed before.
        before: the deltas, and whether they acted before.

    Raises:
        DeltaError: a block inside has not ended. Nothing is routed then.
    """
    now = [stack.routed for stack, _ in kept]
    if any(now) or not kept:  # or else a block around, which ended first, has put all back
        for record, active in before:
            record.active = active
    in_order = all(routed is not None and routed.rows is own for routed in now)
    for stack, outer in kept:
        stack.__dict__.pop("routed", None)  # not None: as it was, for what is compiled
        if in_order and outer is not None:
            stack.__dict__["routed"] = outer
    if not in_order:
        raise DeltaError(
            "blocks of route() must end in the reverse of the order in which they began; now no "
            "row is routed. Give each task its own opendelta.shared_copy(model)"
        )
