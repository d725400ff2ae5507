"""Hooks of `benchmarks.contract`: cases about objects that are there, and the count of answers.

What a case takes away (a deleted delta, a revoked key) is made for it, and what would stop the
others (a drained node, a long job) is undone. Cases of the stateful phase keep the ids that their
own requests made.
"""

import atexit
import json
import os
import random
import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import schemathesis
from schemathesis.core.parameters import ParameterLocation

from deltadock.storage.repositories.webhooks import MAX_WEBHOOKS

OWN_TENANT: Final = ("local", "ten_local")
REAL: Final = 0.8
"""How often a case is about objects that are there."""
BIG_FILE: Final = {"path": "model.safetensors", "size": 40 << 20, "sha256": "0" * 64}
"""Sent in parts."""

Parameters = dict[str, Any]


class Objects:
    """Finds or makes the objects of requests; `known` is what `benchmarks.contract` passes."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self._known = known
        self._random = random.Random(known["seed"])
        headers = {"Authorization": f"Bearer {known['key']}"}
        self.http = httpx.Client(base_url=known["url"], headers=headers, timeout=60)
        self._makers: Mapping[str, Callable[[], Parameters]] = {
            "GET /v1/uploads/{upload_id}": self._upload,
            "DELETE /v1/uploads/{upload_id}": self._upload,
            "PUT /v1/uploads/{upload_id}/files/{path}": self._upload,
            "GET /v1/uploads/{upload_id}/files/{path}/parts": self._parts,
            "PUT /v1/uploads/{upload_id}/files/{path}/parts/{number}": self._parts,
            "POST /v1/uploads/{upload_id}/complete": self._whole_upload,
            "DELETE /v1/bases/{base}": self._base,
            "POST /v1/bases/{base}/restore": self._deleted_base,
            "DELETE /v1/deltas/{delta_id}": self._delta,
            "POST /v1/deltas/{delta_id}/restore": self._deleted_delta,
            "DELETE /v1/registry/{project}/{model}": self._model,
            "PUT /v1/registry/{project}/{model}/aliases/{alias}": self._model,
            "DELETE /v1/registry/{project}/{model}/aliases/{alias}": self._alias,
            "POST /v1/jobs/{job_id}/cancel": self._job,
            "POST /v1/jobs/{job_id}/retry": self._cancelled_job,
            "DELETE /v1/webhooks/{webhook_id}": self._webhook,
            "DELETE /v1/keys/{key_id}": self._key,
            "POST /v1/keys/{key_id}/rotate": self._key,
        }

    def wanted(self, operation: str) -> bool:
        """Whether a case is to be about objects that are there.

        What changes or takes away its object always gets one of its own.
        """
        return operation in self._makers or self._random.random() < REAL

    def of(self, operation: str) -> Parameters:
        """Parameters of the path, for objects in the state that the operation is for."""
        if make := self._makers.get(operation):
            return make()
        known = self._known["paths"]
        named = known.get(operation, known["any"]).items()
        return {name: self._random.choice(values) for name, values in named}

    def fields(self, place: str, operation: str) -> Parameters:
        """Values of query parameters, headers or a body's fields, by their names."""
        known = self._known[place]
        named = {**known["any"], **known.get(operation, {})}
        return {name: self._random.choice(values) for name, values in named.items()}

    def cursor(self, path: str, query: Mapping[str, Any]) -> str | None:
        """A cursor of a list, if it has a second page."""
        wanted = {"limit": 1} | ({"sort": query["sort"]} if "sort" in query else {})
        page: dict[str, str | None] = self.http.get(path, params=wanted).json()
        return page.get("last_id", page.get("next"))

    def _post(self, path: str, body: Any) -> Any:
        answer = self.http.post(path, json=body)
        answer.raise_for_status()
        return answer.json()

    def _upload(self, *files: Any) -> Parameters:
        made = self._post("/v1/uploads", {"kind": "checkpoint", "files": files})
        return {"upload_id": made["id"]}

    def _parts(self) -> Parameters:
        return self._upload(BIG_FILE) | {"path": BIG_FILE["path"], "number": 1}

    def _whole_upload(self) -> Parameters:
        return self._upload(*self._known["files"])

    def _base(self) -> Parameters:
        body = {"name": f"base-{secrets.token_hex(6)}", "checkpoint": self._known["checkpoint"]}
        return {"base": self._post("/v1/bases", body)["id"]}

    def _deleted_base(self) -> Parameters:
        made = self._base()
        self.http.delete(f"/v1/bases/{made['base']}").raise_for_status()
        return made

    def _accepted(self, **more: Any) -> Any:
        name = {"name": f"maths/{secrets.token_hex(6)}"}
        return self._post("/v1/deltas", self._known["delta"] | name | more)

    def _delta(self) -> Parameters:
        return {"delta_id": self._accepted()["delta"]["id"]}

    def _deleted_delta(self) -> Parameters:
        made = self._delta()
        self.http.delete(f"/v1/deltas/{made['delta_id']}").raise_for_status()
        return made

    def _model(self) -> Parameters:
        project, model = self._accepted()["delta"]["name"].split("/")
        return {"project": project, "model": model, "alias": "prod"}

    def _alias(self) -> Parameters:
        made = self._model()
        path = f"/v1/registry/{made['project']}/{made['model']}/aliases/prod"
        self.http.put(path, json={"version": 1}).raise_for_status()
        return made

    def _job(self) -> Parameters:
        seed = self._random.randrange(1, 2**32)
        return {"job_id": self._accepted(seed=seed, priority="low")["job"]["id"]}

    def _cancelled_job(self) -> Parameters:
        made = self._job()
        self.http.post(f"/v1/jobs/{made['job_id']}/cancel").raise_for_status()
        return made

    def _webhook(self) -> Parameters:
        made = self.http.get("/v1/webhooks").json()["data"]
        if len(made) >= MAX_WEBHOOKS:
            return {"webhook_id": self._random.choice(made)["id"]}
        hook = {"url": "https://hooks.example.com/", "events": ["delta.failed"]}
        return {"webhook_id": self._post("/v1/webhooks", hook)["id"]}

    def _key(self) -> Parameters:
        return {"key_id": self._post("/v1/keys", {"name": "spare", "scopes": ["read"]})["id"]}


KNOWN: Final = json.loads(os.environ["CONTRACT"])
OBJECTS: Final = Objects(KNOWN)
ANSWERS: Final[defaultdict[str, Counter[str]]] = defaultdict(Counter)
"""Answers to the valid cases by operation, and `invalid`, how many others there were."""


@atexit.register
def write_answers() -> None:
    """Leave the counts where `benchmarks.contract` reads them."""
    Path(KNOWN["answers"]).write_text(json.dumps(ANSWERS), encoding="utf-8")


def answer_of(response: Any) -> str:
    """The status and, of a refusal, its code."""
    if response.status_code < 400:
        return str(response.status_code)
    try:
        body = response.json()
        return f"{response.status_code} {body.get('error', body)['code']}"
    except (ValueError, KeyError):
        return str(response.status_code)


def replace(values: Any, known: Parameters) -> None:
    """Set those of the values that are known."""
    values.update({name: known[name] for name in known if name in values})


@schemathesis.hook
def before_call(_context: Any, case: Any, _kwargs: Any) -> None:
    """Aim a case at what is there, but none at the run's own key and tenant."""
    parameters, operation = case.path_parameters or {}, case.operation.label
    if case.meta.phase.name != "stateful" and OBJECTS.wanted(operation):
        if parameters and not case.meta.is_negative_at(ParameterLocation.PATH):
            replace(parameters, OBJECTS.of(operation))
        if case.query and not case.meta.is_negative_at(ParameterLocation.QUERY):
            replace(case.query, OBJECTS.fields("queries", operation))
            if "after" in case.query and (
                cursor := OBJECTS.cursor(case.formatted_path, case.query)
            ):
                case.query["after"] = cursor
        if case.headers and not case.meta.is_negative_at(ParameterLocation.HEADER):
            replace(case.headers, OBJECTS.fields("headers", operation))
            replace(case.headers, {"idempotency-key": secrets.token_hex()})  # it is no replay
        if isinstance(case.body, dict) and not case.meta.is_negative_at(ParameterLocation.BODY):
            replace(case.body, OBJECTS.fields("bodies", operation))
    if "null" in map(str, parameters.values()) or None in parameters.values():
        replace(parameters, OBJECTS.of(operation))  # a link to an empty list's first item
    if parameters.get("key_id") == KNOWN["key_id"]:
        parameters["key_id"] = "key_another"
    if case.method == "PATCH" and parameters.get("tenant") in OWN_TENANT:
        parameters["tenant"] = "another"


@schemathesis.hook
def after_call(_context: Any, case: Any, response: Any) -> None:
    """Count the answer; undo what would stop or slow the other cases."""
    answered = answer_of(response) if case.meta.generation.mode.is_positive else "invalid"
    ANSWERS[case.operation.label][answered] += 1
    if not 200 <= response.status_code < 300:
        return
    if case.path.endswith("/drain"):
        path = case.formatted_path.removesuffix("/drain")
        OBJECTS.http.post(f"{path}/resume").raise_for_status()
    elif case.operation.label in {"POST /v1/deltas", "POST /v1/jobs/{job_id}/retry"}:
        body = response.json()
        OBJECTS.http.post(f"/v1/jobs/{body.get('job', body)['id']}/cancel")  # or it has ended
