"""Projects' rules for the fine-tunes that their deltas were made of."""

from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from deltadock.api.access import CallerDep
from deltadock.api.dependencies import ReadSession, ResourcesDep, WriteUnit
from deltadock.api.routing import api_router
from deltadock.api.schemas import RequestBody
from deltadock.errors import InvalidInput
from deltadock.names import PART_PATTERN
from deltadock.problems import problems
from deltadock.settings import RETENTION_PATTERN
from deltadock.storage.repositories import RetentionRepository

router = api_router("/v1/projects", tags=["storage"])

Project = Annotated[str, Path(pattern=PART_PATTERN, examples=["maths"])]
Rule = Annotated[
    str,
    Field(
        pattern=RETENTION_PATTERN,
        description="keep; ready: drop an uploaded fine-tune once its delta is ready; or the days "
        "after which it is dropped then.",
        examples=["30"],
    ),
]


class RetentionIn(RequestBody):
    """A project's rule."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"rule": "ready"}]})

    rule: Rule | None = Field(description="null: the project has none, and the default holds.")


class RetentionOut(BaseModel):
    """The rule that holds in a project."""

    rule: Rule
    is_default: bool = Field(description="Whether the project has none of its own.")


@router.get("/{project}/retention", responses=problems(InvalidInput))
def get_retention(
    project: Project, caller: CallerDep, session: ReadSession, resources: ResourcesDep
) -> RetentionOut:
    """Get the rule for the fine-tunes of a project."""
    own = RetentionRepository(session, caller.tenant_id).find(project)
    rule = resources.settings.retention if own is None else own
    return RetentionOut(rule=rule, is_default=own is None)


@router.put("/{project}/retention", responses=problems(InvalidInput))
def put_retention(
    project: Project, body: RetentionIn, caller: CallerDep, unit: WriteUnit, resources: ResourcesDep
) -> RetentionOut:
    """Set or remove the rule for the fine-tunes of a project.

    A fine-tune of several projects is kept as long as any of their rules keeps it; one that a base
    is registered of, or that a job may still need, is always kept.
    """
    rules = RetentionRepository(unit.session, caller.tenant_id)
    if body.rule is None:
        rules.delete(project)
    else:
        rules.put(project, body.rule)
    return get_retention(project, caller, unit.session, resources)
