"""The kernels compile without a GPU and keep their errors in registers."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deltadock.kernels.error_compensation import GROUP, KEPT
from deltadock.kernels.error_compensation.triton import (
    COLUMNS,
    INTEGERS,
    ROWS,
    prune_block_kernel,
    round_block_kernel,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("kernel", "most"), [(round_block_kernel, 128), (prune_block_kernel, 192)])
def test_registers_and_spills(kernel: Any, most: int, capability: int, tmp_path: Path) -> None:
    """An SM runs four programs at once, or two: about as many as there are."""
    constants = {"ROWS": ROWS, "COLUMNS": COLUMNS, "GROUP": GROUP, "KEPT": KEPT}
    types = {"codes_ptr": "*u8", "kept_ptr": "*i1", **dict.fromkeys(INTEGERS, "i32")}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32")
        for name in kernel.arg_names
    }
    used = {name: value for name, value in constants.items() if name in signature}
    compiled = triton.compile(
        ASTSource(kernel, signature, used),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": 4, "enable_fp_fusion": True},
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = re.search(r"_block_kernel:\s+REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    registers, stack = map(int, found.groups())
    assert registers <= most
    assert stack == 0
