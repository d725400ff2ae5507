"""A node's throughput, latency and memory over the last seconds, as its heartbeats report them."""

import os
import time
from collections import deque
from pathlib import Path
from typing import Final, NamedTuple

import torch

from deltadock.host_memory import total_memory
from deltadock.inference.metrics import Metrics

WINDOW_SECONDS: Final = 10.0

_STATM: Final = Path("/proc/self/statm")


class Usage(NamedTuple):
    """Latencies are means, None without a token; memory is None where it is not known."""

    tokens_per_second: float
    """Generated."""
    first_token_seconds: float | None
    inter_token_seconds: float | None
    memory_bytes: int | None
    """Of the GPU, by all processes, or else of this process."""
    memory_limit: int | None


class _Counts(NamedTuple):
    at: float
    tokens: float
    first: tuple[float, float]
    inter: tuple[float, float]


class UsageMeter:
    """Compares the metrics' counts with those of up to `WINDOW_SECONDS` before."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._counts: deque[_Counts] = deque([self._count()])

    def read(self) -> Usage:
        """The usage now."""
        now = self._count()
        while len(self._counts) > 1 and now.at - self._counts[1].at >= WINDOW_SECONDS:
            self._counts.popleft()
        before = self._counts[0]
        self._counts.append(now)
        memory_bytes, memory_limit = _memory()
        return Usage(
            (now.tokens - before.tokens) / max(now.at - before.at, 1e-3),
            _mean(before.first, now.first),
            _mean(before.inter, now.inter),
            memory_bytes,
            memory_limit,
        )

    def _count(self) -> _Counts:
        first, inter = (
            (self._metrics.value(f"{name}_sum"), self._metrics.value(f"{name}_count"))
            for name in ("first_token_seconds", "inter_token_seconds")
        )
        tokens = self._metrics.value("generated_tokens_total")
        return _Counts(time.monotonic(), tokens, first, inter)


def _mean(before: tuple[float, float], now: tuple[float, float]) -> float | None:
    count = now[1] - before[1]
    return (now[0] - before[0]) / count if count else None


def _memory() -> tuple[int | None, int | None]:
    """Bytes in use and in all: of the GPU if this process uses one, else of this process
    and of the machine, within the limit of its control group.
    """
    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        return total - free, total
    if not _STATM.exists():
        return None, None
    page = os.sysconf("SC_PAGE_SIZE")
    used = int(_STATM.read_text(encoding="ascii").split()[1]) * page
    return used, total_memory()
