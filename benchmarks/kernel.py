"""The SVD-delta kernel at Qwen2.5-7B's shapes: time and bandwidth, beside its alternatives.

    python -m benchmarks.kernel

It needs a GPU, torch, triton and numpy, and ends within five minutes. First every case of
`tests/kernels/svd_delta/cases.py` must pass, and no configuration is timed before its own results
have been checked against float64. Then, for steps of 1 to 64 rows on 1 to 16 deltas of one bit per
weight, it prints for a layer's projections: the time of the deltas in a CUDA graph; the bandwidth
over the packed bytes as a fraction of a device-to-device copy of the same run; how many times
longer low-rank bfloat16 factors of the same bytes take, and dense bfloat16 deltas. Last, the
prefill of 2,048 rows of one delta as a multiple of the base's matrix products. Several layers
alternate, as in a model, so that no cache holds what a step reads.

    python -m benchmarks.kernel --sweep 100

compiles and times the variants of both kernels instead, for `VARIANTS` of
`deltadock/kernels/svd_delta/triton/forms.py`.

    TRITON_INTERPRET=1 python -m benchmarks.kernel --device cpu

runs the same code at a tiny size without a GPU, and times nothing.
"""

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Final

import torch
from torch import Tensor

from benchmarks.harness import device_bandwidth, gpu_seconds
from deltadock.kernels.svd_delta import (
    Chunks,
    DeltaTable,
    Group,
    PackedDelta,
    TensorCache,
    pack_delta,
    reference,
    svd_delta,
    triton,
)
from deltadock.kernels.svd_delta.layout import TILE_COLUMNS, segment_words
from deltadock.kernels.svd_delta.products import add_products
from deltadock.kernels.svd_delta.triton.forms import DEFAULT, ExpandForm, Form, Variant, variant_of
from tests.kernels.decode_attention.cases import CASES as ATTENTION_CASES
from tests.kernels.decoder.cases import CASES as DECODER_CASES
from tests.kernels.linear.cases import CASES as LINEAR_CASES
from tests.kernels.svd_delta.cases import CASES as DELTA_CASES
from tests.kernels.svd_delta.cases import GRAPH_CASES

CASES: Final = DELTA_CASES | ATTENTION_CASES | DECODER_CASES | LINEAR_CASES

WIDTHS = ((0.02, 8, 8), (0.28, 3, 3), (0.70, 2, 2))
"""(fraction of the ranks, bits of V, bits of U), as mixed methods allocate one bit per weight."""
HIDDEN, INTERMEDIATE, KEY_VALUE = 3584, 18944, 512
TOLERANCE = 5e-3
"""Largest accepted relative RMS error of an output row in bfloat16."""
CHECKED_ROWS = 64
GPU_STEPS = [
    *[(rows, 8) for rows in (8, 16, 32, 64)],
    *[(rows, 16) for rows in (16, 32, 64)],
    *[(rows, 1) for rows in (1, 8, 16, 64)],
    *[(rows, 4) for rows in (4, 16, 64)],
    *[(rows, 2) for rows in (2, 64)],
]
"""(rows, distinct deltas), the most important first."""
PREFILL_ROWS = 2048
WORKING_SET_BYTES = 256 << 20
"""Packed bytes of all layers together: several times a GPU's L2 cache."""
LIMIT_SECONDS = 270.0
MOST_WORKERS = 16
"""Processes that compile at once."""


@dataclass(frozen=True)
class Projection:
    """Linear layers with a common input: (h_in) to each of `h_outs`."""

    name: str
    h_in: int
    h_outs: tuple[int, ...]


LAYER = (
    Projection("q, k, v", HIDDEN, (HIDDEN, KEY_VALUE, KEY_VALUE)),
    Projection("o", HIDDEN, (HIDDEN,)),
    Projection("gate, up", HIDDEN, (INTERMEDIATE, INTERMEDIATE)),
    Projection("down", INTERMEDIATE, (HIDDEN,)),
)
SMALL = (Projection("q, k", 70, (40, 33)),)
"""For Triton's interpreter, which takes seconds for each projection."""


KERNELS: Final = ("prepare", "shrink", "expand")
"""In the order of their launches."""
REGISTERS: Final = (128, 64, 80, 96, 168, 255)
PREPARES: Final = [
    replace(DEFAULT, prepare=(Form(warps, registers),))
    for warps, registers in ((4, 48), (8, 32), (8, 40), (8, 64), (4, 64), (2, 64))
]
SHRINKS: Final = [
    replace(DEFAULT, shrink=(Form(warps, registers),))
    for warps in (4, 8, 2, 1)
    for registers in REGISTERS
]
REGISTERS_OF_EXPAND: Final = {64: (80, 64, 96), 128: (80, 96, 128), 256: (168, 128, 255)}
"""By columns of a tile."""
EXPANDS: Final = [
    replace(DEFAULT, expand=(ExpandForm(warps, registers, columns),))
    for warps in (4, 8, 16, 2)
    for columns in TILE_COLUMNS
    for registers in REGISTERS_OF_EXPAND[columns]
    if warps * registers <= 2048  # an SM's
]


def _in_turn(*lists: Sequence[Variant]) -> list[Variant]:
    """The first of each list, the second of each, and so on."""
    return [each for some in zip_longest(*lists) for each in some if each is not None]


SERIAL: Final = replace(DEFAULT, overlap=False)
SWEEP: Final = list(dict.fromkeys([DEFAULT, SERIAL, *_in_turn(SHRINKS, EXPANDS, PREPARES)]))
"""The variants to compare, the default first: each differs from it in one of the kernels, which has
one form, or in whether launches overlap."""


def name_of(variant: Variant) -> str:
    """Warps x registers of prepare's forms, then shrink's, then expand's x columns.

    `--variant` takes it.

    `,serial`: no launches overlap.
    """
    kernels = [
        "+".join("x".join(map(str, astuple(form))) for form in forms)
        for forms in (variant.prepare, variant.shrink, variant.expand)
    ]
    return ",".join(kernels + ([] if variant.overlap else ["serial"]))


def variant_named(name: str) -> Variant:
    """The inverse of `name_of`.

    Raises:
        ValueError: it is not of this form.
    """
    prepare, shrink, expand, *rest = name.split(",")
    if rest not in ([], ["serial"]):
        raise ValueError(f"{name!r} is not a variant's name.")
    return Variant(
        tuple(Form(*numbers) for numbers in _numbers(prepare)),
        tuple(Form(*numbers) for numbers in _numbers(shrink)),
        tuple(ExpandForm(*numbers) for numbers in _numbers(expand)),
        overlap=not rest,
    )


def _numbers(name: str) -> list[list[int]]:
    return [[int(number) for number in form.split("x")] for form in name.split("+")]


class WrongResult(Exception):
    """A kernel's result is wrong, so it is not timed."""


def groups_of(h_out: int, h_in: int) -> list[Group]:
    """The ranks of a delta of one bit per weight."""
    mean = sum(share * (v + u) / 2 for share, v, u in WIDTHS)
    rank = max(3, int(h_out * h_in / mean / (h_out + h_in)))
    return [Group(max(1, int(share * rank)), v, u) for share, v, u in WIDTHS]


def random_delta(h_out: int, h_in: int, device: str, generator: torch.Generator) -> PackedDelta:
    """A delta of one bit per weight with random codes."""
    groups = groups_of(h_out, h_in)

    def words(columns: int, side: int) -> Tensor:
        count = sum(segment_words(group.ranks, columns, group[side]) for group in groups)
        return torch.randint(
            -(2**31), 2**31, (count,), dtype=torch.int32, device=device, generator=generator
        )

    ranks = sum(group.ranks for group in groups)
    sizes = torch.cat([torch.full((n,), 2.0 ** (-v - u)) for n, v, u in groups])
    return pack_delta(
        (h_out, h_in),
        groups,
        s=sizes.to(device) / (h_in * ranks) ** 0.5,
        v=words(h_in, 1),
        u=words(h_out, 2),
        row_scale=torch.ones(h_out, device=device),
        column_scale=torch.ones(h_in, device=device),
    )


class RandomLayers:
    """`copies` layers of the same shapes, each with its own deltas in slots 1 to `deltas`."""

    def __init__(
        self, projections: Sequence[Projection], deltas: int, copies: int, device: str
    ) -> None:
        self.projections, self.deltas, self.copies = projections, deltas, copies
        self.device = device
        self.name = projections[0].name if len(projections) == 1 else "whole layer"
        self.generator = torch.Generator(device).manual_seed(0)
        self.tables = [[self._table(each) for each in projections] for _ in range(copies)]
        self.inputs = [self.normal(CHECKED_ROWS, each.h_in) for each in projections]

    def _table(self, projection: Projection) -> DeltaTable:
        deltas = [
            [
                random_delta(h_out, projection.h_in, self.device, self.generator)
                for h_out in projection.h_outs
            ]
            for _ in range(self.deltas)
        ]
        max_rank = max(sum(delta.rank for delta in slot) for slot in deltas)
        table = DeltaTable(
            self.deltas + 1,
            projection.h_in,
            projection.h_outs,
            max_rank=max_rank,
            device=self.device,
        )
        for slot, installed in enumerate(deltas, 1):
            table.install(slot, *installed)
        return table

    def normal(self, height: int, width: int) -> Tensor:
        """Standard normal values, (height, width) bfloat16."""
        values = torch.randn(height, width, device=self.device, generator=self.generator)
        return values.to(torch.bfloat16)

    @property
    def delta_bytes(self) -> int:
        """Packed bytes of one delta in one layer."""
        deltas = [delta for table in self.tables[0] for delta in table.deltas[1]]
        return sum(delta.nbytes for delta in deltas if delta is not None)

    def base_products(self, rows: int) -> Callable[[], None]:
        """The base's matrix products of one layer on `rows` rows."""
        operands = [
            (self.normal(rows, each.h_in), self.normal(sum(each.h_outs), each.h_in))
            for each in self.projections
        ]

        def run() -> None:
            for x, weight in operands:
                torch.nn.functional.linear(x, weight)

        return run


class DeltaStep:
    """The deltas of one step: `rows` rows spread over `deltas` slots, at every layer."""

    def __init__(
        self,
        layers: RandomLayers,
        rows: int,
        deltas: int,
        dense_rows: int | None = None,
        variant: Variant | None = None,
    ) -> None:
        self.layers, self.variant = layers, variant
        self.row_slots = sorted(1 + row % deltas for row in range(rows))
        self.deltas = deltas
        tables = [table for layer in layers.tables for table in layer]
        self.chunks = Chunks(
            rows, layers.deltas + 1, tables, dense_rows=dense_rows, device=layers.device
        )
        self.chunks.assign(self.row_slots)
        self.cache = TensorCache(8 << 30)
        repeats = -(-rows // CHECKED_ROWS)
        self.inputs = [x.repeat(repeats, 1)[:rows].contiguous() for x in layers.inputs]
        self.outputs = [
            x.new_zeros(rows, sum(each.h_outs))
            for x, each in zip(self.inputs, layers.projections, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Packed bytes that the step reads in one layer."""
        return self.deltas * self.layers.delta_bytes

    def run(self) -> None:
        """Add the deltas of all projections of all layers."""
        for layer in self.layers.tables:
            self._add(layer)

    def _add(self, layer: Sequence[DeltaTable], *, emulate: bool | None = None) -> None:
        for y, x, table in zip(self.outputs, self.inputs, layer, strict=True):
            if x.is_cuda and emulate is None and self.variant is None:
                svd_delta(y, x, table, self.chunks, self.cache)
                continue
            triton.svd_delta(y, x, table, self.chunks, emulate=emulate, variant=self.variant)
            add_products(y, x, table, self.chunks.dense)

    def launch(self, number: int) -> None:
        """Launch kernel `number` (0 prepare, 1 shrink, 2 expand) of all projections and layers."""
        for layer in self.layers.tables:
            for y, x, table in zip(self.outputs, self.inputs, layer, strict=True):
                variant = self.variant or variant_of(x.device)
                launch = triton.launches(y, x, table, self.chunks, variant, emulate=not x.is_cuda)[
                    number
                ]
                launch()

    def error(self, *, emulate: bool | None = None) -> float:
        """Largest relative RMS error of a row of the first layer, against float64."""
        layer = self.layers.tables[0]
        for y in self.outputs:
            y.fill_(0)
        self._add(layer, emulate=emulate)
        worst = 0.0
        for y, x, table in zip(self.outputs, self.inputs, layer, strict=True):
            for slot in range(1, self.deltas + 1):
                rows = [row for row, of_row in enumerate(self.row_slots) if of_row == slot]
                rows = rows[:: max(1, len(rows) // 4)]
                expected = torch.cat(
                    [_product(x[rows], delta) for delta in table.deltas[slot] if delta], dim=1
                )
                error = (y[rows].double() - expected).square().sum(dim=1)
                relative = (error / expected.square().sum(dim=1)).sqrt()
                worst = max(worst, float(relative.nan_to_num(torch.inf).max()))
        return worst


def _product(x: Tensor, delta: PackedDelta) -> Tensor:
    u, s, v, _ = reference.unpack(delta)
    product: Tensor = ((x.double() @ v.double().T) * s.double()) @ u.double().T
    return product


Alternative = tuple[Callable[[], None], int]
"""A callable, and the number of layers that it stands for."""


def low_rank_products(step: DeltaStep) -> Alternative:
    """bfloat16 low-rank factors of the deltas' bytes: two products per delta and linear layer."""
    layers = step.layers
    operands = []
    for _ in range(layers.copies):
        for y, x, table in zip(step.outputs, step.inputs, layers.tables[0], strict=True):
            for slot, rows in step.chunks.by_slot.items():
                begin = 0
                for delta in table.deltas[slot]:
                    assert delta is not None
                    rank = max(1, delta.nbytes // 2 // (delta.h_out + delta.h_in))
                    v, u = layers.normal(delta.h_in, rank), layers.normal(rank, delta.h_out)
                    end = begin + delta.h_out
                    operands.append((y[rows, begin:end], x[rows], v, u))
                    begin = end

    def run() -> None:
        for out, x, v, u in operands:
            out.addmm_(x @ v, u)

    return run, layers.copies


def dense_products(step: DeltaStep) -> Alternative:
    """Dense bfloat16 deltas: a product per delta and projection of one layer, too big to cache."""
    layers = step.layers
    operands = [
        (x[rows], layers.normal(sum(each.h_outs), each.h_in))
        for x, each in zip(step.inputs, layers.projections, strict=True)
        for rows in step.chunks.by_slot.values()
    ]

    def run() -> None:
        for x, weight in operands:
            torch.nn.functional.linear(x, weight)

    return run, 1


def run_case(name: str) -> str:
    """Check one case or one projection; returns the traceback, empty on success."""
    try:
        if name in CASES or name in GRAPH_CASES:
            (CASES | GRAPH_CASES)[name]()
        else:
            projections = [each for each in LAYER if each.name == name]
            checked_step(RandomLayers(projections, 1, 1, "cuda"), 1, 1)
    except Exception:  # noqa: BLE001 (all are reported)
        return traceback.format_exc()
    return ""


def workers_for(names: Sequence[str]) -> ProcessPoolExecutor:
    """A pool of processes that compile, at most one for each name.

    They share the cache of what is compiled, and start when the first is needed.
    """
    count = min(MOST_WORKERS, len(names), os.cpu_count() or 1)
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def run_cases(names: Sequence[str], device: str) -> None:
    """Check all cases; on a GPU in a pool of processes, since compilation dominates.

    Raises:
        WrongResult: a case failed.
    """
    if not names:
        return
    if device == "cuda":
        with workers_for(names) as pool:
            errors = dict(zip(names, pool.map(run_case, names), strict=True))
    else:
        errors = {name: run_case(name) for name in names}
    for name, error in errors.items():
        if error:
            print(f"FAILED {name}\n{error}")
    if any(errors.values()):
        raise WrongResult(f"{sum(map(bool, errors.values()))} of {len(names)} cases failed")
    print(f"{len(names)} of {len(names)} cases passed")


def checked_step(
    layers: RandomLayers,
    rows: int,
    deltas: int,
    dense_rows: int | None = None,
    variant: Variant | None = None,
) -> DeltaStep:
    """A step whose results have been checked against float64.

    Raises:
        WrongResult: a row's relative RMS error exceeds TOLERANCE.
    """
    step = DeltaStep(layers, rows, deltas, dense_rows, variant)
    error = step.error()
    if not error <= TOLERANCE:
        emulated = step.error(emulate=True)
        serial = DeltaStep(layers, rows, deltas, dense_rows, SERIAL).error()
        raise WrongResult(
            f"{rows} rows, {deltas} deltas: relative error {error:.1e}; without overlap "
            f"{serial:.1e}, also without inline assembly {emulated:.1e}"
        )
    return step


def compile_variant(name: str) -> str:
    """Compile a variant for each projection; returns the error, empty on success."""
    try:
        for projection in LAYER:
            checked_step(RandomLayers([projection], 1, 1, "cuda"), 1, 1, None, variant_named(name))
    except Exception as error:  # noqa: BLE001 (a variant that does not fit the card is reported)
        return str(error).partition("\n")[0]
    return ""


def measure_sweep(device: str, limit: float) -> None:
    """Print the time of each kernel of each variant, and the best of each.

    One row on one delta decides the form for few programs, a row on each of all deltas that for
    many; forms between them stay the default's. Variants differ from the default in one kernel, so
    that the best of each make the best whole; serial launches are timed for comparison alone, as a
    kernel here follows itself. A few at a time are compiled in a pool of processes, then timed.
    Stops after `limit` seconds.
    """
    deadline = time.monotonic() + limit
    gpu = device == "cuda"
    names = [name_of(variant) for variant in SWEEP]
    layers = RandomLayers(LAYER, 8, 2, device) if gpu else RandomLayers(SMALL, 2, 1, device)
    print(
        f"\n{'variant, us a layer':54}" + "   prepare    shrink    expand" * 2 + "\n"
        f"{'':54} {'1 row on 1 delta':>29} {f'{layers.deltas} on {layers.deltas}':>29}",
        flush=True,
    )
    best: dict[tuple[str, int], tuple[float, Any]] = {}
    errors: dict[str, str] = {}
    with torch.inference_mode(), workers_for(names) as pool:
        for number, variant in enumerate(SWEEP if gpu else SWEEP[1:2]):
            name = name_of(variant)
            if time.monotonic() > deadline:
                print("... stopped: time limit reached")
                break
            if gpu and name not in errors:
                some = names[number : number + MOST_WORKERS]
                errors |= zip(some, pool.map(compile_variant, some), strict=True)
            if errors.get(name):
                print(f"{name:54} {errors[name]}", flush=True)
                continue
            line = f"{name:54}"
            for deltas, place in ((1, 0), (layers.deltas, -1)):
                step = checked_step(layers, deltas, deltas, None, variant)
                for number_of_kernel, kernel in enumerate(KERNELS):
                    launch = partial(step.launch, number_of_kernel)
                    seconds = gpu_seconds(launch, graph=True) / layers.copies
                    line += f" {1e6 * seconds:9.1f}"
                    forms, one = getattr(variant, kernel), (kernel, place)
                    decides = variant.overlap and len(forms) == 1
                    if gpu and decides and (one not in best or seconds < best[one][0]):
                        best[one] = (seconds, forms[place])
            print(line, flush=True)
        if len(best) == 2 * len(KERNELS):
            prepare, shrink, expand = (
                tuple(dict.fromkeys([best[kernel, 0][1], *forms[1:-1], last]))
                for kernel, forms, last in (
                    # It has many programs only with more rows than these.
                    ("prepare", DEFAULT.prepare, DEFAULT.prepare[-1]),
                    ("shrink", DEFAULT.shrink, best["shrink", -1][1]),
                    ("expand", DEFAULT.expand, best["expand", -1][1]),
                )
            )
            print(f"best: --variant {name_of(Variant(prepare, shrink, expand))}")


def measure_decode(
    layers: RandomLayers,
    steps: Sequence[tuple[int, int]],
    bandwidth: float,
    deadline: float,
    variant: Variant | None = None,
) -> None:
    """Print one line per step until `deadline` (monotonic seconds)."""
    print(
        f"\n{'projections':12} rows deltas      MB        us  of copy  low-rank     dense"
        "   (the last two: how many times longer)"
    )
    fractions = []
    for rows, deltas in steps:
        if time.monotonic() > deadline:
            print("... stopped: time limit reached")
            break
        step = checked_step(layers, rows, deltas, None, variant)
        seconds = gpu_seconds(step.run, graph=True) / layers.copies
        low_rank, dense = (
            gpu_seconds(run, graph=True) / copies
            for run, copies in (low_rank_products(step), dense_products(step))
        )
        fraction = step.nbytes / seconds / bandwidth
        if deltas >= 8 and len(layers.projections) > 1:
            fractions.append(fraction)
        print(
            f"{layers.name:12} {rows:4} {deltas:6} {step.nbytes / 1e6:7.1f} {seconds * 1e6:9.1f}"
            f" {fraction:8.1%} {low_rank / seconds:8.2f}x {dense / seconds:8.2f}x",
            flush=True,
        )
    if fractions:
        print(f"lowest fraction with 8 or more deltas: {min(fractions):.1%} (target: 75 %)")


def measure_prefill(layers: RandomLayers, rows: int) -> None:
    """Print the cost of one delta's rows relative to the base's matrix products."""
    base = gpu_seconds(layers.base_products(rows), repeats=10)
    for dense_rows, path in ((None, "packed, in chunks"), (1, "products of unpacked factors")):
        step = checked_step(layers, rows, 1, dense_rows)
        seconds = gpu_seconds(step.run, repeats=5) / layers.copies
        print(
            f"prefill of {rows:,} rows of one delta, {path}: "
            f"{(base + seconds) / base:.2f}x of the base's products (target: 1.7x)",
            flush=True,
        )


def measure(
    projections: Sequence[Projection],
    steps: Sequence[tuple[int, int]],
    prefill_rows: int,
    cases: int | None,
    device: str,
    variant: Variant | None,
) -> None:
    """Check the first `cases` cases (None: all), then measure prefill and decode steps."""
    start = time.monotonic()
    deadline = start + LIMIT_SECONDS
    gpu = device == "cuda"
    names = [*CASES, *GRAPH_CASES, *[each.name for each in LAYER]] if gpu else [*CASES]
    run_cases(names[:cases], device)
    bandwidth = device_bandwidth() if gpu else float("nan")
    name = torch.cuda.get_device_name() if gpu else "Triton's interpreter"
    print(f"{name}, torch {torch.__version__}, {time.monotonic() - start:.0f} s so far")
    print(f"device-to-device copy: {bandwidth / 1e12:.2f} TB/s")
    max_deltas = max(deltas for _, deltas in steps)
    with torch.inference_mode():
        layer = RandomLayers(projections, 1, 1, device)
        measure_prefill(layer, prefill_rows)
        copies = 1 + WORKING_SET_BYTES // layer.delta_bytes if gpu else 1
        # Neither is bound to a name: its memory is free before the next is allocated.
        measure_decode(
            RandomLayers(projections, max_deltas, copies, device),
            steps,
            bandwidth,
            deadline,
            variant,
        )
        for projection in projections if gpu else ():
            measure_decode(
                RandomLayers([projection], steps[0][1], copies, device),
                steps[:1],
                bandwidth,
                deadline,
                variant,
            )
    print(f"{time.monotonic() - start:.0f} s in all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, then measure; returns 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cases", type=int, help="check only the first N kernel cases")
    parser.add_argument("--only-cases", action="store_true", help="check, and measure nothing")
    parser.add_argument("--sweep", type=float, metavar="SECONDS", help="time every variant instead")
    parser.add_argument("--variant", type=variant_named, help="as the sweep prints it")
    options = parser.parse_args(arguments)
    gpu = options.device == "cuda"
    try:
        if options.only_cases:
            # A layer's projections too: the parts that follow find their kernels compiled.
            of_gpu = [*GRAPH_CASES, *(each.name for each in LAYER)] if gpu else []
            run_cases([*CASES, *of_gpu][: options.cases], options.device)
        elif options.sweep is not None:
            measure_sweep(options.device, options.sweep)
        elif gpu:
            measure(LAYER, GPU_STEPS, PREFILL_ROWS, options.cases, "cuda", options.variant)
        else:
            measure(SMALL, [(2, 1)], 3, options.cases, "cpu", options.variant)
            print("All results are correct; nothing is timed without a GPU.")
    except WrongResult as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
