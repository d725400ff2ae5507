"""The HTTP protocol of the api's server, in which the app can read a large body itself.

    uvicorn --http deltadock.api.protocol:Protocol deltadock.api.main:app

uvicorn copies every 64 KiB of a body four times under the interpreter's lock, and wakes the
request's task for it. A body that the app takes over is copied once, from the socket, without that
lock, and wakes its task once a MiB.
"""

import asyncio
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import aclosing, closing
from typing import Any, Final
from weakref import WeakMethod

import httptools
from starlette.requests import ClientDisconnect, Request
from uvicorn._types import HTTPScope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import is_ssl

EXTENSION: Final = "deltadock.body"
"""In a request's scope: a weak reference to `Protocol.take_body`."""
PIECE_BYTES: Final = 1 << 20
"""The task wakes when so much has arrived."""


class Protocol(HttpToolsProtocol):
    """uvicorn's, of which a request can take over the rest of its body."""

    _untaken = 0
    """Bytes that follow of a body that was taken over and given up; they are skipped."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # Weak: a scope that leads to itself would stay until the next garbage collection.
        self.scope["extensions"] = {EXTENSION: WeakMethod(self.take_body)}  # type: ignore[dict-item]

    def data_received(self, data: bytes) -> None:
        skipped = min(self._untaken, len(data))
        self._untaken -= skipped
        super().data_received(data[skipped:])  # of nothing, too: the connection is not idle

    def take_body(self, scope: HTTPScope, received: int) -> "Body | None":
        """The rest of a request's body, of which the app has `received` bytes.

        None: it is short, complete, of unknown length or encrypted; uvicorn goes on with it.
        """
        cycle, length = self.cycle, dict(scope["headers"]).get(b"content-length")
        if cycle.scope["extensions"] is not scope["extensions"]:  # a pipelined request's
            return None
        if not cycle.more_body or length is None:
            return None
        if is_ssl(self.transport) or self.transport.is_closing():
            return None
        buffered = bytes(cycle.body)
        left = int(length) - received - len(buffered)
        if left < PIECE_BYTES // 4:
            return None
        self.flow.pause_reading()
        cycle.body, cycle.more_body = bytearray(), False
        cycle.message_event.clear()
        self._untaken = left
        # What it has parsed ends with the body, which it does not see.
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return Body(self, buffered, left)

    def taken(self, size: int) -> None:
        """Count bytes of the body that was taken over."""
        self._untaken -= size


class Body:
    """The rest of a request's body, at its connection's socket."""

    def __init__(self, protocol: Protocol, buffered: bytes, left: int) -> None:
        self.buffered = buffered
        """Comes first."""
        self.left = left
        """Bytes that follow at the socket."""
        self._protocol = protocol
        served = protocol.transport.get_extra_info("socket")
        # A descriptor of its own: the event loop watches the transport's.
        self._socket = socket.socket(fileno=os.dup(served.fileno()))
        self._socket.setblocking(False)

    async def read_into(self, buffer: memoryview) -> int:
        """Fill the buffer, or as far as the body lasts; returns the bytes read.

        Raises:
            ClientDisconnect: the client disconnected.
        """
        loop = asyncio.get_running_loop()
        wanted, size = min(len(buffer), self.left), 0
        while size < wanted:
            self._wake_at(wanted - size)
            try:
                read = await loop.sock_recv_into(self._socket, buffer[size:wanted])
            except OSError as error:
                raise ClientDisconnect from error
            if not read:
                raise ClientDisconnect
            size += read
            self.left -= read
            self._protocol.taken(read)
        return size

    def _wake_at(self, size: int) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    def close(self) -> None:
        """Leave the socket to the server."""
        self._wake_at(1)
        self._socket.close()


async def body_of(request: Request) -> AsyncGenerator[bytes | memoryview, None]:
    """The request's body in pieces; each is valid until the next one is asked for.

    Raises:
        ClientDisconnect: the client disconnected.
    """
    take: Any = request.scope.get("extensions", {}).get(EXTENSION, lambda: None)()
    received = 0
    async with aclosing(request.stream()) as stream:
        async for chunk in stream:
            yield chunk
            received += len(chunk)
            if take is not None and (rest := take(request.scope, received)) is not None:
                break
        else:
            return
    with closing(rest):
        if rest.buffered:
            yield rest.buffered
        buffer = memoryview(bytearray(PIECE_BYTES))
        while rest.left:
            yield buffer[: await rest.read_into(buffer)]
