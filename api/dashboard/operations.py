"""Pages of what runs and what is kept: jobs, bases, nodes, keys, storage and the audit log."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Annotated, Any, Final

from fastapi import Query, Request
from markupsafe import Markup
from sqlalchemy.orm import Session
from starlette.responses import Response

from deltadock.api.access import Caller, CallerDep
from deltadock.api.audit import AuditRecord, list_audit_records
from deltadock.api.bases import BaseOut, BaseRef, page_of_bases, require_base
from deltadock.api.dashboard import charts, views
from deltadock.api.dashboard.rendering import page_router, render
from deltadock.api.dependencies import ReadSession, ResourcesDep
from deltadock.api.jobs import JobId, page_of_log, show_job
from deltadock.api.keys import list_keys
from deltadock.api.nodes import registered_nodes
from deltadock.api.paging import After
from deltadock.api.tenants import get_tenant
from deltadock.model_target import not_served
from deltadock.storage.repositories import (
    DeltaRepository,
    NodeRepository,
    UploadRepository,
)
from deltadock.storage.repositories.listing import DeltaFilter, DeltaSort
from deltadock.storage.tables import FINAL_STATES, JobState, NodeSampleRow, Scope
from deltadock.words import latency, plain, significant, size

router = page_router()

ROWS: Final = 50
DELTAS_PER_NODE: Final = 50
"""Shown on the nodes page, fastest tier first."""
LOG_LINES: Final = 1000


class JobGroup(StrEnum):
    """Which jobs a page shows."""

    ALL = "all"
    RUNNING = "running"
    QUEUED = "queued"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def states(self) -> tuple[JobState, ...]:
        """Their states; none: any."""
        if self is JobGroup.ALL:
            return ()
        if self is JobGroup.RUNNING:
            return tuple(set(JobState) - FINAL_STATES - {JobState.QUEUED})
        return (JobState(self.value),)


Show = Annotated[JobGroup, Query()]


@router.get("/jobs")
def show_jobs(
    request: Request,
    caller: CallerDep,
    session: ReadSession,
    show: Show = JobGroup.ALL,
    after: After = None,
) -> Response:
    """The jobs, newest first."""
    return render(request, "jobs.html", _jobs(session, caller, show, after))


@router.get("/parts/jobs")
def refresh_jobs(
    request: Request,
    caller: CallerDep,
    session: ReadSession,
    show: Show = JobGroup.ALL,
    after: After = None,
) -> Response:
    """The jobs without the surrounding page."""
    return render(request, "parts/jobs.html", _jobs(session, caller, show, after))


def _jobs(session: Session, caller: Caller, show: JobGroup, after: str | None) -> dict[str, Any]:
    entries, next_after = views.jobs_page(
        session, caller.tenant_id, show.states, limit=ROWS, after=after
    )
    return {
        "entries": entries,
        "next": next_after,
        "after": after,
        "show": show,
        "groups": list(JobGroup),
        "counts": views.totals(session, caller.tenant_id).counts,
    }


@router.get("/parts/jobs/{job_id}/log")
def show_job_log(
    job_id: JobId, request: Request, caller: CallerDep, session: ReadSession
) -> Response:
    """The lines of a job's log."""
    job = show_job(session, caller.tenant_id, job_id)
    log = page_of_log(session, caller.tenant_id, job, limit=LOG_LINES)
    return render(
        request,
        "parts/log.html",
        {
            "lines": log.data,
            "job_id": job_id,
            "running": not job.state.is_final,
        },
    )


@router.get("/bases")
def show_bases(
    request: Request, caller: CallerDep, session: ReadSession, after: After = None
) -> Response:
    """The bases, by name."""
    page = page_of_bases(session, caller.tenant_id, limit=ROWS, after=after)
    return render(request, "bases.html", {"page": page, "after": after})


@router.get("/bases/{base}")
def show_base(base: BaseRef, request: Request, caller: CallerDep, session: ReadSession) -> Response:
    """One base, with its newest deltas."""
    row = require_base(session, caller.tenant_id, base)
    overview = views.overview(
        session,
        caller.tenant_id,
        after=None,
        wanted=DeltaFilter(base_id=row.id),
        sort=DeltaSort.NEWEST,
    )
    context = {
        "base": BaseOut.of(row),
        "is_own": row.tenant_id == caller.tenant_id,
        "may_share": _operates(caller) and row.tenant_id == caller.tenant_id,
        "overview": overview,
        "not_served": not_served(row.checkpoint.model_type),
        "tried": views.tried(session, caller.tenant_id, [row.name]),
    }
    return render(request, "base.html", context)


@router.get("/nodes")
def show_nodes(request: Request, caller: CallerDep, session: ReadSession) -> Response:
    """The inference nodes and the deltas they hold."""
    return render(request, "nodes.html", _nodes(session, caller))


@router.get("/parts/nodes")
def refresh_nodes(request: Request, caller: CallerDep, session: ReadSession) -> Response:
    """The nodes without the surrounding page."""
    return render(request, "parts/nodes.html", _nodes(session, caller))


def _nodes(session: Session, caller: Caller) -> dict[str, Any]:
    nodes = registered_nodes(session, caller, DELTAS_PER_NODE).data
    operates = _operates(caller)
    past = NodeRepository(session).samples([node.id for node in nodes]) if operates else {}
    return {
        "nodes": nodes,
        "operates": operates,
        "timelines": {node: timelines(samples) for node, samples in past.items()},
    }


def _operates(caller: Caller) -> bool:
    """Whether routes for the operator's admins are open to the caller."""
    return caller.is_operator and Scope.ADMIN in caller.scopes


def timelines(samples: Sequence[NodeSampleRow]) -> list[tuple[str, Markup]]:
    """Charts of a node's last hour with their titles, of what at least two samples know."""
    times = [sample.at for sample in samples]

    def draw(
        title: str, show: Callable[[float | None], str], *names: str
    ) -> Iterator[tuple[str, Markup]]:
        series = [charts.Series(name, [getattr(s, name) for s in samples]) for name in names]
        known = [value for line in series for value in line.values if value is not None]
        if len(known) >= 2 * len(series):
            yield title, charts.timeline(title, times, series, show(max(known)))

    return [
        *draw("Tokens per second", significant, "tokens_per_second"),
        *draw("First token", latency, "first_token_seconds"),
        *draw("Between tokens", latency, "inter_token_seconds"),
        *draw("Memory", size, "memory_bytes"),
        *draw("Sequences", plain, "admitted"),
        *draw("Deltas by tier", plain, "device", "host", "disk"),
    ]


@router.get("/keys")
def show_keys(
    request: Request, caller: CallerDep, session: ReadSession, after: After = None
) -> Response:
    """The tenant's keys, newest first, with its limits and usage."""
    context = {
        "page": list_keys(caller=caller, session=session, after=after),
        "after": after,
        "own_key": caller.key_id,
        "scopes": list(Scope),
        "tenant": get_tenant(caller.tenant_id, caller, session),
        "may_limit": caller.is_operator,
    }
    return render(request, "keys.html", context)


@router.get("/storage")
def show_storage(request: Request, caller: CallerDep, resources: ResourcesDep) -> Response:
    """What the blob store holds by kind, and the rule for uploaded fine-tunes."""
    context = {"usage": resources.storage.usage(), "retention": resources.settings.retention}
    return render(request, "storage.html", context)


@router.get("/audit")
def show_audit(
    request: Request, caller: CallerDep, session: ReadSession, after: After = None
) -> Response:
    """Who changed what, newest first."""
    page = list_audit_records(caller, session, after=after)
    context = {
        "page": page,
        "objects": _names_of_objects(session, caller.tenant_id, page.data),
        "after": after,
    }
    return render(request, "audit.html", context)


def _names_of_objects(
    session: Session, tenant_id: str, records: Iterable[AuditRecord]
) -> dict[str, str]:
    """What people call the jobs and uploads of these records, by id."""
    deltas = {
        record.object: str(record.details["delta"])
        for record in records
        if record.details and "delta" in record.details
    }
    references = DeltaRepository(session, tenant_id).references(set(deltas.values()))
    uploads = {record.object for record in records if record.object.startswith("upl_")}
    return {
        job: references[delta] for job, delta in deltas.items() if delta in references
    } | UploadRepository(session, tenant_id).names(uploads)
