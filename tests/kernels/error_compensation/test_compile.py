"""The kernel compiles without a GPU and keeps its errors in registers."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltadock.kernels.error_compensation.triton import COLUMNS, INTEGERS, ROWS, round_block_kernel

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


@pytest.mark.parametrize("capability", [80, 90])
def test_registers_and_spills(capability: int, tmp_path: Path) -> None:
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    types = {"codes_ptr": "*u8", **dict.fromkeys(INTEGERS, "i32")}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32")
        for name in round_block_kernel.arg_names
    }
    compiled = triton.compile(
        ASTSource(round_block_kernel, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": True},
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = re.search(r"round_block_kernel:\s+REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = map(int, found.groups())
    assert registers <= 128
    assert stack == 0
