"""Decode attention compiles without a GPU, within budgets of registers and instructions."""

import os

import pytest

from benchmarks.decoder import compile_for
from deltadock.kernels.decode_attention import triton as kernel
from deltadock.kernels.decode_attention.triton import Variant
from tests.kernels.waits import check_accesses_after_the_wait, check_every_program_waits

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code(capability: int) -> None:
    """At Qwen2.5-7B's heads: seven queries share a key head of 128 columns."""
    split, combine = compile_for(capability)
    (loop,) = split.loops
    read = 2 * 64 * 128 * 2  # bytes of a step: keys and values of 64 tokens
    # At 75 % of copy bandwidth an SM may spend 9.4 on a byte.
    assert (loop.stop - loop.start) * split.warps * 32 / read <= 1.3
    assert len(split.operations) <= 800
    assert split.programs_per_sm >= 5
    assert not combine.loops
    assert len(combine.operations) <= 400
    assert combine.programs_per_sm >= 8
    assert split.stack_bytes == combine.stack_bytes == 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("cap", [None, 50.0])
def test_machine_code_of_wide_heads(capability: int, cap: float | None) -> None:
    """At Gemma 2's heads of 256 columns, with and without a cap of the scores."""
    split, combine = compile_for(capability, Variant(tokens=32), width=256, group=2, cap=cap)
    (loop,) = split.loops
    read = 2 * 32 * 256 * 2
    assert (loop.stop - loop.start) * split.warps * 32 / read <= 1.5
    assert split.programs_per_sm >= 5
    assert combine.programs_per_sm >= 6
    assert split.stack_bytes == combine.stack_bytes == 0


def test_what_other_kernels_write_is_accessed_after_the_wait() -> None:
    split, combine = compile_for(90)
    written = ["query_ptr", "keys_ptr", "values_ptr", "parts_ptr", "states_ptr"]
    check_every_program_waits(split)
    check_accesses_after_the_wait(split, kernel.split_kernel, written)
    check_every_program_waits(combine)
    written = ["parts_ptr", "states_ptr", "out_ptr"]
    check_accesses_after_the_wait(combine, kernel.combine_kernel, written)
