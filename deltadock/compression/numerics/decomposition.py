"""Leading singular triples of a delta, at less cost than the whole SVD.

The left vectors are eigenvectors of the Gram matrix of the shorter side. For many ranks of a small
matrix they are computed by its eigendecomposition in float64. Otherwise a block of vectors is
iterated in float32, mostly by matrix products: Chebyshev polynomials of the Gram matrix damp the
eigenvalues below the block (Zhou and Saad, 2007, filtered subspace iteration). The last step is in
float64, from the matrix itself, where the residual is checked.

Matrices of equal shape are iterated together; each leaves the batch when it has converged.
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

    `rest`, (m,), are the singular values after those; iteration computes none. `fallback` is None,
    or says in words why the dense decomposition was used.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    rest: Tensor
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
        numbers, basis = _iterate(wide, ranks, block)
        if numbers:
            exact = wide[numbers].double()
            right = basis.mT @ exact
            # Within the basis, the triples are those of a small matrix.
            turn, _ = _leading(right @ right.mT, ranks)
            none = right.new_empty(len(right), 0)
            made = _triples(basis @ turn, turn.mT @ right, none, wide is deltas, None)
            found |= zip(numbers, made, strict=True)
    dense = [number for number in range(len(wide)) if number not in found]
    if dense:
        exact = (wide if len(dense) == len(wide) else wide[dense]).double()
        left, rest = _leading(exact @ exact.mT, ranks)
        fallback = FALLBACK if iterated else None
        made = _triples(left, left.mT @ exact, rest, wide is deltas, fallback)
        found |= zip(dense, made, strict=True)
    return [found[number] for number in range(len(wide))]


def _triples(
    left: Tensor, right: Tensor, rest: Tensor, upright: bool, fallback: str | None
) -> list[Decomposition]:
    """Decompositions from left vectors (b, size, k) and their images (b, k, length), float64.

    `rest`, (b, m), are the squares of the singular values after those. `upright`: the left vectors
    are U's; else V's.
    """
    s = torch.linalg.vector_norm(right, dim=2)
    kept = (s > RESOLUTION * s[:, :1]).sum(1).clamp_min(1).tolist()
    right = right / s.clamp_min(torch.finfo(torch.float64).tiny)[:, :, None]
    u, v = (left, right) if upright else (right.mT, left.mT)
    peak = v.abs().argmax(dim=2, keepdim=True)
    sign = torch.where(v.gather(2, peak) < 0, -1.0, 1.0)
    u, s, v = (u * sign.mT).float(), s.float(), (v * sign).float()
    others = [
        one[one > RESOLUTION * first]
        for one, first in zip(rest.sqrt().float(), s[:, 0], strict=True)
    ]
    return [
        Decomposition(
            u[number, :, :count], s[number, :count], v[number, :count], others[number], fallback
        )
        for number, count in enumerate(kept)
    ]


def _leading(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the largest eigenvalues of (b, n, n), one per column, and the others'
    eigenvalues (b, n - count), each descending.
    """
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    return vectors[..., -count:].flip(-1), values[:, :-count].flip(-1).clamp_min(0)


def _iterate(wide: Tensor, ranks: int, block: int) -> tuple[list[int], Tensor]:
    """Orthonormal bases (size, block) float64 of the leading left vectors of b matrices.

    Returns:
        Numbers of the matrices of which the residual of every wanted vector came below `TOLERANCE`,
        and their bases.
    """
    work = wide.float()
    norm = torch.linalg.matrix_norm(work)
    left = norm.nonzero().flatten()
    work = work[left] / norm[left, None, None]
    gram = work @ work.mT
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(wide.shape[1], block, generator=generator).to(gram.device)
    basis = torch.linalg.qr(gram @ start).Q
    numbers: list[int] = []
    bases = [basis.new_empty(0, *basis.shape[1:], dtype=torch.float64)]
    for _ in range(PASSES):
        if not len(left):
            break
        image = gram @ basis
        values, turn = torch.linalg.eigh(basis.mT @ image)
        values, turn = values.flip(1), turn.flip(2)
        basis, image = basis @ turn, image @ turn
        residual = torch.linalg.vector_norm(image - basis * values[:, None], dim=1)
        steep = values[:, ranks - 1] <= STEEPEST * values[:, 0]
        done = (residual <= TOLERANCE * values)[:, :ranks].all(1) & ~steep
        if done.any():
            finished, converged = _finish(wide[left[done]].double(), basis[done], ranks)
            numbers += left[done][converged].tolist()
            bases.append(finished[converged])
        going = ~(done | steep)
        left, gram = left[going], gram[going]
        filtered = _filter(gram, basis[going], image[going], values[going])
        basis = torch.linalg.qr(filtered).Q
    return numbers, torch.cat(bases)


def _filter(gram: Tensor, basis: Tensor, image: Tensor, values: Tensor) -> Tensor:
    """Apply a Chebyshev polynomial of each Gram matrix to its basis, damping [0, last value]."""
    edge = values[:, -1].maximum(STEEPEST * values[:, 0] / 10)
    growth = (2 * values[:, 0] / edge - 1).clamp_min(1.01)
    degrees = (math.acosh(GROWTH) / growth.double().acosh()).long().clamp_min(1)
    scale = (2 / edge)[:, None, None]
    doubled = 2 * scale * gram
    before, after = basis, scale * image - basis
    for degree in range(1, max(degrees.tolist(), default=0)):
        following = torch.baddbmm(before + 2 * after, doubled, after, beta=-1)
        going = (degree < degrees)[:, None, None]
        before, after = after, torch.where(going, following, after)
    length: Tensor = torch.linalg.vector_norm(after, dim=1, keepdim=True)
    return after / length


def _finish(wide: Tensor, basis: Tensor, ranks: int) -> tuple[Tensor, Tensor]:
    """One step in float64; whether the residuals against the matrices themselves are small."""
    basis = torch.linalg.qr(basis.double()).Q
    right = basis.mT @ wide
    image = wide @ right.mT
    residual = torch.linalg.vector_norm(image - basis @ (right @ right.mT), dim=1)
    values = right.square().sum(2)
    converged = (residual <= TOLERANCE * values)[:, :ranks].all(1)
    return torch.linalg.qr(image).Q, converged
