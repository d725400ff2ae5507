"""The layers of a decoder of Llama's kind, with the deltas of every row.

Transformers loads the weights, and its modelling code is what tests compare with. The loop is our
own, so that a layer's small operations between the products are few: on a GPU each is one kernel.
What a family's layers do otherwise than Llama's is read from their modules, and from `families`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation

from deltadock.inference.model.attention import AttentionForm, AttentionMetadata, attend
from deltadock.inference.model.families import Family
from deltadock.inference.model.layers import NO_NORM, DeltaLinears, DeltaNorm, NoNorm
from deltadock.inference.model.rotary import DeltaRotary
from deltadock.inference.model.routing import Routing
from deltadock.kernels.decoder import (
    Activation,
    CacheRows,
    Rotation,
    RowNorm,
    gated,
    rotate_and_store,
)

ACTIVATIONS: Final[Mapping[type[nn.Module], Activation]] = MappingProxyType(
    {SiLUActivation: "silu", nn.SiLU: "silu", GELUTanh: "gelu_tanh"}
)
"""Activations that have a kernel."""


class DecoderLayer:
    """Attention and gated MLP of a transformers layer that `replace_modules` has been through.

    Each of the two may have a norm before it and one after it, before its result is added to the
    residual.
    """

    def __init__(self, layer: Any, family: Family, config: Any, routing: Routing) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_norm: DeltaNorm | NoNorm = layer.input_layernorm
        self.mlp_norm: DeltaNorm | NoNorm = layer.post_attention_layernorm
        self._ends: tuple[DeltaNorm | NoNorm, DeltaNorm | NoNorm] = NO_NORM, NO_NORM
        if hasattr(layer, "post_feedforward_layernorm"):
            self.mlp_norm = layer.pre_feedforward_layernorm
            self._ends = layer.post_attention_layernorm, layer.post_feedforward_layernorm
        self._qkv: DeltaLinears = attention.qkv_proj
        self._o: DeltaLinears = attention.o_proj
        self._gate_up: DeltaLinears = mlp.gate_up_proj
        self._down: DeltaLinears = mlp.down_proj
        self._head_norms: tuple[RowNorm, RowNorm] | None = None
        if hasattr(attention, "q_norm"):
            self._head_norms = attention.q_norm.table, attention.k_norm.table
        self._number: int = attention.layer_idx
        self._form = AttentionForm(
            attention.scaling,
            config.sliding_window
            if family.one_window
            else getattr(attention, "sliding_window", None),
            attention.attn_logit_softcapping if family.capped_scores else None,
        )
        self._act_fn: nn.Module = mlp.act_fn
        self._activation = ACTIVATIONS.get(type(self._act_fn))
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
        out = attend(query, keys, values, metadata, self._form)
        return self._ends[0](self._o(out.view(1, len(query), -1)))

    def mlp(self, x: Tensor) -> Tensor:
        """(1, rows, hidden) to the same shape."""
        gate_up = self._gate_up(x)[0]
        if self._activation is not None:
            product = gated(gate_up, self._activation)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            product = self._act_fn(gate) * up
        return self._ends[1](self._down(product[None]))


class Decoder:
    """All layers and the last norm."""

    def __init__(self, model: Any, family: Family, rotary: DeltaRotary, routing: Routing) -> None:
        """Take the modules of `model`, a transformers base model."""
        self._layers = [
            DecoderLayer(layer, family, model.config, routing) for layer in model.layers
        ]
        self._norms = [layer.attention_norm for layer in self._layers] + [model.norm]
        self._rotary = rotary

    def __call__(self, embedded: Tensor, metadata: AttentionMetadata) -> Tensor:
        """(1, rows, hidden) to the same shape. On a GPU, without host synchronization."""
        rotations = self._rotary(metadata.positions, embedded.dtype)
        residual: Tensor = embedded
        x: Tensor = self._norms[0](embedded)
        for number, (layer, next_norm) in enumerate(
            zip(self._layers, self._norms[1:], strict=True)
        ):
            attended = layer.attention(x, rotations[number], metadata)
            residual, x = layer.mlp_norm.add(residual, attended)
            residual, x = next_norm.add(residual, layer.mlp(x))
        return x
