"""The small operations of a decoder layer for rows that belong to different deltas.

On a GPU each is one launch, without host synchronization, and a row's result is bitwise independent
of the other rows; otherwise it is plain PyTorch. What they compute is said in `reference`.
"""

from torch import Tensor

from deltadock.kernels import dispatch
from deltadock.kernels.decoder import reference
from deltadock.kernels.decoder.arguments import Activation, CacheRows, Rotation, RowNorm

__all__ = [
    "Activation",
    "CacheRows",
    "Rotation",
    "RowNorm",
    "add_rms_norm",
    "gated",
    "rms_norm",
    "rotate_and_store",
]


def rms_norm(x: Tensor, norm: RowNorm, row_slots: Tensor) -> Tensor:
    """Normalize (rows, width), on the CPU also (rows, ..., width); `row_slots` (rows,) int32."""
    if dispatch.on_gpu(x):
        from deltadock.kernels.decoder import triton

        return triton.rms_norm(x, norm, row_slots)
    return reference.rms_norm(x, norm, row_slots)


def add_rms_norm(
    x: Tensor, residual: Tensor, norm: RowNorm, row_slots: Tensor
) -> tuple[Tensor, Tensor]:
    """`residual + x` (rows, width), and the same normalized."""
    if dispatch.on_gpu(x):
        from deltadock.kernels.decoder import triton

        return triton.add_rms_norm(x, residual, norm, row_slots)
    return reference.add_rms_norm(x, residual, norm, row_slots)


def rotate_and_store(
    projected: Tensor,
    rotation: Rotation,
    cache: CacheRows,
    norms: tuple[RowNorm, RowNorm] | None,
    row_slots: Tensor,
) -> Tensor:
    """Rotate queries and keys, and write keys and values to the cache; see `reference`."""
    if dispatch.on_gpu(projected):
        from deltadock.kernels.decoder import triton

        return triton.rotate_and_store(projected, rotation, cache, norms, row_slots)
    return reference.rotate_and_store(projected, rotation, cache, norms, row_slots)


def gated(x: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up` of (rows, 2 * width), gate first."""
    if dispatch.on_gpu(x):
        from deltadock.kernels.decoder import triton

        return triton.gated(x, activation)
    return reference.gated(x, activation)
