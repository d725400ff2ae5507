"""Terminates a parent's process groups once the parent has died, by whatever cause.

Runs as a script, with only the standard library. The parent holds the write end of its stdin and
writes `+ID` when it starts a process group and `-ID` when one has exited. The kernel closes the
pipe even if the parent is killed; the watchdog then terminates the remaining groups.
"""

import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress

GRACE_SECONDS = 5.0


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def watch(lines: Iterable[str]) -> None:
    """Read `lines` to their end, terminate the remaining groups, and kill them after the grace."""
    groups: set[int] = set()
    for line in lines:
        group = int(line[1:])
        if line.startswith("+"):
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < deadline and any(map(_alive, groups)):
        time.sleep(0.05)
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    watch(sys.stdin)
