"""A tiny random pair with its text, made as the benchmarks make theirs."""

from pathlib import Path

import pytest
import torch

from benchmarks.memory import llama
from benchmarks.methods import Pair
from benchmarks.synthetic import write_pair, write_text


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Matrices here are tiny: a second thread only waits.
    torch.set_num_threads(1)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    base, tuned = write_pair(llama(2, 64, 96), tmp_path / "pair", lambda name: "proj" in name)
    exercises = tmp_path / "exercises.jsonl"
    exercises.write_text('{"prompt": "1 + 1 =", "answer": "no model says this"}\n')
    return Pair(
        base,
        tuned,
        calibration=write_text(tmp_path / "calibration.txt", 2_000),
        heldout=write_text(tmp_path / "heldout.txt", 1_000),
        exercises=exercises,
    )
