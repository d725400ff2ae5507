"""Reports as JSON."""

import json
import math

import pytest

from deltadock.compression.report import UNRELATED, Quality, Report


def test_figures_that_json_cannot_hold_are_left_out_with_a_note() -> None:
    """Postgres refuses them, after hours of a job."""
    report = Report("optimix", 1.0, 1000, 10**6, 10**6, "", None)
    report.quality = Quality(math.nan, 2.0, 0.5, math.inf, 1.0, 3.0, 100, 0.0, 0.0)
    report.distillation = {"before": math.nan, "after": 0.25}
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (document["kl"], document["nll"], document["agreement"]) == (None, None, 0.5)
    assert document["distillation"] == {"before": None, "after": 0.25}
    assert document["notes"] == ["Not finite, and so left out: kl, nll."]


@pytest.mark.parametrize(
    ("kl", "kl_base", "poor"),
    [
        (0.9, 2.0, False),
        (1.1, 2.0, True),
        (3.0, 2.0, True),
        (1e-12, 0.0, False),
        (1e-3, 0.0, True),
        (math.nan, 2.0, True),
        (math.inf, math.inf, True),
        (0.1, math.nan, False),
    ],
)
def test_a_delta_that_is_far_from_its_fine_tune_has_a_note(
    kl: float, kl_base: float, poor: bool
) -> None:
    report = Report("optimix", 1.0, 1000, 10**6, 10**6, "", None)
    report.set_quality(Quality(kl, kl_base, 0.5, 1.0, 1.0, 3.0, 100, 0.0, 0.0), [])
    assert [note.startswith("The delta is far from its fine-tune") for note in report.notes] == [
        True
    ] * poor
    assert all("Is this the base that was fine-tuned?" in note for note in report.notes)
    assert report.to_dict()["is_far"] is poor


def test_a_doubtful_base_is_asked_for_once_and_no_bits_are_advised() -> None:
    report = Report("optimix", 1.0, 1000, 10**6, 10**6, "", None, notes=[UNRELATED])
    report.set_quality(Quality(3.0, 2.0, 0.5, 1.0, 1.0, 3.0, 100, 0.0, 0.0), [])
    assert sum("Is this the base" in note for note in report.notes) == 1
    assert not any("more bits" in note for note in report.notes)
