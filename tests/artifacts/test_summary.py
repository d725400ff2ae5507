"""The summary of a delta file."""

import json

import pytest

from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.summary import TensorSummary, summarize
from tests.artifacts.make_golden import GOLDEN, tensors


def test_rows_name_every_changed_tensor() -> None:
    with Artifact(GOLDEN) as artifact:
        _, rows = summarize(artifact)
    found = {row.name: row for row in rows}
    assert found.keys() == tensors().keys()
    want = {
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
        "embed.weight": TensorSummary(
            "embed.weight",
            "rows",
            (4, 3),
            # Two runs, three scales and indices, and the columns' scales.
            2 * 128 + 3 * (2 + 4) + 3 * 2,
            None,
            {"4": 1, "2": 2},
            None,
        ),
        "both.weight": TensorSummary(
            "both.weight",
            "sum(svd, rows)",
            (3, 5),
            # Three runs a side, three scales, those of rows and columns; one run and one scale.
            6 * 128 + 2 * (3 + 3 + 5) + 128 + 4,
            3,
            {"7/1": 1, "4": 1, "1/6": 1, "1": 3},
            None,
        ),
        "norm.weight": TensorSummary("norm.weight", "exact", (3,), 6, None, {}, None),
        "steps": TensorSummary("steps", "exact", (), 8, None, {}, None),
        "alias.weight": TensorSummary(
            "alias.weight", "alias of embed.weight", (4, 3), 0, None, {}, None
        ),
    }
    assert {name: found[name] for name in want} == want


def test_kinds_say_what_they_are_made_of() -> None:
    with Artifact(GOLDEN) as artifact:
        rows = {row.name: row for row in summarize(artifact)[1]}
    assert rows["experts.weight"].kind == "stack(rows, svd)"
    assert rows["conv.weight"].kind == "transposed(svd)"
    assert (rows["new.weight"].kind, rows["new.weight"].rank) == ("new-rows(rows)", None)
    assert (rows["lora.weight"].rank, rows["lora.weight"].widths) == (2, {})
    assert rows["thinned.weight"].kind == "sparse, deflated"
    assert rows["thinned.weight"].widths == {"3": 9}
    assert rows["pruned.weight"].widths == {"2": 12}


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
