"""The layers of a decoder of Llama's kind, with the deltas of every row.

Transformers loads the weights, and its modelling code is what tests compare with. The loop is our
own, so that a layer's small operations between the products are few: on a GPU each is one kernel.
What a family's layers do otherwise than Llama's is read from their modules, and from `families`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
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

    Each of the two may have a norm before it, and one after it or a multiplier, before its result
    is added to the residual.
    """

    def __init__(self, layer: Any, family: Family, config: Any, routing: Routing) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.attention_norm: DeltaNorm | NoNorm = getattr(layer, "input_layernorm", NO_NORM)
        self.mlp_norm: DeltaNorm | NoNorm = layer.post_attention_layernorm
        self._ends: tuple[DeltaNorm | NoNorm, DeltaNorm | NoNorm] = NO_NORM, NO_NORM
        if hasattr(layer, "post_feedforward_layernorm"):
            self.mlp_norm = getattr(layer, "pre_feedforward_layernorm", NO_NORM)
            self._ends = layer.post_attention_layernorm, layer.post_feedforward_layernorm
        self._multiplier = float(getattr(layer, "residual_multiplier", 1.0))
        self._qkv: DeltaLinears = attention.qkv_proj
        self._o: DeltaLinears = attention.o_proj
        self._gate_up: DeltaLinears = mlp.gate_up_proj
        self._down: DeltaLinears = mlp.down_proj
        self._head_norms: tuple[RowNorm, RowNorm] | None = None
        self._row_norms: tuple[DeltaNorm, DeltaNorm] | None = None
        if hasattr(attention, "q_norm"):
            norms: tuple[DeltaNorm, DeltaNorm] = attention.q_norm, attention.k_norm
            if norms[0].width == attention.head_dim:
                self._head_norms = norms[0].table, norms[1].table
            else:
                self._row_norms = norms
        self._number: int = attention.layer_idx
        self._form = AttentionForm(
            attention.scaling,
            config.sliding_window
            if family.one_window
            else getattr(attention, "sliding_window", None),
            attention.attn_logit_softcapping if family.capped_scores else None,
        )
        self._act_fn: nn.Module = getattr(mlp, "act_fn", None) or mlp.activation_fn
        self._activation = ACTIVATIONS.get(type(self._act_fn))
        self._routing = routing

    def attention(self, x: Tensor, rotation: Rotation, metadata: AttentionMetadata) -> Tensor:
        """(1, rows, hidden) to the same shape; writes keys and values to the cache."""
        keys, values = metadata.cache.keys[self._number], metadata.cache.values[self._number]
        query = rotate_and_store(
            self._projected(x)[0],
            rotation,
            CacheRows(keys, values, metadata.slots, metadata.positions),
            self._head_norms,
            self._routing.row_slots,
        )
        out = attend(query, keys, values, metadata, self._form)
        return self._ended(self._o(out.view(1, len(query), -1)), self._ends[0])

    def _projected(self, x: Tensor) -> Tensor:
        """Queries, keys and values of all heads side by side, normalized if their rows are."""
        projected: Tensor = self._qkv(x)
        if self._row_norms is None:
            return projected
        of_query, of_key = self._row_norms
        widths = [of_query.width, of_key.width, of_key.width]
        query, key, value = projected.split(widths, dim=-1)
        return torch.cat((of_query(query), of_key(key), value), dim=-1)

    def mlp(self, x: Tensor) -> Tensor:
        """(1, rows, hidden) to the same shape."""
        gate_up = self._gate_up(x)[0]
        if self._activation is not None:
            product = gated(gate_up, self._activation)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            product = self._act_fn(gate) * up
        return self._ended(self._down(product[None]), self._ends[1])

    def _ended(self, y: Tensor, norm: DeltaNorm | NoNorm) -> Tensor:
        """What is added to the residual."""
        y = norm(y)
        return y if self._multiplier == 1 else y * self._multiplier


class Decoder:
    """All layers and the last norm."""

    def __init__(self, model: Any, family: Family, rotary: DeltaRotary, routing: Routing) -> None:
        """Take the modules of `model`, a transformers base model."""
        self._layers = [
            DecoderLayer(layer, family, model.config, routing) for layer in model.layers
        ]
        self._norms = [layer.attention_norm for layer in self._layers] + [model.norm]
        self._rotary = rotary
        self._rotation_dtype = torch.float32 if family.float32_rotation else None

    def __call__(self, embedded: Tensor, metadata: AttentionMetadata) -> Tensor:
        """(1, rows, hidden) to the same shape. On a GPU, without host synchronization."""
        rotations = self._rotary(metadata.positions, self._rotation_dtype or embedded.dtype)
        residual: Tensor = embedded
        x: Tensor = self._norms[0](embedded)
        for number, (layer, next_norm) in enumerate(
            zip(self._layers, self._norms[1:], strict=True)
        ):
            attended = layer.attention(x, rotations[number], metadata)
            residual, x = layer.mlp_norm.add(residual, attended)
            residual, x = next_norm.add(residual, layer.mlp(x))
        return x
