"""Rotary embeddings with frequencies of their own for every delta slot."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltadock.artifacts.configs import LENGTH_DEPENDENT, ROPE
from deltadock.errors import ArchitectureMismatch, InvalidArtifact
from deltadock.inference.model.routing import Routing
from deltadock.kernels.decoder import Rotation


class Rope(NamedTuple):
    """Frequencies of a rotary embedding."""

    frequencies: Tensor
    """(head_dim / 2,) float32, in radians per position."""
    scaling: float
    """Factor of cosines and sines."""


def context_limit(config: Any) -> int:
    """The longest sequence for which a configuration's rotary frequencies stay the same.

    `dynamic` ones change beyond `max_position_embeddings`, `longrope` beyond
    `original_max_position_embeddings`.
    """
    limit = int(config.max_position_embeddings)
    if config.rope_parameters["rope_type"] != "longrope":
        return limit
    original = config.rope_parameters.get("original_max_position_embeddings") or limit
    return min(limit, int(original))


class DeltaRotary:
    """A model's rotary embedding: each row's cosines and sines are those of its delta's."""

    def __init__(self, rotary: Any, routing: Routing) -> None:
        """Take the frequencies of `rotary`, a `transformers` module for the base's config."""
        self._routing = routing
        self._kind = type(rotary)
        self._base = rotary.inv_freq.float(), float(rotary.attention_scaling)
        slots = routing.limits.slots
        self._frequencies = self._base[0].repeat(slots, 1)
        self._scaling = torch.full((slots,), self._base[1], device=self._frequencies.device)

    def rope(self, config: Any, context: int) -> Rope:
        """The frequencies that a configuration has for sequences of up to `context` tokens.

        Raises:
            ArchitectureMismatch: they depend on the sequence's length within the context.
            InvalidArtifact: they cannot be computed, or do not fit the model.
        """
        kind = config.rope_parameters["rope_type"]
        limit = context_limit(config)
        if kind in LENGTH_DEPENDENT and limit < context:
            raise ArchitectureMismatch(
                f"The delta's rotary embedding ({kind}) changes beyond {limit} tokens, and the "
                f"base is served up to {context}. Merge the delta and serve it as a base."
            )
        try:
            module = self._kind(config)
            rope = Rope(module.inv_freq.float(), float(module.attention_scaling))
        except Exception as error:  # any error here is caused by the config
            raise InvalidArtifact(f"The delta's {ROPE} cannot be computed: {error}") from error
        if rope.frequencies.shape != self._base[0].shape:
            raise InvalidArtifact(f"The delta's {ROPE} do not fit the base's heads.")
        return rope

    def install(self, slot: int, rope: Rope) -> None:
        """Set the frequencies of the rows of `slot`."""
        self._frequencies[slot] = rope.frequencies.to(self._frequencies.device)
        self._scaling[slot] = rope.scaling

    def remove(self, slot: int) -> None:
        """Restore the base's frequencies for the rows of `slot`."""
        self._frequencies[slot], self._scaling[slot] = self._base

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Cosines and sines (rows, head_dim) in `dtype`, at positions (rows,)."""
        slots = self._routing.row_slots
        angles = positions[:, None].float() * self._frequencies[slots]
        angles = torch.cat((angles, angles), dim=-1)
        scaling = self._scaling[slots][:, None]
        return Rotation((angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype))
