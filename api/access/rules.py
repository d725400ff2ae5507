"""What each route requires of its caller: the table of who may do what."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute, Mount, compile_path

from deltadock.api.access.caller import Caller
from deltadock.errors import Forbidden
from deltadock.storage.tables import Scope


@dataclass(frozen=True, slots=True)
class Rule:
    """Requirements of a route."""

    scopes: tuple[Scope, ...] = ()
    """Any of them suffices; without any, the route needs no key."""
    operator: bool = False
    """Whether the key must be of the operator's tenant."""
    page: bool = False
    """Whether browsers without a session are sent to the sign-in page."""
    node: bool = False
    """Whether the route is for nodes, which have a secret of their own."""

    def check(self, caller: Caller) -> None:
        """Raise Forbidden unless the caller meets the requirements."""
        if self.scopes and caller.scopes.isdisjoint(self.scopes):
            held = ", ".join(sorted(caller.scopes)) or "none"
            raise Forbidden(
                f"This needs the scope {' or '.join(self.scopes)}; the key has {held}. Use another "
                "key, or ask an admin of your tenant for one."
            )
        if self.operator and not caller.is_operator:
            raise Forbidden("This needs an admin key of the operator's tenant.")


PUBLIC: Final = Rule()
READ: Final = Rule((Scope.READ,))
WRITE: Final = Rule((Scope.WRITE,))
INFER: Final = Rule((Scope.INFER,))
MODELS: Final = Rule((Scope.READ, Scope.INFER))
ADMIN: Final = Rule((Scope.ADMIN,))
OPERATOR: Final = Rule((Scope.ADMIN,), operator=True)
PAGE: Final = Rule((Scope.READ,), page=True)
ADMIN_PAGE: Final = Rule((Scope.ADMIN,), page=True)
OPERATOR_PAGE: Final = Rule((Scope.ADMIN,), operator=True, page=True)
NODE: Final = Rule(node=True)

CHANGES: Final = (WRITE, ADMIN, OPERATOR)
"""Rules of what changes something, unless by GET."""

RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        "GET /healthz": PUBLIC,
        "GET /readyz": PUBLIC,
        "GET /static": PUBLIC,
        "GET /metrics": OPERATOR,
        "GET /sign-in": PUBLIC,
        "POST /sign-in": PUBLIC,
        "POST /sign-out": PUBLIC,
        "GET /openapi.json": READ,
        "GET /docs": PAGE,
        "GET /": PAGE,
        "GET /new": PAGE,
        "GET /try": PAGE,
        "GET /compare": PAGE,
        "GET /jobs": PAGE,
        "GET /bases": PAGE,
        "GET /bases/{base}": PAGE,
        "GET /nodes": PAGE,
        "GET /keys": ADMIN_PAGE,
        "GET /storage": OPERATOR_PAGE,
        "GET /audit": ADMIN_PAGE,
        "GET /deltas/{delta_id:reference}": PAGE,
        "GET /models/{project}/{model}": PAGE,
        "GET /parts/jobs": PAGE,
        "GET /parts/jobs/{job_id}/log": PAGE,
        "GET /parts/totals": PAGE,
        "GET /parts/nodes": PAGE,
        "GET /parts/deltas/{delta_id:prefix}/row": PAGE,
        "GET /parts/deltas/{delta_id:prefix}/job": PAGE,
        "POST /v1/uploads": WRITE,
        "GET /v1/uploads": READ,
        "GET /v1/uploads/{upload_id}": READ,
        "DELETE /v1/uploads/{upload_id}": WRITE,
        "PUT /v1/uploads/{upload_id}/files/{path:file}": WRITE,
        "GET /v1/uploads/{upload_id}/files/{path:path}/parts": WRITE,
        "PUT /v1/uploads/{upload_id}/files/{path:path}/parts/{number}": WRITE,
        "POST /v1/uploads/{upload_id}/complete": WRITE,
        "GET /v1/bases": READ,
        "POST /v1/bases": WRITE,
        "GET /v1/bases/{base}": READ,
        "GET /v1/bases/{base}/manifest": READ,
        "PATCH /v1/bases/{base}": OPERATOR,
        "DELETE /v1/bases/{base}": WRITE,
        "POST /v1/bases/{base}/restore": WRITE,
        "POST /v1/previews": READ,
        "GET /v1/storage": OPERATOR,
        "GET /v1/projects/{project}/retention": READ,
        "PUT /v1/projects/{project}/retention": WRITE,
        "POST /v1/deltas/{delta_id:prefix}/restore": WRITE,
        "GET /v1/deltas": READ,
        "POST /v1/deltas": WRITE,
        "GET /v1/deltas/{delta_id:reference}": READ,
        "DELETE /v1/deltas/{delta_id:reference}": WRITE,
        "GET /v1/deltas/{delta_id:prefix}/report": READ,
        "GET /v1/deltas/{delta_id:prefix}/artifact": READ,
        "HEAD /v1/deltas/{delta_id:prefix}/artifact": READ,
        "GET /v1/registry": READ,
        "GET /v1/registry/{project}/{model}": READ,
        "PATCH /v1/registry/{project}/{model}": WRITE,
        "DELETE /v1/registry/{project}/{model}": WRITE,
        "PUT /v1/registry/{project}/{model}/aliases/{alias}": WRITE,
        "DELETE /v1/registry/{project}/{model}/aliases/{alias}": WRITE,
        "GET /v1/registry/{project}/{model}/history": READ,
        "GET /v1/resolve/{reference:reference}": READ,
        "GET /v1/jobs": READ,
        "GET /v1/jobs/{job_id}": READ,
        "GET /v1/jobs/{job_id}/log": READ,
        "GET /v1/jobs/{job_id}/events": READ,
        "POST /v1/jobs/{job_id}/cancel": WRITE,
        "POST /v1/jobs/{job_id}/retry": WRITE,
        "GET /v1/methods": READ,
        "GET /v1/models": MODELS,
        "GET /v1/models/{model:path}": MODELS,
        "POST /v1/completions": INFER,
        "POST /v1/chat/completions": INFER,
        "POST /v1/responses": INFER,
        "POST /v1/deltas/{delta_id:prefix}/generate": INFER,
        "POST /v1/bases/{base}/generate": INFER,
        "GET /v1/nodes": READ,
        "GET /v1/nodes/{node_id}/samples": OPERATOR,
        "POST /v1/nodes/{node_id}/drain": OPERATOR,
        "POST /v1/nodes/{node_id}/resume": OPERATOR,
        "DELETE /v1/nodes/{node_id}/deltas/{artifact}": OPERATOR,
        "PUT /v1/nodes/{node_id}": NODE,
        "DELETE /v1/nodes/{node_id}": NODE,
        "GET /v1/webhooks": READ,
        "POST /v1/webhooks": WRITE,
        "GET /v1/webhooks/{webhook_id}": READ,
        "DELETE /v1/webhooks/{webhook_id}": WRITE,
        "GET /v1/webhooks/{webhook_id}/messages": READ,
        "POST /v1/webhooks/{webhook_id}/messages/{message_id}/resend": WRITE,
        "GET /v1/audit": ADMIN,
        "GET /v1/keys": ADMIN,
        "POST /v1/keys": ADMIN,
        "DELETE /v1/keys/{key_id}": ADMIN,
        "POST /v1/keys/{key_id}/rotate": ADMIN,
        "GET /v1/tenants": OPERATOR,
        "POST /v1/tenants": OPERATOR,
        "GET /v1/tenants/{tenant}": READ,
        "PATCH /v1/tenants/{tenant}": OPERATOR,
    }
)
"""By method and path, as the routes are declared; HEAD is as GET unless it is listed."""

_ANY_KEY: Final = Rule(tuple(Scope))
"""For paths and methods that no route has: with a key, they are a 404 or 405."""


def operations(routes: Iterable[BaseRoute]) -> set[str]:
    """The routes as keys of `RULES`."""
    found = set()
    for route in iter_route_contexts(list(routes)):
        if isinstance(route.original_route, Mount):
            found.add(f"GET {route.original_route.path}")
            continue
        methods = set(route.methods or ())
        if "GET" in methods:
            methods.discard("HEAD")  # which Starlette adds
        found |= {f"{method} {route.path}" for method in methods}
    return found


class RuleTable:
    """The rule of each request's route."""

    def __init__(self, routes: Iterable[BaseRoute], rules: Mapping[str, Rule] = RULES) -> None:
        """Compile the table.

        Raises:
            RuntimeError: a route has no rule.
        """
        if missing := sorted(operations(routes) - rules.keys()):
            raise RuntimeError(f"Add rules to {__name__} for these routes: {', '.join(missing)}.")
        self._patterns = []
        for operation, rule in rules.items():
            method, path = operation.split(" ")
            pattern, template, _ = compile_path(path)
            self._patterns.append((method, pattern, template, rule))

    def find(self, method: str, path: str) -> Rule:
        """The rule for a request."""
        return self.match(method, path)[1]

    def match(self, method: str, path: str) -> tuple[str | None, Rule]:
        """The path of a request's route, such as `/v1/jobs/{job_id}`, if there is one; its rule."""
        if path.startswith("/static/"):
            return "/static", PUBLIC
        for listed, pattern, route, rule in self._patterns:
            if listed == method and pattern.match(path):
                return route, rule
        return self.match("GET", path) if method == "HEAD" else (None, _ANY_KEY)
