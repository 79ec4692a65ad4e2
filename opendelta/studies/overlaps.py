"""Compare the changes that deltas make to one weight: directions, and the spaces they span."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._backbone.backbone import Backbone
from .._layers.base import Acts
from .._layers.bound import arranged
from .._layers.record import Record
from .._modules.tensors import full
from .._sites.merged import change_of
from ..errors import SiteError, quoted
from .interference_report import Overlap, Spaces

ENERGY = 0.99  # share of |D|^2 in the directions that count as the space of D
WIDE: Any = {"device": "cpu", "dtype": torch.float64}


class Change(NamedTuple):
    """A change of a weight D = U diag(S) V^T.

    Attributes:
        U: [out, rank], with orthonormal columns.
        S: [rank], from the largest on.
        V: [in, rank], with orthonormal columns.
        is_matrix: D is a matrix, and not the weight of a normalisation, which spans no space.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    is_matrix: bool = True

    def norm(self) -> float:
        """Return |D|, the root of the sum of all squared entries."""
        return float(self.S.norm())

    def space(self, side: str) -> Tensor:
        """Return an orthonormal basis of the effective column space, "U", or row space, "V"."""
        shares = self.S.square().cumsum(0) / self.S.square().sum()
        return getattr(self, side)[:, : 1 + int((shares < ENERGY).sum())]

    def dot(self, other: Change) -> float:
        """Return the sum of the products of all entries of two changes."""
        products = (self.U.T @ other.U) * (self.V.T @ other.V)
        return float(self.S @ products @ other.S)


def _of_factors(A: Tensor, B: Tensor, scale: float) -> Change:
    """Return scale B A; the product is not built."""
    A, B = (full(t.detach()).to(**WIDE) for t in (A, B))
    left, right = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vt = torch.linalg.svd(scale * left.R @ right.R.T)
    count = len(S)
    return Change(left.Q @ U[:, :count], S, right.Q @ Vt[:count].T)


def _of_matrix(D: Tensor, is_matrix: bool) -> Change:
    D = D if is_matrix else D.reshape(-1, 1)
    U, S, Vt = torch.linalg.svd(D, full_matrices=False)
    return Change(U.to(**WIDE), S.to(**WIDE), Vt.T.to(**WIDE), is_matrix)


def _change(backbone: Backbone, where: str, layers: Sequence[Any]) -> Change | None:
    """Return the change of the weight of a module that layers make alone; None: they make none.

    Raises:
        SiteError: it cannot be read.
    """
    own = arranged([layer for layer in layers if layer.acts is not Acts.SERVES])
    if len(own) != 1 or not own[0].folds:
        return None
    with torch.no_grad():
        pair = own[0].folds_as()
        if pair is not None:
            change = _of_factors(pair.A, pair.B, pair.scale)
        else:
            D, _ = change_of(where, backbone.modules[where], own[0])
            change = _of_matrix(D, D.ndim == 2)
    return change if change.norm() > 0 else None


def overlaps(
    backbone: Backbone, players: dict[str, frozenset[Record]], not_compared: list[str]
) -> dict[tuple[str, str], dict[str, Overlap]]:
    """Return {two deltas: {full name of a module: the overlap of their changes of its weight}}.

    Args:
        players: {name: the delta of this name, and those that act with it}.
        not_compared: gets the changes that cannot be read, each with the reason.
    """
    found: dict[tuple[str, str], dict[str, Overlap]] = {}
    for where, stack in backbone.stacks.items():
        changes: dict[str, Change] = {}
        for name, records in players.items():
            layers = [layer for layer in stack.values() if layer.record in records]
            try:
                change = _change(backbone, where, layers)
            except SiteError as error:
                not_compared.append(f"the weight change of {name} on {quoted(where)}: {error}")
                continue
            if change is not None:
                changes[name] = change
        names = list(changes)
        for index, first in enumerate(names):
            for second in names[index + 1 :]:
                both = _overlap(changes[first], changes[second])
                found.setdefault((first, second), {})[where] = both
    return found


def _overlap(one: Change, other: Change) -> Overlap:
    both = one.is_matrix and other.is_matrix
    spaces = [_spaces(one.space(s), other.space(s)) if both else None for s in ("U", "V")]
    return Overlap(one.dot(other), (one.norm(), other.norm()), *spaces)


def _spaces(one: Tensor, other: Tensor) -> Spaces:
    """Compare the spans of two orthonormal bases.

    The angles are computed from sines too, as cosines near 1 are not exact.
    """
    if one.size(1) > other.size(1):
        one, other = other, one
    _, cosines, Zt = torch.linalg.svd(other.T @ one, full_matrices=False)
    principal = one @ Zt.T
    sines = torch.linalg.vector_norm(principal - other @ (other.T @ principal), dim=0)
    angles = torch.atan2(sines, cosines).rad2deg().tolist()
    return Spaces(angles, other.size(1) / other.size(0))
