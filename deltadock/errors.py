"""Deltadock's domain errors.

    DeltadockError                      500 internal_error
    ├── InvalidInput                    422 invalid_input
    │   ├── InvalidCheckpoint           422 invalid_checkpoint
    │   │   ├── UnsafeFile              422 unsafe_file
    │   │   ├── MalformedSafetensors    422 malformed_safetensors
    │   │   ├── NonFiniteWeights        422 non_finite_weights
    │   │   ├── ArchitectureMismatch    422 architecture_mismatch
    │   │   └── UnchangedCheckpoint     422 unchanged_checkpoint
    │   ├── HashMismatch                422 hash_mismatch
    │   ├── ContextExceeded             422 context_length_exceeded
    │   ├── GrammarTooComplex           422 grammar_too_complex
    │   ├── UnknownMethod               422 unknown_method
    │   ├── BitsOutOfRange              422 bits_out_of_range
    │   ├── InvalidGoal                 422 invalid_goal
    │   ├── InvalidCalibration          422 invalid_calibration
    │   ├── InvalidAdapter              422 invalid_adapter
    │   ├── InvalidArtifact             422 invalid_artifact
    │   └── UnsupportedModel            422 unsupported_model
    │       └── NoChatTemplate          422 no_chat_template
    ├── BadRequest                      400 bad_request
    ├── Unauthorized                    401 unauthorized
    ├── Forbidden                       403 forbidden
    │   └── QuotaExceeded               403 quota_exceeded
    ├── NotFound                        404 not_found
    │   ├── ModelNotFound               404 model_not_found
    │   └── RouteNotFound               404 route_not_found
    ├── MethodNotAllowed                405 method_not_allowed
    ├── Conflict                        409 conflict
    │   ├── BaseMismatch                409 base_mismatch
    │   ├── IdempotencyKeyReused        409 idempotency_key_reused
    │   └── NotReady                    409 not_ready
    ├── PreconditionFailed              412 precondition_failed
    ├── TooLarge                        413 too_large
    ├── RangeNotSatisfiable             416 range_not_satisfiable
    ├── Cancelled                       409 cancelled
    ├── NotInstalled                    501 not_installed
    ├── InferenceFailed                 500 inference_failed
    ├── DamagedBlob                     502 damaged_blob
    ├── StorageFull                     507 storage_full
    ├── WorkerLost                      500 worker_lost
    └── Unavailable                     503 unavailable
        ├── Overloaded                  429 overloaded
        └── RateLimited                 429 rate_limited

`code` is stable: clients may match on it. `status` is the HTTP status; an invalid input is a 409
where only what is stored makes it one (`refused_by_state`). The message is for people and says what
to do.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar


class DeltadockError(Exception):
    """Base class of all errors that Deltadock raises deliberately."""

    status: int = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    permanent: ClassVar[bool] = False
    """Whether the same inputs always end so: a job that ended so is not retried."""

    def __init__(
        self, message: str, *, headers: Mapping[str, str] | None = None, **details: object
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.headers = headers or {}
        """Headers of the response."""


class InvalidInput(DeltadockError):
    """The input is invalid."""

    status = 422
    code = "invalid_input"
    permanent = True


class InvalidCheckpoint(InvalidInput):
    """The files are not a complete Hugging Face checkpoint."""

    code = "invalid_checkpoint"


class UnsafeFile(InvalidCheckpoint):
    """A file that can run code when loaded (a pickle), or with an unsafe path."""

    code = "unsafe_file"


class MalformedSafetensors(InvalidCheckpoint):
    """A safetensors file that is truncated or whose header contradicts its data."""

    code = "malformed_safetensors"


class NonFiniteWeights(InvalidCheckpoint):
    """A weight tensor contains NaN or infinity."""

    code = "non_finite_weights"


class ArchitectureMismatch(InvalidCheckpoint):
    """The fine-tune's architecture or tensor shapes differ from its base's."""

    code = "architecture_mismatch"


class UnchangedCheckpoint(InvalidCheckpoint):
    """The fine-tune equals its base, tensors and files of the model alike."""

    code = "unchanged_checkpoint"


class HashMismatch(InvalidInput):
    """The received bytes do not match the announced digest."""

    code = "hash_mismatch"


class ContextExceeded(InvalidInput):
    """The prompt leaves no room for an answer in the node's context."""

    code = "context_length_exceeded"


class GrammarTooComplex(InvalidInput):
    """A grammar takes more time or memory than the node allows, to compile or for a next token."""

    code = "grammar_too_complex"


class UnknownMethod(InvalidInput):
    """No compression method has this name."""

    code = "unknown_method"


class BitsOutOfRange(InvalidInput):
    """The bit budget is outside the method's range."""

    code = "bits_out_of_range"


class InvalidGoal(InvalidInput):
    """The size or quality goal is missing, contradictory or out of range."""

    code = "invalid_goal"


class InvalidCalibration(InvalidInput):
    """The calibration text is empty, too short or not UTF-8."""

    code = "invalid_calibration"


class InvalidAdapter(InvalidInput):
    """Not a PEFT adapter, or one that uses an unsupported feature."""

    code = "invalid_adapter"


class InvalidArtifact(InvalidInput):
    """The file is not a readable `deltadock` artifact."""

    code = "invalid_artifact"


class UnsupportedModel(InvalidInput):
    """The model family cannot be calibrated or served."""

    code = "unsupported_model"


class NoChatTemplate(UnsupportedModel):
    """A conversation for a model that has no chat template."""

    code = "no_chat_template"


class BadRequest(DeltadockError):
    """The request is not HTTP as this service reads it."""

    status = 400
    code = "bad_request"


class Unauthorized(DeltadockError):
    """The request has no valid key or secret."""

    status = 401
    code = "unauthorized"


class Forbidden(DeltadockError):
    """The key lacks the scope that the request needs, or a form its token."""

    status = 403
    code = "forbidden"


class QuotaExceeded(Forbidden):
    """The tenant has stored as much as it may."""

    code = "quota_exceeded"


class NotFound(DeltadockError):
    """There is no object with this id."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """There is no model with this name."""

    code = "model_not_found"


class RouteNotFound(NotFound):
    """OpenAI has this route, and Deltadock does not."""

    code = "route_not_found"


class MethodNotAllowed(DeltadockError):
    """The path has no such method; the Allow header lists those that it has."""

    status = 405
    code = "method_not_allowed"


class Conflict(DeltadockError):
    """The request conflicts with the current state."""

    status = 409
    code = "conflict"


class BaseMismatch(Conflict):
    """The artifact was compressed against another base."""

    code = "base_mismatch"


class IdempotencyKeyReused(Conflict):
    """The Idempotency-Key was used for another request."""

    code = "idempotency_key_reused"


class NotReady(Conflict):
    """The delta's compression is unfinished or failed."""

    code = "not_ready"


class PreconditionFailed(DeltadockError):
    """The object is not the version that `If-Match` names."""

    status = 412
    code = "precondition_failed"


class TooLarge(DeltadockError):
    """A body or file exceeds its size limit."""

    status = 413
    code = "too_large"
    permanent = True


class RangeNotSatisfiable(DeltadockError):
    """The requested byte range is outside the object."""

    status = 416
    code = "range_not_satisfiable"


class Cancelled(DeltadockError):
    """The job or the transfer was cancelled on request."""

    status = 409
    code = "cancelled"


class NotInstalled(DeltadockError):
    """An optional package is missing where this runs."""

    status = 501
    code = "not_installed"


class InferenceFailed(DeltadockError):
    """One request failed on the node; others are unaffected."""

    code = "inference_failed"


class DamagedBlob(DeltadockError):
    """The store's bytes of a blob do not match its digest; restore it or store it again."""

    status = 502
    code = "damaged_blob"

    @property
    def digest(self) -> str | None:
        """The blob's, if it is known."""
        return str(self.details["digest"]) if "digest" in self.details else None


class StorageFull(DeltadockError):
    """There is no space left on a disk or in the object store; free some, then try again."""

    status = 507
    code = "storage_full"


class WorkerLost(DeltadockError):
    """Every worker that started the job disappeared; it probably needs more memory."""

    code = "worker_lost"


class Unavailable(DeltadockError):
    """A required service does not answer; the same request may succeed later."""

    status = 503
    code = "unavailable"
    retryable = True


class Overloaded(Unavailable):
    """The queue is full."""

    status = 429
    code = "overloaded"


class RateLimited(Unavailable):
    """The tenant sends more than its rate allows, or runs as many jobs as it may."""

    status = 429
    code = "rate_limited"


@contextmanager
def refused_by_state() -> Iterator[None]:
    """Answer 409 to what is invalid only with what is stored, by the code that says why."""
    try:
        yield
    except InvalidInput as error:
        error.status = Conflict.status
        raise


def error_for(code: str, message: str, **details: object) -> DeltadockError:
    """An error of the class with this code; one of an unknown code is named in the message."""
    classes = [DeltadockError]
    for kind in classes:
        if kind.code == code:
            return kind(message, headers=None, **details)
        classes.extend(kind.__subclasses__())
    return DeltadockError(f"{code}: {message}", headers=None, **details)
