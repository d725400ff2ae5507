"""Cases of a decoder layer's small operations against float64."""

import os
from collections.abc import Callable
from functools import partial
from typing import Final

import torch
from torch import Tensor

from deltadock.kernels.decoder import CacheRows, Rotation, RowNorm, reference, triton

DEVICE: Final = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE: Final = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SLOTS, ROWS = 3, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_norm(width: int, dtype: torch.dtype, seed: int) -> RowNorm:
    """Slots with weights and epsilons of their own; one epsilon is large."""
    weights = 1 + 0.3 * normal(SLOTS, width, seed=seed)
    return RowNorm(weights.to(DEVICE, dtype), torch.tensor([1e-6, 0.5, 1e-5], device=DEVICE))


def exact_norm(norm: RowNorm) -> RowNorm:
    return RowNorm(norm.weights.double(), norm.epsilons.double())


def row_slots() -> Tensor:
    return torch.tensor([2, 0, 1], dtype=torch.int32, device=DEVICE)


def check(got: Tensor, want: Tensor) -> None:
    error = (got.double() - want).norm() / want.norm()
    assert error < TOLERANCE[got.dtype], error


def norms(dtype: torch.dtype, width: int) -> None:
    """With and without the residual; rows are apart from each other."""
    x, residual = normal(2, ROWS, width + 3).to(DEVICE, dtype)[:, :, :width]
    norm, slots = make_norm(width, dtype, seed=1), row_slots()
    check(triton.rms_norm(x, norm, slots), reference.rms_norm(x.double(), exact_norm(norm), slots))
    total, got = triton.add_rms_norm(x, residual, norm, slots)
    assert torch.equal(total, x + residual)
    check(got, reference.rms_norm(total.double(), exact_norm(norm), slots))


def rotation(dtype: torch.dtype, heads: tuple[int, int], width: int, normed: bool) -> None:
    """Rows of two sequences; what they do not write of the cache stays."""
    projected = normal(ROWS, (heads[0] + 2 * heads[1]) * width).to(DEVICE, dtype)
    angles = 3 * normal(ROWS, width // 2, seed=1).repeat(1, 2)
    turn = Rotation(angles.cos().to(DEVICE, dtype), angles.sin().to(DEVICE, dtype))
    pair = (make_norm(width, dtype, 2), make_norm(width, dtype, 3)) if normed else None
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


def gates(dtype: torch.dtype) -> None:
    x = 4 * normal(2, 2 * 1030).to(DEVICE, dtype)
    check(triton.gated_silu(x), reference.gated_silu(x.double()))


CASES: Final[dict[str, Callable[[], None]]] = {
    "norms, bfloat16 3584": partial(norms, torch.bfloat16, 3584),
    "norms, float16 100": partial(norms, torch.float16, 100),
    "rotation, bfloat16 128": partial(rotation, torch.bfloat16, (3, 1), 128, normed=False),
    "rotation, float16 80 with norms": partial(rotation, torch.float16, (4, 2), 80, normed=True),
    "rotation, float32 8 with norms": partial(rotation, torch.float32, (2, 2), 8, normed=True),
    "gates, bfloat16": partial(gates, torch.bfloat16),
    "gates, float16": partial(gates, torch.float16),
}
