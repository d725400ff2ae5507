"""What Triton's interpreter computes otherwise than a GPU, for kernels that run in both.

With `EMULATE` a kernel uses neither bfloat16 products nor Triton's rounding to bfloat16.
"""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, EMULATE: tl.constexpr):
    """`a @ b + acc`; float32 operands are not rounded."""
    if EMULATE:  # Triton's interpreter computes bfloat16 products incorrectly.
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def round_to(x, DT: tl.constexpr, EMULATE: tl.constexpr):
    """Round float32 to DT, to nearest even."""
    if EMULATE and tl.bfloat16 == DT:  # Triton's interpreter truncates.
        bits = x.to(tl.int32, bitcast=True)
        number = (bits & 0x7FFFFFFF) <= 0x7F800000  # not NaN
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(number, bits, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(DT)
    return rounded
