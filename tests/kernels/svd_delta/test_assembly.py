"""The inline assembly that Triton's interpreter cannot run: the packed multiply-add.

Without a GPU nothing executes the instruction that turns codes into floats. Its operands are read
from the PTX, and it is evaluated in exact arithmetic by the rules of the PTX manual: without
`.ftz` subnormal inputs keep their value, and the sum is rounded once.
"""

import os
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltadock.kernels.svd_delta.triton import _subtract_midpoint

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


class Format(NamedTuple):
    """A 16-bit float."""

    torch_type: torch.dtype
    operation: str
    mantissa: int
    """Mantissa bits."""

    @property
    def unit(self) -> int:
        return self.mantissa - 1


FORMATS = {
    "bf16": Format(torch.bfloat16, "fma.rn.bf16x2", 7),
    "fp16": Format(torch.float16, "fma.rn.f16x2", 10),
}


@triton.jit
def midpoint_kernel(
    out_ptr, in_ptr, type_ptr, BITS: tl.constexpr, SPAN: tl.constexpr, DOWN: tl.constexpr
):  # fmt: skip
    """Process a word of masked codes at each bit position that codes of BITS bits can have."""
    for T in tl.static_range(0, SPAN, BITS):
        masked = tl.load(in_ptr + T)
        pair = _subtract_midpoint(masked, T, BITS, DOWN, type_ptr.dtype.element_ty, False)
        tl.store(out_ptr + T, pair)


def operands(ptx: str, operation: str) -> list[tuple[int, int]]:
    """Second factor and addend, 32 bits each, of every `operation`."""
    numbers = dict(re.findall(r"mov\.b32\s+(%r\d+), (-?\d+);", ptx))
    found = re.findall(
        rf"{re.escape(operation)}\s+%r\d+, %r\d+, (%r\d+|-?\d+), (%r\d+|-?\d+);", ptx
    )
    return [
        (
            int(numbers.get(factor, factor)) & 0xFFFFFFFF,
            int(numbers.get(addend, addend)) & 0xFFFFFFFF,
        )
        for factor, addend in found
    ]


def as_numbers(halves: np.ndarray, form: Format) -> np.ndarray:
    """16-bit patterns as float64; subnormals keep their value."""
    patterns = torch.from_numpy(halves.astype(np.uint16).view(np.int16))
    return patterns.view(form.torch_type).double().numpy()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("bits", "down"), [(1, 0), (2, 0), (4, 0), (4, 4)])
def test_the_packed_multiply_add_subtracts_the_midpoint(
    bits: int, down: int, dtype: str, capability: int
) -> None:
    form = FORMATS[dtype]
    span = form.mantissa // bits * bits
    compiled = triton.compile(
        ASTSource(
            midpoint_kernel,
            {"out_ptr": "*i32", "in_ptr": "*i32", "type_ptr": f"*{dtype}"}
            | dict.fromkeys(("BITS", "SPAN", "DOWN"), "constexpr"),
            {"BITS": bits, "SPAN": span, "DOWN": down},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"enable_fp_fusion": True, "num_warps": 1},
    )
    ptx = compiled.asm["ptx"]
    assert ".ftz" not in ptx
    found = operands(ptx, form.operation)
    places = range(0, span, bits)
    assert len(found) == len(places)
    codes = np.arange(2**bits)
    want = (codes - (2**bits - 1) / 2) * 2.0 ** (-form.unit - down)
    # The larger the factor, the lower the bit position of the codes that it scales.
    for place, (factor, addend) in zip(places, sorted(found, reverse=True), strict=True):
        assert factor >> 16 == factor & 0xFFFF, "both halves have the same operands"
        assert addend >> 16 == addend & 0xFFFF
        masked = as_numbers(codes << place, form)
        by, plus = as_numbers(np.array([factor & 0xFFFF, addend & 0xFFFF]), form)
        exact = masked * by + plus  # exact in float64: all operands have few bits
        np.testing.assert_array_equal(exact, want)
        rounded = torch.from_numpy(exact).to(form.torch_type).double().numpy()
        np.testing.assert_array_equal(rounded, exact)
