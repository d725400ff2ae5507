"""The inputs as fixed-point numbers, once for each width of a plane of V."""

import triton
import triton.language as tl

from deltadock.kernels.overlap import start_next, wait_for_previous
from deltadock.kernels.svd_delta.chunks import BLOCK_INPUTS, CHUNK_ROWS
from deltadock.kernels.svd_delta.layout import DESCRIPTOR_FIELDS
from deltadock.kernels.svd_delta.triton.fixed_point import (
    FINITE,
    HIGH,
    LARGEST,
    LOW,
    bytes_of,
    fixed_point,
    inverse_of,
)
from deltadock.kernels.svd_delta.triton.forms import UNSPECIALIZED

_DESCRIPTOR = tl.constexpr(DESCRIPTOR_FIELDS)
_ROWS = tl.constexpr(CHUNK_ROWS)
_BLOCK_INPUTS = tl.constexpr(BLOCK_INPUTS)


@triton.jit
def _input(x_ptrs, scale_ptrs, column, number, digit, h_in, scaled):
    """Input `number` of a word of a plane's bytes, and its scale; `column` is that of the first."""
    offset = number << digit
    x = tl.load(x_ptrs + offset, mask=column < h_in - offset, other=0.0)
    scale = tl.load(scale_ptrs + offset, mask=column < scaled - offset, other=1.0)
    return x.to(tl.float32), scale


@triton.jit(do_not_specialize=UNSPECIALIZED)
def prepare_kernel(
    xs_ptr, xs_stride, scales_ptr, scales_stride, x_ptr, x_stride, h_in, padded_h_in,
    rows_ptr, slots_ptr, addresses_ptr, descriptors_ptr,
    LINEARS: tl.constexpr, VECTOR: tl.constexpr, OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A block of a row times a linear's column scale: fixed-point numbers, their scale and sum.

    A program stores them for one plane of V's words, or all of them.
    """
    start_next(OVERLAP)
    position, block = tl.program_id(0), tl.program_id(1)
    linear, first_digit = tl.program_id(2) % LINEARS, tl.program_id(2) // LINEARS
    row = tl.load(rows_ptr + position).to(tl.int64)
    slot = tl.load(slots_ptr + position // _ROWS)
    # After a product nothing hides these loads: all that depends on the slot is asked for at once.
    descriptor = descriptors_ptr + (slot * LINEARS + linear) * _DESCRIPTOR
    tiles, scale_word, planes = (
        tl.load(descriptor), tl.load(descriptor + 7), tl.load(descriptor + 15),
    )  # fmt: skip
    address = tl.load(addresses_ptr + slot * LINEARS + linear)
    if (row < 0) | (tiles == 0):
        wait_for_previous(OVERLAP)
        return
    columns = block * _BLOCK_INPUTS + tl.arange(0, _BLOCK_INPUTS)
    scale_ptr = address.to(tl.pointer_type(tl.float32)) + scale_word
    scaled = tl.where(scale_word >= 0, h_in, 0)
    column_scale = tl.load(scale_ptr + columns, mask=columns < scaled, other=1.0)
    x_ptr += wait_for_previous(OVERLAP) + row * x_stride
    if VECTOR:  # One check for all numbers of a load.
        h_in = h_in // 16 * 16
    x = tl.load(x_ptr + columns, mask=columns < h_in, other=0.0).to(tl.float32) * column_scale
    # As integers NaN is the largest, and makes the scale NaN.
    peak = tl.max(x.to(tl.int32, bitcast=True) & FINITE, axis=0).to(tl.float32, bitcast=True)
    inverse = inverse_of(peak)
    scale = peak * (1.0 / LARGEST)
    total = tl.sum((fixed_point(x, inverse) & 0xFFFF) - 0x8080, axis=0).to(tl.float32)
    scales_ptr += position * scales_stride + (linear * tl.num_programs(1) + block) * 2
    tl.store(scales_ptr, scale)
    tl.store(scales_ptr + 1, total * scale)
    word = tl.arange(0, _BLOCK_INPUTS // 4)
    xs_ptr += position.to(tl.int64) * xs_stride + linear * (2 * padded_h_in)
    xs_ptr += block * (_BLOCK_INPUTS // 4) + word
    for digit in range(first_digit, 4, tl.num_programs(2) // LINEARS):
        if planes & (8 >> digit):
            # Bytes of a word, and words of a thread, are those of the weights; fields are apart.
            column = (word >> (2 + digit) << (4 + digit)) + ((word & 3) << (2 + digit))
            column += block * _BLOCK_INPUTS + ((word >> 2) & ((1 << digit) - 1))
            x_ptrs, scale_ptrs = x_ptr + column, scale_ptr + column
            x0, scale_0 = _input(x_ptrs, scale_ptrs, column, 0, digit, h_in, scaled)
            x1, scale_1 = _input(x_ptrs, scale_ptrs, column, 1, digit, h_in, scaled)
            x2, scale_2 = _input(x_ptrs, scale_ptrs, column, 2, digit, h_in, scaled)
            x3, scale_3 = _input(x_ptrs, scale_ptrs, column, 3, digit, h_in, scaled)
            t0, t1 = fixed_point(x0 * scale_0, inverse), fixed_point(x1 * scale_1, inverse)
            t2, t3 = fixed_point(x2 * scale_2, inverse), fixed_point(x3 * scale_3, inverse)
            out = xs_ptr + digit * (padded_h_in // 2)
            tl.store(out, bytes_of(t0, t1, t2, t3, HIGH, EMULATE))
            tl.store(out + padded_h_in // 4, bytes_of(t0, t1, t2, t3, LOW, EMULATE))
