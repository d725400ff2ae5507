"""A rank's deltas: in host memory, in slots of the device, and the rows of each step.

Stands in for vLLM's `LRUCacheWorkerLoRAManager`: scheduling, the prefix cache's keys and metrics
stay vLLM's own, to which a delta is an adapter whose path is a delta file.

Reading and hashing happen in a thread, beside steps. A delta that was read once stays mapped, so
that a step which needs it again after its eviction cannot fail: an exception in a step would end
the engine, and with it every request.
"""

import json
import time
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger

from deltadock.artifacts.reader import Artifact
from deltadock.errors import DeltadockError, InvalidArtifact, InvalidInput, UnsupportedModel
from deltadock.inference.deltas.tensors import read_tensor_delta
from deltadock.inference.model.weight_deltas import EncodedDelta, LowRank, buffered
from deltadock.kernels.cache import TensorCache
from deltadock.kernels.svd_delta import PackedDelta, empty_delta
from deltadock_vllm.fetching import local_copy
from deltadock_vllm.many.memory import in_copy, moved
from deltadock_vllm.many.modules import Modules
from deltadock_vllm.many.sharding import DensePart, PartDelta
from deltadock_vllm.many.sites import LinearDelta, LinearSite, Rows, Site, StepChunks

log = init_logger("vllm.deltadock")

FIRST_ID: Final = 1 << 10
"""Of a delta; below are the dummies of vLLM's warm-up."""


class Settings(BaseModel):
    """`--additional-config '{"deltadock": {...}}'`."""

    model_config = ConfigDict(extra="forbid")

    slot_bytes: int | None = None
    """Device memory of each slot on each rank; None: an eighth of its matrices, unquantized."""
    cache_bytes: int = 1 << 30
    """A rank's memory for unpacked tensors, on a GPU those that its kernels cannot read packed."""
    base: Path | None = None
    """Of an engine whose checkpoint is stored quantized, the folder of what it was before."""

    @classmethod
    def of(cls, config: VllmConfig) -> "Settings":
        """The engine's settings.

        Raises:
            InvalidInput: a key is unknown, or a value is of another kind.
        """
        extra = config.additional_config
        try:
            return cls.model_validate(extra.get("deltadock", {}) if isinstance(extra, dict) else {})
        except ValidationError as error:
            raise InvalidInput(f"--additional-config, deltadock: {error}") from error


class Install(NamedTuple):
    """What placing a delta does to one site."""

    site: Any
    deltas: Sequence[PartDelta | None]
    """Of each linear of a site; of other sites one."""
    biases: Sequence[Tensor | None] = ()

    def into(self, slot: int, memory: Tensor, dtype: torch.dtype) -> None:
        """Install the delta, of which `memory` begins with a copy of the block."""
        placed = [
            None if delta is None else _on(in_copy(delta, memory), memory.device, dtype)
            for delta in self.deltas
        ]
        if not isinstance(self.site, LinearSite):
            self.site.install(slot, placed[0])
            return
        pairs = zip(placed, self.biases, strict=True)
        self.site.install(
            slot,
            [
                None
                if weight is None and bias is None
                else LinearDelta(weight, None if bias is None else bias.to(memory.device))
                for weight, bias in pairs
            ],
        )


def _on(delta: PartDelta, device: torch.device, dtype: torch.dtype) -> PartDelta:
    """Let what stays encoded in host memory be decoded to the device."""
    if isinstance(delta, EncodedDelta):
        return delta.to(device, dtype)
    if isinstance(delta, DensePart) and isinstance(delta.whole, EncodedDelta):
        return delta.moved(delta.whole.to(device, dtype))
    return delta


class HostDelta(NamedTuple):
    """This rank's part of a delta, in one block of host memory."""

    block: Tensor
    installs: Sequence[Install]


class Loaded(NamedTuple):
    """A delta that was read and found servable."""

    artifact: Artifact
    """Open, so that its bytes stay, whatever becomes of the file's name."""
    host: HostDelta


class DeltaManager:
    """What a model runner calls for its adapters."""

    is_enabled = True

    def __init__(self, model: nn.Module, config: VllmConfig, device: torch.device) -> None:
        """Give the model sites, and reserve the slots' memory before the KV cache is sized.

        Raises:
            UnsupportedModel: the engine is pipeline parallel.
            InvalidInput: `Settings` are invalid.
        """
        if config.parallel_config.pipeline_parallel_size > 1:
            raise UnsupportedModel(
                "Deltas by request need all layers on each rank. Use tensor parallelism, or serve "
                "one delta with --load-format deltadock."
            )
        settings = Settings.of(config)
        lora = config.lora_config
        self._device, self._dtype = device, config.model_config.dtype
        self._capacity = lora.max_cpu_loras
        rows = self._rows = Rows(TensorCache(settings.cache_bytes))
        slots = lora.max_loras + 1
        self._modules = Modules(model, rows, slots, device)
        self._captured = _captured_rows(config)
        scheduler = config.scheduler_config
        for name, most, head in (
            ("tokens", scheduler.max_num_batched_tokens, False),
            ("samples", scheduler.max_num_batched_tokens, True),
        ):
            tables = list(self._modules.tables(head=head))
            captured = 0 if head else self._captured
            chunks = StepChunks(most, slots, tables, captured=captured, device=device)
            setattr(rows, name, chunks)
        slot_bytes = settings.slot_bytes or self._modules.elements * self._dtype.itemsize // 8
        self._memory = torch.empty(lora.max_loras, slot_bytes, dtype=torch.uint8, device=device)
        # Until the first delta, held for what the cache will take: the KV cache gets the rest.
        self._cache_memory: Tensor | None = None
        if device.type == "cuda":
            self._cache_memory = torch.empty(settings.cache_bytes, dtype=torch.uint8, device=device)
        self._readers = ThreadPoolExecutor(1, "read-delta")
        self._loading: dict[int, Future[Loaded]] = {}
        self._artifacts: dict[int, Artifact] = {}
        self._host: OrderedDict[int, HostDelta] = OrderedDict()
        self._pinned: set[int] = set()
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(lora.max_loras, 0, -1))
        self._assigned: tuple[list[int], list[int]] = ([], [])
        self._used: frozenset[int] = frozenset()
        log.info("%d slots of %.1f MiB for deltas", lora.max_loras, slot_bytes / 2**20)

    # Called by the front, between steps.

    def load(self, key: int, path: str) -> dict[str, str]:
        """Begin to load a delta, or say how it is going.

        Returns:
            {"state": "loading"}, {"state": "ready"}, or the refusal as `code` and `message`.
        """
        artifact = self._artifacts.get(key)
        if artifact is not None and artifact.path.name != Path(path).name:
            return {
                "code": "conflict",
                "message": f"{path} and {artifact.path.name} have one number in vLLM. Start the "
                "engine anew to serve the former.",
            }
        if key in self._host:
            self._host.move_to_end(key)
            return {"state": "ready"}
        loading = self._loading.get(key)
        if loading is None:
            loading = self._loading[key] = self._readers.submit(self._read_verified, key, path)
        if not loading.done():
            return {"state": "loading"}
        del self._loading[key]
        try:
            loaded = loading.result()
        except DeltadockError as error:
            return {"code": error.code, "message": error.message}
        except Exception as error:
            log.exception("%s could not be read", path)
            return {"code": "inference_failed", "message": f"The delta could not be read: {error}"}
        self._artifacts[key] = loaded.artifact
        self._keep(key, loaded.host)
        return {"state": "ready"}

    def _read_verified(self, key: int, path: str) -> Loaded:
        began = time.perf_counter()
        artifact = self._artifacts.get(key)
        if artifact is None:
            artifact = Artifact(local_copy(path))
            artifact.check_intact()
        host = self._read(artifact)
        log.info("Read %s in %.2f s", artifact.path.name, time.perf_counter() - began)
        return Loaded(artifact, host)

    def _read(self, artifact: Artifact) -> HostDelta:
        """This rank's part of a delta.

        Raises:
            UnsupportedModel: a tensor cannot differ by request, or is larger than the slots allow.
            InvalidArtifact: a tensor does not fit the model.
        """
        weights: dict[Site, dict[int, PartDelta]] = defaultdict(dict)
        biases: dict[Site, dict[int, Tensor]] = defaultdict(dict)
        for name, targets in self._modules.find(artifact.records).items():
            shape = torch.Size(artifact.records[name]["shape"])
            delta = read_tensor_delta(artifact, name, shape)
            parts: dict[str, PartDelta] = {}
            for target in targets:
                cut = f"{target.rows}, {target.columns}"
                if cut not in parts:
                    parts[cut] = target.part(name, delta, shape)
                if not target.bias:
                    weights[target.site][target.linear] = _on_host(parts[cut], self._dtype)
                elif target.base is not None:
                    bias = parts[cut]
                    assert isinstance(bias, Tensor)
                    biases[target.site][target.linear] = bias.float() - target.base
        installs = [
            self._install(site, weights.get(site, {}), biases.get(site, {}))
            for site in dict.fromkeys([*weights, *biases])
        ]
        return self._in_block(artifact, installs)

    def _install(
        self, site: Site, weights: Mapping[int, PartDelta], biases: Mapping[int, Tensor]
    ) -> Install:
        if not isinstance(site, LinearSite):
            return Install(site, [weights[0]])
        deltas: list[PartDelta | None] = []
        others: list[Tensor | None] = []
        for number, h_out in enumerate(site.table.h_outs):
            weight, bias = weights.get(number), biases.get(number)
            if weight is None and bias is not None:
                weight = empty_delta(h_out, site.table.h_in)
            if isinstance(weight, PackedDelta) and bias is not None:
                weight, bias = weight.with_bias(bias), None
            if (
                self._captured
                and weight is not None
                and not site.head
                and not isinstance(weight, PackedDelta)
            ):
                raise UnsupportedModel(
                    "This delta's matrices are not of the encoding that CUDA graphs can hold. "
                    "Start vLLM with --enforce-eager, or compress it with adamix or optimix."
                )
            deltas.append(weight)
            others.append(bias)
        return Install(site, deltas, others)

    def _in_block(self, artifact: Artifact, installs: Sequence[Install]) -> HostDelta:
        deltas = [delta for install in installs for delta in install.deltas if delta is not None]
        block, views = buffered(deltas, moved, pin_memory=self._device.type == "cuda")
        most = self._memory.shape[1]
        if block.nbytes > most:
            setting = json.dumps({"deltadock": {"slot_bytes": block.nbytes}})
            raise UnsupportedModel(
                f"{artifact.path.name} takes {block.nbytes} bytes of a rank's memory, and a slot "
                f"has {most}. Start vLLM with --additional-config '{setting}'."
            )
        placed = iter(views)
        return HostDelta(
            block,
            [
                install._replace(
                    deltas=[None if delta is None else next(placed) for delta in install.deltas]
                )
                for install in installs
            ],
        )

    def _keep(self, key: int, host: HostDelta) -> None:
        self._host[key] = host
        for other in list(self._host):
            if len(self._host) <= self._capacity:
                break
            if other != key and other not in self._pinned and other not in self._used:
                self._vacate(other)
                del self._host[other]

    # vLLM's own interface.

    def add_adapter(self, request: Any) -> bool:
        """Load a delta at once; False if it is refused, of which `load` says more."""
        key, path = request.lora_int_id, request.lora_path
        while (found := self.load(key, path)).get("state") == "loading":
            self._loading[key].exception()  # waits
        return found.get("state") == "ready"

    def remove_adapter(self, key: int) -> bool:
        """Forget a delta, file included."""
        self._vacate(key)
        self._pinned.discard(key)
        if (artifact := self._artifacts.pop(key, None)) is not None:
            artifact.close()
        return self._host.pop(key, None) is not None

    def remove_all_adapters(self) -> None:
        """Forget all deltas, and the rows of the last step."""
        for key in list(self._host):
            self.remove_adapter(key)
        self._assign([], [])

    def list_adapters(self) -> set[int]:
        """Those in host memory."""
        return set(self._host)

    def pin_adapter(self, key: int) -> bool:
        """Keep a delta in host memory."""
        if key in self._host:
            self._pinned.add(key)
        return key in self._host

    def supports_tower_connector_lora(self) -> bool:
        """Encoders are the base's."""
        return False

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Nothing to keep."""
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Deltas have no common rank."""
        return default_rank

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """An adapter without changes, for warm-up and capture."""
        self._host[request.lora_int_id] = HostDelta(torch.empty(0, dtype=torch.uint8), [])
        return True

    def set_active_adapters(self, requests: set[Any], mapping: Any | None) -> None:
        """Place the step's deltas, and lay out its rows."""
        wanted = {request.lora_int_id: request for request in requests if request}
        self._used = frozenset(wanted)
        for key, request in wanted.items():
            if key not in self._host:
                self._read_again(key, request)
            self._host.move_to_end(key)
        for key in wanted:
            if key not in self._slots:
                self._place(key)
            self._slots.move_to_end(key)
        if mapping is not None:
            slots = {0: 0, **self._slots}
            self._assign(
                [slots[key] for key in mapping.index_mapping],
                [slots[key] for key in mapping.prompt_mapping],
            )

    def _read_again(self, key: int, request: Any) -> None:
        """Load a delta that the step needs, and that was evicted since it was asked for."""
        artifact = self._artifacts.get(key)
        if artifact is not None:
            self._keep(key, self._read(artifact))
        elif not self.add_adapter(request):
            raise InvalidArtifact(f"{request.lora_path} was not loaded before it was scheduled.")

    def _place(self, key: int) -> None:
        if not self._free:
            self._vacate(next(held for held in self._slots if held not in self._used))
        slot = self._slots[key] = self._free.pop()
        host = self._host[key]
        if host.installs:
            self._cache_memory = None
        memory = self._memory[slot - 1]
        memory[: host.block.nbytes].copy_(host.block, non_blocking=True)
        for install in host.installs:
            install.into(slot, memory, self._dtype)

    def _vacate(self, key: int) -> None:
        slot = self._slots.pop(key, None)
        if slot is None:
            return
        for install in self._host[key].installs:
            install.site.remove(slot)
        self._free.append(slot)

    def _assign(self, tokens: list[int], samples: list[int]) -> None:
        self._rows.cache.begin_step()
        if (tokens, samples) != self._assigned:
            self._assigned = (tokens, samples)
            self._rows.tokens.assign(tokens)
            self._rows.samples.assign(samples)


def _on_host(delta: PartDelta, dtype: torch.dtype) -> PartDelta:
    """What is not encoded, in the model's dtype."""
    if isinstance(delta, LowRank | Tensor):
        return moved(delta, lambda tensor: tensor.to(dtype).contiguous())
    return delta


def _captured_rows(config: VllmConfig) -> int:
    """The most rows of a step that a CUDA graph may replay; 0: there are none."""
    compilation = config.compilation_config
    if compilation.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return 0
    return int(compilation.max_cudagraph_capture_size or 0)
