"""Uploads files: only what the server lacks, in parts and in parallel, resuming what broke off."""

import hashlib
import logging
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

from deltadock.artifacts.checkpoint import CHUNK_BYTES
from deltadock.client.stopping import Stop
from deltadock.errors import Conflict, DeltadockError, InvalidInput, Unavailable, error_for

log = logging.getLogger(__name__)

JsonObject = dict[str, Any]
Progress = Callable[[str, int, int], None]

THREADS: Final = 4
"""Files hashed, and parts sent, at once."""
ATTEMPTS: Final = 6
"""In a row that fail; the pauses between them add up to half a minute at most."""
POLL_SECONDS: Final = 1.0
BATCH: Final = 64
"""Parts asked for at once, so that their URLs are used before they expire."""


class Uploader:
    """Uploads the files of one folder."""

    def __init__(
        self,
        request: Callable[..., JsonObject],
        put: Callable[[str, Iterator[bytes], int], None],
        folder: Path,
        progress: Progress,
        stop: Stop,
    ) -> None:
        """`request` sends a request to the api, `put` a body of known size to any URL of a part.

        `stop` ends the upload, between two requests or chunks of a file.
        """
        self._request = request
        self._put = put
        self._folder = folder
        self._progress = progress
        self._stop = stop

    def upload(self, kind: str, names: Iterable[str], **becomes: str) -> JsonObject:
        """Upload files as one upload; returns it, complete.

        `becomes` names the `delta` or the `base` that they are for.

        An earlier upload of the same files that is still open is continued, also one to which
        another process sends them: what it has completed by then is not sent again.

        Raises:
            QuotaExceeded, RateLimited, Conflict: the server would refuse the delta or base.
            InvalidInput: the server rejects a file.
            Unavailable: the server does not answer; call again to resume.
        """
        with ThreadPoolExecutor(THREADS, "upload") as pool:
            files = list(pool.map(self._describe, names))
            upload = self._open_upload(kind, files, becomes)
            try:
                return self._finish(pool, upload)
            except InvalidInput:
                with suppress(DeltadockError):
                    self._request("DELETE", f"/v1/uploads/{upload['id']}")
                raise

    def _describe(self, name: str) -> JsonObject:
        size, hashed = (self._folder / name).stat().st_size, hashlib.sha256()
        for chunk in self._read(name, 0, size):
            hashed.update(chunk)
        return {"path": name, "size": size, "sha256": hashed.hexdigest()}

    def _open_upload(
        self, kind: str, files: list[JsonObject], becomes: dict[str, str]
    ) -> JsonObject:
        wanted = sorted((file["path"], file["size"], file["sha256"]) for file in files)
        opened = self._request("GET", "/v1/uploads?" + urlencode({"state": "open"}))
        for upload in opened["data"]:
            found = [(file["path"], file["size"], file["sha256"]) for file in upload["files"]]
            if upload["kind"] == kind and sorted(found) == wanted:
                earlier: JsonObject = upload
                return earlier
        return self._request("POST", "/v1/uploads", json={"kind": kind, "files": files, **becomes})

    def _finish(self, pool: ThreadPoolExecutor, upload: JsonObject) -> JsonObject:
        """Send what is missing and complete the upload, unless another process is faster.

        A part that another process sends once more is missing until it has arrived.
        """
        url = f"/v1/uploads/{upload['id']}"
        for attempt in count(1):
            try:
                if upload["state"] == "open":
                    self._send(pool, upload)
                    upload = self._request("POST", f"{url}/complete")
                return self._completed(url, upload)
            except Conflict:
                self._stop.sleep(_pause(attempt))
                upload = self._request("GET", url)
                if attempt == ATTEMPTS or upload["state"] == "dropped":
                    raise
        raise AssertionError

    def _send(self, pool: ThreadPoolExecutor, upload: JsonObject) -> None:
        """Send every file that is not stored."""
        waiting = []
        for file in upload["files"]:
            if file["stored"]:
                self._progress(file["path"], file["size"], file["size"])
            else:
                waiting.append(file)
        small = [file for file in waiting if file["parts"] is None]
        list(pool.map(lambda file: self._send_whole(upload["id"], file), small))
        for file in waiting:
            if file["parts"] is not None:
                self._send_parts(pool, upload["id"], file)

    def _send_whole(self, upload: str, file: JsonObject) -> None:
        url = f"/v1/uploads/{upload}/files/{quote(file['path'])}"

        def send() -> bool:
            self._put(url, self._read(file["path"], 0, file["size"]), file["size"])
            return True

        self._repeat(send)
        self._progress(file["path"], file["size"], file["size"])

    def _send_parts(self, pool: ThreadPoolExecutor, upload: str, file: JsonObject) -> None:
        url = f"/v1/uploads/{upload}/files/{quote(file['path'])}/parts?limit={BATCH}"

        def send_missing() -> bool:
            parts = self._request("GET", url)
            done = min(len(parts["arrived"]) * parts["bytes"], file["size"])
            self._progress(file["path"], done, file["size"])
            counting = threading.Lock()

            def send(part: JsonObject) -> Unavailable | None:
                nonlocal done
                offset = (part["number"] - 1) * parts["bytes"]
                try:
                    self._put(
                        part["url"], self._read(file["path"], offset, part["size"]), part["size"]
                    )
                except Unavailable as error:
                    return error
                with counting:
                    done = min(done + part["size"], file["size"])
                    self._progress(file["path"], done, file["size"])
                return None

            failures = list(pool.map(send, parts["missing"]))
            if failures and None not in failures:
                raise Unavailable(str(failures[0])) from None
            return len(failures) < BATCH and not any(failures)

        self._repeat(send_missing)

    def _read(self, name: str, start: int, size: int) -> Iterator[bytes]:
        with (self._folder / name).open("rb") as stream:
            stream.seek(start)
            while size and (chunk := stream.read(min(size, CHUNK_BYTES))):
                self._stop.check()
                size -= len(chunk)
                yield chunk

    def _completed(self, url: str, state: JsonObject) -> JsonObject:
        said = None
        while state["state"] == "completing":
            if (error := state["error"]) is not None and error["message"] != said:
                said = error["message"]
                log.warning("The server checks the files again later: %s", said)
            self._stop.sleep(POLL_SECONDS)
            state = self._request("GET", url)
        if state["error"] is not None:
            raise error_for(state["error"]["code"], state["error"]["message"])
        return state

    def _repeat(self, step: Callable[[], bool]) -> None:
        """Repeat `step` until it is True, after Unavailable up to `ATTEMPTS` times."""
        failures = 0
        while True:
            try:
                if step():
                    return
                failures = 0
            except Unavailable:
                failures += 1
                if failures == ATTEMPTS:
                    raise
                self._stop.sleep(_pause(failures))


def _pause(failures: int) -> float:
    """Seconds to wait after so many failures in a row: exponential, with jitter."""
    return random.uniform(0, 2**failures / 2)
