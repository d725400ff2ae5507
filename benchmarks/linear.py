"""The base's products of few rows at Qwen2.5-7B's shapes: cuBLAS, and the kernel that overlaps.

    python -m benchmarks.linear

It needs a GPU. Printed is first the time in a CUDA graph of a layer's products with the norms and
the activation between them, by cuBLAS and by each form of the kernel, and as a fraction of copy
bandwidth. Only the kernel lets the launch after it start early, and begins to read its weight
before the one before has ended. Then the same of each product alone. Every result is checked first.
The best form belongs into `FORMS` of `deltadock/kernels/linear/triton.py` if it is faster.

"cuBLAS, ahead" is a layer by cuBLAS while, from each product on, a second stream brings the first
inputs of the next weight's columns to L2.

    TRITON_INTERPRET=1 python -m benchmarks.linear --device cpu

runs the same code at a tiny size without a GPU, and times nothing.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Final

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.harness import describe_machine, device_bandwidth, gpu_seconds
from benchmarks.kernel import LAYER, Projection
from benchmarks.machine_code import MachineCode, compile_kernel, disassemble
from deltadock.kernels.decoder import RowNorm
from deltadock.kernels.decoder import triton as decoder
from deltadock.kernels.linear import triton as kernel
from deltadock.kernels.linear.triton import LINE, Form
from deltadock.kernels.overlap import prefetch

FORMS: Final = [
    Form(16, 4, 4, 32),
    Form(16, 8, 2, 32),
    Form(16, 4, 4, 128),
    Form(32, 4, 2, 32),
    Form(16, 8, 4, 32),
    Form(32, 8, 2, 32),
]
"""The most likely first."""
ROWS: Final = (1, 12)
HEAD: Final = Projection("head", 3584, (152_064,))
TINY: Final = (
    Projection("q, k, v", 24, (24, 8, 8)), Projection("o", 24, (24,)),
    Projection("gate, up", 24, (40, 40)), Projection("down", 40, (24,)),
)  # fmt: skip
TOLERANCE: Final = 0.01
"""Largest accepted relative RMS error in bfloat16."""
WORKING_SET_BYTES: Final = 256 << 20
"""Of the weights that are read in turn: several times a GPU's L2 cache."""
AHEAD_BYTES: Final = 24 << 20
"""Of a weight, brought to L2, half of which this is."""
AHEAD_COLUMNS: Final = 16
"""Of a program that does so."""
TYPES: Final = dict.fromkeys(("y_ptr", "x_ptr", "weight_ptr", "bias_ptr"), "*bf16") | dict.fromkeys(
    ("y_stride", "x_stride", "rows", "h_in", "h_out"), "i32"
)
Product = Callable[[Tensor, Tensor], Tensor]
"""Of inputs and a weight."""


@functools.cache
def compile_for(capability: int, form: Form, rows: int) -> MachineCode:
    """The kernel's machine code for bfloat16 and inputs that are whole steps of all warps."""
    constants = {
        "ROWS": rows, "COLUMNS": form.columns, "WARPS": form.warps, "CHUNKS": form.chunks,
        "LINES": form.lines, "EVEN": True, "BIAS": True, "OVERLAP": capability >= 90,
        "EMULATE": False,
    }  # fmt: skip
    compiled = compile_kernel(
        capability, kernel.linear_kernel, TYPES, constants,
        unspecialized=kernel.UNSPECIALIZED, num_warps=form.warps,
    )  # fmt: skip
    return disassemble(compiled)


def name_of(form: Form) -> str:
    """Columns, warps, chunks and lines."""
    return "x".join(map(str, astuple(form)))


def form_named(name: str) -> Form:
    """The inverse of `name_of`."""
    return Form(*map(int, name.split("x")))


def products_of(forms: Sequence[Form]) -> dict[str, Product]:
    """CuBLAS's and those of the forms."""
    ours = {name_of(form): functools.partial(_linear, form) for form in forms}
    return {"cuBLAS": F.linear, **ours}


def _linear(form: Form, x: Tensor, weight: Tensor) -> Tensor:
    return kernel.linear(x, weight, None, form)


def _bring(
    weight_ptr: tl.tensor,
    h_in: tl.tensor,
    h_out: tl.tensor,
    COLUMNS: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
) -> None:
    """Bring the first LINES lines of COLUMNS of a weight's columns to L2."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, LINES) * LINE
    offsets = columns.to(tl.int64)[:, None] * h_in + place[None, :]
    prefetch(weight_ptr + offsets, (columns < h_out)[:, None] & (place < h_in)[None, :])


bring_kernel: Final = triton.jit(_bring)


class AheadProducts:
    """CuBLAS's products with these weights in turn, each with a part of the next brought to L2."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._next = {
            weight.data_ptr(): following for weight, following in itertools.pairwise(weights)
        }
        self._stream = torch.cuda.Stream()
        self._forked = False

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        current = torch.cuda.current_stream()
        if self._forked:  # A graph that is captured may not wait for what is before it.
            current.wait_stream(self._stream)
        y = F.linear(x, weight)
        following = self._next.get(weight.data_ptr())
        self._forked = following is not None
        if following is not None:
            h_out, h_in = following.shape
            lines = 1 << (AHEAD_BYTES // (2 * LINE * h_out)).bit_length() - 1
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                bring_kernel[(triton.cdiv(h_out, AHEAD_COLUMNS),)](
                    following, h_in, h_out, COLUMNS=AHEAD_COLUMNS, LINES=lines, LINE=LINE,
                    num_warps=1,
                )  # fmt: skip
        return y


class Operands:
    """Weights of some layers, and what else a layer of `rows` rows takes."""

    def __init__(self, projections: Sequence[Projection], rows: int, copies: int, device: str):
        generator = torch.Generator(device).manual_seed(0)

        def normal(height: int, width: int) -> Tensor:
            values = torch.empty(height, width, device=device, dtype=torch.bfloat16)
            return values.normal_(generator=generator)

        self.inputs = [normal(rows, each.h_in) for each in projections]
        self.weights = [
            [normal(sum(each.h_outs), each.h_in).mul_(each.h_in**-0.5) for each in projections]
            for _ in range(copies)
        ]
        self.nbytes = sum(weight.nbytes for weight in self.weights[0])
        hidden = projections[0].h_in
        self.norm = RowNorm(normal(1, hidden), torch.full((1,), 1e-6, device=device))
        self.row_slots = torch.zeros(rows, dtype=torch.int32, device=device)

    def layer(self, weights: Sequence[Tensor], x: Tensor, product: Product) -> Tensor:
        """A layer without deltas, whose attention is of each row to itself alone."""
        qkv, o, gate_up, down = weights
        normed = decoder.rms_norm(x, self.norm, self.row_slots)
        attended = product(product(normed, qkv)[:, : x.shape[1]], o)
        residual, normed = decoder.add_rms_norm(attended, x, self.norm, self.row_slots)
        return residual + product(decoder.gated(product(normed, gate_up), "silu"), down)


def check(got: Tensor, want: Tensor, name: str) -> None:
    """Compare with float32.

    Raises:
        SystemExit: the result is wrong.
    """
    error = float((got.float() - want).norm() / want.norm())
    if not error < TOLERANCE:
        raise SystemExit(f"{name}: the relative error is {error:.1e}.")


def measure_layer(
    projections: Sequence[Projection], rows: int, products: dict[str, Product], device: str
) -> dict[str, float]:
    """Seconds of a layer, of two in turn."""
    operands = Operands(projections, rows, 2, device)
    want = operands.layer(operands.weights[0], operands.inputs[0], F.linear).float()
    if device == "cuda":
        weights = [weight for layer in operands.weights for weight in layer]
        products = {"cuBLAS, ahead": AheadProducts(weights), **products}
    times = {}
    for name, product in products.items():
        check(operands.layer(operands.weights[0], operands.inputs[0], product), want, name)

        def layers(product: Product = product) -> None:
            x = operands.inputs[0]
            for weights in operands.weights:
                x = operands.layer(weights, x, product)

        times[name] = gpu_seconds(layers, graph=True) / 2
    show(f"a layer, {rows} rows", times, operands.nbytes, device)
    return times


def measure_product(
    projection: Projection, rows: int, products: dict[str, Product], device: str
) -> None:
    """Time one product, on weights in turn."""
    size = 2 * projection.h_in * sum(projection.h_outs)
    copies = 1 + WORKING_SET_BYTES // size if device == "cuda" else 1
    operands = Operands([projection], rows, copies, device)
    (x,) = operands.inputs
    weights = [weight for (weight,) in operands.weights]
    want = F.linear(x.float(), weights[0].float())
    times = {}
    for name, product in products.items():
        check(product(x, weights[0]), want, f"{projection.name}, {name}")

        def run(product: Product = product) -> None:
            for weight in weights:
                product(x, weight)

        times[name] = gpu_seconds(run, graph=True) / copies
    show(f"{projection.name}, {rows} rows", times, size, device)


@functools.cache
def _bandwidth() -> float:
    return device_bandwidth()


def show(what: str, times: dict[str, float], size: int, device: str) -> None:
    """Print times, and the fraction of copy bandwidth at which weights of `size` bytes are read."""
    bandwidth = _bandwidth() if device == "cuda" else float("nan")
    figures = [
        f"{name} {1e6 * seconds:.1f} us ({size / seconds / bandwidth:.0%})"
        for name, seconds in times.items()
    ]
    print(f"{what}: {', '.join(figures)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a layer, then each product."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args(arguments).device
    gpu = device == "cuda"
    print(describe_machine(device))
    print("columns x warps x chunks x lines (of copy bandwidth)")
    projections, products = (LAYER, products_of(FORMS)) if gpu else (TINY, products_of(FORMS[:2]))
    best = {}
    for rows in ROWS if gpu else ROWS[:1]:
        times = measure_layer(projections, rows, products, device)
        best[rows] = min(times, key=times.__getitem__)
    print("the best: " + ", ".join(f"{name} for {rows} rows" for rows, name in best.items()))
    for rows in best:
        for each in (*projections, HEAD) if gpu else projections:
            measure_product(each, rows, products, device)


if __name__ == "__main__":
    main()
