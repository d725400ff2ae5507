"""References to deltas in paths: an id, or `project/model` with a version or alias.

A name has a slash. `dlt_x/report` is an id before another segment, and `x/report` a name: a project
whose name begins as an id does is reached by ids alone.
"""

from typing import Annotated, Final

from fastapi import Path
from starlette.convertors import Convertor, register_url_convertor

from deltadock.api.schemas import EXAMPLE_DELTA_ID
from deltadock.names import VERSIONED

REFERENCE_PATTERN: Final = rf"^(?:dlt_[a-z0-9]{{1,32}}|(?!dlt_[a-z0-9]*/){VERSIONED})$"


class _Reference(Convertor[str]):
    regex = r"(?:[^/]+|(?!dlt_[a-z0-9]*/)[^/]+/[^/]+)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


class _PrefixReference(_Reference):
    regex = r"(?:dlt_[a-z0-9]*|(?!dlt_[a-z0-9]*/)[^/]+/[^/]+)"


class _File(_Reference):
    """A path inside an upload; no file's path looks like the routes of its parts."""

    regex = r"(?:(?!.*/parts(?:/[^/]*)?$).+)"


register_url_convertor("file", _File())
register_url_convertor("reference", _Reference())
register_url_convertor("prefix", _PrefixReference())

DeltaReference = Annotated[
    str,
    Path(
        description="A delta's id, or `project/model` (its default version), `project/model:3` or "
        "`project/model@alias`.",
        examples=[EXAMPLE_DELTA_ID],
        # Anything else names nothing: a 404, as for names that are free.
        json_schema_extra={"pattern": REFERENCE_PATTERN},
    ),
]
