"""The base's product compiles without a GPU, with enough bytes on their way to every SM."""

import os

import pytest

from benchmarks.kernel import LAYER
from benchmarks.kernel_model import CLOCK, COPY_BANDWIDTH, MULTIPROCESSORS
from benchmarks.linear import FORMS, compile_for
from deltadock.kernels.linear.triton import CHUNK, MOST_ROWS, Form, linear_kernel
from tests.kernels.waits import check_accesses_after_the_wait, check_every_program_waits

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

LANES_A_BYTE = 128 * MULTIPROCESSORS * CLOCK / COPY_BANDWIDTH
"""Lane-instructions that an SM issues for a byte at copy bandwidth: 7."""
LATENCY = 0.8
"""Microseconds of a load from memory that others use too."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("capability", "rows"), [(80, 8), (90, 8), (90, MOST_ROWS)])
def test_machine_code(form: Form, capability: int, rows: int) -> None:
    code = compile_for(capability, form, rows)
    assert code.stack_bytes == 0
    bytes_of_step = 2 * form.columns * form.chunks * CHUNK
    (loop,) = (code.operations[loop] for loop in code.loops if "HMMA" in code.operations[loop])
    assert not {"BAR", "LDS", "LDSM", "STS"}.intersection(loop)
    # The loop may be of several steps.
    products = form.columns // 16 * form.chunks * 2 * rows // 8
    steps = loop.count("HMMA") / products
    assert 32 * len(loop) / (steps * bytes_of_step) < LANES_A_BYTE / 5
    # The words of a step are on their way at any time.
    warps = form.warps * code.programs_per_sm
    assert warps * bytes_of_step > 1.5 * LATENCY * COPY_BANDWIDTH / MULTIPROCESSORS


@pytest.mark.parametrize("form", FORMS)
def test_inputs_are_read_after_the_wait_and_weights_before(form: Form) -> None:
    code = compile_for(90, form, 8)
    check_every_program_waits(code)
    check_accesses_after_the_wait(code, linear_kernel, ["x_ptr", "y_ptr"])
    before = code.operations[: code.operations.index("ACQBULK")]
    assert before.count("LDG") == form.columns // 8 * form.chunks
    assert "CCTL" in before


def test_few_programs_have_bytes_enough_on_their_way() -> None:
    """The smallest of a 7B model's weights."""
    h_out = min(sum(each.h_outs) for each in LAYER)
    loaded = FORMS[0].warps * 2 * FORMS[0].columns * FORMS[0].chunks * CHUNK
    assert h_out / FORMS[0].columns * loaded > LATENCY * COPY_BANDWIDTH
