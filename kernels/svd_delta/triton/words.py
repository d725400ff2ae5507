"""Words loaded into the threads that compute with them, and stored from those that have them.

Triton would load 16 bytes a thread and move them between threads through shared memory, with
barriers. An instruction that it does not know gets the layout of its result's use.
"""

import triton
import triton.language as tl

from deltadock.kernels.operands import PAIRED

_PAIRED = tl.constexpr(PAIRED)


@triton.jit
def ceil_div(number, divisor: tl.constexpr):
    """`number / divisor` rounded up; of a number that is not negative compilers make a shift."""
    return ((number + (divisor - 1)).to(tl.uint32) // divisor).to(tl.int32)


@triton.jit
def load_bits(addresses, EMULATE: tl.constexpr):
    """Load 32-bit words, as int32."""
    if EMULATE:
        bits = tl.load(addresses.to(tl.pointer_type(tl.int32)))
    else:
        bits = tl.inline_asm_elementwise(
            "ld.global.b32 $0, [$1];", "=r,l", [addresses],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    return bits


@triton.jit
def load_inputs(addresses, EMULATE: tl.constexpr):
    """`load_bits` of 16 bytes at once: a thread's words 0 to 3 on the last axis."""
    if EMULATE:
        bits = load_bits(addresses, EMULATE)
    else:
        bits = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l,l,l,l",
            [addresses], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    return bits


@triton.jit
def load_words(addresses, VECTOR: tl.constexpr, EMULATE: tl.constexpr):
    """`load_bits` of words 0 to 3, on the last axis, of two vectors, 8 apart on the axis of ranks.

    In the product's operand a thread's numbers alternate between two vectors, one by one or in
    pairs. Without VECTOR addresses need not be multiples of 16.
    """
    if EMULATE:
        bits = load_bits(addresses, EMULATE)
    elif VECTOR and _PAIRED:
        bits = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $4, $5}, [$8]; ld.global.v4.b32 {$2, $3, $6, $7}, [$10];",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,l,l,l,l,l,l,l",
            [addresses], dtype=tl.int32, is_pure=True, pack=8,
        )  # fmt: skip
    elif VECTOR:
        bits = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $2, $4, $6}, [$8]; ld.global.v4.b32 {$1, $3, $5, $7}, [$9];",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,l,l,l,l,l,l,l,l",
            [addresses], dtype=tl.int32, is_pure=True, pack=8,
        )  # fmt: skip
    else:
        bits = load_bits(addresses, EMULATE)
    return bits


@triton.jit
def store_bits(addresses, bits, EMULATE: tl.constexpr):
    """Store 32-bit words from the threads that have them; Triton would exchange them first."""
    if EMULATE:
        tl.store(addresses.to(tl.pointer_type(tl.int32)), bits)
    else:
        tl.inline_asm_elementwise(
            "st.global.b32 [$1], $2; mov.b32 $0, 0;", "=r,l,r", [addresses, bits],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def row_addresses(first, rank, last, stride, EMULATE: tl.constexpr):
    """`first + min(rank, last) * stride`, int64, by two instructions.

    Compilers would multiply 64-bit numbers, and compute what no tile changes once, for all planes,
    which they keep on the stack.
    """
    if EMULATE:
        addresses = first + tl.minimum(rank, last).to(tl.int64) * stride
    else:
        addresses = tl.inline_asm_elementwise(
            "{.reg .s32 row; min.s32 row, $2, $3; mad.wide.s32 $0, row, $4, $1;}", "=l,l,r,r,r",
            [first, rank, last, stride], dtype=tl.int64, is_pure=True, pack=1,
        )  # fmt: skip
    return addresses


@triton.jit
def load_run(addresses, COUNT: tl.constexpr, VECTOR: tl.constexpr, EMULATE: tl.constexpr):
    """`load_bits` of COUNT consecutive words at each address, as a tuple.

    The 256 bytes around come to L2: they are of the program's next tiles, or its neighbours'.
    Without VECTOR addresses need not be multiples of the run's bytes, or of 16.
    """
    if COUNT == 8 or (COUNT > 1 and (EMULATE or not VECTOR)):
        run = load_run(addresses, COUNT // 2, VECTOR, EMULATE)
        run += load_run(addresses + 2 * COUNT, COUNT // 2, VECTOR, EMULATE)
    elif EMULATE:
        run = (load_bits(addresses, EMULATE),)
    elif COUNT == 1:
        run = (
            tl.inline_asm_elementwise(
                "ld.global.L2::256B.b32 $0, [$1];", "=r,l", [addresses],
                dtype=tl.int32, is_pure=True, pack=1,
            ),
        )  # fmt: skip
    elif COUNT == 2:
        run = tl.inline_asm_elementwise(
            "ld.global.L2::256B.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [addresses],
            dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        run = tl.inline_asm_elementwise(
            "ld.global.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [addresses],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return run
