"""The entry point of the `deltadock` script; it imports little before it notes Ctrl-C."""

import os
import sys
from io import TextIOWrapper

from deltadock.cli.interrupts import (
    INTERRUPTED,
    note_interrupts,
    say_interrupted,
    was_interrupted,
)


def main() -> None:
    """Run the command.

    Raises:
        SystemExit: with the status that `deltadock.cli.outcome` describes.
    """
    note_interrupts()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal of another encoding cannot show
    # Before torch is loaded, for this process and those that it starts. By default OpenMP's threads
    # spin while they wait, on cores that api, worker and node share.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from deltadock.cli.app import app

        app(prog_name="deltadock")
    except BaseException as end:
        if was_interrupted() and getattr(end, "code", INTERRUPTED) == INTERRUPTED:
            say_interrupted()
            raise SystemExit(INTERRUPTED) from None
        raise
