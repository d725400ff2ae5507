"""Both kernels compile without a GPU, within the registers that leave a GPU enough warps."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.svd_delta import triton as kernel
from kernels.svd_delta.chunks import HEIGHT
from kernels.svd_delta.layout import GROUP_FIELDS

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

TYPES = {"x_ptr": "*bf16", "y_ptr": "*bf16", "addresses_ptr": "*i64"} | dict.fromkeys(
    ("projected_ptr", "sums_ptr", "scales_ptr"), "*fp32"
)
NUMBERS = ("x_stride", "y_stride", "h_in", "h_out", "max_rank")
CONSTANTS = {"MAX_GROUPS": 64, "FIELDS": GROUP_FIELDS, "BLOCK_M": HEIGHT, "UPCAST": False} | {
    name: getattr(kernel, name) for name in ("BLOCK_R", "BLOCK_K", "BLOCK_N")
}


def compile_for(capability: int, function: Any, stages: int) -> Any:
    """Compile as it is launched on bfloat16 rows whose shape is a multiple of 16."""
    names = function.arg_names
    constants = {name: CONSTANTS[name] for name in names if name in CONSTANTS}
    types = TYPES | dict.fromkeys(NUMBERS, "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*i32") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in constants
    }
    return triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_stages": stages, "enable_fp_fusion": True},
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("name", "stages", "limit"),
    [("shrink_kernel", kernel.SHRINK_STAGES, 128), ("expand_kernel", kernel.EXPAND_STAGES, 168)],
)
def test_registers_and_spills(
    name: str, stages: int, limit: int, capability: int, tmp_path: Path
) -> None:
    compiled = compile_for(capability, getattr(kernel, name), stages)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = re.search(rf"{name}:\s+REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = map(int, found.groups())
    assert registers <= limit
    # Spilled registers lie on the stack; ptxas may leave a few numbers there that no loop reads.
    assert stack <= 32
