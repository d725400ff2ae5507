"""Requests and what their answers mean, for the blocking and the asynchronous client alike.

A `Call` is one request and how its answer is read; `Pages` a list, page by page; `Events` a stream
of server-sent events. The clients only send them: what is repeated, after which pause, and which
error a response is, is decided here.
"""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, TypeVar

import httpx
from pydantic import TypeAdapter

from deltadock.errors import DeltadockError, Unavailable, error_for

T = TypeVar("T")
JsonObject = dict[str, Any]

TIMEOUT: Final = httpx.Timeout(60.0, connect=10.0, read=600.0)
"""Seconds; the server responds late while it stores a large file or generates."""
READ_TIMEOUT: Final = httpx.Timeout(60.0, connect=10.0)
"""Seconds; what only reads is answered soon, and streams hold no longer silences."""
ATTEMPTS: Final = 4
"""Of one request; the pauses between them are at most 3.5 seconds, unless the server asks for
longer ones."""
MAX_PAUSE: Final = 60.0
"""Seconds that the server may ask for; if it asks for more, its refusal is raised at once."""
POLL_SECONDS: Final = 1.0
"""Interval at which a followed log is read, and a broken stream is connected to again."""
RECONNECTS: Final = 5
"""Of one stream or download, without anything received between them."""
REFUSED: Final = frozenset({429, 503})
"""Statuses of requests that the server did not work on."""
PASSING: Final = REFUSED | {502, 504}
"""Statuses that may be another one later."""
IDEMPOTENT: Final = frozenset({"GET", "PUT", "DELETE"})


def reader(kind: Any) -> Callable[[Any], Any]:
    """What parses a JSON answer as `kind`."""
    return TypeAdapter(kind).validate_python


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request to the api.

    Attributes:
        method, path, params, body: as sent; `params` that are None are left out.
        read: makes the result of the parsed JSON answer.
        idempotent: whether a POST may be sent twice.
        key: the Idempotency-Key, with which a POST that creates something may be sent twice.
    """

    method: str
    path: str
    read: Callable[[Any], T]
    params: Mapping[str, Any] = field(default_factory=dict)
    body: Any = None
    idempotent: bool = False
    key: str | None = None

    def arguments(self) -> dict[str, Any]:
        """The arguments of httpx's `request` and `stream`."""
        named: dict[str, Any] = {"method": self.method, "url": self.path}
        if params := {name: value for name, value in self.params.items() if value is not None}:
            named["params"] = params
        if self.body is not None:
            named["json"] = self.body
        if self.method == "GET":
            named["timeout"] = READ_TIMEOUT
        if self.key is not None:
            named["headers"] = {"Idempotency-Key": self.key}
        return named

    def result(self, response: httpx.Response) -> T:
        """What a complete response means.

        Raises:
            DeltadockError: it is an error; the class has its code.
            Unavailable: it is none of Deltadock's.
        """
        check(response)
        try:
            return self.read(response.json() if response.content else None)
        except (ValueError, KeyError, TypeError) as error:  # such as a proxy's page to sign in
            raise _foreign(response) from error

    def pause(self, attempt: int, error: Exception) -> float:
        """Seconds to wait before the request is sent again after its `attempt`th failure.

        Raises:
            DeltadockError: it must not be sent again; the class has the error's code.
        """
        found = domain_error(error)
        if attempt >= ATTEMPTS or not self._may_repeat(error):
            raise found from None
        asked = found.headers.get("retry-after", "")
        if asked.isdecimal():
            if float(asked) > MAX_PAUSE:
                raise found from None
            return float(asked)
        longest: float = 2.0 ** (attempt - 2)
        return random.uniform(longest / 2, longest)

    def _may_repeat(self, error: Exception) -> bool:
        if isinstance(error, httpx.ReadTimeout):
            return False  # it has waited for long enough
        twice = self.key is not None or self.idempotent or self.method in IDEMPOTENT
        if isinstance(error, DeltadockError):
            return error.details.get("status") in (PASSING if twice else REFUSED)
        return twice or isinstance(error, httpx.ConnectError)


@dataclass(frozen=True)
class Pages(Generic[T]):
    """A list: `first` is the call of its first page."""

    first: Call[tuple[list[T], str | None]]

    @classmethod
    def of(cls, kind: type[T], path: str, **params: Any) -> "Pages[T]":
        """The list at `path`, of `kind`."""
        items = reader(list[kind])  # type: ignore[valid-type]
        return cls(
            Call("GET", path, lambda page: (items(page["data"]), page.get("next")), params=params)
        )

    def after(self, cursor: str) -> Call[tuple[list[T], str | None]]:
        """The call of the page that follows."""
        return replace(self.first, params={**self.first.params, "after": cursor})


class Lines:
    """The lines of a stream, of which chunks are given as they arrive.

    Only line feeds end them: `str.splitlines`, and so httpx, also breaks them at characters that
    are in the middle of JSON as they are, such as U+0085 and U+2028.
    """

    def __init__(self) -> None:
        self._rest = b""

    def of(self, chunk: bytes) -> list[str]:
        """The lines that end in this chunk."""
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        return [line.decode(errors="replace") for line in whole]


@dataclass(frozen=True)
class Events(Generic[T]):
    """A stream of server-sent events: `call` starts it, and reads the data of each."""

    call: Call[T]

    def check(self, response: httpx.Response) -> None:
        """Check that a successful response is a stream of events.

        Raises:
            Unavailable: it is something else, and not of Deltadock.
        """
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise _foreign(response)

    def read(self, line: str) -> T | None:
        """The event of a line of the stream; None if the line holds none.

        Raises:
            DeltadockError: the server ends the stream with an error.
        """
        if not line.startswith("data:"):
            return None
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return None
        content = json.loads(data)
        if content.keys() == {"error"}:
            raise error_for(content["error"]["code"], content["error"]["message"])
        return self.call.read(content)


LISTS: Final = {
    **{name: name for name in ("bases", "deltas", "jobs", "keys", "methods", "models", "nodes")},
    "registry": "models",
}
"""The client's methods that list what these routes of the api do, which its messages name."""


def check(response: httpx.Response) -> None:
    """Raise the error of a response that is one; it must have been read."""
    if not response.is_success:
        raise error_of(response)


def error_of(response: httpx.Response) -> DeltadockError:
    """The error of a response with a problem body (RFC 9457) or OpenAI's."""
    try:
        problem = response.json()
        if isinstance(problem.get("error"), dict):
            code, detail = problem["error"]["code"], problem["error"]["message"]
        else:
            code, detail = problem["code"], problem["detail"]
        error = error_for(
            code,
            _in_methods(detail),
            status=response.status_code,
            deleted=problem.get("deleted"),
            newest=problem.get("newest"),
        )
    except (ValueError, KeyError, TypeError, AttributeError):  # such as a proxy's error page
        return _foreign(response)
    error.headers = response.headers
    return error


def _foreign(response: httpx.Response) -> Unavailable:
    """The error of a response that no Deltadock, or none of this version, has made."""
    error = Unavailable(
        f"{_server(response.url)} answers with status {response.status_code}, and not as a "
        "Deltadock does. Is the address right, and does a proxy on the way work?",
        status=response.status_code,
    )
    error.headers = response.headers
    return error


def domain_error(error: Exception) -> DeltadockError:
    """The domain error for a failed request."""
    if isinstance(error, DeltadockError):
        return error
    assert isinstance(error, httpx.RequestError)
    server = _server(error.request.url)
    return Unavailable(
        f"Deltadock at {server} does not answer ({error or type(error).__name__}). Is it running, "
        "and is the address right? `deltadock doctor` tells more."
    )


def _server(url: httpx.URL) -> httpx.URL:
    """Its address, without the secrets that URLs may hold."""
    return url.copy_with(path="/", query=None, userinfo=b"")


def _in_methods(message: str) -> str:
    """The message with the client's methods instead of the api's routes."""
    message = re.sub(r"GET /v1/jobs/(job_\w+)", r"`client.job('\1')`", message)
    message = re.sub(r"POST /v1/deltas/(\S+)/restore", r"`client.restore('\1')`", message)
    message = re.sub(r"POST /v1/bases/(\S+)/restore", r"`client.restore_base('\1')`", message)
    routes = "|".join(LISTS)
    return re.sub(
        rf"GET /v1/({routes})(?:\?(\w+)=(\S+))?(?![\w/])",
        lambda found: (
            f"`client.{LISTS[found[1]]}({f'{found[2]}={found[3]!r}' if found[2] else ''})`"
        ),
        message,
    )
