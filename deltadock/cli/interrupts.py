"""Ctrl-C, from the first import on.

Libraries that are interrupted while they are imported turn the KeyboardInterrupt into other
errors, or lose it; so it is remembered.
"""

import signal
from types import FrameType
from typing import Final

INTERRUPTED: Final = 130
"""The exit status: 128 and the number of SIGINT."""

_pressed: list[int] = []


def note_interrupts() -> None:
    """From here on, remember that Ctrl-C was pressed, and raise KeyboardInterrupt as before."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        _pressed.append(number)
        raise KeyboardInterrupt

    _pressed.clear()
    signal.signal(signal.SIGINT, interrupt)


def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed."""
    return bool(_pressed)


def forget_interrupts() -> None:
    """Ctrl-C has done what it was pressed for, and the command goes on."""
    _pressed.clear()
