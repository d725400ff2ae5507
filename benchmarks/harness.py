"""The machine that a benchmark runs on, and timing on a CPU or GPU."""

import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def processor() -> str:
    """The CPU's model name as the operating system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe_machine(device: str = "cpu") -> str:
    """CPU, cores, threads, the GPU if `device` is one, and versions: printed with every result."""
    parts = [f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"]
    if torch.device(device).type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    parts.append(f"Python {platform.python_version()}, torch {torch.__version__}")
    return "; ".join(parts)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued kernels, so that a wall clock includes them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wall_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, the device's queued kernels included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def gpu_seconds(call: Callable[[], None], *, graph: bool = False, repeats: int = 20) -> float:
    """Median seconds of a call on the GPU by CUDA events, after three warm-up calls.

    With `graph`, the call is captured in a CUDA graph and its replay is timed. Without a GPU the
    call runs once and the result is NaN.
    """
    if not torch.cuda.is_available():
        call()
        return math.nan
    for _ in range(3):
        call()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        call = captured.replay
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return sorted(times)[repeats // 2]


def device_bandwidth() -> float:
    """Bytes per second, reads plus writes, of a device-to-device copy of 2 GiB."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return float(2 * source.numel() / gpu_seconds(copy))


def copy_rate(source: Tensor, target: Tensor) -> float:
    """Bytes copied per second between two tensors, hosts or devices; the best of seven copies."""

    def copy() -> None:
        target.copy_(source, non_blocking=True)

    return source.nbytes / min(wall_seconds(copy, target.device) for _ in range(7))
