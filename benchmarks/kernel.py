"""The delta kernel at Qwen2.5-7B's shapes: time and bandwidth, beside its alternatives.

    python -m benchmarks.kernel

It needs a GPU, torch, triton and numpy, and stops itself before five minutes are over. First every
case of `tests/kernels/cases.py` must hold, and nothing is timed before its own results have been
checked against float64. Then, for steps of 1 to 64 rows on 1 to 16 deltas of one bit a weight, it
prints for a layer's projections: the time of the deltas in a CUDA graph; the bandwidth over the
packed bytes as a share of a device-to-device copy of the same run; how many times longer bfloat16
low-rank factors of the same bytes take, and dense bfloat16 deltas. Last, the prefill of 2,048 rows
of one delta as a multiple of the base's own products. Layers take turns, as in a model, so that no
cache holds what a step reads.

    TRITON_INTERPRET=1 python -m benchmarks.kernel --device cpu

goes the same way at a tiny size without a GPU, and times nothing.
"""

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.kernel_layers import LAYER, SMALL, TOLERANCE, Layers, Projection, Step
from benchmarks.kernel_peers import dense_products, low_rank_products
from benchmarks.timing import copy_bandwidth, seconds
from tests.kernels.cases import CASES, GRAPH_CASES

GPU_STEPS = [
    *[(rows, 8) for rows in (8, 16, 32, 64)],
    *[(rows, 16) for rows in (16, 32, 64)],
    *[(rows, 1) for rows in (1, 8, 16, 64)],
    *[(rows, 4) for rows in (4, 16, 64)],
    *[(rows, 2) for rows in (2, 64)],
]
"""Rows and distinct deltas, the most important first."""
PREFILL_ROWS = 2048
ROTATED_BYTES = 256 << 20
"""Packed bytes that a measured step reads in all: several times a GPU's cache."""
LIMIT_SECONDS = 270.0


class WrongResult(Exception):
    """What was to be timed is not right."""


def run_case(name: str) -> str:
    """Check one case, or one projection, in a process of its own; the error's text."""
    try:
        if name in CASES or name in GRAPH_CASES:
            (CASES | GRAPH_CASES)[name]()
        else:
            check(Layers([part for part in LAYER if part.name == name], 1, 1, "cuda"), 1, 1)
    except Exception:  # noqa: BLE001 (all are told)
        return traceback.format_exc()
    return ""


def run_cases(names: Sequence[str], device: str) -> None:
    """Check all, in many processes: compiling takes longest, and they share what is compiled."""
    workers = min(12, len(names), os.cpu_count() or 1) if device == "cuda" else 1
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as pool:
        errors = dict(zip(names, pool.map(run_case, names), strict=True))
    for name, error in errors.items():
        if error:
            print(f"FAILED {name}\n{error}")
    if any(errors.values()):
        raise WrongResult(f"{sum(map(bool, errors.values()))} of {len(names)} cases do not hold")
    print(f"{len(names)} of {len(names)} cases hold")


def check(layers: Layers, rows: int, deltas: int, dense_rows: int | None = None) -> Step:
    """A step whose results are right.

    Raises:
        WrongResult: a row's relative RMS error is over TOLERANCE.
    """
    step = Step(layers, rows, deltas, dense_rows)
    error = step.error()
    if not error <= TOLERANCE:
        plain = step.error(emulate=True)
        raise WrongResult(
            f"{rows} rows, {deltas} deltas: relative error {error:.1e}; without inline assembly "
            f"{plain:.1e}"
        )
    return step


def measure_decode(
    layers: Layers, steps: Sequence[tuple[int, int]], bandwidth: float, until: float
) -> None:
    """Print a line a step, as long as there is time."""
    print(
        f"\n{'projections':12} rows deltas      MB        us  of copy  low-rank     dense"
        "   (the last two: how many times longer)"
    )
    shares = []
    for rows, deltas in steps:
        if time.monotonic() > until:
            print("... stopped: the time is over")
            break
        step = check(layers, rows, deltas)
        took = seconds(step.run, graph=True) / layers.copies
        peers = [
            seconds(peer, graph=True) / copies
            for peer, copies in (low_rank_products(step), dense_products(step))
        ]
        share = step.nbytes / took / bandwidth
        if deltas >= 8 and len(layers.parts) > 1:
            shares.append(share)
        print(
            f"{layers.name:12} {rows:4} {deltas:6} {step.nbytes / 1e6:7.1f} {took * 1e6:9.1f}"
            f" {share:8.1%} {peers[0] / took:8.2f}x {peers[1] / took:8.2f}x",
            flush=True,
        )
    if shares:
        print(f"least share with 8 or more deltas: {min(shares):.1%} (bar: 75 %)")


def measure_prefill(layers: Layers, rows: int) -> None:
    """Print what one delta's rows cost beside the base's own products."""
    base = seconds(layers.base_products(rows), repeats=10)
    for dense_rows, path in ((None, "packed, in chunks"), (1, "products of unpacked factors")):
        step = check(layers, rows, 1, dense_rows)
        took = seconds(step.run, repeats=5) / layers.copies
        print(
            f"prefill of {rows:,} rows of one delta, {path}: "
            f"{(base + took) / base:.2f}x of the base's products (bar: 1.7x)",
            flush=True,
        )


def measure(
    parts: Sequence[Projection],
    steps: Sequence[tuple[int, int]],
    prefill_rows: int,
    cases: int | None,
    device: str,
) -> None:
    """The whole benchmark."""
    began = time.monotonic()
    until = began + LIMIT_SECONDS
    gpu = device == "cuda"
    names = [*CASES, *GRAPH_CASES, *[part.name for part in LAYER]] if gpu else [*CASES]
    run_cases(names[:cases], device)
    bandwidth = copy_bandwidth() if gpu else float("nan")
    name = torch.cuda.get_device_name() if gpu else "Triton's interpreter"
    print(f"{name}, torch {torch.__version__}, {time.monotonic() - began:.0f} s so far")
    print(f"device-to-device copy: {bandwidth / 1e12:.2f} TB/s")
    most = max(deltas for _, deltas in steps)
    with torch.inference_mode():
        layer = Layers(parts, 1, 1, device)
        measure_prefill(layer, prefill_rows)
        copies = 1 + ROTATED_BYTES // layer.delta_bytes if gpu else 1
        measure_decode(Layers(parts, most, copies, device), steps, bandwidth, until)
        for part in parts if gpu else ():
            one = Layers([part], steps[0][1], copies, device)
            measure_decode(one, steps[:1], bandwidth, until)
    print(f"{time.monotonic() - began:.0f} s in all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, then measure; 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cases", type=int, help="check only so many of the kernel's cases")
    options = parser.parse_args(arguments)
    try:
        if options.device == "cuda":
            measure(LAYER, GPU_STEPS, PREFILL_ROWS, options.cases, "cuda")
        else:
            measure(SMALL, [(3, 2)], 9, options.cases, "cpu")
            print("All is correct; nothing is timed without a GPU.")
    except WrongResult as error:
        print(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
