"""A tiny random pair with its texts, written as the benchmarks write theirs."""

from pathlib import Path

import pytest
import torch

from benchmarks.memory import llama
from benchmarks.methods import Pair
from benchmarks.synthetic import write_pair, write_text


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Tiny matrices do not gain from a second thread.
    torch.set_num_threads(1)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    base, tuned = write_pair(llama(1, 64, 96), tmp_path / "pair", lambda name: "proj" in name)
    exercises = tmp_path / "exercises.jsonl"
    exercises.write_text('{"prompt": "1 + 1 =", "answer": "no model says this"}\n')
    return Pair(
        base,
        tuned,
        calibration=write_text(tmp_path / "calibration.txt", 2_000),
        heldout=write_text(tmp_path / "heldout.txt", 1_000),
        exercises=exercises,
    )
