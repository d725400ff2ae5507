"""The kernels compile without a GPU, within a register budget that keeps occupancy."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltadock.kernels.svd_delta import triton as kernel
from deltadock.kernels.svd_delta.chunks import CHUNK_ROWS, SUM_COLUMNS
from deltadock.kernels.svd_delta.layout import TILE_RANKS
from deltadock.kernels.svd_delta.triton import UNSPECIALIZED

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

TYPES = {"addresses_ptr": "*i64", "projected_ptr": "*fp32", "sums_ptr": "*fp32"}
NUMBERS = ("x_stride", "y_stride", "xs_stride", "sums_stride", "h_in", "padded_h_in", "max_rank")
CONSTANTS = {
    "LINEARS": 3,
    "BLOCK_M": CHUNK_ROWS,
    "BLOCK_K": SUM_COLUMNS,
    "BLOCK_R": TILE_RANKS,
    "SUMS": 4,
    "TERMS": 1,
    "WARPS": kernel.WARPS,
    "WORDS": kernel.WORDS,
    "ALIGNED": True,
    "EMULATE": False,
}


def compile_for(capability: int, function: Any, dtype: str, warps: int, stages: int) -> Any:
    """Compile as launched for a 16-bit dtype and shapes that are multiples of 128."""
    names = function.arg_names
    constants = {name: CONSTANTS[name] for name in names if name in CONSTANTS}
    if dtype == "fp16" and "TERMS" in constants:
        constants["TERMS"] = 2
    types = TYPES | dict.fromkeys(("x_ptr", "xs_ptr", "y_ptr"), f"*{dtype}")
    types |= dict.fromkeys((*NUMBERS, "sum_count"), "i32") | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "*i32") for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in constants and name not in UNSPECIALIZED
    }
    return triton.compile(
        ASTSource(function, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True},
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("name", "warps", "stages", "registers", "shared"),
    [
        ("prepare_kernel", 4, 1, 128, 4_096),
        ("shrink_kernel", kernel.WARPS, kernel.SHRINK_STAGES, 224, 90_000),
        ("expand_kernel", kernel.WARPS, kernel.EXPAND_STAGES, 255, 90_000),
    ],
)
def test_registers_spills_and_shared_memory(
    name: str,
    warps: int,
    stages: int,
    registers: int,
    shared: int,
    dtype: str,
    capability: int,
    tmp_path: Path,
) -> None:
    compiled = compile_for(capability, getattr(kernel, name), dtype, warps, stages)
    # Codes are used in the thread that unpacked them: no dot loads its tall operand from shared
    # memory.
    assert not re.search(r"local_load .*opIdx = 0", compiled.asm["ttgir"])
    assert compiled.metadata.shared <= shared
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
    used, stack = map(int, found.groups())
    assert used <= registers
    # Spilled registers are on the stack; ptxas may keep a few values there outside of loops.
    assert stack <= 32
