"""GPU path: one launch that reads a weight once, for few rows.

Tensor cores multiply a tile of the weight, the tall operand, by all rows. Terms of a product may be
in any order, so each thread loads 16 bytes of a weight's row and of an input's, which are the very
numbers that its part of the tensor-core product takes: the loop has neither barriers nor shared
memory. The warps of a program share the inputs, and each loads the words of its next step before it
uses those of this one. How a sum is split follows from the form and the inputs alone, so that a
row's bits do not depend on the other rows.

Where launches overlap (`kernels/overlap.py`), a program's first words are loaded before the wait,
and more are brought to L2: memory is busy while the kernels before still run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltadock.kernels.interpreter import dot, round_to
from deltadock.kernels.operands import PAIRED
from deltadock.kernels.overlap import launch_options, prefetch, start_next, wait_for_previous

MOST_ROWS: Final = 16
"""The inputs of more rows take the registers that the words need on their way."""
LEAST_ROWS: Final = 8
"""Of a product on tensor cores."""
RUN: Final = 8
"""Numbers of a vector that a thread loads at once, 16 bytes."""
CHUNK: Final = 4 * RUN
"""Numbers of a vector that the four threads load that share it."""
LINE: Final = 32
"""Numbers that one request brings to L2, 64 bytes."""
UNSPECIALIZED: Final = ("rows",)
"""Arguments whose values only would multiply compilations."""


@dataclass(frozen=True, slots=True)
class Form:
    """How the kernel is compiled.

    Attributes:
        columns: outputs of a program; a power of two from 16 on.
        warps: of a program; each takes a part of the inputs.
        chunks: `CHUNK`s of a column that a warp takes in a step.
        lines: `LINE`s of a column that are brought to L2 before the wait; a power of two.
    """

    columns: int
    warps: int
    chunks: int
    lines: int


FORMS: Final[Mapping[tuple[int, int], Form]] = MappingProxyType({})
"""By compute capability the form that `python -m benchmarks.linear` finds faster than cuBLAS; cards
that are not listed use cuBLAS."""

_RUN = tl.constexpr(RUN)
_CHUNK = tl.constexpr(CHUNK)
_LINE = tl.constexpr(LINE)
_PAIRED = tl.constexpr(PAIRED)


@cache
def form_of(device: torch.device) -> Form | None:
    """The form for a device, if it has one."""
    if device.type != "cuda":
        return None
    return FORMS.get(torch.cuda.get_device_capability(device))


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can multiply these."""
    return (
        0 < len(x) <= MOST_ROWS
        and weight.dtype in {torch.float16, torch.bfloat16}
        and x.shape[1] % RUN == x.stride(0) % RUN == 0
        and x.stride(1) == 1
        and weight.is_contiguous()
        and x.data_ptr() % 16 == weight.data_ptr() % 16 == 0
    )


@triton.jit
def _load_runs(vectors, index, length, CONSTANT: tl.constexpr, EMULATE: tl.constexpr):
    """The four words of a run from `index` on of each vector; past its end those of its last run.

    CONSTANT: no kernel of a step writes them, and they are read once.
    """
    index = tl.minimum(index, length - _RUN)
    addresses = vectors[None, :, None, None] + index.to(tl.int64) * 2
    if EMULATE:
        words = addresses.to(tl.pointer_type(tl.int32))
        runs = (tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3))
    elif CONSTANT:
        runs = tl.inline_asm_elementwise(
            "ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {$0, $1, $2, $3}, [$4];",
            "=r,=r,=r,=r,l", [addresses],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        runs = tl.inline_asm_elementwise(
            "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [addresses],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return runs


@triton.jit
def _numbers(runs, DT: tl.constexpr):
    """Runs (warps, vectors, chunks, 4) as an operand (warps, vectors, numbers).

    A thread of the operand has the same part of each eight numbers, or of each 16 if they are
    paired. Here these are the words of its run in turn.
    """
    words = tl.join(tl.join(runs[0], runs[1]), tl.join(runs[2], runs[3]))
    low = (words & 0xFFFF).to(tl.int16).to(DT, bitcast=True)
    high = ((words >> 16) & 0xFFFF).to(tl.int16).to(DT, bitcast=True)
    numbers = tl.join(low, high)
    numbers = tl.permute(numbers, (0, 1, 2, 5, 3, 4, 6) if _PAIRED else (0, 1, 2, 5, 4, 3, 6))
    return tl.reshape(numbers, (runs[0].shape[0], runs[0].shape[1], runs[0].shape[2] * _CHUNK))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def linear_kernel(
    y_ptr, y_stride, x_ptr, x_stride, weight_ptr, bias_ptr, rows, h_in, h_out,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr,
    LINES: tl.constexpr, EVEN: tl.constexpr, BIAS: tl.constexpr, OVERLAP: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """COLUMNS outputs of all rows. EVEN: the inputs are whole steps of all warps."""
    start_next(OVERLAP)
    DT: tl.constexpr = y_ptr.dtype.element_ty
    STEP: tl.constexpr = CHUNKS * _CHUNK
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # Past the last column or row, those of the last.
    weights = (weight_ptr + tl.minimum(columns, h_out - 1).to(tl.int64) * h_in).to(tl.int64)
    index = (tl.arange(0, CHUNKS) * _CHUNK)[:, None] + (tl.arange(0, 4) * _RUN)[None, :]
    index = ((tl.arange(0, WARPS) * STEP)[:, None, None] + index[None, :, :])[:, None, :, :]
    w = _load_runs(weights, index, h_in, True, EMULATE)
    if OVERLAP:
        ahead = WARPS * STEP + tl.arange(0, LINES) * _LINE
        needed = (columns < h_out)[:, None] & (ahead < h_in)[None, :]
        prefetch(weights[:, None] + ahead[None, :] * 2, needed)
    started = wait_for_previous(OVERLAP)
    row = tl.arange(0, ROWS)
    inputs = x_ptr + started + tl.minimum(row, rows - 1).to(tl.int64) * x_stride
    inputs = inputs.to(tl.int64)
    x = _load_runs(inputs, index, h_in, False, EMULATE)
    acc = tl.zeros((WARPS, COLUMNS, ROWS), tl.float32)
    for _ in range(0, h_in, STEP * WARPS):
        if not EVEN:
            used = index < h_in
            x0, x1 = tl.where(used, x[0], 0), tl.where(used, x[1], 0)
            x2, x3 = tl.where(used, x[2], 0), tl.where(used, x[3], 0)
            x = (x0, x1, x2, x3)
        index += STEP * WARPS
        next_w = _load_runs(weights, index, h_in, True, EMULATE)
        next_x = _load_runs(inputs, index, h_in, False, EMULATE)
        acc = dot(_numbers(w, DT), tl.permute(_numbers(x, DT), (0, 2, 1)), acc, EMULATE)
        w, x = next_w, next_x
    total = tl.sum(acc, axis=0)
    if BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < h_out, other=0.0)
        total += bias.to(tl.float32)[:, None]
    out = y_ptr + row.to(tl.int64)[None, :] * y_stride + columns[:, None]
    mask = (columns < h_out)[:, None] & (row < rows)[None, :]
    tl.store(out, round_to(total, DT, EMULATE), mask=mask)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    """See `deltadock.kernels.linear.linear`; what `fits` says holds."""
    rows, (h_out, h_in) = len(x), weight.shape
    y = torch.empty(rows, h_out, dtype=x.dtype, device=x.device)
    linear_kernel[(triton.cdiv(h_out, form.columns),)](
        y, y.stride(0), x, x.stride(0), weight, weight if bias is None else bias,
        rows, h_in, h_out,
        ROWS=max(LEAST_ROWS, triton.next_power_of_2(rows)), COLUMNS=form.columns,
        WARPS=form.warps, CHUNKS=form.chunks, LINES=form.lines,
        EVEN=h_in % (form.warps * form.chunks * CHUNK) == 0, BIAS=bias is not None,
        EMULATE=not x.is_cuda, num_warps=form.warps, **launch_options(x.device),
        enable_fp_fusion=True,  # pinned: Triton 3.10 changes the default
    )  # fmt: skip
    return y
