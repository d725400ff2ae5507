"""The figures of a delta file."""

import json

import pytest

from artifacts.reader import Artifact
from artifacts.summary import TensorSummary, summarize
from tests.artifacts.make_golden import GOLDEN


def test_rows_name_every_changed_tensor() -> None:
    with Artifact(GOLDEN) as artifact:
        _, rows = summarize(artifact)
    assert {row.name: row for row in rows} == {
        "proj.weight": TensorSummary(
            "proj.weight",
            "svd",
            (3, 5),
            # Four runs of at most 128 bytes a side, two zeros and a scale a rank.
            4 * 128 * 2 + 4 * (2 + 2 + 4),
            4,
            {"8": 1, "8/5": 1, "3": 1, "2": 1},
            0.25,
        ),
        "embed.weight": TensorSummary("embed.weight", "rows", (4, 3), 128 + 4 + 8, None, {}, None),
        "norm.weight": TensorSummary("norm.weight", "exact", (3,), 6, None, {}, None),
        "steps": TensorSummary("steps", "exact", (), 8, None, {}, None),
    }


def test_totals_count_the_whole_file() -> None:
    size = GOLDEN.stat().st_size
    with Artifact(GOLDEN) as artifact:
        totals, rows = summarize(artifact)
        assert totals["digest"] == artifact.digest
    assert totals["artifact_bytes"] == size > sum(row.bytes for row in rows)
    assert totals["checkpoint_bytes"] == 200
    assert totals["ratio"] == pytest.approx(200 / size)
    assert totals["true_bits"] == pytest.approx(8 * size / 100)
    assert (totals["method"], totals["nominal_bits"]) == ("adamix", 1.0)
    assert totals["base_digest"] == "b" * 64
    assert totals["files"] == ["chat_template.jinja", "generation_config.json"]
    assert json.loads(json.dumps(totals)) == totals
