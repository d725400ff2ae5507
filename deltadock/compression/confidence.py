"""What a figure of some tokens says of other text: confidence bounds of KL and agreement."""

import math
from typing import Final

from deltadock.compression.options import Goal
from deltadock.compression.report import Quality
from deltadock.errors import InvalidGoal

CONFIDENCE: Final = 0.95
STANDARD_ERRORS: Final = 1.645
"""To the end of a normal distribution's one-sided interval of `CONFIDENCE`."""
UNSEEN: Final = -math.log(1 - CONFIDENCE)
"""How often tokens would occur in a text of which, with less than `CONFIDENCE`, one were in it."""
LEAST_TOKENS: Final = 512
"""Tokens below which the mean KL of choosing windows says too little of other text's."""


def confidence_bound(goal: Goal, quality: Quality) -> float:
    """The figure that the bound is on, at the end of its confidence interval that is worse.

    Of agreement, Clopper and Pearson's, which is exact. Of KL there is no exact one: half of it is
    in one token of a hundred, so that a mean is small where such tokens are missing, and its
    standard error then as well. Beyond the normal distribution's interval stand tokens that this
    text may lack: as many as would be missing in one text of twenty, each as bad as its worst.
    """
    if goal.kind == "max_kl":
        unseen = UNSEEN * quality.kl_max / quality.tokens
        return quality.kl + STANDARD_ERRORS * quality.kl_error + unseen
    return least_share(round(quality.agreement * quality.tokens), quality.tokens)


def least_share(hits: int, count: int) -> float:
    """The share of which `hits` of `count` or more come up in only `1 - CONFIDENCE` of the cases.

    Source: C. J. Clopper, E. S. Pearson, "The Use of Confidence or Fiducial Limits", 1934.
    """
    low, high = 0.0, hits / count
    while (share := (low + high) / 2) not in (low, high):
        if _log_tail(hits, count, share) < math.log(1 - CONFIDENCE):
            low = share
        else:
            high = share
    return low


def _log_tail(hits: int, count: int, share: float) -> float:
    """Logarithm of a binomial distribution's sum from `hits` on, which are more than its mean."""
    first = (
        math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
        + hits * math.log(share) + (count - hits) * math.log1p(-share)
    )  # fmt: skip
    term = total = 1.0
    for number in range(hits, count):
        term *= (count - number) / (number + 1) * share / (1 - share)
        total += term
        if term < 1e-12 * total:
            break
    return first + math.log(total)


def check_tokens(goal: Goal, windows: int, length: int) -> None:
    """Refuse a bound that choosing windows cannot vouch for, whatever is measured.

    Args:
        goal: the bound.
        windows: number of choosing windows.
        length: of a window, in tokens.

    Raises:
        InvalidGoal: naming how many can.
    """
    least = LEAST_TOKENS
    if goal.kind == "min_agreement":
        # Below this, agreement of all tokens has a smaller confidence bound.
        least = math.ceil(math.log(1 - CONFIDENCE) / math.log(goal.value))
    if windows * length < least:
        text = 16 * length * math.ceil(least / length)
        raise InvalidGoal(
            f"To vouch for {goal} takes {least} tokens that choose, of about a sixteenth of the "
            f"calibration text; this text gives {windows * length}. Give text, and "
            f"`--calibration-tokens`, of {text} tokens or more, loosen the bound, or give a size."
        )
