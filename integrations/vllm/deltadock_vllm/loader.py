"""`--load-format deltadock`: vLLM reads base plus delta, merged tensor by tensor.

Names, packed layers, tensor and pipeline parallelism and quantization stay vLLM's own: only what
its loader reads is changed.
"""

import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from vllm.config import ModelConfig
from vllm.config.load import LoadConfig
from vllm.distributed import get_world_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.tensors import merged_tensor
from deltadock.errors import DeltadockError, HashMismatch, InvalidInput
from deltadock_vllm.checks import EngineFiles, check_servable
from deltadock_vllm.fetching import DeltaFile, fetch

LOAD_FORMAT = "deltadock"
SERVED = "deltadock_delta"
"""The attribute of vLLM's model that holds the `DeltaFile` merged into it, or None."""

log = init_logger("vllm.deltadock")


class DeltadockLoader(DefaultModelLoader):
    """Reads a base and merges one delta.

    `--model-loader-extra-config` has `delta`, a file, digest or name; without it the base is
    served, and deltas can be swapped in. Other keys are the default loader's.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        extra = load_config.model_loader_extra_config
        if not isinstance(extra, dict):
            raise InvalidInput("--model-loader-extra-config has to be a JSON object.")
        rest = dict(extra)
        self._delta: str | None = rest.pop("delta", None)
        config = dataclasses.replace(
            load_config, load_format="auto", model_loader_extra_config=rest
        )
        super().__init__(config)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, Tensor], None, None]:
        """The fine-tune's tensors, by the base's names.

        Raises:
            DeltadockError: the delta cannot be fetched or served; before the first tensor.
        """
        base = super().get_all_weights(model_config, model)
        if self._delta is None:
            setattr(model, SERVED, None)
            yield from base
            return
        file = self.check(self._delta, model_config)
        with Artifact(file.path) as artifact:
            for name, tensor in base:
                yield name, merged_tensor(artifact, name, tensor)
        setattr(model, SERVED, file)
        log.info("Merged %s, SHA-256 %s", self._delta, file.digest)

    def check(self, delta: str, model_config: ModelConfig) -> DeltaFile:
        """Fetch a delta on every rank, the same one on all, and check that it can be served.

        Raises:
            DeltadockError: it cannot.
        """
        file = _fetch_same(delta)
        folder = Path(
            self._prepare_weights(model_config.model, None, model_config.revision, True, None)[0]
        )
        with Artifact(file.path) as artifact:
            check_servable(artifact, engine_files(model_config, folder))
        return file


def engine_files(model_config: ModelConfig, base: Path) -> EngineFiles:
    """Where an engine's files are; a name on the Hugging Face Hub is the base's folder."""

    def folder(name: Any) -> Path:
        return Path(name) if Path(str(name)).is_dir() else base

    generation = model_config.generation_config
    return EngineFiles(
        base, folder(model_config.tokenizer), None if generation == "vllm" else folder(generation)
    )


def _fetch_same(delta: str) -> DeltaFile:
    """Fetch what the first rank's name means: an alias may move while the others start.

    Raises:
        DeltadockError: the first rank could not fetch it, on every rank; or this one could not.
    """
    group = get_world_group()
    found: DeltaFile | DeltadockError | None = None
    if group.rank_in_group == 0:
        try:
            found = fetch(delta)
        except DeltadockError as error:
            found = error
    found = group.broadcast_object(found, src=0)
    if isinstance(found, DeltadockError):
        raise found
    if group.rank_in_group == 0:
        return found
    own = fetch(delta if Path(delta).is_file() else found.digest)
    if own.digest != found.digest:
        raise HashMismatch(f"The ranks' files {delta} differ. Copy the same one to each machine.")
    return own


def register_loader() -> None:
    """Register the load format."""
    register_model_loader(LOAD_FORMAT)(DeltadockLoader)
