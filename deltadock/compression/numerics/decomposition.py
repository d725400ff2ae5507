"""Leading singular triples of a delta, at less cost than the whole SVD.

The left vectors are eigenvectors of the Gram matrix of the shorter side. For many ranks of a small
matrix they are computed by its eigendecomposition in float64. Otherwise a block of vectors is
iterated in float32, mostly by matrix products: Chebyshev polynomials of the Gram matrix damp the
eigenvalues below the block (Zhou and Saad, 2007, filtered subspace iteration). The last step is in
float64, from the matrix itself, where the residual is checked.
"""

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

DENSE_SIZE: Final = 1024
"""Up to this many rows (of the shorter side) the eigendecomposition is faster."""

DENSE_SHARE: Final = 3
"""Iteration pays while the block is at most this fraction of the shorter side."""

TOLERANCE: Final = 0.02
"""Largest residual of a wanted triple, `|D D^T u - s^2 u|` in units of `s^2`."""

STEEPEST: Final = 1e-5
"""Smallest wanted eigenvalue above float32's rounding of the largest, as a fraction of it."""

PASSES: Final = 12
GROWTH: Final = 1e9
"""Largest amplification of the top eigenvalue over the damped ones by a filter, in float32."""

RESOLUTION: Final = 1e-6
"""Singular values below this fraction of the largest are float32 rounding errors."""

FALLBACK: Final = "dense decomposition, as iteration in float32 would not do"


class Decomposition(NamedTuple):
    """`delta ~ u @ diag(s) @ v`: u (h_out, k), s (k,) descending, v (k, h_in), float32.

    `fallback` is None, or says in words why the dense decomposition was used.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    fallback: str | None


def decompose(deltas: Tensor, ranks: int) -> list[Decomposition]:
    """The leading `ranks` singular triples of b matrices; fewer if the others are rounding errors.

    At least one is returned. The largest entry of each row of `v` is made positive, so that equal
    inputs give equal bytes whatever sign an eigensolver returns.

    Args:
        deltas: (b, h_out, h_in), any float dtype.
        ranks: number of triples, at least 1.
    """
    wide = deltas if deltas.shape[1] <= deltas.shape[2] else deltas.mT
    size = wide.shape[1]
    ranks = min(ranks, size)
    block = min(size, ranks + max(16, ranks // 10))
    found: dict[int, Decomposition] = {}
    iterated = size > DENSE_SIZE and block <= size // DENSE_SHARE
    if iterated:
        for number, matrix in enumerate(wide):
            basis = _iterate(matrix, ranks, block)
            if basis is not None:
                exact = matrix.double()[None]
                right = basis.t() @ exact
                # Within the basis, the triples are those of a small matrix.
                turn = _leading(right @ right.mT, ranks)
                (found[number],) = _triples(basis @ turn, turn.mT @ right, wide is deltas, None)
    dense = [number for number in range(len(wide)) if number not in found]
    if dense:
        exact = (wide if len(dense) == len(wide) else wide[dense]).double()
        left = _leading(exact @ exact.mT, ranks)
        fallback = FALLBACK if iterated else None
        made = _triples(left, left.mT @ exact, wide is deltas, fallback)
        found |= zip(dense, made, strict=True)
    return [found[number] for number in range(len(wide))]


def _triples(
    left: Tensor, right: Tensor, upright: bool, fallback: str | None
) -> list[Decomposition]:
    """Decompositions from left vectors (b, size, k) and their images (b, k, length), float64.

    `upright`: the left vectors are U's; else V's.
    """
    s = torch.linalg.vector_norm(right, dim=2)
    kept = (s > RESOLUTION * s[:, :1]).sum(1).clamp_min(1).tolist()
    right = right / s.clamp_min(torch.finfo(torch.float64).tiny)[:, :, None]
    u, v = (left, right) if upright else (right.mT, left.mT)
    peak = v.abs().argmax(dim=2, keepdim=True)
    sign = torch.where(v.gather(2, peak) < 0, -1.0, 1.0)
    u, s, v = (u * sign.mT).float(), s.float(), (v * sign).float()
    return [
        Decomposition(u[number, :, :count], s[number, :count], v[number, :count], fallback)
        for number, count in enumerate(kept)
    ]


def _leading(gram: Tensor, count: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues of (b, n, n), descending, one per column."""
    vectors: Tensor = torch.linalg.eigh((gram + gram.mT) / 2).eigenvectors
    return vectors[..., -count:].flip(-1)


def _iterate(wide: Tensor, ranks: int, block: int) -> Tensor | None:
    """Orthonormal basis (size, block) float64 of the leading left vectors.

    None if the residual of a wanted vector stays above `TOLERANCE`.
    """
    work = wide.float()
    norm = torch.linalg.matrix_norm(work)
    if norm == 0:
        return None
    work = work / norm
    gram = work @ work.t()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(gram), block, generator=generator).to(gram.device)
    basis = torch.linalg.qr(gram @ start).Q
    for _ in range(PASSES):
        image = gram @ basis
        values, turn = torch.linalg.eigh(basis.t() @ image)
        values, turn = values.flip(0), turn.flip(1)
        basis, image = basis @ turn, image @ turn
        if values[ranks - 1] <= STEEPEST * values[0]:
            return None
        residual = torch.linalg.vector_norm(image - basis * values, dim=0)
        if (residual <= TOLERANCE * values)[:ranks].all():
            return _finish(wide.double(), basis, ranks)
        basis = torch.linalg.qr(_filter(gram, basis, image, values)).Q
    return None


def _filter(gram: Tensor, basis: Tensor, image: Tensor, values: Tensor) -> Tensor:
    """Apply a Chebyshev polynomial of the Gram matrix to the basis, damping [0, last value]."""
    edge, top = max(float(values[-1]), STEEPEST * float(values[0]) / 10), float(values[0])
    degree = max(1, int(math.acosh(GROWTH) / math.acosh(max(2 * top / edge - 1, 1.01))))
    before, after = basis, (2 / edge) * image - basis
    for _ in range(degree - 1):
        before, after = after, torch.addmm(before + 2 * after, gram, after, beta=-1, alpha=4 / edge)
    length: Tensor = torch.linalg.vector_norm(after, dim=0)
    return after / length


def _finish(wide: Tensor, basis: Tensor, ranks: int) -> Tensor | None:
    """One step in float64, and the residual against the matrix itself."""
    basis = torch.linalg.qr(basis.double()).Q
    right = basis.t() @ wide
    image = wide @ right.t()
    residual = torch.linalg.vector_norm(image - basis @ (right @ right.t()), dim=0)
    values = right.square().sum(dim=1)
    if (residual > TOLERANCE * values)[:ranks].any():
        return None
    finished: Tensor = torch.linalg.qr(image).Q
    return finished
