"""Pages of lists: opaque cursors, and the refusal of query parameters that a route has not."""

import base64
import binascii
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, TypeVar

from fastapi import Query, Request
from fastapi.dependencies.utils import get_flat_params
from fastapi.params import Query as QueryParameter
from fastapi.routing import APIRoute
from pydantic import Field, TypeAdapter, ValidationError

from deltadock.errors import InvalidInput, NotFound

MAX_LIMIT: Final = 200
_STORABLE: Final = {
    int: Annotated[int, Field(ge=-(2**63), lt=2**63)],
    str: Annotated[str, Field(pattern=r"^[^\x00]*$")],
}
"""The values that both databases can compare with a column's."""

Row = TypeVar("Row")

After = Annotated[str | None, Query(max_length=1024, description="`next` of the previous page.")]
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT)]


class Cursor:
    """Converts between a row's place in a sort and the opaque `next` of a page.

    A cursor holds no more than the place, so it stays valid when its row is deleted.

    Args:
        sort: the name of the sort; a cursor of another one is refused.
        place: the types of the place's values.
    """

    def __init__(self, sort: str, *place: type) -> None:
        self._sort = sort
        types: Any = (str, *(_STORABLE.get(kind, kind) for kind in place))
        self._adapter: TypeAdapter[tuple[Any, ...]] = TypeAdapter(tuple[types])

    def write(self, place: Sequence[Any]) -> str:
        """The cursor of the rows that follow this place."""
        content = self._adapter.dump_json((self._sort, *place))
        return base64.urlsafe_b64encode(content).decode().rstrip("=")

    def page(
        self, found: Sequence[Row], limit: int, place: Callable[[Row], Sequence[Any]]
    ) -> tuple[Sequence[Row], str | None]:
        """Up to `limit` of the rows and the next page's `after` (None on the last page).

        Args:
            found: one row more than `limit`, if there are as many.
            place: of a row.
        """
        page = found[:limit]
        return page, self.write(place(page[-1])) if len(found) > limit else None

    def read(self, after: str | None) -> tuple[Any, ...] | None:
        """The place; None without a cursor.

        Raises:
            NotFound: it is not a cursor of this list and sort.
        """
        if after is None:
            return None
        try:
            content = base64.urlsafe_b64decode(after.encode() + b"=" * (-len(after) % 4))
            sort, *place = self._adapter.validate_json(content)
            if sort != self._sort:
                raise ValueError("another list's")
        except (ValueError, binascii.Error, ValidationError) as error:
            raise NotFound(
                "There is no page after this: `after` is not a cursor of this list and sort. Use "
                "the previous page's `next`."
            ) from error
        return tuple(place)


async def refuse_unknown_query(request: Request) -> None:
    """Refuse query parameters that the route does not have.

    Raises:
        InvalidInput: there are some.
    """
    if not request.query_params:
        return
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    known = {
        parameter.alias
        for parameter in get_flat_params(route.dependant)
        if isinstance(parameter.field_info, QueryParameter)
    }
    if unknown := sorted(set(request.query_params) - known):
        allowed = ", ".join(sorted(known)) or "none"
        raise InvalidInput(
            f"Unknown query parameters: {', '.join(unknown)}. This route takes: {allowed}.",
            parameters=unknown,
        )
