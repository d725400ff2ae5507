"""What endpoints ask for: the resources, a session to read with, a unit of work to write with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request
from sqlalchemy.orm import Session

from deltadock.api.resources import Resources


def get_resources(request: Request) -> Resources:
    """The app's resources."""
    resources: Resources = request.app.state.resources
    return resources


ResourcesDep = Annotated[Resources, Depends(get_resources)]


def read_session(resources: ResourcesDep) -> Iterator[Session]:
    """A session that only reads."""
    with resources.database.read_scope() as session:
        yield session


@dataclass(slots=True)
class UnitOfWork:
    """One request's changes: committed once, after the endpoint and before the response."""

    session: Session
    after_commit: list[Callable[[], None]] = field(default_factory=list)
    """What may happen only once the changes are in the database, such as sending a task."""


def unit_of_work(resources: ResourcesDep) -> Iterator[UnitOfWork]:
    """A session that commits at the end, then runs what had to wait for that."""
    with resources.database.session_scope() as session:
        unit = UnitOfWork(session)
        yield unit
    for action in unit.after_commit:
        action()


# The scope "function" ends these before the response is sent: no success is reported that the
# database then refuses, and no connection is held while a slow client reads.
ReadSession = Annotated[Session, Depends(read_session, scope="function")]
WriteUnit = Annotated[UnitOfWork, Depends(unit_of_work, scope="function")]
