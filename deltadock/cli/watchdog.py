"""Ends a parent's child processes once the parent itself is gone, however it died.

Run as a script beside the parent, on the standard library alone. The parent holds the write end of
our stdin and names a process group with `+ID` when it starts and `-ID` when it has ended; the
kernel closes the pipe even when the parent is killed, and then we end what is left.
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
    """Follow `lines` until they end, then terminate the groups still named, and kill the rest."""
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
