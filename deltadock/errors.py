"""The domain errors of Deltadock, in one tree.

    DeltadockError                      500 internal_error
    ├── InvalidInput                    422 invalid_input
    │   ├── InvalidCheckpoint           422 invalid_checkpoint
    │   │   ├── UnsafeFile              422 unsafe_file
    │   │   ├── MalformedSafetensors    422 malformed_safetensors
    │   │   ├── NonFiniteWeights        422 non_finite_weights
    │   │   └── ArchitectureMismatch    422 architecture_mismatch
    │   ├── HashMismatch                422 hash_mismatch
    │   ├── UnknownMethod               422 unknown_method
    │   ├── BitsOutOfRange              422 bits_out_of_range
    │   ├── InvalidGoal                 422 invalid_goal
    │   ├── InvalidCalibration          422 invalid_calibration
    │   ├── InvalidAdapter              422 invalid_adapter
    │   ├── InvalidArtifact             422 invalid_artifact
    │   └── UnsupportedModel            422 unsupported_model
    ├── Unauthorized                    401 unauthorized
    ├── NotFound                        404 not_found
    ├── Conflict                        409 conflict
    │   ├── BaseMismatch                409 base_mismatch
    │   └── NotReady                    409 not_ready
    ├── TooLarge                        413 too_large
    ├── RangeNotSatisfiable             416 range_not_satisfiable
    ├── Cancelled                       409 cancelled
    ├── WorkerLost                      500 worker_lost
    ├── InferenceFailed                 500 inference_failed
    └── Unavailable                     503 unavailable
        └── Overloaded                  429 overloaded

`code` is stable: clients may match on it. `status` is what the api answers with. The message is
for a person and says what to do.
"""

from typing import ClassVar


class DeltadockError(Exception):
    """Root of every error that Deltadock raises on purpose."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class InvalidInput(DeltadockError):
    """What was sent cannot be used as it is."""

    status = 422
    code = "invalid_input"


class InvalidCheckpoint(InvalidInput):
    """The files are not a complete Hugging Face checkpoint."""

    code = "invalid_checkpoint"


class UnsafeFile(InvalidCheckpoint):
    """A file of a kind that can run code when opened (a pickle), or with an unsafe path."""

    code = "unsafe_file"


class MalformedSafetensors(InvalidCheckpoint):
    """A safetensors file that is truncated or whose header lies about its data."""

    code = "malformed_safetensors"


class NonFiniteWeights(InvalidCheckpoint):
    """A weight tensor holds NaN or an infinity."""

    code = "non_finite_weights"


class ArchitectureMismatch(InvalidCheckpoint):
    """The fine-tune's architecture or tensor shapes are not its base's."""

    code = "architecture_mismatch"


class HashMismatch(InvalidInput):
    """The bytes received do not have the digest that was announced."""

    code = "hash_mismatch"


class ContextExceeded(InvalidInput):
    """Prompt and answer are longer than the node's context."""

    code = "context_length_exceeded"


class UnknownMethod(InvalidInput):
    """No compression method has this name."""

    code = "unknown_method"


class BitsOutOfRange(InvalidInput):
    """The bit budget is outside what the method can use."""

    code = "bits_out_of_range"


class InvalidGoal(InvalidInput):
    """What decides the artifact's size is missing, contradictory or outside its range."""

    code = "invalid_goal"


class InvalidCalibration(InvalidInput):
    """The calibration text is empty, too short or not UTF-8."""

    code = "invalid_calibration"


class InvalidAdapter(InvalidInput):
    """Not a PEFT adapter, or one with a feature that cannot be imported."""

    code = "invalid_adapter"


class InvalidArtifact(InvalidInput):
    """A delta file that is not a readable `deltadock` artifact."""

    code = "invalid_artifact"


class UnsupportedModel(InvalidInput):
    """The model family cannot be calibrated or served."""

    code = "unsupported_model"


class Unauthorized(DeltadockError):
    """The request needs a secret that it does not bring."""

    status = 401
    code = "unauthorized"


class NotFound(DeltadockError):
    """Nothing has this id."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """No model has this name."""

    code = "model_not_found"


class Conflict(DeltadockError):
    """The request contradicts the present state."""

    status = 409
    code = "conflict"


class BaseMismatch(Conflict):
    """The artifact was made for another base."""

    code = "base_mismatch"


class NotReady(Conflict):
    """The delta exists but has not been compressed yet, or its compression failed."""

    code = "not_ready"


class TooLarge(DeltadockError):
    """A body or file is over its limit."""

    status = 413
    code = "too_large"


class RangeNotSatisfiable(DeltadockError):
    """The byte range asked for lies outside the object."""

    status = 416
    code = "range_not_satisfiable"


class Cancelled(DeltadockError):
    """The work was cancelled on request."""

    status = 409
    code = "cancelled"


class InferenceFailed(DeltadockError):
    """One request could not be computed; the others were not touched."""

    code = "inference_failed"


class WorkerLost(DeltadockError):
    """Every worker that took the job ended without a word; probably it needs more memory."""

    code = "worker_lost"


class Unavailable(DeltadockError):
    """A part that is needed does not answer; the same request may succeed later."""

    status = 503
    code = "unavailable"
    retryable = True


class Overloaded(Unavailable):
    """The queue is full."""

    status = 429
    code = "overloaded"
