"""`Client`, the client of the REST interface that blocks.

`deltadock.client.routes` describes its methods; `deltadock.client.requests` says what is repeated
and which error a response is.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar, Unpack

import httpx

from deltadock.artifacts.folder import folder_files, read_headers
from deltadock.client import routes
from deltadock.client.checks import check_method, check_size, check_text
from deltadock.client.connection import certificates, http_options
from deltadock.client.downloads import Downloader
from deltadock.client.methods import method_of
from deltadock.client.progress import default_bar
from deltadock.client.requests import (
    POLL_SECONDS,
    RECONNECTS,
    TIMEOUT,
    Call,
    Events,
    JsonObject,
    Lines,
    Pages,
    check,
    domain_error,
    reader,
)
from deltadock.client.resources import Checkpoint, Delta, Job, LogLine
from deltadock.client.routes import GoalOptions
from deltadock.client.stopping import Stop
from deltadock.client.uploads import Uploader
from deltadock.compression.options import check_weights
from deltadock.errors import DeltadockError, NotFound, NotReady, Unavailable

if TYPE_CHECKING:
    from deltadock.client.asynchronous import AsyncClient, AsyncPush

T = TypeVar("T")

BytesProgress = Callable[[str, int, int], None]
"""Called with a file's name, the bytes that are done, and all of them, by several threads."""
JobProgress = Callable[[Job], None]
PauseNotice = Callable[[float, DeltadockError], None]
"""Called before the client waits for long: with the seconds, and the error that it waits for."""
Calibration = str | Path | Mapping[str | Path, float]
"""A text file, or a mixture: weights by file, or by "sampled" for text of the fine-tune."""

SAMPLED: Final = "sampled"
LONG_PAUSE_SECONDS: Final = 4.0
"""A pause that the server asked for: the client's own are shorter."""


def ignore(*_: object) -> None:
    """The default progress callback."""


class Client:
    """A client of the Deltadock at `url`; a context manager that closes its connections.

    Every method may raise `Unauthorized` (no valid key), `Forbidden` (the key may not do that),
    `NotFound`, `InvalidInput`, and `Unavailable` (the server does not answer, after a few tries);
    its docstring names what else. All are `DeltadockError`s of `deltadock.errors`.

    Args:
        url, key: the api's address and an API key. None: those of the environment, of `deltadock
            login`, or of the Deltadock that `deltadock up` runs in this folder
            (`deltadock.client.connection`).
        on_pause: called before a long pause that the server asks for, as over a rate limit.

    Raises:
        InvalidInput: `url` is not an address.
    """

    def __init__(
        self, url: str | None = None, key: str | None = None, *, on_pause: PauseNotice = ignore
    ) -> None:
        self._stop = Stop()
        self._http = httpx.Client(**http_options(url, key), event_hooks=self._stop.hooks)
        self._on_pause = on_pause

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @property
    def url(self) -> str:
        """The api's address."""
        return str(self._http.base_url)

    def __repr__(self: "Client | AsyncClient") -> str:
        return f"<{type(self).__name__} of {self.url}>"

    def send(self, call: Call[T]) -> T:
        """Send a request, again if it fails and may be repeated, and read its answer.

        Raises:
            DeltadockError: the answer is an error; the class has its code.
            Unavailable: the server does not answer.
        """
        for attempt in count(1):
            try:
                return call.result(self._http.request(**call.arguments()))
            except (httpx.RequestError, Unavailable) as error:
                self._pause(call, attempt, error)
        raise AssertionError

    def _pause(self, call: Call[Any], attempt: int, error: Exception) -> None:
        """Wait before a failed request is sent again; raises if it must not be."""
        self._stop.check()
        seconds = call.pause(attempt, error)
        if seconds >= LONG_PAUSE_SECONDS:
            self._on_pause(seconds, domain_error(error))
        self._stop.sleep(seconds)

    def items(self, pages: Pages[T]) -> Iterator[T]:
        """The items of a list, whose pages are fetched as they are needed."""
        call = pages.first
        while True:
            items, following = self.send(call)
            yield from items
            if following is None:
                return
            call = pages.after(following)

    def events(self, events: Events[T]) -> Iterator[T]:
        """The events of one stream.

        Raises:
            DeltadockError: as `send`, and an error in the stream.
            Unavailable: the connection broke.
        """
        with closing(self._open(events.call)) as response:
            events.check(response)
            lines = Lines()
            try:
                for line in chain.from_iterable(map(lines.of, response.iter_bytes())):
                    if (event := events.read(line)) is not None:
                        yield event
            except httpx.RequestError as error:
                raise domain_error(error) from None

    ready = method_of(routes.ready, send)
    methods = method_of(routes.methods, send)
    create_base = method_of(routes.create_base, send)
    base = method_of(routes.base, send)
    share_base = method_of(routes.share_base, send)
    bases = method_of(routes.bases, items)
    delete_base = method_of(routes.delete_base, send)
    restore_base = method_of(routes.restore_base, send)
    create_delta = method_of(routes.create_delta, send)
    preview = method_of(routes.preview, send)
    delta = method_of(routes.delta, send)
    resolve = method_of(routes.resolve, send)
    deltas = method_of(routes.deltas, items)
    report = method_of(routes.report, send)
    delete = method_of(routes.delete, send)
    restore = method_of(routes.restore, send)
    models = method_of(routes.models, items)
    model = method_of(routes.model, send)
    change_model = method_of(routes.change_model, send)
    delete_model = method_of(routes.delete_model, send)
    move_alias = method_of(routes.move_alias, send)
    remove_alias = method_of(routes.remove_alias, send)
    alias_moves = method_of(routes.alias_moves, items)
    job = method_of(routes.job, send)
    jobs = method_of(routes.jobs, items)
    cancel = method_of(routes.cancel, send)
    retry = method_of(routes.retry, send)
    nodes = method_of(routes.nodes, send)
    drain = method_of(routes.drain, send)
    resume = method_of(routes.resume, send)
    evict = method_of(routes.evict, send)
    keys = method_of(routes.keys, items)
    create_key = method_of(routes.create_key, send)
    revoke_key = method_of(routes.revoke_key, send)
    rotate_key = method_of(routes.rotate_key, send)
    webhooks = method_of(routes.webhooks, send)
    create_webhook = method_of(routes.create_webhook, send)
    delete_webhook = method_of(routes.delete_webhook, send)
    webhook_messages = method_of(routes.webhook_messages, items)
    resend_message = method_of(routes.resend_message, send)
    tenants = method_of(routes.tenants, items)
    tenant = method_of(routes.tenant, send)
    create_tenant = method_of(routes.create_tenant, send)
    change_tenant = method_of(routes.change_tenant, send)
    check_served = method_of(routes.check_served, send)
    generate = method_of(routes.generate, send)
    stream = method_of(routes.stream, events)

    def _open(self, call: Call[Any], **more: Any) -> httpx.Response:
        """Send a request like `send`; its answer is not read yet, and must be closed."""
        for attempt in count(1):
            try:
                request = self._http.build_request(**call.arguments() | more)
                # Only for downloads: the api may redirect to a presigned URL of its object store.
                # httpx sends neither Authorization nor this server's cookies to another host.
                response = self._http.send(request, stream=True, follow_redirects=True)
                if not response.is_success:
                    with closing(response):
                        response.read()
                    check(response)
                return response  # noqa: TRY300
            except (httpx.RequestError, Unavailable) as error:
                self._pause(call, attempt, error)
        raise AssertionError

    def follow(self, job: str) -> Iterator[Job]:
        """A job now and after every change, until it has ended; connects again if it must.

        Raises:
            NotFound: there is none.
            Unavailable: the server does not answer; the job goes on.
        """
        failures = 0
        while failures < RECONNECTS:
            try:
                for state in self.events(routes.events(job)):
                    failures = 0
                    yield state
                    if state.is_final:
                        return
            except Unavailable:
                if failures == RECONNECTS - 1:
                    raise
            failures += 1
            time.sleep(POLL_SECONDS)
        raise Unavailable(f"The server ends the events of {job} before the job has ended.")

    def wait(self, job: str, progress: JobProgress = ignore) -> Job:
        """Wait until a job has ended, and return it; `progress` gets it after every change.

        Raises:
            NotFound: there is none.
            Unavailable: the server does not answer; the job goes on.
        """
        for state in self.follow(job):
            progress(state)
        return state

    def log(
        self, job: str, *, follow: bool = False, progress: JobProgress = ignore
    ) -> Iterator[LogLine]:
        """The lines of a job's log, oldest first; with `follow`, until the job has ended.

        `progress` gets the followed job every second.
        """
        after, ended = 0, not follow
        while True:
            if follow:
                state = self.job(job)
                progress(state)
                ended = state.is_final  # before its last lines are read
            while lines := self.send(routes.log(job, after)):
                yield from lines
                after = lines[-1].id
            if ended:
                return
            time.sleep(POLL_SECONDS)

    def upload_folder(
        self,
        folder: str | Path,
        progress: BytesProgress = ignore,
        *,
        delta: str | None = None,
        base: str | None = None,
    ) -> Checkpoint:
        """Upload a checkpoint folder; returns the checkpoint with its digests.

        Only the files of the model or adapter are sent, not what a trainer left beside them, and
        of those only what the server lacks: an upload that was interrupted is continued.

        Args:
            folder, progress: as for `push`.
            delta: name of the delta that it will become, if any.
            base: name of the base that it will become, if any.

        Raises:
            QuotaExceeded: there is no room for it, or for another delta.
            RateLimited: the tenant may not run another job now.
            Conflict: the delta's name is a deleted model's, or the base's another checkpoint's.
            InvalidCheckpoint: the folder has no checkpoint files, or the server refuses them.
            HashMismatch: the server received other bytes than were sent.
            Unavailable: the server does not answer; call again to resume.
        """
        folder = Path(folder)
        names = sorted(folder_files(folder))
        becomes = {
            kind: name for kind, name in (("delta", delta), ("base", base)) if name is not None
        }
        uploaded = self._upload("checkpoint", folder, names, progress, **becomes)["checkpoint"]
        return Checkpoint.model_validate(uploaded)

    def upload_calibration(self, path: str | Path) -> str:
        """Upload a calibration text (.txt or .jsonl); returns its digest.

        Raises:
            NotFound: there is no such file.
            InvalidCalibration: the server refuses it.
        """
        path = Path(path)
        if not path.is_file():
            raise NotFound(f"There is no calibration file {path}.")
        uploaded = self._upload("calibration", path.parent, [path.name], ignore)
        digest: str = uploaded["calibration"]["digest"]
        return digest

    def _upload(
        self,
        kind: str,
        folder: Path,
        names: Iterable[str],
        progress: BytesProgress,
        **becomes: str,
    ) -> JsonObject:
        with httpx.Client(
            timeout=TIMEOUT, verify=certificates(), event_hooks=self._stop.hooks
        ) as storage:

            def put(url: str, body: Iterator[bytes], size: int) -> None:
                # A presigned URL is the object store's, which gets no credentials of ours.
                http = self._http if url.startswith("/") else storage
                headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
                try:
                    check(http.put(url, content=body, headers=headers))
                except httpx.RequestError as error:
                    raise domain_error(error) from None

            def request(method: str, path: str, **body: Any) -> JsonObject:
                return self.send(Call(method, path, _as_json, body=body.get("json")))

            uploader = Uploader(request, put, folder, progress, self._stop)
            return uploader.upload(kind, names, **becomes)

    def push(
        self,
        folder: str | Path,
        name: str,
        base: str,
        *,
        method: str | None = None,
        calibration: Calibration | None = None,
        seed: int = 0,
        priority: Literal["high", "normal", "low"] = "normal",
        parent: str | None = None,
        recipe: JsonObject | None = None,
        commit: str | None = None,
        progress: BytesProgress = ignore,
        **goal: Unpack[GoalOptions],
    ) -> "Push":
        """Upload a fine-tune and start its compression; `push(...).wait()` waits until it is ready.

        Args:
            folder: the fine-tune's checkpoint, or a PEFT LoRA adapter's folder.
            name: `project/model`; each push makes a new version, but for equal inputs.
            base: name or id of the base.
            calibration: a text, or a mixture of some; None: text sampled from the fine-tune, if
                the method needs calibration.
            progress: of the upload.
            method, seed, priority, parent, recipe, commit, goal: as for `create_delta`.

        Raises:
            InvalidInput: an argument is refused; a subclass says why.
            Conflict: the method does not fit: an adapter needs 'lora', a whole model another one.
            InvalidAdapter: the adapter cannot be imported.
            UnsupportedModel: the method must run the model, whose family cannot be run.
            ArchitectureMismatch: the model is another one than its base.
            InvalidCalibration: a text is too short.
            QuotaExceeded, RateLimited: the tenant may have no more bytes, deltas or jobs.
            NotFound: there is no such base, parent or file.
            Unavailable: the server does not answer; call again to resume.
        """
        # All that can be refused now is, before hours of upload.
        routes.checked_name(name)
        before, headers = self.send(routes.base_manifest(base)), read_headers(Path(folder))
        chosen, wanted = check_method(
            before, headers, method, goal, has_text=calibration is not None,
            known=lambda: {known.name for known in self.methods()},
        )  # fmt: skip
        if wanted is not None and wanted.is_size:
            check_size(Path(folder), before, chosen, wanted)
        for source in _weights_of(calibration):
            if source != SAMPLED:
                check_text(Path(source), Path(folder))
        if parent is not None:
            self.delta(parent)
        mixture = None if calibration is None else self._mixture(calibration)
        checkpoint = self.upload_folder(folder, progress, delta=name)
        accepted = self.create_delta(
            name, base, checkpoint.digest, method=method, seed=seed, priority=priority,
            calibration=mixture, parent=parent, recipe=recipe, commit=commit, **goal,
        )  # fmt: skip
        return Push(self, accepted.delta, accepted.job)

    def _mixture(self, calibration: Calibration) -> JsonObject:
        weights = _weights_of(calibration)
        check_weights(list(weights.values()))
        sources: list[JsonObject] = []
        for source, weight in weights.items():
            if source == SAMPLED:
                sources.append({"source": "sampled", "weight": weight})
            else:
                sources.append({"digest": self.upload_calibration(source), "weight": weight})
        return {"sources": sources}

    def download(self, reference: str, path: str | Path, progress: BytesProgress = ignore) -> Delta:
        """Download a delta's file to `path` and verify it; continues what was interrupted.

        Raises:
            NotFound: there is no such delta, or no such folder.
            NotReady: its compression is unfinished or failed.
            HashMismatch: the bytes do not match the digest; the partial file is removed.
            Unavailable: the connection broke; call again to resume.
        """
        path, delta = Path(path), self.delta(reference)
        if not path.parent.is_dir():
            raise NotFound(f"There is no folder {path.parent}. Make it, or choose another path.")
        if delta.artifact is None:
            raise NotReady(f"{delta.reference} is {delta.state}; see its job {delta.job}.")
        call = Call("GET", f"/v1/deltas/{delta.id}/artifact", reader(bytes))

        def open_at(start: int) -> httpx.Response:
            # No If-Range: a delta's bytes never change, and an object store does not know our ETag.
            return self._open(call, headers={"Range": f"bytes={start}-"} if start else {})

        Downloader(open_at, progress, self._stop).download(delta.reference, delta.artifact, path)
        return delta


class Push:
    """A push whose compression runs on the server.

    Attributes:
        delta: the new version.
        job: its compression, as it was then.
    """

    def __init__(self, client: Client, delta: Delta, job: Job) -> None:
        self.delta = delta
        self.job = job
        self._client = client

    def __repr__(self: "Push | AsyncPush") -> str:
        return f"<Push {self.delta.reference}: {self.job.state}>"

    def wait(self, progress: JobProgress | None = None) -> Delta:
        """Wait until the delta is ready, and return it.

        Args:
            progress: gets the job after every change. None: a bar, in a terminal or a notebook.

        Raises:
            DeltadockError: the compression failed; the class has its code.
            Cancelled: it was cancelled.
            Unavailable: the server does not answer; the job goes on, and `wait` can be called
                again.
        """
        with default_bar(progress) as show:
            self.job = self._client.wait(self.job.id, show)
        if (failure := self.job.failure) is not None:
            raise failure
        self.delta = self._client.delta(self.delta.id)
        return self.delta

    def _repr_html_(self: "Push | AsyncPush") -> str:
        return self.delta._repr_html_()


def _weights_of(calibration: Calibration | None) -> Mapping[str | Path, float]:
    """The weights of the mixture, by source."""
    if calibration is None:
        return {}
    return calibration if isinstance(calibration, Mapping) else {calibration: 1.0}


def _as_json(answer: Any) -> JsonObject:
    parsed: JsonObject = answer or {}
    return parsed
