"""Routes of bases."""

from typing import Annotated

from fastapi import APIRouter, Path, Response

from deltadock.api.bases import service
from deltadock.api.bases.schemas import BaseIn, BaseList, BaseOut
from deltadock.api.dependencies import ReadSession, WriteUnit
from deltadock.api.problems import problems
from deltadock.errors import Conflict, InvalidInput, NotFound
from deltadock.storage.repositories import BaseRepository

router = APIRouter(prefix="/v1/bases", tags=["bases"])

BaseRef = Annotated[str, Path(description="A base's id or name.", examples=["tiny-base"])]


@router.post(
    "",
    status_code=201,
    responses={
        200: {"model": BaseOut, "description": "It was registered already"},
        **problems(InvalidInput, NotFound, Conflict),
    },
)
def register_base(body: BaseIn, unit: WriteUnit, response: Response) -> BaseOut:
    """Make a complete checkpoint a base; the same again answers 200 and changes nothing."""
    base, is_new = service.register_base(unit.session, body)
    if not is_new:
        response.status_code = 200
    return BaseOut.of(base)


@router.get("")
def list_bases(session: ReadSession) -> BaseList:
    """Every base."""
    return BaseList(data=[BaseOut.of(base) for base in BaseRepository(session).all()])


@router.get("/{base}", responses=problems(NotFound))
def get_base(base: BaseRef, session: ReadSession) -> BaseOut:
    """One base."""
    return BaseOut.of(service.get_base(session, base))
