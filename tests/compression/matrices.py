"""Matrices to compress, and checks of the result."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltadock.artifacts.encodings import decode_dense
from deltadock.compression.methods.base import (
    MatrixMethod,
    MatrixResult,
    MatrixTask,
)


def make_moment(h_in: int, seed: int = 0) -> Tensor:
    """Second moment (h_in, h_in) float64 of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(h_in, h_in, generator=generator) / h_in**0.5
    inputs = (mixing @ torch.randn(h_in, 600, generator=generator)).double()
    return inputs @ inputs.T


def make_task(
    h_out: int = 48,
    h_in: int = 80,
    bits: float = 1.0,
    seed: int = 0,
    delta: Tensor | None = None,
    moment: Tensor | None = None,
) -> MatrixTask:
    """A task; the default delta has exponentially decaying singular values."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(h_out, h_in)
    left = torch.randn(h_out, rank, generator=generator)
    right = torch.randn(rank, h_in, generator=generator)
    if delta is None:
        delta = (left * torch.exp(-torch.arange(rank) / 8)) @ right
    if moment is None:
        moment = make_moment(h_in, seed)
    return MatrixTask("w", delta, moment, "BF16", bits, "exact")


def compress_matrices(method: MatrixMethod, tasks: Sequence[MatrixTask]) -> list[MatrixResult]:
    """Compress matrices of equal shapes and budgets."""
    ranks = method.ranks(tasks[0].bits, *tasks[0].delta.shape)
    return method.compress(tasks, method.prepare(tasks, ranks))


def compress_one(method: MatrixMethod, task: MatrixTask) -> MatrixResult:
    """Compress a single matrix."""
    (result,) = compress_matrices(method, [task])
    return result


def output_error(delta: Tensor, approximation: Tensor, moment: Tensor) -> float:
    """`||(D - D_hat) X||^2`."""
    error = (delta - approximation).double()
    return float(((error @ moment) * error).sum())


def check_result(result: MatrixResult, task: MatrixTask) -> Tensor:
    """Check what holds for every method; returns the decoded delta."""
    decoded = torch.from_numpy(decode_dense(result.encoded))
    assert decoded.shape == task.delta.shape
    assert torch.isfinite(decoded).all()
    torch.testing.assert_close(result.approximation, decoded)
    assert result.encoded.record["dtype"] == task.dtype
    return decoded
