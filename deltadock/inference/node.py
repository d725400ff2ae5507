"""The node: admits requests, brings their base and delta in, and follows them to their end."""

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from deltadock.artifacts.checkpoint import CheckpointManifest, scan_folder
from deltadock.errors import ModelNotFound, NotReady, Unavailable
from deltadock.inference.admission import Admission
from deltadock.inference.base import ServedBase
from deltadock.inference.deltas.disk import DiskTier
from deltadock.inference.deltas.store import Held
from deltadock.inference.generation import Generation
from deltadock.inference.metrics import Metrics
from deltadock.inference.prompts.chat import TemplateSandbox
from deltadock.inference.registration import Registration
from deltadock.inference.request import Prompt, Request, Target, encode, sampling_of
from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore
from deltadock.storage.cache import FileCache

TOLD_DELTAS: Final = 500
"""The api is told of so many at most; what is beyond lies on the slowest tier."""


class Node:
    """Serves one base at a time, adopting the one that requests name unless it was given one."""

    def __init__(self, settings: Settings, blobs: BlobStore) -> None:
        self.settings = settings
        self._files = FileCache(blobs, settings.cache_folder)
        self._disk = DiskTier(self._files, settings.node_disk_bytes)
        running = settings.node_max_sequences
        self._admission = Admission(
            running + settings.node_max_waiting, running + settings.node_max_waiting_per_delta
        )
        self._base_lock = asyncio.Lock()
        self._templates = TemplateSandbox()
        self._registration: Registration | None = None
        self.base: ServedBase | None = None
        self.draining = False
        """Whether new requests are refused, because the node is about to stop."""
        self.metrics = Metrics()

    async def start(self) -> None:
        """Load the base and the deltas that the node was given, if any.

        Raises:
            DeltadockError: one of them cannot be loaded.
        """
        if (folder := self.settings.node_base) is not None:
            self.base = await asyncio.to_thread(self._load_folder, folder)
            for digest in self.settings.node_deltas:
                await self.base.deltas.load(digest)

    def register(self, url: str) -> None:
        """Tell the api, if the settings name one, that the node is at `url`; until `stop`."""
        if self.settings.api_url is not None:
            self._registration = Registration(self.settings, url, self.state)

    def _tell_soon(self) -> None:
        if self._registration is not None:
            self._registration.changed()

    async def drain(self) -> None:
        """Take no new requests, and say so; what runs goes on."""
        self.draining = True
        if self._registration is not None:
            await self._registration.tell()

    async def stop(self) -> None:
        """End the engine; what still runs is cancelled."""
        if self._registration is not None:
            await self._registration.close()
        if self.base is not None:
            self.base.stop_merging()
            await asyncio.to_thread(self.base.close)
        await asyncio.to_thread(self._templates.close)

    @property
    def ready(self) -> bool:
        """Whether requests can be taken: the engine runs, or the first request will start it."""
        return self.base is None or self.base.engine.alive

    def state(self) -> dict[str, Any]:
        """What the api is told of the node."""
        base = self.base
        return {
            "base": None if base is None else base.digest,
            "adopts": self.settings.node_base is None,
            "draining": self.draining or not self.ready,
            "capacity": self._admission.limit,
            "admitted": self.admitted,
            "delta_slots": self.settings.node_max_deltas,
            "deltas": [held._asdict() for held in self.held()[:TOLD_DELTAS]],
        }

    @property
    def admitted(self) -> int:
        """Sequences that wait or run."""
        return self._admission.admitted

    def held(self) -> list[Held]:
        """The deltas of the present base in every tier, fast tiers first."""
        return [] if self.base is None else self.base.deltas.held()

    def target(self, model: str) -> Target:
        """What a request's `model` means to the node itself, which knows no names but its base's.

        Raises:
            ModelNotFound: it is neither the base nor the digest of a delta that the node holds.
        """
        base = self.base
        if base is not None:
            if model in {base.name, base.digest}:
                return Target(base.digest)
            if any(held.digest == model for held in base.deltas.held()):
                return Target(base.digest, model)
        raise ModelNotFound(
            f"This node does not know the model {model!r}; GET /v1/models lists what it holds. "
            "Weights that it is to fetch are named in the headers Deltadock-Base and "
            "Deltadock-Artifact.",
            param="model",
        )

    async def generate(self, target: Target, request: Request) -> Generation:
        """Begin to answer a request; load the base and the delta first where needed.

        Raises:
            Overloaded: the node's queue, or the delta's, is full.
            Unavailable: the node is busy with another base, or about to stop.
            InvalidInput: a prompt is empty or too long, or more answers than the queue holds.
            DeltadockError: whatever loading the base or the delta raised.
        """
        if self.draining:
            raise Unavailable("The node is stopping; send the request to another.")
        prompts = request.prompts()
        count = len(prompts) * request.answers
        self._admission.enter(target.model_key, count)
        try:
            return await self._begin(target, prompts, request)
        except BaseException:
            self._admission.leave(target.model_key, count)
            raise

    async def _begin(
        self, target: Target, prompts: Sequence[Prompt], request: Request
    ) -> Generation:
        base = await self._enter(target.base)
        with ExitStack() as undo:
            undo.callback(_leave, base)
            slot = 0
            generation = Generation(
                base,
                target.artifact,
                self.metrics,
                partial(self._admission.leave, target.model_key),
            )
            if target.artifact is not None:
                slot, delta = await base.deltas.acquire(target.artifact)
                undo.callback(base.deltas.release, target.artifact)
                generation.tokenizer = delta.tokenizer
            tokenizer = generation.tokenizer
            vocabulary = base.model.vocabulary(slot)
            encoded = await asyncio.to_thread(
                encode, prompts, tokenizer, self._templates, vocabulary
            )
            context = base.engine.context_tokens
            sampling = sampling_of(request, tokenizer.defaults, encoded, context, vocabulary)
            generation.start(encoded, request.answers, sampling, slot)
            undo.pop_all()
        self.metrics.requests.labels("ok").inc()
        return generation

    @asynccontextmanager
    async def using(self, digest: str | None) -> AsyncIterator[ServedBase]:
        """The base `digest`, or without one the present base, which stays while the block runs.

        Raises:
            NotReady: there is no base yet, and none is named.
            DeltadockError: whatever loading the base raised.
        """
        digest = digest or (None if self.base is None else self.base.digest)
        if digest is None:
            raise NotReady("The node has no base yet; name one in the header Deltadock-Base.")
        base = await self._enter(digest)
        try:
            yield base
        finally:
            _leave(base)

    async def _enter(self, digest: str) -> ServedBase:
        """The base `digest`, which stays until `_leave`."""
        while True:
            # A client that goes away must not leave a base half adopted.
            base = await asyncio.shield(asyncio.create_task(self._adopt(digest)))
            if base is self.base:
                base.users += 1
                return base

    async def _adopt(self, digest: str) -> ServedBase:
        async with self._base_lock:
            base = self.base
            if base is not None and base.digest == digest:
                return base
            self._check_idle(digest)
            # The new base is on disk and whole before the old one goes.
            folder, manifest = await asyncio.to_thread(self._files.checkpoint, digest)
            self._check_idle(digest)
            if base is not None:
                self.base = None
                await asyncio.to_thread(base.close)
                del base
                # Its parts refer to each other, and two bases may have no room.
                await asyncio.to_thread(gc.collect)
            self.base = await asyncio.to_thread(self._serve, digest, manifest, folder)
            return self.base

    def _check_idle(self, digest: str) -> None:
        base = self.base
        if base is not None and (base.users or self.settings.node_base is not None):
            raise Unavailable(
                f"This node serves the base {base.digest} and cannot change to {digest} now. "
                "Try again later, or send the request to a node with that base."
            )

    def _load_folder(self, folder: Path) -> ServedBase:
        manifest = scan_folder(folder)
        return self._serve(folder.resolve().name, manifest, folder)

    def _serve(self, name: str, manifest: CheckpointManifest, folder: Path) -> ServedBase:
        return ServedBase(
            name=name,
            manifest=manifest,
            folder=folder,
            disk=self._disk,
            settings=self.settings,
            metrics=self.metrics,
            changed=self._tell_soon,
        )


def _leave(base: ServedBase) -> None:
    base.users -= 1
