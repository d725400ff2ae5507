"""Ctrl-C, from the first import on.

Libraries that are interrupted while they are imported turn the KeyboardInterrupt into other
errors, or lose it; so it is remembered.
"""

import signal
import sys
from types import FrameType
from typing import Final

INTERRUPTED: Final = 130
"""The exit status: 128 and the number of SIGINT."""

_pressed: list[int] = []
_said: list[str] = []
_begun: list[bool] = []


def note_interrupts() -> None:
    """From here on, remember that Ctrl-C was pressed, and raise KeyboardInterrupt as before."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        _pressed.append(number)
        raise KeyboardInterrupt

    _pressed.clear()
    _said.clear()
    _begun.clear()
    signal.signal(signal.SIGINT, interrupt)


def was_interrupted() -> bool:
    """Whether Ctrl-C was pressed."""
    return bool(_pressed)


def say_interrupted(hint: str = "") -> None:
    """Say, once, that Ctrl-C has ended the command, and what has become of its work."""
    if not _said:
        hint = hint or ("" if _begun else "Nothing was done.")
        _said.append(hint)
        sys.stderr.write(f"\nInterrupted. {hint}".rstrip() + "\n")


def note_beginning() -> None:
    """From here on, a command is at work."""
    _begun.append(True)


def forget_interrupts() -> None:
    """Ctrl-C has done what it was pressed for, and the command goes on."""
    _pressed.clear()
