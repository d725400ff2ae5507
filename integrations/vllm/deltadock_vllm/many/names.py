"""The front of an engine: from a request's `model` to a delta that every rank has loaded.

A name is resolved through the registry, with the engine's key, to `name@digest`; vLLM's queue,
prefix cache, metrics and answers know a delta by that. What cannot be served is refused here, by
name: nothing that reaches a rank's step can be missing or damaged.
"""

import asyncio
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from deltadock.artifacts.checkpoint import CONFIG
from deltadock.artifacts.configs import check_same_forward
from deltadock.artifacts.reader import Artifact
from deltadock.client.blocking import Client
from deltadock.client.routes import is_reference
from deltadock.errors import (
    DeltadockError,
    InvalidInput,
    NotFound,
    Unavailable,
    UnsupportedModel,
    error_for,
)
from deltadock.names import DIGEST
from deltadock_vllm.checks import MERGE, base_manifest, check_servable
from deltadock_vllm.fetching import DeltaFile, fetch, fetch_registered
from deltadock_vllm.loader import engine_files
from deltadock_vllm.many.manager import FIRST_ID, Settings

log = init_logger("vllm.deltadock")

RESOLVED_SECONDS: Final = 5.0
"""How long an answer of the registry is used: a moved alias is followed after that."""
LISTED_SECONDS: Final = 30.0
"""How long a list of the registry is used; longer if it took a twentieth of that to read."""
PAGE: Final = 200
"""Deltas of one request for that list."""
POLL_SECONDS: Final = 0.02
MOST_NAMES: Final = 10_000
"""Names that are remembered."""
MOST_CHECKED: Final = 1000
"""Deltas that are not hashed and checked again."""

Load = Callable[[int, str], Awaitable[list[dict[str, str]]]]
"""Ask every rank for `DeltaManager.load`."""


class Found(NamedTuple):
    """A delta that can be served, and its own chat template (None: the engine's)."""

    request: LoRARequest
    template: str | None


class _Known(NamedTuple):
    found: Found
    until: float


class _List(NamedTuple):
    names: Sequence[str]
    until: float


class DeltaNames:
    """The deltas that an engine can be asked for. Belongs to one event loop, or one thread."""

    def __init__(self, config: VllmConfig) -> None:
        self._config = config
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._loaded: OrderedDict[int, None] = OrderedDict()
        self._fetched = lru_cache(MOST_CHECKED)(fetch_registered)
        self._template_of = lru_cache(MOST_CHECKED)(self._check)
        self._listed = _List((), 0.0)
        self._listing = asyncio.Lock()
        self._threads = ThreadPoolExecutor(4, "resolve-delta")
        self._base_lock = threading.Lock()

    async def find(self, name: str, load: Load) -> Found:
        """The adapter that `name` means now, on every rank.

        Raises:
            DeltadockError: there is none, or it cannot be served.
        """
        known = self._known.get(name)
        if known is None or known.until < time.monotonic():
            loop = asyncio.get_running_loop()
            try:
                found = await loop.run_in_executor(self._threads, self.resolve, name)
            except Unavailable:
                if known is None:
                    raise
                log.warning("The registry is unavailable; %s keeps its meaning.", name)
                found = known.found
            known = self._known[name] = _Known(found, time.monotonic() + RESOLVED_SECONDS)
            if len(self._known) > MOST_NAMES:
                self._known.popitem(last=False)
        await self.ensure(known.found.request, load)
        return known.found

    async def ensure(self, request: LoRARequest, load: Load) -> None:
        """Wait until every rank has a delta in host memory.

        Raises:
            DeltadockError: a rank refuses it.
        """
        key = request.lora_int_id
        if key not in self._loaded:
            while True:
                states = await load(key, request.lora_path)
                raise_refusal(states)
                if all(state["state"] == "ready" for state in states):
                    break
                await asyncio.sleep(POLL_SECONDS)
        self.note_loaded(key)

    def note_loaded(self, key: int) -> None:
        """Remember that the ranks have a delta, as long as they cannot have evicted it."""
        self._loaded[key] = None
        self._loaded.move_to_end(key)
        while len(self._loaded) > self._config.lora_config.max_cpu_loras:
            self._loaded.popitem(last=False)

    def is_loaded(self, key: int) -> bool:
        """Whether the ranks have a delta."""
        return key in self._loaded

    def is_known(self, request: LoRARequest) -> bool:
        """Whether it is of a name that HTTP asked for: checked, and rendered with its template."""
        return any(one.found.request.lora_path == request.lora_path for one in self._known.values())

    def resolve(self, name: str) -> Found:
        """Fetch and check the delta that a name, id, digest or `name@digest` means; blocks.

        Raises:
            DeltadockError: there is none, or it cannot be served.
        """
        reference, _, pinned = name.rpartition("@")
        if not re.fullmatch(DIGEST, pinned):
            reference, pinned = name, ""
        if pinned == name:
            digest = label = name
        elif is_reference(reference):
            with Client() as client:
                found = client.resolve(reference)
            if pinned not in ("", found.digest):
                raise NotFound(f"{reference} is not the artifact {pinned}, but {found.digest}.")
            digest, label = found.digest, f"{found.name}@{found.digest}"
        else:
            raise NotFound(f"The model {name!r} does not exist.")
        file = self._fetched(digest)
        if not file.path.is_file():  # removed from the cache meanwhile
            file = fetch_registered(digest)
        return Found(LoRARequest(label, number(digest), str(file.path)), self._template_of(file))

    def check_path(self, path: str) -> None:
        """Check a delta file that a caller in this process names; blocks.

        Raises:
            DeltadockError: there is none, or it cannot be served; or it has a chat template of its
                own, which callers in this process would render without.
        """
        if self._template_of(fetch(path)) is not None:
            raise UnsupportedModel(
                "The delta has a chat template of its own, with which only requests over HTTP are "
                f"rendered. {MERGE}"
            )

    def _check(self, file: DeltaFile) -> str | None:
        """The chat template of a delta that this engine can serve, if it has its own; blocks.

        Raises:
            DeltadockError: it cannot serve it.
        """
        model = self._config.model_config
        with self._base_lock:
            files = engine_files(model, self._base)
        with Artifact(file.path) as artifact:
            return check_servable(artifact, files, own_template=True)

    @cached_property
    def _base(self) -> Path:
        """The checkpoint that deltas are of.

        Raises:
            UnsupportedModel: the engine's is no quantization of it.
        """
        full, own = Settings.of(self._config).base, self._checkpoint()
        if full is not None and (different := check_same_forward(_config(full), _config(own))):
            keys = ", ".join(one.key for one in different)
            raise UnsupportedModel(f"{full} is not what {own} was before: it has another {keys}.")
        return full or own

    def _checkpoint(self) -> Path:
        model = self._config.model_config
        if (folder := Path(model.model)).is_dir():
            return folder
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model.model, revision=model.revision, local_files_only=True))

    async def listed(self) -> Sequence[str]:
        """Names of the registry's ready deltas of this base; none while it is unavailable."""
        async with self._listing:
            if self._listed.until < (began := time.monotonic()):
                loop = asyncio.get_running_loop()
                names = await loop.run_in_executor(self._threads, self._list)
                now = time.monotonic()
                self._listed = _List(names, now + max(LISTED_SECONDS, 20 * (now - began)))
            return self._listed.names

    def _list(self) -> list[str]:
        names: dict[str, None] = {}
        try:
            with self._base_lock:
                digest = base_manifest(self._base).digest
            with Client() as client:
                bases = [base.id for base in client.bases() if base.checkpoint.digest == digest]
                for base in bases:
                    for delta in client.deltas(base=base, state="ready", limit=PAGE):
                        bare = [delta.name] if delta.version == delta.default_version else []
                        aliases = [f"{delta.name}@{alias}" for alias in delta.aliases]
                        names |= dict.fromkeys([*bare, delta.reference, *aliases])
        except DeltadockError as error:
            log.warning("/v1/models lacks deltas of the registry: %s", error.message)
        return list(names)


def _config(folder: Path) -> dict[str, Any]:
    """The config.json, but for how the weights are quantized."""
    found: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
    found.pop("quantization_config", None)
    return found


def number(digest: str) -> int:
    """vLLM's number of a delta: the same in every API server, below 2**31."""
    return FIRST_ID + int(digest[:16], 16) % (2**31 - FIRST_ID)


def raise_refusal(states: list[dict[str, str]]) -> None:
    """Raise the first rank's refusal, if there is one."""
    for state in states:
        if "code" in state:
            raise error_for(state["code"], state["message"])


def check_sampling(params: Any) -> None:
    """Refuse what a delta's requests cannot ask for.

    Raises:
        InvalidInput: log-probabilities of the prompt.
    """
    if getattr(params, "prompt_logprobs", None) is not None:
        raise InvalidInput(
            "prompt_logprobs cannot be had of a delta beside others: the head's rows are laid out "
            "for sampled positions. Ask an engine with --load-format deltadock."
        )
