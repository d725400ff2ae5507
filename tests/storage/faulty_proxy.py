"""An HTTP proxy in front of an S3 server that makes chosen requests fail."""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Fault:
    """What happens to the next `times` requests with this method and a path that contains `path`.

    `status`: answered instead of forwarded. `reset_request`: the connection is reset after so many
    bytes of the body were read. `reset_answer`, `truncate`: it is reset, or closed, after so many
    bytes of the answer's body. `lose_answer`: the server does the work, the client hears nothing.
    `wait`: seconds before anything is sent back.
    """

    method: str
    path: str = ""
    times: int = 1
    status: int | None = None
    code: str = "SlowDown"
    reset_request: int | None = None
    reset_answer: int | None = None
    truncate: int | None = None
    lose_answer: bool = False
    wait: float = 0.0


@dataclass
class FaultyProxy:
    url: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def take(self, method: str, path: str) -> Fault | None:
        self.requests.append(f"{method} {path}")
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and fault.path in path:
                fault.times -= 1
                return fault
        return None


@contextmanager
def faulty_proxy(server_url: str) -> Iterator[FaultyProxy]:
    """A proxy for the server; signatures stay valid, since the Host header is passed on."""
    target = urlsplit(server_url)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Log nothing."""

        def _reset(self) -> None:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RD)

        def _forward(self) -> None:
            fault = proxy.take(self.command, self.path) or Fault("")
            length = int(self.headers.get("Content-Length", 0))
            if fault.reset_request is not None:
                self.rfile.read(min(fault.reset_request, length))
                self._reset()
                return
            body = self.rfile.read(length)
            if fault.wait:
                time.sleep(fault.wait)
                self._reset()
                return
            if fault.status is not None:
                content = f"<Error><Code>{fault.code}</Code></Error>".encode()
                self._answer(fault.status, [("Content-Type", "application/xml")], content)
                return
            with closing(http.client.HTTPConnection(target.hostname or "", target.port)) as onward:
                headers = {k: v for k, v in self.headers.items() if k.lower() != "expect"}
                onward.request(self.command, self.path, body, headers)
                answer = onward.getresponse()
                content = answer.read()
            if fault.lose_answer:
                self._reset()
                return
            cut = fault.reset_answer if fault.reset_answer is not None else fault.truncate
            self._answer(answer.status, answer.getheaders(), content, cut)
            if cut is not None:
                self.close_connection = True
                if fault.reset_answer is not None:
                    self._reset()

        def _answer(
            self,
            status: int,
            headers: list[tuple[str, str]],
            content: bytes,
            cut: int | None = None,
        ) -> None:
            self.send_response_only(status)
            lengths = [value for name, value in headers if name.lower() == "content-length"]
            for name, value in headers:
                if name.lower() not in {"content-length", "transfer-encoding", "connection"}:
                    self.send_header(name, value)
            head = self.command == "HEAD" and lengths
            self.send_header("Content-Length", lengths[0] if head else str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:cut])
                self.wfile.flush()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward  # noqa: N815

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """The client may disconnect as well."""

    server = Server(("127.0.0.1", 0), Handler)
    proxy = FaultyProxy(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
