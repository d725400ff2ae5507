"""The memory of an api process: what the allocator gives back, and what is collected."""

import ctypes
import gc
from typing import Final

# mallopt(3)
M_TRIM_THRESHOLD: Final = -1
M_TOP_PAD: Final = -2
M_MMAP_THRESHOLD: Final = -3

KEPT_BYTES: Final = 64 << 20
"""Free memory that stays with the process."""


def tune_memory() -> None:
    """Call once when everything is loaded.

    - What is loaded lives as long as the process: collections need not visit it. A full one would
      stop all requests for a tenth of a second now and then.
    - Buffers of uploads (up to a MiB each) are reused. By default glibc returns each one to
      the system and faults the next one in, page by page: half of an upload's processor time.
    """
    gc.freeze()
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES // 2)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_TOP_PAD, KEPT_BYTES // 16)
