"""Functions of small matrices, also in the operations that an ONNX file can hold."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 32  # of Newton's iteration: enough where rounding leaves an inverse any digits


def orthonormal(matrix: Tensor) -> Tensor:
    """Return the Q [rows, columns] of the QR decomposition of a matrix with at least as many rows.

    In an export to ONNX, by Householder reflections as LAPACK chooses them.
    """
    if not torch.onnx.is_in_onnx_export():
        return torch.linalg.qr(matrix).Q
    rows, columns = matrix.shape
    number = torch.arange(rows, device=matrix.device)
    rest, mirrors = matrix, []
    for k in range(min(columns, rows - 1)):
        below = rest[:, k] * (number >= k)
        u = below + (number == k) * torch.where(below[k] < 0, -1, 1) * below.norm()
        mirrors.append(u / u.norm())
        rest = _reflected(rest, mirrors[-1])
    Q = torch.eye(rows, columns, dtype=matrix.dtype, device=matrix.device)
    for u in reversed(mirrors):
        Q = _reflected(Q, u)
    return Q


def _reflected(matrix: Tensor, u: Tensor) -> Tensor:
    return matrix - 2 * u[:, None] * (u @ matrix)


def cayley(Q: Tensor) -> Tensor:
    """Return the rotations (I - Q) (I + Q)^-1 for Q [..., size, size] with Q = -Q^T.

    In an export to ONNX, by Newton's iteration for the inverse.
    """
    one = torch.eye(Q.size(-1), dtype=Q.dtype, device=Q.device)
    if not torch.onnx.is_in_onnx_export():
        return torch.linalg.solve(one + Q, one - Q, left=False)
    inverse = (one - Q) / (one + Q).abs().sum(-1).amax(-1)[..., None, None].square()
    for _ in range(STEPS):
        inverse = inverse @ (2 * one - (one + Q) @ inverse)
    return (one - Q) @ inverse
