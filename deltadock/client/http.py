"""The Python client of the REST interface.

Answers are the JSON objects of the OpenAPI description. A refusal raises the error of
`deltadock.errors` that its stable code names.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self
from urllib.parse import quote

import httpx

from deltadock.artifacts.checkpoint import CHUNK_BYTES, KNOWN_SUFFIXES
from deltadock.errors import DeltadockError, HashMismatch, InvalidCheckpoint, Unavailable

Json = dict[str, Any]
FINAL_STATES: Final = frozenset({"ready", "failed", "cancelled"})
TIMEOUT: Final = httpx.Timeout(60.0, read=600.0)
"""Seconds; an answer may take long while the server stores a large file or generates."""


def _ignore_bytes(_path: str, _done: int, _total: int) -> None:
    """Nobody watches the transfer."""


def _ignore_job(_job: Json) -> None:
    """Nobody watches the job."""


class Client:
    """A connection to a Deltadock at `url`; a context manager that closes it."""

    def __init__(self, url: str = "http://127.0.0.1:8000") -> None:
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT)

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
    ) -> Json:
        """Upload a checkpoint folder; the checkpoint with its digests.

        `progress` is called with a file's name and its bytes sent and in all.

        Raises:
            InvalidCheckpoint: there is nothing in it to upload, or the server refuses it.
            HashMismatch: a file arrived as other bytes than were sent.
        """
        kinds = KNOWN_SUFFIXES - {".md"}
        paths = sorted(path for path in folder.glob("*") if path.suffix in kinds)
        if not paths:
            raise InvalidCheckpoint(f"{folder} holds no checkpoint (.safetensors, .json).")
        checkpoint: Json = self._upload("checkpoint", paths, progress)["checkpoint"]
        return checkpoint

    def upload_calibration(self, path: Path) -> str:
        """Upload a calibration text (.txt or .jsonl); its digest."""
        digest: str = self._upload("calibration", [path], _ignore_bytes)["calibration"]["digest"]
        return digest

    def _upload(
        self, kind: str, paths: Iterable[Path], progress: Callable[[str, int, int], None]
    ) -> Json:
        upload = self._json("POST", "/v1/uploads", json={"kind": kind})["id"]
        try:
            for path in paths:
                self._put_file(upload, path, progress)
            return self._json("POST", f"/v1/uploads/{upload}/complete")
        except BaseException:
            with suppress(DeltadockError):
                self._json("DELETE", f"/v1/uploads/{upload}")
            raise

    def _put_file(self, upload: str, path: Path, progress: Callable[[str, int, int], None]) -> None:
        total, digest = path.stat().st_size, hashlib.sha256()

        def chunks() -> Iterator[bytes]:
            sent = 0
            with path.open("rb") as stream:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    sent += len(chunk)
                    yield chunk
                    progress(path.name, sent, total)

        stored = self._json(
            "PUT",
            f"/v1/uploads/{upload}/files/{quote(path.name)}",
            content=chunks(),
            headers={"Content-Length": str(total), "Content-Type": "application/octet-stream"},
        )
        if stored["sha256"] != digest.hexdigest():
            raise HashMismatch(f"{path.name} did not arrive as it was sent. Upload it again.")

    def create_base(self, name: str, checkpoint: str) -> Json:
        """Register an uploaded checkpoint (its digest) as a base."""
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
        calibration: str | Json | None = None,
        **goal: float | None,
    ) -> Json:
        """Have a fine-tuned checkpoint compressed; `{"delta": ..., "job": ...}`.

        Args:
            name, base, checkpoint, seed, solver: as the REST interface describes them.
            method: None: the service's default.
            calibration: the digest of an uploaded text, or a mixture `{"sources": [...]}`; None:
                text sampled from the fine-tune, for the methods that need calibration.
            goal: at most one of `bits`, `target_bytes`, `ratio`, `max_kl` and `min_agreement`.
        """
        if isinstance(calibration, str):
            calibration = {"source": "text", "digest": calibration}
        body: Json = {
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

    def preview(self, base: str, checkpoint: str, *, method: str, **goal: float | None) -> Json:
        """The size that a compression would come to; `goal` as for `create_delta`."""
        body: Json = {"base": base, "checkpoint": checkpoint, "method": method, **goal}
        return self._json("POST", "/v1/previews", json=body)

    def wait(self, job: str, progress: Callable[[Json], None] = _ignore_job) -> Json:
        """Follow a job to its end; the job as it ended. `progress` gets it after every change.

        Raises:
            Unavailable: the connection broke; call again to go on waiting.
        """
        state: Json = {"state": ""}
        with self._stream("GET", f"/v1/jobs/{job}/events") as answer:
            for line in answer.iter_lines():
                if line.startswith("data:"):
                    state = json.loads(line.removeprefix("data:"))
                    progress(state)
        if state["state"] not in FINAL_STATES:
            raise Unavailable("The server ended the connection before the job had ended.")
        return state

    def job(self, job: str) -> Json:
        """A job as it is now."""
        return self._json("GET", f"/v1/jobs/{job}")

    def cancel(self, job: str) -> Json:
        """Ask a job to stop."""
        return self._json("POST", f"/v1/jobs/{job}/cancel")

    def delta(self, delta: str) -> Json:
        """One delta."""
        return self._json("GET", f"/v1/deltas/{delta}")

    def deltas(self) -> Iterator[Json]:
        """All deltas, newest first."""
        parameters: dict[str, str] = {}
        while True:
            page = self._json("GET", "/v1/deltas", params=parameters)
            yield from page["data"]
            if page["next"] is None:
                return
            parameters["after"] = page["next"]

    def report(self, delta: str) -> Json:
        """What the compression of a delta measured."""
        return self._json("GET", f"/v1/deltas/{delta}/report")

    def download_artifact(
        self,
        delta: str,
        path: Path,
        progress: Callable[[str, int, int], None] = _ignore_bytes,
    ) -> None:
        """Download a delta's file to `path`, going on where an earlier call broke off.

        Raises:
            HashMismatch: the bytes are not those of the delta; what was kept is removed.
            Unavailable: the connection broke; call again to go on.
        """
        digest = self.delta(delta)["artifact"]
        arriving = path.with_name(f"{path.name}.part")
        received = arriving.stat().st_size if arriving.exists() else 0
        headers = {}
        if received:
            headers = {"Range": f"bytes={received}-", "If-Range": f'"{digest["digest"]}"'}
        if received != digest["bytes"]:
            with self._stream("GET", f"/v1/deltas/{delta}/artifact", headers=headers) as answer:
                received = received if answer.status_code == httpx.codes.PARTIAL_CONTENT else 0
                with arriving.open("ab" if received else "wb") as output:
                    for chunk in answer.iter_bytes(CHUNK_BYTES):
                        output.write(chunk)
                        received += len(chunk)
                        progress(path.name, received, digest["bytes"])
        with arriving.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != digest["digest"]:
            arriving.unlink()
            raise HashMismatch(f"The download of {delta} is damaged. Download it again.")
        arriving.replace(path)

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
    ) -> Json:
        """Continue a prompt with a delta, or with a bare base; `{"text": ..., "usage": ...}`."""
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

    def _json(self, method: str, path: str, **arguments: Any) -> Json:
        with self._stream(method, path, **arguments) as answer:
            raw = answer.read()
        parsed: Json = json.loads(raw) if raw else {}
        return parsed

    @contextmanager
    def _stream(self, method: str, path: str, **arguments: Any) -> Iterator[httpx.Response]:
        """The answer to a request.

        Raises:
            DeltadockError: the server refuses it; the class is the one with its code.
            Unavailable: no server answers, or the connection broke.
        """
        try:
            with self._http.stream(method, path, **arguments) as answer:
                if not answer.is_success:
                    answer.read()
                    raise error_of(answer)
                yield answer
        except httpx.TransportError as error:
            raise Unavailable(
                f"Deltadock at {self._http.base_url} does not answer: {error}"
            ) from error


def error_of(answer: httpx.Response) -> DeltadockError:
    """The error that an answer with a problem body stands for."""
    try:
        problem = answer.json()
        code, detail = problem["code"], problem["detail"]
    except (ValueError, KeyError, TypeError):  # a proxy's page, for instance
        return Unavailable(f"{answer.url} answered with status {answer.status_code}.")
    classes = [DeltadockError]
    for kind in classes:
        if kind.code == code:
            return kind(detail)
        classes.extend(kind.__subclasses__())
    return DeltadockError(f"{code}: {detail}")
