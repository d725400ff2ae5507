"""`Stop`: how another thread ends the requests of a client that blocks."""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakSet

import httpx

from deltadock.errors import Cancelled


class Stop:
    """A flag that a client looks at before every request, and the connections that it has.

    `hooks` are the event hooks of the httpx clients that it stops.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._changing = threading.Lock()
        self._sockets: WeakSet[socket.socket] = WeakSet()
        self.hooks: dict[str, list[Callable[..., Any]]] = {"request": [self._watch]}

    def set(self) -> None:
        """Let nothing more be sent, and end what is being sent or waited for."""
        with self._changing:
            self._asked.set()
            for connected in self._sockets:
                _shut_down(connected)

    def check(self) -> None:
        """Raise `Cancelled` if the client is to stop."""
        if self._asked.is_set():
            raise Cancelled("The transfer was cancelled; start it again to continue it.")

    def sleep(self, seconds: float) -> None:
        """Sleep, but no longer than until the client is to stop, and then raise `Cancelled`."""
        self._asked.wait(seconds)
        self.check()

    def _watch(self, request: httpx.Request) -> None:
        self.check()
        request.extensions["trace"] = self._trace

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            connected = info["return_value"].get_extra_info("socket")
            with self._changing:
                self._sockets.add(connected)
                if self._asked.is_set():
                    _shut_down(connected)


def _shut_down(connected: socket.socket) -> None:
    """End what its thread does with it. To close it here would let another file get its number."""
    with suppress(OSError):  # it is closed already
        # `SSLSocket.shutdown` takes the TLS from under a thread that reads.
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
