"""What to do about a job that did not end well, by its stable error code."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from deltadock import errors

_SEND_AGAIN: Final = "Send the same request again: blocks that were done are not done again."

_ADVICE: Final[Mapping[str, str]] = MappingProxyType(
    {
        errors.NonFiniteWeights.code: (
            "The fine-tune diverged or was saved badly. Upload a checkpoint without NaN and "
            "infinities; nothing that was stored needs to be removed."
        ),
        errors.ArchitectureMismatch.code: (
            "A delta needs a base with the same tensors. Register the checkpoint that the "
            "fine-tune started from, and name that as the base."
        ),
        errors.InvalidCalibration.code: (
            "Calibrate with a few hundred lines of text like the fine-tune's own, as UTF-8 "
            ".txt or .jsonl."
        ),
        errors.UnsupportedModel.code: (
            "This model family cannot be run for calibration. The method “exact” needs none."
        ),
        errors.HashMismatch.code: "Stored bytes are damaged. Upload the checkpoint again.",
        errors.WorkerLost.code: (
            f"Give the worker more memory, or look into its log. {_SEND_AGAIN}"
        ),
        errors.Unavailable.code: f"A service did not answer; GET /readyz says which. {_SEND_AGAIN}",
        errors.Cancelled.code: _SEND_AGAIN,
        errors.DeltadockError.code: f"The worker's log has the cause. {_SEND_AGAIN}",
    }
)


def advice_for(code: str) -> str | None:
    """A sentence or two for a person; None where the error's own message says it all."""
    return _ADVICE.get(code)
