"""The kernels compile without a GPU, within budgets of registers and instructions."""

import os
import re
from typing import Any

import pytest

from benchmarks.kernel import LAYER
from benchmarks.kernel_model import (
    EXPAND_CODES,
    MEASURED,
    compile_for,
    expand_programs,
    inner_loops,
    lane_instructions,
    predict,
    read_code,
    shrink_codes,
    shrink_programs,
)
from deltadock.kernels.svd_delta import triton as kernel
from deltadock.kernels.svd_delta.triton import DEFAULT

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("name", "warps", "stages", "registers", "shared"),
    [
        ("shrink_kernel", DEFAULT.shrink_warps, DEFAULT.shrink_stages, 224, 90_000),
        ("expand_kernel", DEFAULT.expand_warps, DEFAULT.expand_stages, 255, 90_000),
    ],
)
def test_registers_spills_and_shared_memory(
    name: str, warps: int, stages: int, registers: int, shared: int, dtype: str, capability: int
) -> None:
    compiled = compile_for(capability, getattr(kernel, name), dtype, warps, stages)
    # Codes are used in the thread that unpacked them: no dot loads its tall operand from shared
    # memory.
    assert not re.search(r"local_load .*opIdx = 0", compiled.asm["ttgir"])
    code = read_code(name, compiled, warps)
    assert code.shared_bytes <= shared
    assert code.registers <= registers
    # Spilled registers are on the stack; ptxas may keep a few values there outside of loops.
    assert code.stack_bytes <= 32
    assert code.programs_per_sm >= 1


@pytest.mark.parametrize("capability", [80, 90])
def test_the_prepare_kernel_is_small(capability: int) -> None:
    compiled = compile_for(capability, kernel.prepare_kernel, "bf16", 4, 1)
    assert compiled.metadata.shared <= 4_096


@pytest.mark.parametrize(
    ("name", "codes_of", "bounds"),
    [
        # Of planes of 8, 4, 2 and 1 bits.
        ("shrink_kernel", shrink_codes(DEFAULT.shrink_words), (5.2, 2.8, 2.1, 1.8)),
        ("expand_kernel", EXPAND_CODES, (6.2, 3.8, 2.9, 2.5)),
    ],
)
def test_instructions_a_code(name: str, codes_of: list[int], bounds: tuple[float, ...]) -> None:
    """An SM may spend 1.2 instructions of a lane on a byte's eighth at 75 % of copy bandwidth."""
    warps, stages = (
        (DEFAULT.shrink_warps, DEFAULT.shrink_stages)
        if name == "shrink_kernel"
        else (DEFAULT.expand_warps, DEFAULT.expand_stages)
    )
    compiled = compile_for(90, getattr(kernel, name), "bf16", warps, stages)
    found = lane_instructions(read_code(name, compiled, warps), codes_of)
    assert all(number <= bound for number, bound in zip(found, bounds, strict=True)), found


@pytest.mark.parametrize(("key", "measured"), MEASURED.items())
def test_the_model_explains_what_an_h200_measured(key: Any, measured: float) -> None:
    name, rows, deltas = key
    projections = [each for each in LAYER if name in ("whole layer", each.name)]
    assert predict(projections, rows, deltas, DEFAULT, 90) == pytest.approx(measured, rel=0.15)


def test_programs_at_decode_shapes() -> None:
    """One row on one delta, for an H200's 132 SMs: a layer's launches leave most of them idle."""
    programs = {
        each.name: (len(shrink_programs(each, DEFAULT)), len(expand_programs(each, DEFAULT)))
        for each in LAYER
    }
    assert programs == {
        "q, k, v": (41, 18), "o": (25, 14), "gate, up": (80, 148), "down": (40, 14),
    }  # fmt: skip


LISTING = """
.L_x_0:
        /*0000*/  IMAD R1, R2, R3, R4 ;
.L_x_1:
        /*0010*/  HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0020*/  @P0 BRA `(.L_x_1) ;
        /*0030*/  @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0040*/  LDG.E R1, [R2] ;
        /*0050*/  FADD R1, R1, R2 ;
        /*0060*/  @P2 BRA `(.L_x_2) ;
.L_x_3:
        /*0070*/  BRA `(.L_x_3) ;
"""


def test_inner_loops_are_found_in_a_listing() -> None:
    assert list(inner_loops(LISTING)) == [(2, 1), (3, 0)]
