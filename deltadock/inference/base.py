"""A base in memory with its engine and its deltas."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from deltadock.artifacts.checkpoint import CheckpointManifest
from deltadock.inference.deltas.hot_delta import HotDeltaMerger
from deltadock.inference.deltas.reading import ModelDevice
from deltadock.inference.deltas.store import DeltaStore
from deltadock.inference.deltas.tiers import DiskTier
from deltadock.inference.engine.engine import Engine
from deltadock.inference.metrics import Metrics
from deltadock.inference.model.loading import load_base
from deltadock.inference.model.model import DeltaModel
from deltadock.inference.model.routing import DeltaLimits
from deltadock.inference.prompts.tokenizer import Tokenizer, read_tokenizer_files
from deltadock.kernels import choose_device
from deltadock.settings import Settings


class ServedBase:
    """One base, loaded, with its engine running."""

    def __init__(
        self,
        *,
        name: str,
        manifest: CheckpointManifest,
        folder: Path,
        disk: DiskTier,
        settings: Settings,
        metrics: Metrics,
        changed: Callable[[], None],
    ) -> None:
        """Load the base; `changed` is called whenever the slots' contents change."""
        self.digest = manifest.digest
        self.name = name
        self.max_sequences = settings.node_max_sequences
        self.users = 0
        """Requests and merges in progress; the base is not replaced meanwhile."""
        self.idle = asyncio.Event()
        """Set when the last one leaves."""
        files = read_tokenizer_files(folder)
        self.tokenizer = Tokenizer(files)
        limits = DeltaLimits(
            slots=settings.node_max_deltas + 1,
            rows=max(settings.node_pass_tokens, settings.node_max_sequences),
            cache_bytes=settings.node_factor_cache_bytes,
        )
        device = choose_device(settings.device)
        self.model: DeltaModel = load_base(folder, manifest, device, limits)
        self.engine = Engine(
            self.model,
            max_sequences=settings.node_max_sequences,
            context_tokens=settings.node_context_tokens,
            pass_tokens=settings.node_pass_tokens,
            cache_slots=settings.node_cache_slots,
        )
        self.deltas = DeltaStore(
            disk,
            ModelDevice(self.model, disk, manifest.weights_digest, files),
            host_bytes=settings.node_host_bytes,
            slots=settings.node_max_deltas,
            metrics=metrics,
            changed=changed,
        )
        self._merger = (
            HotDeltaMerger(self.digest, self.merge, lambda: self.deltas.merged)
            if settings.node_merge
            else None
        )
        self.engine.start()

    def enter(self) -> None:
        """Count a user, until it leaves; called in the event loop."""
        self.users += 1
        self.idle.clear()

    def leave(self) -> None:
        """Count a user less; called in the event loop."""
        self.users -= 1
        if not self.users:
            self.idle.set()

    def record_traffic(self, model_key: str, tokens: int) -> None:
        """Count an ended request's tokens; called in the event loop."""
        if self._merger is not None:
            self._merger.record(model_key, tokens)

    async def merge(self, digest: str) -> None:
        """Merge a delta's weights, keeping the base meanwhile. Raises as `DeltaStore.merge`."""
        self.enter()
        try:
            await self.deltas.merge(digest)
        finally:
            self.leave()

    def stop_merging(self) -> None:
        """Start no more merges; called in the event loop."""
        if self._merger is not None:
            self._merger.stop()

    def close(self) -> None:
        """Stop the engine; running sequences are cancelled."""
        self.engine.stop()
        self.deltas.close()
