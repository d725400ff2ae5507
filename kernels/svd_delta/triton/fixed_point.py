"""Fixed-point numbers and codes as bytes of words, exact products of them, and their sums."""

import triton
import triton.language as tl

LARGEST = tl.constexpr(32512.0)
"""Largest magnitude of a fixed-point number: its bytes, -127 to 127 and -128 to 127, have signs."""
_TO_FIXED = tl.constexpr(1.5 * 2**23 + 0x8080)
"""Added to a float32, it leaves the rounded number plus 0x8080 in the low 16 bits."""
_SIGNS = tl.constexpr(-0x7F7F7F80)
"""The sign of every byte of a word."""
_BYTES = tl.constexpr(0x01010101)
HIGH = tl.constexpr(0x7632)
LOW = tl.constexpr(0x5410)
"""What picks the high or the low bytes of two pairs of fixed-point numbers."""
FINITE = tl.constexpr(0x7FFFFFFF)


@triton.jit
def inverse_of(peak):
    """What makes the largest number the largest fixed-point number; of zeros anything."""
    return LARGEST / tl.maximum(peak, 1e-30)


@triton.jit
def fixed_point(x, inverse):
    """The bytes of `x * inverse`, without their signs, in bits 8 to 15 and 0 to 7."""
    return (x * inverse + _TO_FIXED).to(tl.int32, bitcast=True)


@triton.jit
def bytes_of(t0, t1, t2, t3, selector, EMULATE: tl.constexpr):
    """A word of the high bytes of four fixed-point numbers, or of their low ones."""
    low_pair, high_pair = pick_bytes(t0, t1, 0x5140, EMULATE), pick_bytes(t2, t3, 0x5140, EMULATE)
    return pick_bytes(low_pair, high_pair, selector, EMULATE) ^ _SIGNS


@triton.jit
def codes_of(words, P: tl.constexpr, FIELD: tl.constexpr, LIFT: tl.constexpr = 0):
    """The code of P bits in each byte: its `FIELD`-th, shifted left by LIFT; 8 bits less 128."""
    SHIFT: tl.constexpr = P * FIELD - LIFT
    shifted = words >> SHIFT if SHIFT >= 0 else words << -SHIFT
    return words ^ _SIGNS if P == 8 else shifted & ((_BYTES * (2**P - 1)) << LIFT)


@triton.jit
def spread(words, EMULATE: tl.constexpr):
    """The bytes of each word as int8, the lowest first, on two trailing axes of size 2."""
    if EMULATE:
        first, second = (words & 0xFF).to(tl.int8), ((words >> 8) & 0xFF).to(tl.int8)
        third, fourth = ((words >> 16) & 0xFF).to(tl.int8), ((words >> 24) & 0xFF).to(tl.int8)
        spread_bytes = tl.join(tl.join(first, third), tl.join(second, fourth))
    else:
        copies = tl.join(words, words)
        spread_bytes = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r,r,r,r", [tl.join(copies, copies)],
            dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    return spread_bytes


@triton.jit
def pick_bytes(first, second, selector, EMULATE: tl.constexpr):
    """A word of four bytes: number `selector >> 4 * i & 7` of those of `first`, then `second`."""
    if EMULATE:
        picked = tl.zeros_like(first)
        for i in tl.static_range(4):
            number = (selector >> (4 * i)) & 7
            word = tl.where(number < 4, first, second)
            picked |= ((word >> (8 * (number % 4))) & 0xFF) << (8 * i)
    else:
        picked = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [first, second, selector],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return picked


@triton.jit
def dot_bytes(a, b, acc, EMULATE: tl.constexpr):
    """`a @ b + acc` of int8 operands; exact."""
    if EMULATE:  # Triton's interpreter overflows.
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
        acc += product.to(tl.int32)
    else:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def sum_over_warps(parts):
    """Sum (warps, columns, rows) over the warps, in pairs; each thread is left with a few sums.

    `tl.sum` would leave every warp with all of them.
    """
    WARPS: tl.constexpr = parts.shape[0]
    COLUMNS: tl.constexpr = parts.shape[1]
    ROWS: tl.constexpr = parts.shape[2]
    if WARPS == 1:
        total = tl.reshape(parts, (COLUMNS, ROWS))
    else:
        pairs = tl.permute(tl.reshape(parts, (2, WARPS // 2, COLUMNS, ROWS)), (1, 2, 3, 0))
        even, odd = tl.split(pairs)
        total = sum_over_warps(even + odd)
    return total
