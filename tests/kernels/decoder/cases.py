"""Cases of a decoder layer's small operations against float64."""

import os
from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from deltadock.kernels.decoder import (
    Activation,
    CacheRows,
    Rotation,
    RowNorm,
    reference,
    triton,
)

DEVICE: Final = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE: Final = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SLOTS, ROWS = 3, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_norm(width: int, dtype: torch.dtype, seed: int) -> RowNorm:
    """Slots with weights, of this dtype, and epsilons of their own; one epsilon is large."""
    weights = 1 + 0.3 * normal(SLOTS, width, seed=seed)
    return RowNorm(weights.to(DEVICE, dtype), torch.tensor([1e-6, 0.5, 1e-5], device=DEVICE))


def exact_norm(norm: RowNorm) -> RowNorm:
    return RowNorm(norm.weights.double(), norm.epsilons.double())


def row_slots() -> Tensor:
    return torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)


def check(got: Tensor, want: Tensor) -> None:
    error = (got.double() - want).norm() / want.norm()
    assert error < TOLERANCE[got.dtype], error


def norms(dtype: torch.dtype, width: int, weights: torch.dtype | None = None) -> None:
    """With and without the residual; rows are apart from each other."""
    x, residual = normal(2, ROWS, width + 3).to(DEVICE, dtype)[:, :, :width]
    norm, slots = make_norm(width, weights or dtype, seed=1), row_slots()
    check(triton.rms_norm(x, norm, slots), reference.rms_norm(x.double(), exact_norm(norm), slots))
    total, got = triton.add_rms_norm(x, residual, norm, slots)
    assert torch.equal(total, x + residual)
    check(got, reference.rms_norm(total.double(), exact_norm(norm), slots))


def rotation(
    dtype: torch.dtype,
    heads: tuple[int, int],
    width: int,
    *,
    normed: bool,
    rotated: int | None = None,
    factors: torch.dtype | None = None,
) -> None:
    """Rows of two sequences; what they do not write of the cache stays.

    `factors` is the dtype of cosines, sines and norms' weights.
    """
    factors = factors or dtype
    projected = normal(ROWS, (heads[0] + 2 * heads[1]) * width).to(DEVICE, dtype)
    angles = 3 * normal(ROWS, (rotated or width) // 2, seed=1).repeat(1, 2)
    turn = Rotation(angles.cos().to(DEVICE, factors), angles.sin().to(DEVICE, factors))
    pair = (make_norm(width, factors, 2), make_norm(width, factors, 3)) if normed else None
    keys, values = torch.full((2, 2, heads[1], 7, width), torch.nan, device=DEVICE, dtype=dtype)
    slots, positions = (torch.tensor(n, device=DEVICE) for n in ([1, 0, 1], [5, 0, 6]))
    rows = CacheRows(keys, values, slots, positions)
    query = triton.rotate_and_store(projected, turn, rows, pair, row_slots())
    exact = rows._replace(keys=keys.double(), values=values.double())
    want = reference.rotate_and_store(
        projected.double(),
        Rotation(turn.cos.double(), turn.sin.double()),
        exact,
        None if pair is None else (exact_norm(pair[0]), exact_norm(pair[1])),
        row_slots(),
    )
    check(query, want)
    written = (slots, slice(None), positions)
    check(keys[written], exact.keys[written])
    assert torch.equal(values[written].double(), exact.values[written])
    assert int(keys.isnan().sum()) == int(values.isnan().sum()) == (2 * 7 - 3) * heads[1] * width


def weights_in_float32_are_multiplied_before_rounding() -> None:
    """What differs from the exact result by no more than one rounding has been rounded once."""
    x, slots = normal(ROWS, 512).to(DEVICE, torch.bfloat16), row_slots()
    norm = make_norm(512, torch.float32, seed=1)
    want = reference.rms_norm(x.double(), exact_norm(norm), slots)
    got = triton.rms_norm(x, norm, slots)
    assert torch.equal(got, want.to(got))
    rounded = RowNorm(norm.weights.to(x.dtype), norm.epsilons)
    twice = triton.rms_norm(x, rounded, slots)
    want = reference.rms_norm(x.double(), exact_norm(rounded), slots)
    assert not torch.equal(twice, want.to(twice))


def gates(dtype: torch.dtype, activation: Activation) -> None:
    x = 4 * normal(2, 2 * 1030).to(DEVICE, dtype)
    x[0, :4] = torch.tensor([-300.0, 300.0, -20.0, 0.0])
    with np.errstate(over="ignore"):  # an infinite denominator makes the gate 0
        got = triton.gated(x, activation)
    check(got, reference.gated(x.double(), activation))
    assert got.isfinite().all()


CASES: Final[dict[str, Callable[[], None]]] = {
    "norms, bfloat16 3584": partial(norms, torch.bfloat16, 3584),
    "norms, float16 100": partial(norms, torch.float16, 100),
    "norms, bfloat16 640, weights float32": partial(norms, torch.bfloat16, 640, torch.float32),
    "norms, float32 weights are multiplied before rounding": (
        weights_in_float32_are_multiplied_before_rounding
    ),
    "rotation, bfloat16 128": partial(rotation, torch.bfloat16, (3, 1), 128, normed=False),
    "rotation, float16 80 with norms": partial(rotation, torch.float16, (4, 2), 80, normed=True),
    "rotation, float32 8 with norms": partial(rotation, torch.float32, (2, 2), 8, normed=True),
    "rotation, bfloat16 256 with float32 norms": partial(
        rotation, torch.bfloat16, (2, 1), 256, normed=True, factors=torch.float32
    ),
    "rotation, bfloat16 96 of 128": partial(
        rotation, torch.bfloat16, (3, 1), 128, normed=False, rotated=96
    ),
    "rotation, float32 6 of 8": partial(
        rotation, torch.float32, (2, 2), 8, normed=False, rotated=6
    ),
    "gates, bfloat16": partial(gates, torch.bfloat16, "silu"),
    "gates, float16": partial(gates, torch.float16, "silu"),
    "gates, bfloat16 gelu": partial(gates, torch.bfloat16, "gelu_tanh"),
    "gates, float32 gelu": partial(gates, torch.float32, "gelu_tanh"),
}
