"""Refuses requests by their headers alone: nothing of a refused body is read."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Final
from urllib.parse import quote, urlencode

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltadock.api.access.caller import Caller
from deltadock.api.access.rules import CHANGES, INFER, Rule, RuleTable
from deltadock.api.access.sessions import COOKIE, check_token
from deltadock.api.dependencies import Resources
from deltadock.errors import DeltadockError, Forbidden, QuotaExceeded, Unauthorized
from deltadock.problems import error_response
from deltadock.storage.actor import acting
from deltadock.storage.tables import AuditAction
from deltadock.trust import check_trusted

CSRF_HEADER: Final = "X-CSRF-Token"
SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
NO_KEY: Final = (
    "Send an API key: `Authorization: Bearer ddk_...`. `deltadock up` keeps its own in the file "
    "api.key of its home; `deltadock keys create` makes others."
)


class AccessControl:
    """Finds a request's caller, and checks its route's rule and its tenant's rate."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        resources: Resources,
        rules: RuleTable,
        page: Callable[[Request, DeltadockError], Response],
    ) -> None:
        """`page` shows browsers why a page is refused."""
        self.app = app
        self._page = page
        self._resources = resources
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        route, rule = self._rules.match(scope["method"], scope["path"])
        request.scope.setdefault("state", {})["route"] = route
        try:
            headers = await self._admit(request, rule)
        except DeltadockError as error:
            await self._refusal(request, rule, error)(scope, receive, send)
            return

        caller: Caller | None = getattr(request.state, "caller", None)

        async def send_recorded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
                if caller and scope["state"].get("error_code") == QuotaExceeded.code:
                    await run_in_threadpool(self._record, request, caller, QuotaExceeded.code)
            await send(message)

        with acting(caller.acting_in(request)) if caller else nullcontext():
            await self.app(scope, receive, send_recorded if caller else send)

    async def _admit(self, request: Request, rule: Rule) -> dict[str, str]:
        """Check the request; returns headers for its response.

        Raises:
            Unauthorized, Forbidden, RateLimited: it is refused.
            Unavailable: the database does not answer.
        """
        if rule.node:
            client = request.client.host if request.client is not None else None
            secret = self._resources.settings.node_secret
            check_trusted(secret, request.headers.get("Authorization"), client)
        if not rule.scopes:
            return {}
        caller = await self._find_caller(request)
        request.state.caller = caller
        headers = await self._resources.rates.count_request(caller)
        try:
            rule.check(caller)
        except Forbidden:
            if rule in CHANGES and request.method not in SAFE_METHODS:
                await run_in_threadpool(self._record, request, caller, Forbidden.code)
            raise
        if rule is INFER:
            headers |= await self._resources.rates.check_tokens(caller)
        return headers

    def _record(self, request: Request, caller: Caller, outcome: str) -> None:
        self._resources.refusals.record(
            caller.acting_in(request), caller.tenant_id, AuditAction.REQUEST,
            quote(request.url.path)[:255], outcome, method=request.method,
        )  # fmt: skip

    async def _find_caller(self, request: Request) -> Caller:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        keys = self._resources.keys
        if scheme.lower() == "bearer" and key:
            key = key.strip()
            if (known := keys.recall(key=key)) is not None:
                return known
            return await run_in_threadpool(keys.caller_of_key, key)
        if cookie := request.cookies.get(COOKIE):
            session = self._resources.sessions.find(cookie)
            if request.method not in SAFE_METHODS:
                check_token(session.csrf, request.headers.get(CSRF_HEADER))
            request.state.csrf = session.csrf
            if (known := keys.recall(key_id=session.key_id)) is not None:
                return known
            return await run_in_threadpool(keys.caller_of_session, session.key_id)
        raise Unauthorized(NO_KEY)

    def _refusal(self, request: Request, rule: Rule, error: DeltadockError) -> Response:
        """The error, of a page as one; browsers without a session are sent to the sign-in."""
        if not rule.page:
            return error_response(request.url.path, error)
        if not isinstance(error, Unauthorized):
            return self._page(request, error)
        if "HX-Request" in request.headers:
            return Response(headers={"HX-Redirect": "/sign-in"})
        target = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        return RedirectResponse(f"/sign-in?{urlencode({'next': target})}", 303)
