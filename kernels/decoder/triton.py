"""GPU path: each operation is one launch, which reads its inputs once and computes in float32.

Where launches overlap (`kernels/overlap.py`), what depends on the row's slot alone is read before
the wait.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltadock.kernels.decoder.arguments import CacheRows, Rotation, RowNorm
from deltadock.kernels.interpreter import round_to
from deltadock.kernels.overlap import launch_options, start_next, wait_for_previous

UNSPECIALIZED: Final = ("heads", "kv_heads")
"""Arguments whose values only would multiply compilations."""
GATED_COLUMNS: Final = 1024
"""Outputs of a program of the gated activation."""
ELEMENTS_PER_WARP: Final = 512
"""Of a row that is normalized: 16 a thread."""


@triton.jit
def rms_norm_kernel(
    out_ptr, sum_ptr, x_ptr, x_stride, residual_ptr, residual_stride,
    weights_ptr, epsilons_ptr, row_slots_ptr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, OVERLAP: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Normalize one row, with ADD after adding it to the residual, which is stored too."""
    start_next(OVERLAP)
    DT: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_slots_ptr + row)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    weight = tl.load(weights_ptr + slot * WIDTH + columns, mask=mask, other=0.0)
    epsilon = tl.load(epsilons_ptr + slot)
    started = wait_for_previous(OVERLAP)
    x_ptr += started + row * x_stride
    x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual_ptr += started + row * residual_stride
        residual = tl.load(residual_ptr + columns, mask=mask, other=0.0)
        rounded = round_to(residual.to(tl.float32) + x, DT, EMULATE)
        tl.store(sum_ptr + row * WIDTH + columns, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + epsilon)
    out = round_to(x * scale, DT, EMULATE).to(tl.float32) * weight.to(tl.float32)
    tl.store(out_ptr + row * WIDTH + columns, round_to(out, DT, EMULATE), mask=mask)


def rms_norm(x: Tensor, norm: RowNorm, row_slots: Tensor) -> Tensor:
    """See `reference.rms_norm`; x (rows, width), each row contiguous."""
    return _rms_norm(x, None, norm, row_slots)[1]


def add_rms_norm(
    x: Tensor, residual: Tensor, norm: RowNorm, row_slots: Tensor
) -> tuple[Tensor, Tensor]:
    """`residual + x`, and its rows normalized."""
    return _rms_norm(x, residual, norm, row_slots)


def _rms_norm(
    x: Tensor, residual: Tensor | None, norm: RowNorm, row_slots: Tensor
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    weights, epsilons = norm
    if weights.shape[1] != width or not weights.is_contiguous() or weights.dtype != x.dtype:
        raise ValueError("A norm's weights need one contiguous row for each slot.")
    if x.stride(1) != 1 or (residual is not None and residual.shape != x.shape):
        raise ValueError("Rows need to be contiguous, and as many as the residual's.")
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    total = out if residual is None else torch.empty_like(out)
    other = x if residual is None else residual
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(rows,)](
        out, total, x, x.stride(0), other, other.stride(0), weights, epsilons, row_slots,
        WIDTH=width, BLOCK=block, ADD=residual is not None, EMULATE=not x.is_cuda,
        num_warps=min(16, max(1, block // ELEMENTS_PER_WARP)), **launch_options(x.device),
        enable_fp_fusion=True,  # pinned: Triton 3.10 changes the default
    )  # fmt: skip
    return total, out


@triton.jit
def _half(ptr, columns, mask, scale, weights, NORM: tl.constexpr, DT: tl.constexpr,
          EMULATE: tl.constexpr):  # fmt: skip
    """Half of a head, normalized by `scale` and the weights, as float32."""
    x = tl.load(ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        weights = weights.to(tl.float32)
        x = round_to(round_to(x * scale, DT, EMULATE).to(tl.float32) * weights, DT, EMULATE)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rotate_and_store_kernel(
    query_ptr, projected_ptr, projected_stride, cos_ptr, sin_ptr,
    keys_ptr, values_ptr, slot_stride, kv_stride, slots_ptr, positions_ptr, heads, kv_heads,
    query_weights_ptr, query_epsilons_ptr, key_weights_ptr, key_epsilons_ptr, row_slots_ptr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, OVERLAP: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """One head of one row: a query's to the output, a key's or value's to the cache."""
    start_next(OVERLAP)
    DT: tl.constexpr = query_ptr.dtype.element_ty
    HALF: tl.constexpr = WIDTH // 2
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < HALF
    place = tl.load(slots_ptr + row) * slot_stride + tl.load(positions_ptr + row) * WIDTH
    epsilon, low_weights, high_weights = 1.0, columns, columns
    if NORM:
        slot = tl.load(row_slots_ptr + row)
        if head < heads:
            epsilons_ptr, weights_ptr = query_epsilons_ptr, query_weights_ptr
        else:
            epsilons_ptr, weights_ptr = key_epsilons_ptr, key_weights_ptr
        epsilon = tl.load(epsilons_ptr + slot)
        weights_ptr += slot * WIDTH
        low_weights = tl.load(weights_ptr + columns, mask=mask, other=0.0)
        high_weights = tl.load(weights_ptr + HALF + columns, mask=mask, other=0.0)
    started = wait_for_previous(OVERLAP)
    source = projected_ptr + started + row * projected_stride + head * WIDTH
    if head >= heads + kv_heads:
        target = values_ptr + place + (head - heads - kv_heads) * kv_stride
        for part in tl.static_range(2):
            value = tl.load(source + part * HALF + columns, mask=mask)
            tl.store(target + part * HALF + columns, value, mask=mask)
    else:
        scale = 1.0
        if NORM:
            low = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
            high = tl.load(source + HALF + columns, mask=mask, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(low * low + high * high, axis=0) / WIDTH + epsilon)
        low = _half(source, columns, mask, scale, low_weights, NORM, DT, EMULATE)
        high = _half(source, columns + HALF, mask, scale, high_weights, NORM, DT, EMULATE)
        factors = started + row * WIDTH + columns
        for part in tl.static_range(2):
            cos = tl.load(cos_ptr + factors + part * HALF, mask=mask, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + factors + part * HALF, mask=mask, other=0.0).to(tl.float32)
            rotated = low * cos - high * sin if part == 0 else high * cos + low * sin
            rotated = round_to(rotated, DT, EMULATE)
            if head < heads:
                target = query_ptr + (row * heads + head) * WIDTH
            else:
                target = keys_ptr + place + (head - heads) * kv_stride
            tl.store(target + part * HALF + columns, rotated, mask=mask)


def rotate_and_store(
    projected: Tensor,
    rotation: Rotation,
    cache: CacheRows,
    norms: tuple[RowNorm, RowNorm] | None,
    row_slots: Tensor,
) -> Tensor:
    """See `reference.rotate_and_store`; each row contiguous."""
    rows, (kv_heads, _, width) = len(projected), cache.keys.shape[1:]
    heads = projected.shape[1] // width - 2 * kv_heads
    tensors = (*rotation, *(weights for weights, _ in norms or ()))
    if not all(tensor.is_contiguous() and tensor.shape[1] == width for tensor in tensors):
        raise ValueError("Cosines, sines and weights of norms need contiguous rows of a head.")
    if cache.keys.stride() != cache.values.stride() or cache.keys.stride()[2:] != (width, 1):
        raise ValueError("A head's tokens need to be contiguous.")
    if len(cache.slots) != rows or len(cache.positions) != rows or projected.stride(1) != 1:
        raise ValueError("Each row needs a slot and a position, and to be contiguous.")
    query = torch.empty(rows, heads, width, dtype=projected.dtype, device=projected.device)
    of_query, of_key = norms or (RowNorm(query, query),) * 2
    rotate_and_store_kernel[(heads + 2 * kv_heads, rows)](
        query, projected, projected.stride(0), *rotation,
        cache.keys, cache.values, cache.keys.stride(0), cache.keys.stride(1),
        cache.slots, cache.positions, heads, kv_heads, *of_query, *of_key, row_slots,
        WIDTH=width, BLOCK=triton.next_power_of_2(width // 2), NORM=norms is not None,
        EMULATE=not projected.is_cuda, num_warps=1, **launch_options(projected.device),
        enable_fp_fusion=True,  # pinned: Triton 3.10 changes the default
    )  # fmt: skip
    return query


@triton.jit
def gated_silu_kernel(
    out_ptr, x_ptr, x_stride, width,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A block of one row's outputs."""
    start_next(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    x_ptr += wait_for_previous(OVERLAP) + row * x_stride
    gate = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + width + columns, mask=mask, other=0.0).to(tl.float32)
    gate = round_to(gate / (1.0 + tl.exp(-gate)), out_ptr.dtype.element_ty, EMULATE).to(tl.float32)
    out = round_to(gate * up, out_ptr.dtype.element_ty, EMULATE)
    tl.store(out_ptr + row * width + columns, out, mask=mask)


def gated_silu(x: Tensor) -> Tensor:
    """See `reference.gated_silu`; each row contiguous."""
    rows, width = len(x), x.shape[1] // 2
    if x.stride(1) != 1:
        raise ValueError("Rows need to be contiguous.")
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    gated_silu_kernel[(triton.cdiv(width, GATED_COLUMNS), rows)](
        out, x, x.stride(0), width, BLOCK=GATED_COLUMNS, EMULATE=not x.is_cuda, num_warps=4,
        **launch_options(x.device),
        enable_fp_fusion=True,  # pinned: Triton 3.10 changes the default
    )  # fmt: skip
    return out
