"""Client of the REST interface.

Methods return the JSON objects of the OpenAPI description. An error response raises the class of
`deltadock.errors` with its code.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import quote

import httpx

from deltadock.artifacts.checkpoint import CHUNK_BYTES, folder_files
from deltadock.client.uploads import Uploader
from deltadock.errors import DeltadockError, HashMismatch, Unavailable, error_for

JsonObject = dict[str, Any]
FINAL_STATES: Final = frozenset({"ready", "failed", "cancelled"})
TIMEOUT: Final = httpx.Timeout(60.0, read=600.0)
"""Seconds; the server responds late while it stores a large file or generates."""


def _ignore_bytes(_path: str, _done: int, _total: int) -> None:
    """The default progress callback of transfers."""


def _ignore_job(_job: JsonObject) -> None:
    """The default progress callback of jobs."""


class Client:
    """A client of the Deltadock api at `url`; a context manager that closes its connections.

    Args:
        url: address of the api.
        api_key: None: that of the environment variable DELTADOCK_API_KEY, if set.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", api_key: str | None = None) -> None:
        api_key = api_key or os.environ.get("DELTADOCK_API_KEY")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def upload_folder(
        self, folder: Path, progress: Callable[[str, int, int], None] = _ignore_bytes
    ) -> JsonObject:
        """Upload a checkpoint folder; returns the checkpoint with its digests.

        Only the files of the model or adapter are sent, not what a trainer left beside them, and
        of those only what the server lacks: an upload that was interrupted is continued.
        `progress` is called with a file's name, bytes sent and total bytes, by several threads.

        Raises:
            InvalidCheckpoint: the folder has no checkpoint files, or the server refuses them.
            HashMismatch: the server received other bytes than were sent.
            Unavailable: the server does not answer; call again to resume.
        """
        names = sorted(folder_files(folder))
        checkpoint: JsonObject = self._upload("checkpoint", folder, names, progress)["checkpoint"]
        return checkpoint

    def upload_calibration(self, path: Path) -> str:
        """Upload a calibration text (.txt or .jsonl); returns its digest."""
        digest: str = self._upload("calibration", path.parent, [path.name], _ignore_bytes)[
            "calibration"
        ]["digest"]
        return digest

    def _upload(
        self,
        kind: str,
        folder: Path,
        names: Iterable[str],
        progress: Callable[[str, int, int], None],
    ) -> JsonObject:
        with httpx.Client(timeout=TIMEOUT) as storage:

            def put(url: str, body: Iterator[bytes], size: int) -> None:
                # A presigned URL is the object store's, which gets no credentials of ours.
                http = self._http if url.startswith("/") else storage
                headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
                with _stream(http, "PUT", url, content=body, headers=headers) as response:
                    response.read()

            return Uploader(self._json, put, folder, progress).upload(kind, names)

    def create_base(self, name: str, checkpoint: str) -> JsonObject:
        """Register the uploaded checkpoint with this digest as a base."""
        return self._json("POST", "/v1/bases", json={"name": name, "checkpoint": checkpoint})

    def create_delta(
        self,
        name: str,
        base: str,
        checkpoint: str,
        *,
        method: str | None = None,
        seed: int = 0,
        solver: Literal["exact", "scip"] = "exact",
        calibration: str | JsonObject | None = None,
        **goal: float | None,
    ) -> JsonObject:
        """Start the compression of a fine-tuned checkpoint; returns `{"delta": ..., "job": ...}`.

        Args:
            name, base, checkpoint, seed, solver: see the REST interface.
            method: None: the server's default.
            calibration: digest of an uploaded text, or a mixture `{"sources": [...]}`; None: text
                sampled from the fine-tune, if the method needs calibration.
            goal: at most one of `bits`, `target_bytes`, `ratio`, `max_kl` and `min_agreement`.
        """
        if isinstance(calibration, str):
            calibration = {"source": "text", "digest": calibration}
        body: JsonObject = {
            "name": name,
            "base": base,
            "checkpoint": checkpoint,
            **({} if method is None else {"method": method}),
            "seed": seed,
            "solver": solver,
            "calibration": calibration,
            **goal,
        }
        return self._json("POST", "/v1/deltas", json=body)

    def preview(
        self, base: str, checkpoint: str, *, method: str, **goal: float | None
    ) -> JsonObject:
        """Predict the size of a compression; `goal` as for `create_delta`."""
        body: JsonObject = {"base": base, "checkpoint": checkpoint, "method": method, **goal}
        return self._json("POST", "/v1/previews", json=body)

    def wait(self, job: str, progress: Callable[[JsonObject], None] = _ignore_job) -> JsonObject:
        """Wait for a job's final state; `progress` is called with the job after every change.

        Raises:
            Unavailable: the connection broke; call again to continue.
        """
        state: JsonObject = {"state": ""}
        with self._stream("GET", f"/v1/jobs/{job}/events") as response:
            for line in response.iter_lines():
                if line.startswith("data:"):
                    state = json.loads(line.removeprefix("data:"))
                    progress(state)
        if state["state"] not in FINAL_STATES:
            raise Unavailable("The server closed the connection before the job ended.")
        return state

    def job(self, job: str) -> JsonObject:
        """A job's current state."""
        return self._json("GET", f"/v1/jobs/{job}")

    def cancel(self, job: str) -> JsonObject:
        """Request the cancellation of a job."""
        return self._json("POST", f"/v1/jobs/{job}/cancel")

    def delta(self, delta: str) -> JsonObject:
        """The delta with this id."""
        return self._json("GET", f"/v1/deltas/{delta}")

    def deltas(self) -> Iterator[JsonObject]:
        """All deltas, newest first; pages are fetched lazily."""
        parameters: dict[str, str] = {}
        while True:
            page = self._json("GET", "/v1/deltas", params=parameters)
            yield from page["data"]
            if page["next"] is None:
                return
            parameters["after"] = page["next"]

    def report(self, delta: str) -> JsonObject:
        """The compression report of a delta."""
        return self._json("GET", f"/v1/deltas/{delta}/report")

    def download_artifact(
        self,
        delta: str,
        path: Path,
        progress: Callable[[str, int, int], None] = _ignore_bytes,
    ) -> None:
        """Download a delta file to `path`; resumes an interrupted download.

        Raises:
            HashMismatch: the bytes do not match the digest; the partial file is removed.
            Unavailable: the connection broke; call again to resume.
        """
        artifact = self.delta(delta)["artifact"]
        partial = path.with_name(f"{path.name}.part")
        received = partial.stat().st_size if partial.exists() else 0
        # No If-Range: a delta's bytes never change, and an object store does not know our ETag.
        headers = {"Range": f"bytes={received}-"} if received else {}
        if received != artifact["bytes"]:
            # Only here: the api may redirect to a presigned URL of its object store. httpx sends
            # neither Authorization nor this server's cookies to another host.
            with self._stream(
                "GET", f"/v1/deltas/{delta}/artifact", headers=headers, follow_redirects=True
            ) as response:
                received = received if response.status_code == httpx.codes.PARTIAL_CONTENT else 0
                with partial.open("ab" if received else "wb") as output:
                    for chunk in response.iter_bytes(CHUNK_BYTES):
                        output.write(chunk)
                        received += len(chunk)
                        progress(path.name, received, artifact["bytes"])
        with partial.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != artifact["digest"]:
            partial.unlink()
            raise HashMismatch(f"The download of {delta} is damaged. Download it again.")
        partial.replace(path)

    def generate(
        self,
        model: str,
        prompt: str,
        *,
        kind: Literal["deltas", "bases"] = "deltas",
        max_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | list[str] | None = None,
    ) -> JsonObject:
        """Complete a prompt with a delta or a bare base; returns `{"text", "usage"}`."""
        return self._json(
            "POST",
            f"/v1/{kind}/{quote(model, safe='')}/generate",
            json={
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": temperature,
                "top_p": top_p,
                "seed": seed,
                "stop": stop,
            },
        )

    def _json(self, method: str, path: str, **arguments: Any) -> JsonObject:
        with self._stream(method, path, **arguments) as response:
            content = response.read()
        parsed: JsonObject = json.loads(content) if content else {}
        return parsed

    def _stream(
        self, method: str, path: str, **arguments: Any
    ) -> AbstractContextManager[httpx.Response]:
        return _stream(self._http, method, path, **arguments)


@contextmanager
def _stream(
    http: httpx.Client, method: str, url: str, **arguments: Any
) -> Iterator[httpx.Response]:
    """Send a request and stream the response.

    Raises:
        DeltadockError: an error response; the class has its code.
        Unavailable: the connection failed.
    """
    try:
        with http.stream(method, url, **arguments) as response:
            if not response.is_success:
                response.read()
                raise error_of(response)
            yield response
    except httpx.RequestError as error:
        server = error.request.url.copy_with(path="/", query=None)
        raise Unavailable(f"Deltadock at {server} does not answer: {error}") from error


def error_of(response: httpx.Response) -> DeltadockError:
    """The error for a response with a problem body (RFC 9457)."""
    try:
        problem = response.json()
        code, detail = problem["code"], problem["detail"]
    except (ValueError, KeyError, TypeError):  # such as a proxy's error page
        url = response.url.copy_with(query=None)  # presigned URLs have their signature there
        return Unavailable(f"{url} answered with status {response.status_code}.")
    return error_for(code, detail)
