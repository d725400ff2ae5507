"""GPU path: each operation is one launch, which reads its inputs once and computes in float32.

Where launches overlap (`kernels/overlap.py`), what depends on the row's slot alone is read before
the wait.
"""

import math
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltadock.kernels.decoder.arguments import Activation, CacheRows, Rotation, RowNorm
from deltadock.kernels.interpreter import round_to
from deltadock.kernels.overlap import launch_options, start_next, wait_for_previous

UNSPECIALIZED: Final = ("heads", "kv_heads")
"""Arguments whose values only would multiply compilations."""
GATED_COLUMNS: Final = 1024
"""Outputs of a program of the gated activation."""
ELEMENTS_PER_WARP: Final = 512
"""Of a row that is normalized: 16 a thread."""
GELU_SLOPE: Final = tl.constexpr(2 * math.sqrt(2 / math.pi))
GELU_CUBE: Final = tl.constexpr(0.044715)
"""GELU by tanh is x times the logistic function of `GELU_SLOPE` (x + `GELU_CUBE` x^3)."""


@triton.jit
def _times(x, weight, DT: tl.constexpr, EMULATE: tl.constexpr):
    """A normalized row times its weights, as float32; rounded before if they are in its dtype."""
    if weight.dtype == DT:
        x = round_to(x, DT, EMULATE).to(tl.float32)
    return x * weight.to(tl.float32)


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
    out = _times(x * scale, weight, DT, EMULATE)
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
    if weights.shape[1] != width or not weights.is_contiguous():
        raise ValueError("A norm's weights need one contiguous row for each slot.")
    if weights.dtype not in {x.dtype, torch.float32}:
        raise ValueError("A norm's weights need the rows' dtype, or float32.")
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
        x = round_to(_times(x * scale, weights, DT, EMULATE), DT, EMULATE)
    return x.to(tl.float32)


@triton.jit
def _copy_rest(target, source, WIDTH: tl.constexpr, ROTATED: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of a head that are not rotated."""
    columns = ROTATED + tl.arange(0, BLOCK)
    value = tl.load(source + columns, mask=columns < WIDTH)
    tl.store(target + columns, value, mask=columns < WIDTH)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rotate_and_store_kernel(
    query_ptr, projected_ptr, projected_stride, cos_ptr, sin_ptr,
    keys_ptr, values_ptr, slot_stride, kv_stride, slots_ptr, positions_ptr, heads, kv_heads,
    query_weights_ptr, query_epsilons_ptr, key_weights_ptr, key_epsilons_ptr, row_slots_ptr,
    WIDTH: tl.constexpr, ROTATED: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
    NORM: tl.constexpr, OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One head of one row: a query's to the output, a key's or value's to the cache.

    A head has WIDTH columns, of which the first ROTATED are rotated; BLOCK covers half of these,
    and REST the others.
    """
    start_next(OVERLAP)
    DT: tl.constexpr = query_ptr.dtype.element_ty
    HALF: tl.constexpr = ROTATED // 2
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
        if ROTATED < WIDTH:
            _copy_rest(target, source, WIDTH, ROTATED, REST)
    else:
        scale = 1.0
        if NORM:
            low = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
            high = tl.load(source + HALF + columns, mask=mask, other=0.0).to(tl.float32)
            scale = tl.rsqrt(tl.sum(low * low + high * high, axis=0) / WIDTH + epsilon)
        low = _half(source, columns, mask, scale, low_weights, NORM, DT, EMULATE)
        high = _half(source, columns + HALF, mask, scale, high_weights, NORM, DT, EMULATE)
        factors = started + row * ROTATED + columns
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
        if ROTATED < WIDTH:
            if head < heads:
                _copy_rest(query_ptr + (row * heads + head) * WIDTH, source, WIDTH, ROTATED, REST)
            else:
                target = keys_ptr + place + (head - heads) * kv_stride
                _copy_rest(target, source, WIDTH, ROTATED, REST)


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
    rotated = rotation.cos.shape[1]
    weights = [weights for weights, _ in norms or ()]
    if not all(tensor.is_contiguous() for tensor in (*rotation, *weights)):
        raise ValueError("Cosines, sines and weights of norms need contiguous rows.")
    if rotation.sin.shape[1] != rotated or rotated % 2 or rotated > width:
        raise ValueError("Cosines and sines need an even number of columns, at most a head's.")
    if any(tensor.shape[1] != width or rotated != width for tensor in weights):
        raise ValueError(
            "Heads with norms need weights of a head's width, and to be rotated whole."
        )
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
        WIDTH=width, ROTATED=rotated, BLOCK=triton.next_power_of_2(rotated // 2),
        REST=triton.next_power_of_2(max(1, width - rotated)), NORM=norms is not None,
        EMULATE=not projected.is_cuda, num_warps=1, **launch_options(projected.device),
        enable_fp_fusion=True,  # pinned: Triton 3.10 changes the default
    )  # fmt: skip
    return query


@triton.jit
def gated_kernel(
    out_ptr, x_ptr, x_stride, width,
    BLOCK: tl.constexpr, SILU: tl.constexpr, OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A block of one row's outputs."""
    start_next(OVERLAP)
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    x_ptr += wait_for_previous(OVERLAP) + row * x_stride
    gate = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + width + columns, mask=mask, other=0.0).to(tl.float32)
    slope = gate if SILU else GELU_SLOPE * (gate + GELU_CUBE * gate * gate * gate)
    gate = round_to(gate / (1.0 + tl.exp(-slope)), out_ptr.dtype.element_ty, EMULATE).to(tl.float32)
    out = round_to(gate * up, out_ptr.dtype.element_ty, EMULATE)
    tl.store(out_ptr + row * width + columns, out, mask=mask)


def gated(x: Tensor, activation: Activation) -> Tensor:
    """See `reference.gated`; each row contiguous."""
    rows, width = len(x), x.shape[1] // 2
    if x.stride(1) != 1:
        raise ValueError("Rows need to be contiguous.")
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    gated_kernel[(triton.cdiv(width, GATED_COLUMNS), rows)](
        out, x, x.stride(0), width, BLOCK=GATED_COLUMNS, SILU=activation == "silu",
        EMULATE=not x.is_cuda, num_warps=4,
        **launch_options(x.device),
        enable_fp_fusion=True,  # pinned: Triton 3.10 changes the default
    )  # fmt: skip
    return out
