"""A decoder layer's small operations compile without a GPU: no spills, few instructions."""

import os
from typing import Any, NamedTuple

import pytest

from benchmarks.decoder import compile_operation
from benchmarks.machine_code import MachineCode
from deltadock.kernels.decoder import triton as kernel
from tests.kernels.waits import check_accesses_after_the_wait, check_every_program_waits

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


class Compiled(NamedTuple):
    """A kernel at a family's shapes, and the most instructions that it may take."""

    kernel: str
    warps: int
    constants: dict[str, Any]
    instructions: int
    types: dict[str, str] = {}  # noqa: RUF012 (a tuple's default is not changed)


WHOLE = {"WIDTH": 128, "ROTATED": 128, "BLOCK": 64, "REST": 1}
KERNELS = {
    "norm, Qwen": Compiled(
        "rms_norm_kernel", 8, {"WIDTH": 3584, "BLOCK": 4096, "ADD": True}, 230
    ),
    "norm, Gemma": Compiled(
        "rms_norm_kernel", 8, {"WIDTH": 3584, "BLOCK": 4096, "ADD": True}, 240,
        {"weights_ptr": "*fp32"},
    ),
    "rotation, Qwen": Compiled("rotate_and_store_kernel", 1, WHOLE | {"NORM": True}, 210),
    "rotation, Gemma": Compiled(
        "rotate_and_store_kernel", 1,
        {"WIDTH": 256, "ROTATED": 256, "BLOCK": 128, "REST": 1, "NORM": True}, 260,
        {"query_weights_ptr": "*fp32", "key_weights_ptr": "*fp32"},
    ),
    "rotation, Phi": Compiled(
        "rotate_and_store_kernel", 1, WHOLE | {"ROTATED": 96, "REST": 32, "NORM": False}, 210
    ),
    "gate, Qwen": Compiled("gated_kernel", 4, {"BLOCK": kernel.GATED_COLUMNS, "SILU": True}, 190),
    "gate, Gemma": Compiled("gated_kernel", 4, {"BLOCK": kernel.GATED_COLUMNS, "SILU": False}, 220),
}  # fmt: skip
WRITTEN = {
    "rms_norm_kernel": ["x_ptr", "residual_ptr", "sum_ptr", "out_ptr"],
    "rotate_and_store_kernel": [
        "projected_ptr", "cos_ptr", "sin_ptr", "query_ptr", "keys_ptr", "values_ptr"
    ],
    "gated_kernel": ["x_ptr", "out_ptr"],
}  # fmt: skip
"""Arguments that kernels of a step write."""


def compiled(name: str, capability: int) -> MachineCode:
    function, warps, constants, _, types = KERNELS[name]
    return compile_operation(capability, function, warps, constants, **types)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name: str, capability: int) -> None:
    code, expected = compiled(name, capability), KERNELS[name]
    assert not code.loops
    assert code.stack_bytes == 0
    assert len(code.operations) <= expected.instructions, len(code.operations)
    assert code.registers <= 48
    assert code.programs_per_sm * expected.warps >= 32


@pytest.mark.parametrize("name", KERNELS)
def test_what_other_kernels_write_is_accessed_after_the_wait(name: str) -> None:
    code, function = compiled(name, 90), KERNELS[name].kernel
    check_every_program_waits(code)
    check_accesses_after_the_wait(code, getattr(kernel, function), WRITTEN[function])


@pytest.mark.parametrize("name", ["norm, Qwen", "norm, Gemma", "rotation, Qwen", "rotation, Gemma"])
def test_weights_of_norms_are_read_before_the_wait(name: str) -> None:
    code = compiled(name, 90)
    before = code.operations[: code.operations.index("ACQBULK")]
    assert before.count("LDG") >= 4
