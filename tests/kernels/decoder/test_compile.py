"""A decoder layer's small operations compile without a GPU: no spills, few instructions."""

import os
from typing import Any

import pytest

from benchmarks.machine_code import compile_kernel, disassemble
from deltadock.kernels.decoder import triton as kernel

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

TYPES = dict.fromkeys(
    ("out_ptr", "sum_ptr", "x_ptr", "residual_ptr", "weights_ptr", "query_ptr", "projected_ptr",
     "cos_ptr", "sin_ptr", "keys_ptr", "values_ptr", "query_weights_ptr", "key_weights_ptr"),
    "*bf16",
) | dict.fromkeys(
    ("x_stride", "residual_stride", "projected_stride", "slot_stride", "kv_stride", "heads",
     "kv_heads", "width"),
    "i32",
) | dict.fromkeys(("epsilons_ptr", "query_epsilons_ptr", "key_epsilons_ptr"), "*fp32") | {
    "slots_ptr": "*i64", "positions_ptr": "*i64"
}  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "warps", "constants", "instructions"),
    [
        ("rms_norm_kernel", 8, {"WIDTH": 3584, "BLOCK": 4096, "ADD": True}, 230),
        ("rotate_and_store_kernel", 1, {"WIDTH": 128, "BLOCK": 64, "NORM": True}, 210),
        ("gated_silu_kernel", 4, {"BLOCK": kernel.GATED_COLUMNS}, 190),
    ],
)
def test_machine_code(
    name: str, warps: int, constants: dict[str, Any], instructions: int, capability: int
) -> None:
    """At Qwen's shapes."""
    compiled = compile_kernel(
        capability, getattr(kernel, name), TYPES, constants | {"EMULATE": False},
        unspecialized=kernel.UNSPECIALIZED, num_warps=warps,
    )  # fmt: skip
    code = disassemble(compiled)
    assert not code.loops
    assert code.stack_bytes == 0
    assert len(code.operations) <= instructions, len(code.operations)
    assert code.registers <= 48
    assert code.programs_per_sm * warps >= 32
