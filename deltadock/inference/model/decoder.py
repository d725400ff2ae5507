"""The layers of a Llama-like model, with the deltas of every row.

Transformers loads the weights, and its modelling code is what tests compare with. The loop is our
own, so that a layer's small operations between the products are few: on a GPU each is one kernel.
"""

from typing import Any, Final

from torch import Tensor

from deltadock.inference.model.attention import AttentionMetadata, attend
from deltadock.inference.model.layers import DeltaLinears, DeltaNorm
from deltadock.inference.model.rotary import DeltaRotary
from deltadock.inference.model.routing import Routing
from deltadock.kernels.decoder import CacheRows, Rotation, RowNorm, gated_silu, rotate_and_store

SILU: Final = frozenset({"silu", "swish"})
"""Names of the activation that has a kernel."""


class DecoderLayer:
    """Attention and gated MLP of a transformers layer that `replace_modules` has been through."""

    def __init__(self, layer: Any, config: Any, routing: Routing) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.input_norm: DeltaNorm = layer.input_layernorm
        self.post_norm: DeltaNorm = layer.post_attention_layernorm
        self._qkv: DeltaLinears = attention.qkv_proj
        self._o: DeltaLinears = attention.o_proj
        self._gate_up: DeltaLinears = mlp.gate_up_proj
        self._down: DeltaLinears = mlp.down_proj
        self._head_norms: tuple[RowNorm, RowNorm] | None = None
        if hasattr(attention, "q_norm"):
            self._head_norms = attention.q_norm.table, attention.k_norm.table
        self._number: int = attention.layer_idx
        self._scale: float = attention.scaling
        self._window: int | None = (
            config.sliding_window
            if config.model_type == "mistral"
            else getattr(attention, "sliding_window", None)
        )
        self._activation = None if config.hidden_act in SILU else mlp.act_fn
        self._routing = routing

    def attention(self, x: Tensor, rotation: Rotation, metadata: AttentionMetadata) -> Tensor:
        """(1, rows, hidden) to the same shape; writes keys and values to the cache."""
        keys, values = metadata.cache.keys[self._number], metadata.cache.values[self._number]
        query = rotate_and_store(
            self._qkv(x)[0],
            rotation,
            CacheRows(keys, values, metadata.slots, metadata.positions),
            self._head_norms,
            self._routing.row_slots,
        )
        out = attend(query, keys, values, metadata, scale=self._scale, window=self._window)
        y: Tensor = self._o(out.view(1, len(query), -1))
        return y

    def mlp(self, x: Tensor) -> Tensor:
        """(1, rows, hidden) to the same shape."""
        gate_up = self._gate_up(x)[0]
        if self._activation is None:
            gated = gated_silu(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            gated = self._activation(gate) * up
        y: Tensor = self._down(gated[None])
        return y


class Decoder:
    """All layers and the last norm."""

    def __init__(self, model: Any, rotary: DeltaRotary, routing: Routing) -> None:
        """Take the modules of `model`, a transformers base model."""
        self._layers = [DecoderLayer(layer, model.config, routing) for layer in model.layers]
        self._norms: list[DeltaNorm] = [layer.input_norm for layer in self._layers] + [model.norm]
        self._rotary = rotary

    def __call__(self, embedded: Tensor, metadata: AttentionMetadata) -> Tensor:
        """(1, rows, hidden) to the same shape. On a GPU, without host synchronization."""
        rotation = self._rotary(metadata.positions, embedded.dtype)
        residual: Tensor = embedded
        x: Tensor = self._norms[0](embedded)
        for layer, next_norm in zip(self._layers, self._norms[1:], strict=True):
            residual, x = layer.post_norm.add(residual, layer.attention(x, rotation, metadata))
            residual, x = next_norm.add(residual, layer.mlp(x))
        return x
