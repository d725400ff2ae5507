"""The node: admits requests, loads their base and delta, and starts their generation."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Final
from weakref import WeakValueDictionary

from deltadock.artifacts.folder import scan_folder
from deltadock.errors import Conflict, ModelNotFound, NotFound, NotReady, Unavailable
from deltadock.inference.admission import Admission
from deltadock.inference.base import ServedBase
from deltadock.inference.deltas.slots import MAX_WAIT_SECONDS, SlotsClosed
from deltadock.inference.deltas.store import HeldDelta
from deltadock.inference.deltas.tiers import DiskTier
from deltadock.inference.engine.sampling import SamplingParams
from deltadock.inference.generation import Generation
from deltadock.inference.metrics import Metrics
from deltadock.inference.model.loading import check_servable
from deltadock.inference.prompts.chat import PROCESSES, TemplateSandbox
from deltadock.inference.prompts.grammar import GrammarProcesses
from deltadock.inference.prompts.matching import TokenGrammar
from deltadock.inference.prompts.request_threads import RequestThreads
from deltadock.inference.prompts.tokenizer import Tokenizer
from deltadock.inference.registration import Registration
from deltadock.inference.request import (
    GenerationRequest,
    encode,
    grammar_of,
    prompts_of,
    sampling_params,
)
from deltadock.inference.turns import BaseTurns, FetchedCheckpoint
from deltadock.inference.usage import UsageMeter
from deltadock.model_target import ModelTarget
from deltadock.openai.chat import ChatRequest
from deltadock.openai.fields import Usage
from deltadock.settings import Settings
from deltadock.storage.blobs import BlobStore
from deltadock.storage.cache import FileCache

ENCODERS: Final = 4
"""Prompts without a template that are encoded at the same time."""
MAX_REPORTED_DELTAS: Final = 500
"""Limit of a heartbeat; deltas beyond it are in the slowest tier."""


class InferenceNode:
    """Serves one base at a time: the configured one, else the one that requests name."""

    def __init__(self, settings: Settings, blobs: BlobStore) -> None:
        self.settings = settings
        self._files = FileCache(blobs, settings.cache_folder, self._report_damaged)
        self._disk = DiskTier(self._files, settings.node_disk_bytes)
        running = settings.node_max_sequences
        self._admission = Admission(
            running + settings.node_max_waiting,
            running + settings.node_max_waiting_per_delta,
            settings.node_max_waiting // 4,
        )
        self._turns = BaseTurns(self._hold, self._serve)
        self._templates = TemplateSandbox()
        # Threads of their own: a slow template must not hold up loads, which use the default ones,
        # nor prompts without a template.
        self._renderers = RequestThreads(PROCESSES, "render")
        self._encoders = RequestThreads(ENCODERS, "encode")
        self._compiling: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """One grammar of a queue key is compiled at a time, in a process."""
        self._grammars = GrammarProcesses()
        self._registration: Registration | None = None
        self._drained = False
        """Whether an operator drained it."""
        self._stopping = False
        self._generations: WeakValueDictionary[str, Generation] = WeakValueDictionary()
        """Those whose requests have a name, by it; an ended one too, until it is collected."""
        self.metrics = Metrics()
        self._usage = UsageMeter(self.metrics)

    async def start(self) -> None:
        """Load the configured base and deltas, if any.

        Raises:
            DeltadockError: one of them cannot be loaded.
        """
        if (folder := self.settings.node_base) is not None:
            fetched = folder, await asyncio.to_thread(scan_folder, folder)
            name = folder.resolve().name
            self._turns.current = base = await asyncio.to_thread(self._serve, name, fetched)
            for digest in self.settings.node_deltas.values():
                await base.deltas.load(digest)

    def register(self, url: str) -> None:
        """Register with the api, if one is configured, under `url`; until `stop`."""
        if self.settings.api_url is not None:
            self._registration = Registration(self.settings, url, self.state)

    def _notify_api(self) -> None:
        if self._registration is not None:
            self._registration.notify()

    def _report_damaged(self, digest: str) -> None:
        """Called from any thread."""
        if self._registration is not None:
            self._registration.report_damaged(digest)

    async def drain(self) -> None:
        """Reject new requests until `resume`, and report it; running ones continue."""
        self._drained = True
        await self._report()

    async def resume(self) -> None:
        """Accept requests again, and report it.

        Raises:
            Conflict: the node is stopping.
        """
        if self._stopping:
            raise Conflict("The node is stopping; start it again.")
        self._drained = False
        await self._report()

    async def announce_stop(self) -> None:
        """Reject new requests for good, and report it; running ones continue."""
        self._stopping = True
        await self._report()

    async def _report(self) -> None:
        if self._registration is not None:
            await self._registration.report()

    async def stop(self) -> None:
        """Stop the engine; running requests are cancelled."""
        if self._registration is not None:
            await self._registration.close()
        await self._turns.close()
        self._grammars.close()
        await asyncio.to_thread(self._renderers.close)
        await asyncio.to_thread(self._encoders.close)
        await asyncio.to_thread(self._templates.close)

    @property
    def base(self) -> ServedBase | None:
        """The base that it has now."""
        return self._turns.current

    @property
    def draining(self) -> bool:
        """Whether new requests are rejected: an operator drained the node, or it is stopping."""
        return self._drained or self._stopping

    @property
    def ready(self) -> bool:
        """Whether requests are accepted: the engine runs, or the first request will start it."""
        return self.base is None or self.base.engine.alive

    @property
    def device_lost(self) -> bool:
        """Whether only a new process can serve again."""
        return self.base is not None and self.base.engine.device_lost

    def state(self) -> dict[str, Any]:
        """The node's state as heartbeats report it."""
        base = self.base
        return {
            "base": None if base is None else base.digest,
            "adopts": self.settings.node_base is None,
            "draining": self.draining or not self.ready,
            "capacity": self._admission.limit,
            "admitted": self.admitted,
            "delta_slots": self.settings.node_max_deltas,
            "context_tokens": (
                self.settings.node_context_tokens if base is None else base.engine.context_tokens
            ),
            "deltas": [delta._asdict() for delta in self.held()[:MAX_REPORTED_DELTAS]],
            "usage": self._usage.read()._asdict(),
        }

    @property
    def admitted(self) -> int:
        """Queued and running sequences."""
        return self._admission.admitted

    def held(self) -> list[HeldDelta]:
        """The current base's deltas in every tier, fast tiers first."""
        return [] if self.base is None else self.base.deltas.held()

    def offered(self) -> dict[str, str]:
        """The deltas that are models without headers, by name: those given at the start, and, by
        digest, those that requests or operators had loaded since.

        A file on the disk may be another base's or another tenant's.
        """
        given = {} if self.settings.node_base is None else self.settings.node_deltas
        loaded = [delta.digest for delta in self.held() if delta.tier != "disk"]
        return {**given, **{one: one for one in loaded if one not in given.values()}}

    def target(self, model: str) -> ModelTarget:
        """Resolve a request's `model` without headers: the base, or a delta by name or digest.

        Raises:
            ModelNotFound: it is neither the base nor a delta that the node offers.
        """
        base = self.base
        if base is not None:
            if model in {base.name, base.digest}:
                return ModelTarget(base.digest)
            offered = self.offered()
            digest = offered.get(model, model)
            if digest in offered.values():
                return ModelTarget(base.digest, digest)
        raise ModelNotFound(
            f"This node does not know the model {model!r}; GET /v1/models lists its models. Name "
            "other weights in the headers Deltadock-Base and Deltadock-Artifact.",
            param="model",
        )

    async def generate(
        self, target: ModelTarget, request: GenerationRequest, name: str | None = None
    ) -> Generation:
        """Start answering a request; loads the base and the delta first if needed.

        `end` ends one that has a `name`.

        Raises:
            Overloaded: the node's queue, the delta's or the tenant's share of it is full.
            Unavailable: the node serves only another base, was too long busy with one or with
                other deltas, or is draining.
            InvalidInput: a prompt is empty or too long, or there are more answers than the limit.
            DeltadockError: whatever loading the base or the delta raised.
        """
        if self.draining:
            raise Unavailable("The node is draining; send the request to another.")
        count = len(prompts_of(request)) * request.answers
        self._admission.enter(target, count)
        try:
            generation = await self._start(target, request)
        except BaseException:
            self._admission.leave(target, count)
            raise
        if name is not None:
            self._generations[name] = generation
        return generation

    def end(self, name: str) -> Usage:
        """Cancel the request of this name; returns its usage so far.

        Raises:
            NotFound: it has not begun, or has long ended.
        """
        generation = self._generations.get(name)
        if generation is None:
            raise NotFound("No request of this name is being answered.")
        generation.cancel()
        return generation.usage

    async def _start(self, target: ModelTarget, request: GenerationRequest) -> Generation:
        started_at = time.monotonic()
        base, slot, tokenizer = await self._acquire(target)
        with ExitStack() as on_error:
            on_error.callback(base.leave)
            if target.artifact_digest is not None:
                on_error.callback(base.deltas.release, target.artifact_digest, target.tenant)
            context, vocabulary = base.engine.context_tokens, base.model.vocabulary(slot)
            encode_all = partial(
                encode,
                prompts_of(request),
                tokenizer,
                self._templates,
                context,
                vocabulary,
                target.tenant,
            )
            threads = self._renderers if isinstance(request, ChatRequest) else self._encoders
            prompts = await threads.run(target, encode_all)
            samplings = sampling_params(request, tokenizer.defaults, prompts, context, vocabulary)
            grammar = await self._compile_grammar(target, tokenizer, request, samplings[0])
            generation = Generation(
                base,
                target,
                tokenizer,
                self.metrics,
                self._encoders,
                on_finish=partial(self._admission.leave, target),
                started_at=started_at,
            )
            generation.start(prompts, request.answers, samplings, slot, grammar)
            on_error.pop_all()
        self.metrics.requests.labels("ok").inc()
        return generation

    async def _acquire(self, target: ModelTarget) -> tuple[ServedBase, int, Tokenizer]:
        """The target's base, entered, and its delta's slot, acquired; with the tokenizer."""
        asked_at = time.monotonic()
        while True:
            base = await self._enter(target)
            try:
                if target.artifact_digest is None:
                    return base, 0, base.tokenizer
                slot, delta = await base.deltas.acquire(target.artifact_digest, target.tenant)
            except SlotsClosed:  # it waits for the base again
                base.leave()
                if time.monotonic() - asked_at > MAX_WAIT_SECONDS:
                    raise
            except BaseException:
                base.leave()
                raise
            else:
                return base, slot, delta.tokenizer

    async def _compile_grammar(
        self,
        target: ModelTarget,
        tokenizer: Tokenizer,
        request: GenerationRequest,
        sampling: SamplingParams,
    ) -> TokenGrammar | None:
        spec = grammar_of(request)
        if spec is None:
            return None
        eos = tokenizer.eos_ids
        # Another stop token with a text of its own may be a part of the grammar; it ends it early.
        ends = (
            token
            for token in sampling.end_ids(eos)
            if token in eos or tokenizer.special_text(token) is not None
        )
        end_ids = frozenset(ends)
        spellings = await self._encoders.run(target, lambda: tokenizer.spellings)
        async with self._compiling.setdefault(target.queue_key, asyncio.Lock()):
            return await self._grammars.compile(spellings, spec, end_ids, target.tenant)

    @asynccontextmanager
    async def using(self, digest: str | None) -> AsyncIterator[ServedBase]:
        """The base `digest`, or the current one if None, kept while the block runs.

        Raises:
            NotReady: there is no base, and none is named.
            DeltadockError: whatever loading the base raised.
        """
        base = self._current(digest)
        if base is not None:
            base.enter()  # even if other bases' requests wait: operators do not queue behind them
        elif digest is not None:
            base = await self._enter(ModelTarget(digest))
        else:
            raise NotReady("The node has no base yet; name one in the header Deltadock-Base.")
        try:
            yield base
        finally:
            base.leave()

    async def _enter(self, target: ModelTarget) -> ServedBase:
        """The target's base, kept until its `leave`."""
        digest = target.base_digest
        if (folder := self.settings.node_base) is not None and self._current(digest) is None:
            raise Unavailable(
                f"This node serves only the base {folder.resolve().name}, not {target.shown_base}. "
                "Send the request to another node, or start one: deltadock node --base FOLDER."
            )
        return await self._turns.enter(digest, target.shown_base)

    def _current(self, digest: str | None) -> ServedBase | None:
        """The base that the node has now, if it is `digest` or that is None."""
        base = self.base
        return base if base is not None and digest in {None, base.digest} else None

    @contextmanager
    def _hold(self, digest: str) -> Iterator[FetchedCheckpoint]:
        limit = self.settings.checkpoint_cache_bytes
        with self._files.held_checkpoint(digest, limit) as (folder, manifest):
            check_servable(manifest)  # before another base makes room for it
            yield folder, manifest

    def _serve(self, name: str, fetched: FetchedCheckpoint) -> ServedBase:
        folder, manifest = fetched
        return ServedBase(
            name=name,
            manifest=manifest,
            folder=folder,
            disk=self._disk,
            settings=self.settings,
            metrics=self.metrics,
            changed=self._notify_api,
        )
