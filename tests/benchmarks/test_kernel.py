"""The kernel benchmark checks its results, without a GPU in Triton's interpreter."""

import os
import subprocess
import sys


def test_a_small_layer_is_checked_in_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernel", "--device", "cpu", "--cases", "1"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "All results are correct" in run.stdout
