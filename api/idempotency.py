"""Idempotency-Key: a creating request that is sent again gets its first answer again."""

import hashlib
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import Depends, Header, Request, Response
from pydantic import BaseModel
from sqlalchemy.orm import Session

from deltadock.api.access import CallerDep
from deltadock.api.dependencies import WriteUnit
from deltadock.errors import IdempotencyKeyReused
from deltadock.storage.repositories import IdempotencyRepository

Answer = TypeVar("Answer", bound=BaseModel)


class Once:
    """Runs the work of one request once per key; the answer is stored in its transaction."""

    def __init__(self, session: Session, tenant_id: str, key: str | None, operation: str) -> None:
        self._answers = IdempotencyRepository(session, tenant_id)
        self._key = key
        self._operation = operation

    def answer(
        self,
        kind: type[Answer],
        body: BaseModel | None,
        response: Response,
        work: Callable[[], Answer],
    ) -> Answer:
        """The result of `work`, or the stored first answer of the same key and request.

        Equal requests at the same time wait for each other. A request that failed is not stored:
        it may be sent again with its key.

        Args:
            kind: the answer's class.
            body: the parsed body.
            response: takes the first answer's status and Location.
            work: does the work; may set the response's status and Location.

        Raises:
            IdempotencyKeyReused: the key belongs to another request.
        """
        if self._key is None:
            return work()
        content = "" if body is None else body.model_dump_json()
        fingerprint = hashlib.sha256(f"{self._operation}\n{content}".encode()).hexdigest()
        found = self._answers.find(self._key)
        if found is None:
            result = work()
            self._answers.add(
                self._key,
                fingerprint=fingerprint,
                status=response.status_code,
                location=response.headers.get("Location"),
                body=result.model_dump(mode="json"),
            )
            return result
        if found.fingerprint != fingerprint:
            raise IdempotencyKeyReused(
                f"The Idempotency-Key {self._key!r} belongs to another request of the last 24 "
                "hours. Use a new key for each request, and the same one only to repeat it."
            )
        if found.status is not None:
            response.status_code = found.status
        if found.location is not None:
            response.headers["Location"] = found.location
        return kind.model_validate(found.body)


async def once(
    request: Request,
    caller: CallerDep,
    unit: WriteUnit,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            description="For 24 hours, the same request with the same key gets the first answer; "
            "another request with it is refused.",
            examples=["9b2f6c1e-upload-7"],
        ),
    ] = None,
) -> Once:
    """The request's key, in the request's transaction."""
    operation = f"{request.method} {request.url.path}"
    return Once(unit.session, caller.tenant_id, idempotency_key, operation)


OnceDep = Annotated[Once, Depends(once, scope="function")]
