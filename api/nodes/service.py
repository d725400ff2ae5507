"""Taking note of nodes, and listing them with what they hold."""

from collections import defaultdict

from sqlalchemy.orm import Session

from deltadock.api.nodes.schemas import NodeIn, NodeList, NodeOut
from deltadock.storage.models import DeltaRow
from deltadock.storage.repositories import BaseRepository, DeltaRepository, NodeRepository


def put_node(session: Session, node_id: str, told: NodeIn) -> None:
    """Record what a node tells of itself."""
    fields = told.model_dump()
    fields["base_digest"] = fields.pop("base")
    NodeRepository(session).put(node_id, **fields)


def drop_node(session: Session, node_id: str) -> None:
    """Forget a node that leaves."""
    NodeRepository(session).drop(node_id)


def list_nodes(session: Session) -> NodeList:
    """The nodes that are there, with the names of what they hold."""
    nodes = NodeRepository(session).alive()
    bases = {base.checkpoint_digest: base for base in BaseRepository(session).all()}
    held = {delta["digest"] for node in nodes for delta in node.deltas}
    deltas: defaultdict[str, list[DeltaRow]] = defaultdict(list)
    for delta in DeltaRepository(session).ready():
        if delta.artifact_digest is not None and delta.artifact_digest in held:
            deltas[delta.artifact_digest].append(delta)
    return NodeList(data=[NodeOut.of(node, bases, deltas) for node in nodes])
