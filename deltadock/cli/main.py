"""The entry point of the `deltadock` script; it imports little before it notes Ctrl-C."""

import sys

from deltadock.cli.interrupts import INTERRUPTED, note_interrupts, was_interrupted


def main() -> None:
    """Run the command.

    Raises:
        SystemExit: with the status that `deltadock.cli.outcome` describes.
    """
    note_interrupts()
    try:
        from deltadock.cli.app import app
    except BaseException:
        if was_interrupted():
            sys.stderr.write("\nInterrupted.\n")
            raise SystemExit(INTERRUPTED) from None
        raise
    app(prog_name="deltadock")
