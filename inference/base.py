"""The base in memory and what runs on it: the engine, and the deltas in their slots."""

from collections.abc import Mapping
from pathlib import Path

from artifacts.checkpoint import CheckpointManifest
from artifacts.reader import Artifact
from deltadock.settings import Settings
from inference.deltas import ArtifactSource, LoadedDelta, load_delta
from inference.engine import Engine
from inference.layers import DeltaLimits
from inference.metrics import Metrics
from inference.model import BaseModel, load_base
from inference.slots import SlotManager
from inference.tokens import Tokenizer, read_tokenizer_files
from kernels.device import choose_device
from storage.cache import FileCache


class ServedBase:
    """One base, loaded and running."""

    def __init__(
        self,
        *,
        name: str,
        manifest: CheckpointManifest,
        folder: Path,
        files: FileCache,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.digest = manifest.digest
        self.name = name
        self.users = 0
        """Requests that have not ended yet."""
        self._weights_digest = manifest.weights_digest
        self._files: Mapping[str, str] = read_tokenizer_files(folder)
        self._cache = files
        self._metrics = metrics
        self.tokenizer = Tokenizer(self._files)
        limits = DeltaLimits(
            slots=settings.node_max_deltas + 1,
            rows=max(settings.node_pass_tokens, settings.node_max_sequences),
            cache_bytes=settings.node_factor_cache_bytes,
        )
        device = choose_device(settings.device)
        self.model: BaseModel = load_base(folder, manifest, device, limits)
        self.engine = Engine(
            self.model,
            max_sequences=settings.node_max_sequences,
            context_tokens=settings.node_context_tokens,
            pass_tokens=settings.node_pass_tokens,
            cache_slots=settings.node_cache_slots,
        )
        self.deltas = SlotManager(
            settings.node_max_deltas,
            load=self._load_delta,
            install=lambda slot, delta: self.model.install(slot, delta.changes),
            remove=self.model.remove,
        )
        self.engine.start()

    def close(self) -> None:
        """End the engine; what still runs is cancelled."""
        self.engine.stop()
        self.deltas.close()

    def _load_delta(self, digest: str) -> LoadedDelta:
        timing = self._metrics.load_seconds.time()
        with timing, Artifact.open(self._cache.artifact(digest)) as artifact:
            source = ArtifactSource(artifact)
            return load_delta(source, self.model, self._weights_digest, self._files)
