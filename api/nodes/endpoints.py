"""Routes of nodes: one for people, two for the nodes themselves."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request

from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.nodes import service
from deltadock.api.nodes.schemas import EXAMPLE_NODE_ID, NodeIn, NodeList
from deltadock.api.problems import problems
from deltadock.errors import InvalidInput, Unauthorized
from deltadock.trust import check_trusted

router = APIRouter(prefix="/v1/nodes", tags=["nodes"])

NodeId = Annotated[
    str, Path(pattern=r"^node_[a-z0-9]{1,32}$", description="Chosen by the node at its start.",
              examples=[EXAMPLE_NODE_ID])
]  # fmt: skip


def only_nodes(request: Request, resources: ResourcesDep) -> None:
    """Refuse who cannot be one of our nodes."""
    check_trusted(
        resources.settings.node_secret,
        request.headers.get("Authorization"),
        request.client.host if request.client is not None else None,
    )


OnlyNodes = Depends(only_nodes)


@router.get("")
def list_nodes(session: ReadSession) -> NodeList:
    """Every inference node that is there, and the deltas it holds."""
    return service.list_nodes(session)


@router.put(
    "/{node_id}",
    status_code=204,
    dependencies=[OnlyNodes],
    responses=problems(Unauthorized, InvalidInput),
)
def put_node(node_id: NodeId, body: NodeIn, unit: WriteUnit, resources: ResourcesDep) -> None:
    """A node registers, and again and again tells how it is; silent, it is soon gone."""
    service.put_node(unit.session, node_id, body)
    unit.after_commit.append(resources.fleet.changed)


@router.delete(
    "/{node_id}",
    status_code=204,
    dependencies=[OnlyNodes],
    responses=problems(Unauthorized, InvalidInput),
)
def drop_node(node_id: NodeId, unit: WriteUnit, resources: ResourcesDep) -> None:
    """A node leaves."""
    service.drop_node(unit.session, node_id)
    unit.after_commit.append(resources.fleet.changed)
