"""Which node a request goes to: where its weights are, else where there is room for them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from deltadock.api.generation.target import Target
from deltadock.storage.models import NodeRow

TIERS: Final = ("device", "host", "disk")
"""From the fastest to the slowest."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """What routing needs to know of a node."""

    id: str
    url: str
    base_digest: str | None
    adopts: bool
    draining: bool
    capacity: int
    admitted: int
    tiers: Mapping[str, str]
    """The fastest tier of each artifact that it has."""

    @classmethod
    def of(cls, node: NodeRow) -> "NodeView":
        """The view of a row."""
        return cls(
            id=node.id,
            url=node.url,
            base_digest=node.base_digest,
            adopts=node.adopts,
            draining=node.draining,
            capacity=node.capacity,
            admitted=node.admitted,
            tiers={held["digest"]: held["tier"] for held in node.deltas},
        )


def rank(nodes: Iterable[NodeView], target: Target, sent: Mapping[str, int]) -> list[NodeView]:
    """The nodes that may answer, best first. `sent` counts what we sent each, by its id.

    A base that some node has is served there; otherwise a node without one takes it, or else one
    that changes. Among those, full ones come last, then the delta's tier decides, then the load.
    """
    able = [node for node in nodes if not node.draining]
    having = [node for node in able if node.base_digest == target.base_digest]

    def order(node: NodeView) -> tuple[bool, bool, int, float]:
        # What a node told may be a moment old; what we sent since is in our own count.
        load = max(node.admitted, sent.get(node.id, 0)) / node.capacity
        tier = node.tiers.get(target.artifact_digest or "")
        place = len(TIERS) if tier is None else TIERS.index(tier)
        return node.base_digest not in {None, target.base_digest}, load >= 1, place, load

    return sorted(having or [node for node in able if node.adopts], key=order)
