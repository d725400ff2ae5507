"""Rotary embeddings with frequencies of their own for every delta slot."""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from deltadock.artifacts.configs import LENGTH_DEPENDENT, ROPE
from deltadock.errors import ArchitectureMismatch, InvalidArtifact
from deltadock.inference.model.routing import Routing
from deltadock.kernels.decoder import Rotation

EVERY: Final = "every layer"
"""The kind of the layers of a model whose layers all have the same frequencies."""
UNROTATED: Final = "unrotated"
"""The kind of the layers whose heads are not rotated: all their frequencies are 0."""


class Rope(NamedTuple):
    """Frequencies of a rotary embedding."""

    frequencies: Tensor
    """(rotated columns / 2,) float32, in radians per position."""
    scaling: float
    """Factor of cosines and sines."""


def context_limit(config: Any) -> int:
    """The longest sequence for which a configuration's rotary frequencies stay the same.

    `dynamic` ones change beyond `max_position_embeddings`, `longrope` beyond
    `original_max_position_embeddings`.
    """
    limit = int(config.max_position_embeddings)
    originals = [
        int(parameters.get("original_max_position_embeddings") or limit)
        for parameters in _rope_parameters(config)
        if parameters["rope_type"] == "longrope"
    ]
    return min([limit, *originals])


def _rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """Those of each kind of layers."""
    parameters = config.rope_parameters
    return [one for one in parameters.values() if isinstance(one, dict)] or [parameters]


def _ropes(rotary: Any) -> dict[str, Rope]:
    """The frequencies of a `transformers` module, by kind of layer."""
    if hasattr(rotary, "inv_freq"):
        return {EVERY: Rope(rotary.inv_freq.float(), float(rotary.attention_scaling))}
    return {
        kind: Rope(
            getattr(rotary, f"{kind}_inv_freq").float(),
            float(getattr(rotary, f"{kind}_attention_scaling")),
        )
        for kind in rotary.layer_types
    }


class DeltaRotary:
    """A model's rotary embedding: each row's cosines and sines are those of its delta's."""

    def __init__(self, model: Any, routing: Routing) -> None:
        """Take the frequencies of `model`, a `transformers` base model."""
        self._routing = routing
        self._kind = type(model.rotary_emb)
        self._base = _ropes(model.rotary_emb)
        layer_types = (
            [EVERY] * len(model.layers) if EVERY in self._base else model.config.layer_types
        )
        kinds = [
            kind if getattr(layer.self_attn, "use_rope", True) else UNROTATED
            for kind, layer in zip(layer_types, model.layers, strict=True)
        ]
        if UNROTATED in kinds:
            still = torch.zeros_like(next(iter(self._base.values())).frequencies)
            self._base[UNROTATED] = Rope(still, 1.0)
        self._tables = [list(self._base).index(kind) for kind in kinds]
        """Of each layer."""
        slots = routing.limits.slots
        frequencies = torch.stack([rope.frequencies for rope in self._base.values()])
        scaling = torch.tensor([rope.scaling for rope in self._base.values()])
        self._frequencies = frequencies[:, None].repeat(1, slots, 1)
        self._scaling = scaling.to(frequencies.device)[:, None].repeat(1, slots)

    def ropes(self, config: Any, context: int) -> dict[str, Rope]:
        """The frequencies that a configuration has for sequences of up to `context` tokens.

        Raises:
            ArchitectureMismatch: they depend on the sequence's length within the context.
            InvalidArtifact: they cannot be computed, or do not fit the model.
        """
        limit = context_limit(config)
        kinds = {parameters["rope_type"] for parameters in _rope_parameters(config)}
        if limit < context and (changing := kinds.intersection(LENGTH_DEPENDENT)):
            raise ArchitectureMismatch(
                f"The delta's rotary embedding ({min(changing)}) changes beyond {limit} tokens, "
                f"and the base is served up to {context}. Merge the delta and serve it as a base."
            )
        try:
            ropes = _ropes(self._kind(config))
        except Exception as error:  # any error here is caused by the config
            raise InvalidArtifact(f"The delta's {ROPE} cannot be computed: {error}") from error
        if UNROTATED in self._base:
            ropes[UNROTATED] = self._base[UNROTATED]
        if ropes.keys() != self._base.keys() or any(
            rope.frequencies.shape != self._base[kind].frequencies.shape
            for kind, rope in ropes.items()
        ):
            raise InvalidArtifact(f"The delta's {ROPE} do not fit the base's heads.")
        return ropes

    def install(self, slot: int, ropes: Mapping[str, Rope]) -> None:
        """Set the frequencies of the rows of `slot`."""
        for table, kind in enumerate(self._base):
            rope = ropes[kind]
            self._frequencies[table, slot] = rope.frequencies.to(self._frequencies.device)
            self._scaling[table, slot] = rope.scaling

    def remove(self, slot: int) -> None:
        """Restore the base's frequencies for the rows of `slot`."""
        self.install(slot, self._base)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> list[Rotation]:
        """Each layer's cosines and sines (rows, columns) in `dtype`, at positions (rows,)."""
        slots = self._routing.row_slots
        angles = positions[:, None].float() * self._frequencies[:, slots]
        angles = torch.cat((angles, angles), dim=-1)
        scaling = self._scaling[:, slots, None]
        cos, sin = (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)
        tables = [Rotation(*pair) for pair in zip(cos, sin, strict=True)]
        return [tables[table] for table in self._tables]
