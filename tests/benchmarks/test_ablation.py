"""The ablation: every variant's patches apply, and the method runs with them."""

import math

import pytest

from benchmarks import ablation
from benchmarks.methods import Pair


def test_every_variant_is_measured(pair: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "base": pair.base,
        "finetuned": pair.finetuned,
        "calibration": pair.calibration,
        "heldout": pair.heldout,
        "calibration-tokens": 512,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    ablation.main(arguments)
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [row[0].strip() for row in rows] == [*ablation.variants(), "as it is, distilled"]
    assert all(math.isfinite(float(row[1])) for row in rows)
    # Sizes show that the patches take effect.
    sizes = {row[0].strip(): row[-1] for row in rows}
    for name in ("one width for U and V of a rank", "no 1-bit codes"):
        assert sizes[name] != sizes["as it is, not distilled"]
