"""A decoder layer's small operations compile without a GPU: no spills, few instructions."""

import os
from typing import Any

import pytest

from benchmarks.decoder import compile_operation
from benchmarks.machine_code import MachineCode
from deltadock.kernels.decoder import triton as kernel
from tests.kernels.waits import check_accesses_after_the_wait, check_every_program_waits

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

KERNELS: dict[str, tuple[int, dict[str, Any], int, list[str]]] = {
    "rms_norm_kernel": (
        8, {"WIDTH": 3584, "BLOCK": 4096, "ADD": True}, 230,
        ["x_ptr", "residual_ptr", "sum_ptr", "out_ptr"],
    ),
    "rotate_and_store_kernel": (
        1, {"WIDTH": 128, "BLOCK": 64, "NORM": True}, 210,
        ["projected_ptr", "cos_ptr", "sin_ptr", "query_ptr", "keys_ptr", "values_ptr"],
    ),
    "gated_silu_kernel": (4, {"BLOCK": kernel.GATED_COLUMNS}, 190, ["x_ptr", "out_ptr"]),
}  # fmt: skip
"""At Qwen's shapes: warps, constants, most instructions, arguments that kernels of a step write."""


def compiled(name: str, capability: int) -> MachineCode:
    warps, constants, _, _ = KERNELS[name]
    return compile_operation(capability, name, warps, constants)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name: str, capability: int) -> None:
    code = compiled(name, capability)
    warps, _, instructions, _ = KERNELS[name]
    assert not code.loops
    assert code.stack_bytes == 0
    assert len(code.operations) <= instructions, len(code.operations)
    assert code.registers <= 48
    assert code.programs_per_sm * warps >= 32


@pytest.mark.parametrize("name", KERNELS)
def test_what_other_kernels_write_is_accessed_after_the_wait(name: str) -> None:
    code = compiled(name, 90)
    check_every_program_waits(code)
    check_accesses_after_the_wait(code, getattr(kernel, name), KERNELS[name][-1])


@pytest.mark.parametrize("name", ["rms_norm_kernel", "rotate_and_store_kernel"])
def test_weights_of_norms_are_read_before_the_wait(name: str) -> None:
    code = compiled(name, 90)
    before = code.operations[: code.operations.index("ACQBULK")]
    assert before.count("LDG") >= 4
