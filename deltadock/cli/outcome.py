"""How a command ends: its exit status, one line for an error, one for Ctrl-C.

| status | meaning |
|---|---|
| 0 | done |
| 1 | refused or failed: the message says what to do |
| 2 | an unknown option, command or form of a value; a value that the server refuses is 1 |
| 3 | the server does not answer or is busy: the same command may succeed later |
| 4 | the job that was followed failed or was cancelled |
| 130 | interrupted |
"""

import errno
import os
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import typer
from typer.core import TyperGroup

from deltadock.cli.interrupts import (
    INTERRUPTED,
    note_beginning,
    say_interrupted,
    was_interrupted,
)
from deltadock.errors import DeltadockError, Forbidden, InvalidInput, NotFound, StorageFull
from deltadock.extras import needed_extras

FAILED: Final = 1
UNAVAILABLE: Final = 3
JOB_FAILED: Final = 4

COMMANDS: Final = {
    "bases": "bases",
    "deltas": "ls",
    "job": "logs",
    "jobs": "jobs",
    "keys": "keys list",
    "methods": "methods",
    "models": "ls",
    "nodes": "ps",
    "restore": "undo",
    "restore_base": "bases undo",
}
"""Commands that do what these methods of the client do, which its messages name."""

USAGE_ERROR: Final[Any] = typer.BadParameter.__base__
"""Wrong options and arguments of all kinds; typer exports this one only."""


@dataclass
class Hint:
    """What to say when Ctrl-C ends a command: what has become of its work."""

    text: str


@contextmanager
def on_interrupt(text: str) -> Iterator[Hint]:
    """If Ctrl-C ends the block, print what has become of its work, and exit.

    Yields the hint, which the block may change as its work goes on.
    """
    hint = Hint(text)
    try:
        yield hint
    except typer.Exit:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or was_interrupted():
            say_interrupted(hint.text)
            raise typer.Exit(INTERRUPTED) from None
        raise


def report(error: DeltadockError) -> int:
    """Print an error as one line on stderr; the end of a failed process's log follows, indented.

    Returns its exit status.
    """
    message = _in_commands(" ".join(error.message.split()))
    typer.echo(f"error ({error.code}): {message}", err=True)
    if log_tail := error.details.get("log_tail"):
        typer.echo(textwrap.indent(str(log_tail), "    "), err=True, nl=False)
    return UNAVAILABLE if error.retryable else FAILED


def _in_commands(message: str) -> str:
    """The message with commands instead of the client's methods."""
    return re.sub(
        rf"`client\.({'|'.join(COMMANDS)})\((?:'([^']*)'|[^)]*)\)`",
        lambda found: f"`{' '.join(filter(None, ('deltadock', COMMANDS[found[1]], found[2])))}`",
        message,
    )


def domain_error(error: OSError) -> DeltadockError:
    """The error of a file that cannot be read or written, with its name."""
    name = error.filename if isinstance(error.filename, str | os.PathLike) else None
    where = f"{os.fspath(name)}: " if name else ""
    text = f"{where}{error.strerror or error}."
    match error.errno:
        case errno.ENOENT:
            return NotFound(text)
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return Forbidden(text)
        case errno.ENOSPC | errno.EDQUOT:
            return StorageFull(text)
        case errno.EEXIST | errno.ENOTDIR | errno.EISDIR | errno.ENAMETOOLONG | errno.ELOOP:
            return InvalidInput(text)
        case _:
            return DeltadockError(text)


def _report_usage(error: Any) -> None:
    """Print a wrong option or argument as one line."""
    text = error.format_message().replace(": Value error, ", ": ")
    if not text or "\n" in text:  # of a group without a command, whose help is shown
        typer.echo(text, err=True, nl=False)
        return
    command = error.ctx.command_path if error.ctx else "deltadock"
    sentence = text if text.endswith(("?", ".")) else f"{text}."
    if command == "deltadock" and getattr(error, "option_name", None):
        sentence += " Options of a command follow it."
    typer.echo(f"error (usage): {sentence} See `{command} -h`.", err=True)


class ReportingGroup(TyperGroup):
    """Ends every command as this module says."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        """Parse what precedes the command.

        Raises:
            typer.Exit: it is wrong.
        """
        try:
            return super().make_context(*args, **options)
        except USAGE_ERROR as error:
            _report_usage(error)
            raise typer.Exit(error.exit_code) from None

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command.

        Raises:
            typer.Exit: the command failed or was interrupted.
        """
        with on_interrupt(""):
            try:
                note_beginning()
                with needed_extras():
                    return super().invoke(ctx)
            except DeltadockError as error:
                if was_interrupted():
                    raise
                raise typer.Exit(report(error)) from None
            except USAGE_ERROR as error:
                _report_usage(error)
                raise typer.Exit(error.exit_code) from None
            except BrokenPipeError:
                raise
            except OSError as error:
                if was_interrupted():
                    raise
                raise typer.Exit(report(domain_error(error))) from None
