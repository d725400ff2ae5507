"""From packed words to operands of a tensor core.

Two words give two codes at once: their equal halves are put side by side, a mask leaves one code in
each half, which read as a float is a subnormal, and one packed multiply-add makes of it
`code - centre`, exactly, in units of 2**-UNIT. The order of the terms of a product is free, so
that each code is used in the thread that loaded its word: only the other operand is rearranged.
"""

from typing import Final

import triton
import triton.language as tl

UNSPECIALIZED: Final = ("h_in", "max_rank", "sums_stride", "sum_count")
"""Numbers whose divisibility by 16 gains nothing: each would have its own kernels compiled."""


@triton.jit
def _center(masked, T: tl.constexpr, P: tl.constexpr, DOWN: tl.constexpr, DT: tl.constexpr,
            EMULATE: tl.constexpr):  # fmt: skip
    """`code - (2**P - 1) / 2` of the codes at bit T of both halves, as a pair of DT in 32 bits.

    In units of 2**(UNIT + DOWN).
    """
    MANTISSA: tl.constexpr = 7 if tl.bfloat16 == DT else 10
    BIAS: tl.constexpr = 127 if tl.bfloat16 == DT else 15
    UNIT: tl.constexpr = MANTISSA - 1
    if EMULATE:  # Triton's interpreter knows no inline assembly.
        SCALE: tl.constexpr = 2.0 ** (-UNIT - DOWN)
        low = ((((masked & 0xFFFF) >> T) - (2**P - 1) / 2) * SCALE).to(DT)
        high = ((((masked >> 16) & 0xFFFF) >> T) - (2**P - 1) / 2) * SCALE
        low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        pair = low | (high.to(DT).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        # The largest power of two of the type lifts a subnormal's lowest bit to 2**-UNIT.
        FACTOR: tl.constexpr = ((2 * BIAS - T - DOWN) << MANTISSA) * 0x10001
        # The centre, 1/2, 3/2 or 15/2: its exponent and its highest bits.
        POWER: tl.constexpr = BIAS - UNIT - DOWN + (-1 if P == 1 else (0 if P == 2 else 2))
        BITS: tl.constexpr = (0 if P == 1 else (4 if P == 2 else 7)) << (MANTISSA - 3)
        CENTRE: tl.constexpr = (0x8000 + (POWER << MANTISSA) + BITS) * 0x10001 - (1 << 32)
        if tl.bfloat16 == DT:
            pair = tl.inline_asm_elementwise(
                "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [masked, FACTOR, CENTRE],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            pair = tl.inline_asm_elementwise(
                "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [masked, FACTOR, CENTRE],
                dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
    return pair


@triton.jit
def _pairs(low, high, J: tl.constexpr, STEP: tl.constexpr, P: tl.constexpr, DOWN: tl.constexpr,
           DT: tl.constexpr, EMULATE: tl.constexpr):  # fmt: skip
    """Codes J, J + STEP, ... of each word, on trailing axes of two.

    A mantissa has room for several places, so that few codes need a shift.
    """
    HALF: tl.constexpr = 16 // P
    if STEP == 2 * HALF:
        BITS: tl.constexpr = 4 if P == 8 else P
        FIELD: tl.constexpr = (J % HALF) * P + (4 if P == 8 and DOWN == 0 else 0)
        SPAN: tl.constexpr = (7 if tl.bfloat16 == DT else 10) // BITS * BITS
        SHIFT: tl.constexpr = FIELD // SPAN * SPAN
        T: tl.constexpr = FIELD - SHIFT
        MASK: tl.constexpr = ((1 << BITS) - 1) * 0x10001 << T
        masked = ((low if J < HALF else high) >> SHIFT) & MASK
        pairs = _center(masked, T, BITS, DOWN, DT, EMULATE)
    else:
        even = _pairs(low, high, J, 2 * STEP, P, DOWN, DT, EMULATE)
        odd = _pairs(low, high, J + STEP, 2 * STEP, P, DOWN, DT, EMULATE)
        pairs = tl.join(even, odd)
    return pairs


@triton.jit
def unpack(first, second, P: tl.constexpr, DOWN: tl.constexpr, DT: tl.constexpr,
            EMULATE: tl.constexpr):  # fmt: skip
    """The centred codes of two tensors of words (A, B, C): (A, B, C, 32 // P, 2), type DT.

    The unit is 2**-(UNIT + DOWN). Of 8-bit codes only four bits: the higher without DOWN.
    """
    low = (first & 0xFFFF) | (second << 16)
    high = ((first >> 16) & 0xFFFF) | (second & -65536)
    pairs = _pairs(low, high, 0, 1, P, DOWN, DT, EMULATE)
    even = (pairs & 0xFFFF).to(tl.int16).to(DT, bitcast=True)
    odd = ((pairs >> 16) & 0xFFFF).to(tl.int16).to(DT, bitcast=True)
    A: tl.constexpr = first.shape[0]
    B: tl.constexpr = first.shape[1]
    C: tl.constexpr = first.shape[2]
    return tl.reshape(tl.join(even, odd), (A, B, C, 32 // P, 2))


@triton.jit
def dot(a, b, acc, EMULATE: tl.constexpr):
    if EMULATE:  # Triton's interpreter multiplies bfloat16 wrongly.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def round_to(x, DT: tl.constexpr, EMULATE: tl.constexpr):
    """A float32 tensor in type DT, to the nearest, ties to even."""
    if EMULATE and tl.bfloat16 == DT:  # Triton's interpreter cuts off instead.
        bits = x.to(tl.int32, bitcast=True)
        number = (bits & 0x7FFFFFFF) <= 0x7F800000  # and not NaN
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(number, bits, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(DT)
    return rounded


@triton.jit
def row_words(columns, P: tl.constexpr, ALIGNED: tl.constexpr):
    """Words of a vector in a plane of P bits; if ALIGNED, the compiler sees that 4 divide them."""
    return columns // 128 * (4 * P) if ALIGNED else (columns * P + 31) // 32


@triton.jit
def load_words(words_ptr, rows, columns, limit, ALIGNED: tl.constexpr):
    """Words at (rows + columns) before `limit`, else 0; (A, B, 1) and (A, 1, C) to (A, B, C)."""
    at = words_ptr + (rows + columns)
    if ALIGNED:
        at = tl.multiple_of(at, (16, 16, 16))
    return tl.load(at, mask=columns < limit, other=0)
