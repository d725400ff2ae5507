"""Programmatic dependent launch: a kernel starts while the one before it still runs.

With OVERLAP, which needs compute capability 9.0, a kernel lets the next one in the stream start at
once, and waits for the ones before it only where it needs what they wrote. Until then it may read
only what no kernel of a step writes. Every program must wait, also one that has nothing to do: a
grid counts as ended when its programs are, and the next grid waits for this one only.
"""

from functools import cache

import torch
import triton
import triton.language as tl


@cache
def overlaps(device: torch.device) -> bool:
    """Whether kernels on this device may be launched with OVERLAP."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, bool]:
    """How to launch a kernel that takes OVERLAP."""
    overlap = overlaps(device)
    return {"OVERLAP": overlap, "launch_pdl": overlap}


@triton.jit
def start_next(OVERLAP: tl.constexpr):
    """Let the next kernel start once all programs of this one have come here."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Wait until the kernels before this one have ended and their results are visible.

    Returns 0. Added to a pointer, it keeps loads from being moved before the wait: compilers take
    inline assembly that loads for a function of its operands.
    """
    zero = 0
    if OVERLAP:
        zero = tl.multiple_of(
            tl.inline_asm_elementwise(
                "griddepcontrol.wait; mov.b32 $0, 0;", "=r", [],
                dtype=tl.int32, is_pure=False, pack=1,
            ),
            16,
        )  # fmt: skip
    return zero


@triton.jit
def prefetch(pointers, needed):
    """Ask for the 64 bytes at each pointer to be brought to L2 where `needed`."""
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0;}",
        "=r,l,r", [pointers.to(tl.int64), needed.to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
