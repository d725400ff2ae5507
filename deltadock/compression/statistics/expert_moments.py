"""Moments of linear maps, where some are experts that few tokens reach."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from deltadock.compression.model.weights import MatrixRef


class Collector(Protocol):
    """An observer that sums second moments of linear maps' inputs, by key."""

    def __call__(self, name: str, inputs: Tensor) -> None:
        """Add inputs (..., h_in)."""
        ...

    def moment(self, name: str) -> Tensor:
        """(h_in, h_in), summed over tokens."""
        ...


@dataclass(slots=True)
class ExpertMoments:
    """Moments that suffice for every expert of a layer, however few tokens chose it.

    An expert needs as many tokens as its inputs are wide for its own moment to have full rank;
    the tokens that it lacks are made up with the mean moment of the layer's experts. Feed it as
    an observer.
    """

    collector: Collector
    tokens: dict[str, int] = field(default_factory=dict)

    def __call__(self, key: str, inputs: Tensor) -> None:
        """Add a map's inputs (..., h_in)."""
        self.tokens[key] = self.tokens.get(key, 0) + inputs[..., 0].numel()
        self.collector(key, inputs)

    def moment(self, ref: MatrixRef, block: Iterable[MatrixRef]) -> tuple[Tensor, list[str]]:
        """A map's moment, and what did not go as planned, in words.

        Args:
            ref: which map.
            block: the maps of its block, among which its peers in the other experts are.
        """
        if ref.mixture is None:
            return self.collector.moment(ref.key), []
        peers = [peer.key for peer in block if peer.mixture == ref.mixture]
        seen = [key for key in peers if self.tokens.get(key)]
        common = torch.stack([self.collector.moment(key) for key in seen]).sum(0)
        own = self.tokens.get(ref.key, 0)
        lacking = len(common) - own
        if lacking <= 0:
            return self.collector.moment(ref.key), []
        made_up = common * (lacking / sum(self.tokens[key] for key in seen))
        moment = made_up + self.collector.moment(ref.key) if own else made_up
        return moment, [
            f"{own} tokens reached this expert; its moment is filled up to {len(common)} tokens "
            "with the mean of the layer's experts"
        ]
