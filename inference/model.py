"""The base model: transformers' modelling code with every weight open to per-row deltas."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from artifacts.checkpoint import CheckpointManifest
from deltadock.errors import InvalidArtifact, InvalidCheckpoint, UnsupportedModel
from inference.attention import ATTENTION, Step
from inference.kv_cache import KVCache
from inference.layers import Change, DeltaModule, Group, LowRank, Routing, delta_module

FAMILIES: Final[dict[str, tuple[Any, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
"""What can be served: model_type to its config and model class."""

EMBEDDING: Final = "model.embed_tokens.weight"
LM_HEAD: Final = "lm_head.weight"


class BaseModel:
    """A causal language model whose rows each run with their own delta slot's weights."""

    def __init__(self, model: Any) -> None:
        """Take over `model` (one of FAMILIES, built with attn_implementation=ATTENTION).

        Raises:
            UnsupportedModel: it holds weights in a kind of module that has no per-row form.
        """
        model.eval().requires_grad_(requires_grad=False)
        self.model = model
        self.config = model.config
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self._routing = Routing()
        self._owners: dict[str, list[tuple[DeltaModule, str]]] = {}
        self._parameters: dict[str, Tensor] = {}
        for path, module in list(model.named_modules()):
            self._take_over(path, module)
        if self.config.tie_word_embeddings:
            # One tensor under two names: a change of either acts on both sides of the model.
            owners = self._owners[EMBEDDING] + self._owners[LM_HEAD]
            self._owners[EMBEDDING] = self._owners[LM_HEAD] = owners

    def _take_over(self, path: str, module: nn.Module) -> None:
        parameters = dict(module.named_parameters(recurse=False))
        if not parameters:
            return
        replacement = delta_module(module, self._routing)
        if replacement is None:
            raise UnsupportedModel(f"{path} is a {type(module).__name__}, which cannot be served.")
        self.model.set_submodule(path, replacement)
        for name, parameter in parameters.items():
            self._owners[f"{path}.{name}"] = [(replacement, name)]
            self._parameters[f"{path}.{name}"] = parameter

    @property
    def context_tokens(self) -> int:
        """The longest sequence that the model was made for."""
        return int(self.config.max_position_embeddings)

    def make_cache(self, slots: int, length: int) -> KVCache:
        """A key/value cache for `slots` sequences of up to `length` tokens."""
        config = self.config
        heads = config.num_attention_heads
        return KVCache(
            layers=config.num_hidden_layers,
            slots=slots,
            kv_heads=config.num_key_value_heads,
            length=length,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            dtype=self.dtype,
            device=self.device,
        )

    def forward(self, tokens: Tensor, step: Step, groups: list[Group]) -> Tensor:
        """Hidden states (1, rows, hidden) of the packed `tokens` (rows,); fills the cache."""
        self._routing.groups = groups
        hidden: Tensor = self.model.model(
            input_ids=tokens[None], position_ids=step.positions[None], use_cache=False, step=step
        ).last_hidden_state
        return hidden

    def logits(self, hidden: Tensor, groups: list[Group]) -> Tensor:
        """Logits (rows, vocabulary), float32, of hidden states (1, rows, hidden)."""
        self._routing.groups = groups
        logits: Tensor = self.model.lm_head(hidden)
        return logits[0].float()

    def base_tensor(self, name: str) -> Tensor:
        """The base's tensor of this name.

        Raises:
            InvalidArtifact: the base has no such tensor.
        """
        if name not in self._parameters:
            raise InvalidArtifact(f"The delta changes {name!r}, a tensor that its base lacks.")
        return self._parameters[name]

    def prepare(self, name: str, change: Change) -> Change:
        """Bring a change to the model's device and dtype, laid out for `install`.

        Raises:
            InvalidArtifact: it does not fit the base's tensor.
        """
        base = self.base_tensor(name)
        if isinstance(change, LowRank):
            u, v = change
            fits = base.ndim == 2 and (u.shape[0], v.shape[1]) == base.shape
            if not fits or u.shape[1] != v.shape[0]:
                raise InvalidArtifact(f"The delta's factors of {name!r} do not fit its base.")
            return LowRank(self._place(u), self._place(v))
        if change.shape != base.shape:
            raise InvalidArtifact(
                f"The delta's {name!r} has shape {tuple(change.shape)}; its base's has "
                f"{tuple(base.shape)}."
            )
        return self._place(change)

    def _place(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self.dtype).contiguous()

    def install(self, slot: int, changes: Mapping[str, Change]) -> None:
        """Give `slot` its prepared changes. No running sequence may be on the slot."""
        by_module: dict[DeltaModule, dict[str, Change]] = defaultdict(dict)
        for name, change in changes.items():
            for module, parameter in self._owners[name]:
                by_module[module][parameter] = change
        for module, found in by_module.items():
            module.install(slot, found)

    def remove(self, slot: int) -> None:
        """Forget the changes of `slot`. No running sequence may be on the slot."""
        for module in {module for owners in self._owners.values() for module, _ in owners}:
            module.remove(slot)


def _read_tensors(folder: Path, files: Iterable[str]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (safe_open is no mapping)
    return tensors


def load_base(folder: Path, manifest: CheckpointManifest, device: torch.device) -> BaseModel:
    """Load a checkpoint folder's weights: float32 on the CPU, the checkpoint's dtype on a GPU.

    Nothing in the folder but the manifest's safetensors is opened, and no code that it names.

    Raises:
        UnsupportedModel: a family that is not served, or quantised weights.
        InvalidCheckpoint: tensors are missing, too many or misshapen.
    """
    settings = dict(manifest.config)
    family = settings.get("model_type")
    if family not in FAMILIES or "quantization_config" in settings:
        raise UnsupportedModel(
            f"A {family!r} checkpoint of this kind cannot be served; "
            f"unquantised {', '.join(FAMILIES)} can."
        )
    config_class, model_class = FAMILIES[family]
    tensors = _read_tensors(folder, sorted({tensor.file for tensor in manifest.tensors}))
    dtype = torch.float32 if device.type == "cpu" else tensors[EMBEDDING].dtype
    transformers_logging.disable_progress_bar()
    model, report = model_class.from_pretrained(
        None,
        config=config_class.from_dict(settings),
        state_dict=tensors,
        dtype=dtype,
        attn_implementation=ATTENTION,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    faults = {kind: sorted(map(str, report[f"{kind}_keys"])) for kind in ("missing", "mismatched")}
    for kind, names in faults.items():
        if names:
            raise InvalidCheckpoint(f"The checkpoint has {kind} tensors: {', '.join(names[:3])}.")
    return BaseModel(model.to(device))
