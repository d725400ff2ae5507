"""Memory of this machine, within the limit of this process's control group."""

import os
from pathlib import Path
from typing import Final

GROUP: Final = Path("/sys/fs/cgroup")


def total_memory() -> int:
    """Bytes of memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _of_group("memory.max")
    return memory if limit is None else min(memory, limit)


def free_memory() -> int:
    """Bytes of memory that this process can still take."""
    available = Path("/proc/meminfo").read_text(encoding="ascii").partition("MemAvailable:")[2]
    free = int(available.split()[0]) * 1024
    limit, used = _of_group("memory.max"), _of_group("memory.current")
    return free if limit is None or used is None else min(free, limit - used)


def _of_group(file: str) -> int | None:
    """The bytes in a file of the control group; None without a group, or if it says "max"."""
    try:
        return int((GROUP / file).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
