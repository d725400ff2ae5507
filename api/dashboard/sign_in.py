"""Signing in to the dashboard with an API key or a one-time link, and signing out."""

import secrets
from typing import Annotated, Final
from urllib.parse import parse_qs

from fastapi import Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from deltadock.api.access import Caller
from deltadock.api.access.rules import PAGE
from deltadock.api.access.sessions import (
    COOKIE,
    FORM_COOKIE,
    check_token,
    end_session,
    start_form,
)
from deltadock.api.dashboard.rendering import HEADERS, page_router, render
from deltadock.api.dependencies import Resources, ResourcesDep
from deltadock.errors import DeltadockError, Forbidden, InvalidInput, Unauthorized
from deltadock.storage.actor import Actor, acting
from deltadock.storage.api_keys import prefix_of
from deltadock.storage.repositories import IdempotencyRepository
from deltadock.storage.repositories.audit import record
from deltadock.storage.tables import AuditAction, AuditOrigin
from deltadock.storage.tenancy import LOCAL_TENANT

router = page_router()

MAX_FORM_BYTES: Final = 8192


@router.get("/sign-in")
def show_sign_in(
    request: Request,
    resources: ResourcesDep,
    target: Annotated[str, Query(alias="next")] = "/",
    token: Annotated[str | None, Query()] = None,
) -> Response:
    """The sign-in form; with the token of a one-time link, sign in at once.

    A browser that is signed in goes on to the page, though the link was used before.
    """
    if token is None:
        return _form(request, target)
    try:
        caller = _use_link(resources, token)
    except DeltadockError as error:
        if _has_session(request, resources):
            return RedirectResponse(_local(target), 303, HEADERS)
        return _form(request, target, error)
    return _signed_in(request, resources, caller, target)


@router.post("/sign-in")
async def sign_in(request: Request, resources: ResourcesDep) -> Response:
    """Check the key of the form and start a session."""
    fields = await _fields(request)
    target = fields.get("next", "/")
    check_token(request.cookies.get(FORM_COOKIE), fields.get("csrf"))
    key = fields.get("key", "").strip()
    try:
        caller = await run_in_threadpool(resources.keys.caller_of_key, key)
        PAGE.check(caller)
    except DeltadockError as error:
        if isinstance(error, Unauthorized | Forbidden):
            await run_in_threadpool(_record_refused, request, resources, key, error.code)
        return _form(request, target, error)
    return await run_in_threadpool(_signed_in, request, resources, caller, target)


@router.post("/sign-out")
async def sign_out(request: Request, resources: ResourcesDep) -> Response:
    """End the session."""
    response = RedirectResponse("/sign-in", 303, HEADERS)
    if cookie := request.cookies.get(COOKIE):
        session = resources.sessions.find(cookie)
        check_token(session.csrf, (await _fields(request)).get("csrf"))
        caller = await run_in_threadpool(resources.keys.caller_of_session, session.key_id)
        await run_in_threadpool(_record, request, resources, caller, AuditAction.SIGN_OUT)
        end_session(response)
    return response


def _use_link(resources: Resources, token: str) -> Caller:
    """The caller of a one-time link, used up in the database: any process may have got it first.

    Raises:
        Unauthorized: the link is forged, has expired or was used before; or its key is not valid.
    """
    link = resources.sessions.link(token)
    caller = resources.keys.caller_of_session(link.key_id)
    with resources.database.session_scope() as session:
        used = IdempotencyRepository(session, caller.tenant_id)
        if used.find(link.nonce) is not None:
            raise Unauthorized("This link was used before. Sign in with an API key.")
        used.add(link.nonce, fingerprint="sign-in link", status=None, location=None, body={})
    return caller


def _has_session(request: Request, resources: Resources) -> bool:
    """Whether the browser's session may see pages."""
    try:
        session = resources.sessions.find(request.cookies.get(COOKIE, ""))
        PAGE.check(resources.keys.caller_of_session(session.key_id))
    except DeltadockError:
        return False
    return True


def _form(request: Request, target: str, error: DeltadockError | None = None) -> Response:
    token = secrets.token_urlsafe()
    context = {"form_token": token, "target": _local(target), "error": error}
    response = render(
        request, "sign_in.html", context, status=200 if error is None else error.status
    )
    start_form(request, response, token)
    return response


def _signed_in(request: Request, resources: Resources, caller: Caller, target: str) -> Response:
    response = RedirectResponse(_local(target), 303, HEADERS)
    resources.sessions.start(request, response, caller.key_id)
    _record(request, resources, caller, AuditAction.SIGN_IN)
    return response


def _record(request: Request, resources: Resources, caller: Caller, action: AuditAction) -> None:
    with acting(caller.acting_in(request)), resources.database.session_scope() as session:
        record(session, caller.tenant_id, action, caller.key_id)


def _record_refused(request: Request, resources: Resources, key: str, outcome: str) -> None:
    """Record a failed sign-in in the operator's log: the key may be nobody's."""
    actor = Actor(AuditOrigin.REQUEST, request_id=request.state.request_id)
    shown = prefix_of(key) or "malformed"
    resources.refusals.record(actor, LOCAL_TENANT, AuditAction.SIGN_IN, shown, outcome)


def _local(target: str) -> str:
    """A path of this server, so that a link cannot lead elsewhere."""
    is_path = target.startswith("/") and not target.startswith("//") and "\\" not in target
    return target if is_path and target.isprintable() else "/"


async def _fields(request: Request) -> dict[str, str]:
    """The fields of an urlencoded form.

    Raises:
        InvalidInput: it is too long.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_FORM_BYTES:
            raise InvalidInput("The form is too long.")
    parsed = parse_qs(body.decode("utf-8", "replace"), keep_blank_values=True)
    return {name: values[-1] for name, values in parsed.items()}
