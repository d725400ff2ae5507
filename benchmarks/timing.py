"""Times on a GPU, and the bandwidth that they are held against."""

import math
from collections.abc import Callable

import torch


def seconds(work: Callable[[], None], *, graph: bool = False, repeats: int = 20) -> float:
    """Median time of a call on the GPU, captured in a CUDA graph if asked for.

    Without a GPU the work is done once, and the time is NaN.
    """
    if not torch.cuda.is_available():
        work()
        return math.nan
    for _ in range(3):
        work()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            work()
        work = captured.replay
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return sorted(times)[repeats // 2]


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device-to-device copy of 2 GiB."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    return float(2 * source.numel() / seconds(copy))
