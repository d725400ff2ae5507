"""Child processes that never outlive this one.

Every child is a session leader, so Ctrl-C in the terminal reaches only this process, which stops
its children in order. If it is killed, the watchdog (`cli/watchdog.py`) terminates them.
"""

import atexit
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import Final, Self

from deltadock.cli import watchdog
from deltadock.cli.interrupts import was_interrupted
from deltadock.errors import InvalidInput, Unavailable
from deltadock.words import duration

HOST: Final = "127.0.0.1"
POLL_SECONDS: Final = 0.1
LOG_BYTES: Final = 32 << 20
"""Size at which a child's log is put aside; the one before it goes."""


class _Watchdog:
    """The watchdog process; one per process, see `_watchdog`."""

    def __init__(self) -> None:
        reader, self._writer = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", watchdog.__file__],
            stdin=reader,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(reader)

    def started(self, group: int) -> None:
        os.write(self._writer, f"+{group}\n".encode())

    def ended(self, group: int) -> None:
        os.write(self._writer, f"-{group}\n".encode())

    def close(self) -> None:
        """Let it terminate the remaining groups, and wait for it."""
        os.close(self._writer)
        self._process.wait()


@cache
def _watchdog() -> _Watchdog:
    watcher = _Watchdog()
    atexit.register(watcher.close)
    return watcher


_stopping = threading.Event()


def _stop(_number: int, _frame: FrameType | None) -> None:
    if not _stopping.is_set():
        _stopping.set()
        # A handler may interrupt a write to `sys.stderr`, which cannot be entered twice.
        os.write(sys.stderr.fileno(), b"\nStopping ...\n")


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Within the block, Ctrl-C, SIGTERM and SIGHUP say so and set the yielded event.

    An exception raised by a signal handler could hit between the start of a child and its
    registration. `Child.wait_until` raises KeyboardInterrupt once the event is set; it ends the
    block silently.
    """
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = [signal.signal(number, _stop) for number in signals]
    if was_interrupted():  # while modules were imported, which may have lost it
        _stopping.set()
    try:
        yield _stopping
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
        _stopping.clear()


class Child:
    """A child process whose output goes to a log file; a context manager that stops it.

    Args:
        name: for messages.
        command: the command line.
        log: file that stdout and stderr are appended to.
        env, cwd: as for `subprocess.Popen`.
        user: user id to run as; needs root.
        stop_signal: requests a graceful exit.
        grace: seconds from `stop_signal` to SIGKILL of the process group.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: int | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        grace: float = 10.0,
    ) -> None:
        self.name = name
        self.log = log
        self._command = command
        self._env = env
        self._cwd = cwd
        self._user = user
        self._stop_signal = stop_signal
        self._grace = grace
        log.parent.mkdir(parents=True, exist_ok=True)
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        watchdog_process = _watchdog()
        with self.log.open("ab") as output:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._cwd,
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
                start_new_session=True,
            )
        watchdog_process.started(process.pid)
        self._stop_requested = False
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The process id, which is also the id of its process group."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit status, or None while the process runs."""
        return self._process.poll()

    def request_stop(self) -> None:
        """Send the stop signal without waiting, so that several children stop concurrently."""
        if (
            self.poll() is None and not self._stop_requested
        ):  # many programs exit at once on a second signal
            self._stop_requested = True
            self._process.send_signal(self._stop_signal)

    def stop(self) -> None:
        """Stop the process, kill the rest of its group, and wait until it has exited."""
        self.request_stop()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(self._grace)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        _watchdog().ended(self.pid)

    def restart(self) -> None:
        """Stop what remains of the process group and run the command again."""
        self.stop()
        self._process = self._start()

    def rotate_log(self) -> None:
        """Put a log aside that has become large, and begin it anew.

        The child keeps the file open for appending, so it is copied and emptied, as by logrotate's
        copytruncate: what is written in between is lost.
        """
        with suppress(OSError):  # a full disk: then there is no copy, and the log is kept
            if self.log.stat().st_size > LOG_BYTES:
                shutil.copyfile(self.log, self.log.with_name(f"{self.log.name}.1"))
                os.truncate(self.log, 0)

    def wait_until(self, ready: Callable[[], bool], seconds: float = 60.0) -> None:
        """Poll `ready` until it is true.

        Raises:
            Unavailable: the process exited or was not ready in time; `details` has the log's end.
            KeyboardInterrupt: a stop signal arrived, see `stop_on_signals`.
        """
        deadline = time.monotonic() + seconds
        while True:
            # Polled before `ready`: the process may make it true and exit right away.
            exited = self.poll() is not None
            if ready():
                return
            if exited:
                raise self.exited()
            if _stopping.is_set():
                raise KeyboardInterrupt
            if time.monotonic() > deadline:
                raise self._unavailable(f"{self.name} was not ready after {duration(seconds)}.")
            time.sleep(POLL_SECONDS)

    def exited(self, consequence: str = "") -> Unavailable:
        """The error for an exited process, with its status; `details` has the log's end."""
        return self._unavailable(f"{self.name} exited with status {self.poll()}. {consequence}")

    def _unavailable(self, what: str) -> Unavailable:
        with self.log.open(errors="replace") as stream:
            tail = "".join(deque(stream, maxlen=15))
        return Unavailable(f"{what.strip()} The end of {self.log}:", log_tail=tail)


def port_is_free(port: int, host: str = HOST) -> bool:
    """Whether a server could listen on the port now."""
    with socket.socket() as probe:
        # As servers do: connections in TIME_WAIT do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def check_ports(api_port: int, node_port: int) -> None:
    """Check that both ports are free.

    Raises:
        InvalidInput: they are the same.
        Unavailable: a port is in use.
    """
    if api_port == node_port:
        raise InvalidInput(
            f"Api and node cannot both have port {api_port}: choose another --node-port."
        )
    check_port(api_port, "--api-port")
    check_port(node_port, "--node-port")


def check_port(port: int, option: str) -> None:
    """Check that the port, which the option chooses, is free.

    Raises:
        Unavailable: it is in use.
    """
    if not port_is_free(port):
        raise Unavailable(
            f"Port {port} is in use, perhaps by another Deltadock. "
            f"Stop that process or choose another port with {option}."
        )


def free_ports(count: int) -> list[int]:
    """Distinct free ports, below the ephemeral range of outgoing connections.

    Raises:
        Unavailable: there are not enough.
    """
    with ExitStack() as held:
        ports: list[int] = []
        for port in random.sample(range(20_000, 30_000), k=1_000):
            probe = held.enter_context(socket.socket())
            with suppress(OSError):
                probe.bind((HOST, port))
                ports.append(port)
            if len(ports) == count:
                return ports
    raise Unavailable("This machine has too few free ports between 20000 and 30000.")
