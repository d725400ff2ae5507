"""Cases of the Triton kernels against float64, on a GPU or in Triton's interpreter.

They are plain functions, because a machine with a GPU may lack pytest: `test_kernel.py` makes each
a test, and `benchmarks/kernel.py` runs them before timing.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from deltadock.artifacts.encodings import decode_factors
from deltadock.kernels.svd_delta import (
    Chunks,
    DeltaTable,
    PackedDelta,
    TensorCache,
    empty_delta,
    svd_delta,
)
from deltadock.kernels.svd_delta import triton as kernel
from deltadock.kernels.svd_delta.chunks import CHUNK_ROWS
from deltadock.kernels.svd_delta.products import add_products
from deltadock.kernels.svd_delta.triton.forms import ExpandForm, Form, Variant
from tests.kernels.svd_delta.support import (
    Delta,
    encode,
    expected,
    make_delta,
    pack,
    relative_error,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

DTYPES = [torch.float16, torch.bfloat16]
SHAPES = [(131, 197), (64, 256)]
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 5e-3}
SLOTS, MAX_RANK = 4, 40

CASES: dict[str, Callable[[], None]] = {}
"""By name."""
GRAPH_CASES: dict[str, Callable[[], None]] = {}
"""Cases that need CUDA graphs, which the interpreter lacks."""


def case(
    cases: dict[str, Callable[[], None]] = CASES, **parameters: Sequence[Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function in `cases`, once per combination of its parameters."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for values in product(*parameters.values()):
            name = " ".join([function.__name__, *map(str, values)]).replace("_", " ")
            cases[name] = partial(function, **dict(zip(parameters, values, strict=True)))
        return function

    return register


def few(values: list[Any], count: int) -> list[Any]:
    """The first `count` of the values in the interpreter, which takes seconds for each."""
    return values[:count] if INTERPRETED else values


SKEWED = [(1, 8, 8), (37, 3, 2), (2, 2, 7)]
EVEN = [(9, 5, 4), (9, 4, 6)]


def make_table(shape: tuple[int, int], deltas: dict[int, Delta]) -> DeltaTable:
    table = DeltaTable(SLOTS, shape[1], [shape[0]], max_rank=MAX_RANK, device=DEVICE)
    for slot, delta in deltas.items():
        table.install(slot, delta.packed.to(DEVICE))
    return table


def make_chunks(table: DeltaTable, row_slots: Sequence[int]) -> Chunks:
    """Chunks with NaN in their scratch, which exposes reads of unwritten memory."""
    chunks = Chunks(64, SLOTS, [table], device=DEVICE)
    chunks.fixed.fill_(0x7F7F7F7F)
    chunks.peaks.fill_(0x7FFFFFFF)
    for scratch in (chunks.projected, chunks.scales, chunks.rests):
        scratch.fill_(torch.nan)
    chunks.assign(row_slots)
    return chunks


def run(
    y: Tensor,
    x: Tensor,
    table: DeltaTable,
    row_slots: Sequence[int],
    variant: Variant | None = None,
) -> Tensor:
    out = y.clone()
    kernel.svd_delta(out, x, table, make_chunks(table, row_slots), variant=variant)
    return out


def make_rows(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The base's outputs y and the inputs x."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(rows, shape[0], generator=generator) * 0.5
    x = torch.randn(rows, shape[1], generator=generator)
    return y.to(DEVICE, dtype), x.to(DEVICE, dtype)


# Of these, the first two have every shape and every dtype.
FORMS = [*zip(SHAPES, DTYPES, strict=True), *zip(SHAPES, reversed(DTYPES), strict=True)]


@case(form=few(FORMS, 2))
def rows_of_several_slots(form: tuple[tuple[int, int], torch.dtype]) -> None:
    shape, dtype = form
    deltas = {
        1: make_delta(shape, SKEWED, seed=1),
        2: make_delta(shape, EVEN, seed=2, midrise=True),
    }
    # Slot 0 is the base, slot 3 is empty, and slot 1 has more rows than a chunk.
    row_slots = [1, 0, 3, 2] + [1] * CHUNK_ROWS
    y, x = make_rows(len(row_slots), shape, dtype)
    got = run(y, x, make_table(shape, deltas), row_slots)
    want = expected(y, x, row_slots, {slot: delta.dense for slot, delta in deltas.items()})
    for row in range(len(row_slots)):
        assert relative_error(got[row], want[row]) < TOLERANCE[dtype]
    for row in (1, 2):
        assert torch.equal(got[row], y[row])


@case(dtype=few(DTYPES[::-1], 1))
def linears_that_share_their_input(dtype: torch.dtype) -> None:
    h_in, h_outs = 150, (70, 300, 33)
    tables = DeltaTable(SLOTS, h_in, h_outs, max_rank=3 * MAX_RANK, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    dense, biases = [], []
    packed: list[PackedDelta | None] = []
    for linear, (h_out, widths) in enumerate(zip(h_outs, (EVEN, SKEWED, []), strict=True)):
        bias = torch.randn(h_out, generator=generator) if linear != 1 else None
        encoded = encode(
            (h_out, h_in), widths, linear, midrise=linear != 1, row_scale=True, column_scale=True
        )
        packed.append(pack(encoded, bias).to(DEVICE))
        factors = [torch.from_numpy(getattr(decode_factors(encoded), n)).double() for n in "usv"]
        dense.append((factors[0] * factors[1]) @ factors[2])
        biases.append(torch.zeros(h_out) if bias is None else bias)
    tables.install(1, *packed)
    tables.install(3, None, packed[1], None)
    row_slots = [3, 0, 1, 2]
    y, x = make_rows(4, (sum(h_outs), h_in), dtype)
    got = run(y, x, tables, row_slots)
    begins = [0, 70, 370]
    for linear, begin in enumerate(begins):
        part = slice(begin, begin + h_outs[linear])
        for row, slot in enumerate(row_slots):
            if slot == 1 or (slot == 3 and linear == 1):
                want = y[row, part].double().cpu() + dense[linear] @ x[row].double().cpu()
                error = relative_error(got[row, part], want + biases[linear].double())
                # The column scale rounds the inputs a second time.
                assert error < TOLERANCE[dtype]
            else:
                assert torch.equal(got[row, part], y[row, part])


@case()
def several_steps_of_every_loop() -> None:
    """Vectors of several scales, one of them of an outlier's, and more ranks than warps take."""
    shape = (40, 2600)
    delta = make_delta(shape, [(3, 8, 8), (40, 3, 1), (70, 2, 2)])
    table = DeltaTable(SLOTS, shape[1], [shape[0]], max_rank=113, device=DEVICE)
    table.install(2, delta.packed.to(DEVICE))
    y, x = make_rows(1, shape, torch.float16)
    x[0, 1500] = 1000.0
    outputs = [
        run(
            torch.zeros_like(y), x, table, [2],
            Variant(shrink=(Form(warps, 168),), expand=(ExpandForm(warps, 168, columns),)),
        )
        for warps, columns in ((2, 256), (8, 64), (4, 128))
    ]  # fmt: skip
    want = expected(torch.zeros_like(y), x, [2], {2: delta.dense})
    assert relative_error(outputs[0], want) < TOLERANCE[torch.float16]
    # A row's result does not depend on the form, which the number of rows decides.
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


@case(bits=range(1, 9))
def every_width_on_either_side(bits: int) -> None:
    shape = (45, 70)
    delta = make_delta(shape, [(5, bits, 9 - bits)], seed=bits)
    y, x = make_rows(1, shape, torch.float16, seed=bits)
    got = run(torch.zeros_like(y), x, make_table(shape, {1: delta}), [1])
    want = expected(torch.zeros_like(y), x, [1], {1: delta.dense})
    assert relative_error(got, want) < TOLERANCE[torch.float16]


@case(shape=[(1, 1), (3, 33), (129, 31)])
def odd_shapes(shape: tuple[int, int]) -> None:
    delta = make_delta(shape, [(1, 7, 3)])
    y, x = make_rows(2, shape, torch.float16)
    got = run(y, x, make_table(shape, {3: delta}), [0, 3])
    want = expected(y, x, [0, 3], {3: delta.dense})
    assert relative_error(got[1], want[1]) < TOLERANCE[torch.float16]
    assert torch.equal(got[0], y[0])


@case()
def a_row_does_not_depend_on_its_neighbours() -> None:
    shape = (64, 130)
    table = make_table(shape, {1: make_delta(shape, EVEN), 2: make_delta(shape, SKEWED)})
    y, x = make_rows(CHUNK_ROWS + 1, shape, torch.float16)
    alone = run(y[:1], x[:1], table, [1])
    first = run(y, x, table, [1] * (CHUNK_ROWS + 1))
    last = run(y.flip(0), x.flip(0), table, [2, 0, *[1] * (CHUNK_ROWS - 1)])
    assert torch.equal(alone[0], first[0])
    assert torch.equal(alone[0], last[CHUNK_ROWS])


@case()
def a_row_does_not_depend_on_the_number_of_programs() -> None:
    """Each takes a run of tiles, which ends within a linear or a chunk."""
    h_in, h_outs = 40, (300, 130)
    table = DeltaTable(SLOTS, h_in, h_outs, max_rank=2 * MAX_RANK, device=DEVICE)
    first, second = (make_delta((h_out, h_in), SKEWED, seed=h_out) for h_out in h_outs)
    table.install(1, first.packed.to(DEVICE), second.packed.to(DEVICE))
    table.install(3, None, second.packed.to(DEVICE))
    row_slots = [3, 1, *[1] * CHUNK_ROWS, 0, 2]  # a chunk of slot 2 has no delta
    y, x = make_rows(len(row_slots), (sum(h_outs), h_in), torch.float16)
    outputs = []
    for registers in (200, 32):  # of which a GPU runs fewer or more programs at once
        variant = Variant((Form(4, 48),), (Form(8, 80),), (ExpandForm(2, registers, 64),))
        outputs.append(run(y, x, table, row_slots, variant))
    assert torch.equal(*outputs)
    want = y.double().cpu()
    for rows, begin, end, dense in (
        (slice(1, -2), 0, 300, first.dense), (slice(0, -2), 300, 430, second.dense),
    ):  # fmt: skip
        want[rows, begin:end] += x[rows].double().cpu() @ dense.T
    for row in range(len(row_slots)):
        assert relative_error(outputs[0][row], want[row]) < TOLERANCE[torch.float16]


@case()
def nan_in_a_row_does_not_spread() -> None:
    shape = (40, 64)
    table = make_table(shape, {1: make_delta(shape, EVEN)})
    y, x = make_rows(3, shape, torch.float16)
    clean = run(y, x, table, [1, 1, 1])
    x[1] = torch.nan
    got = run(y, x, table, [1, 1, 1])
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])


@case()
def strided_rows_leave_the_gaps_unmodified() -> None:
    shape = (40, 64)
    delta = make_delta(shape, EVEN)
    wide_y, wide_x = make_rows(2, (2 * shape[0], 2 * shape[1]), torch.float16)
    y, x = wide_y[:, : shape[0]], wide_x[:, : shape[1]]
    want = expected(y, x, [1, 1], {1: delta.dense})
    between = wide_y[:, shape[0] :].clone()
    table = make_table(shape, {1: delta})
    kernel.svd_delta(y, x, table, make_chunks(table, [1, 1]))
    assert relative_error(y, want) < TOLERANCE[torch.float16]
    assert torch.equal(wide_y[:, shape[0] :], between)


@case()
def a_slot_is_reused() -> None:
    shape = (40, 64)
    first, second = make_delta(shape, SKEWED, seed=1), make_delta(shape, EVEN, seed=2)
    table = make_table(shape, {1: first})
    y, x = make_rows(1, shape, torch.float16)
    table.remove(1)
    assert torch.equal(run(y, x, table, [1]), y)
    table.install(1, second.packed.to(DEVICE))
    want = expected(y, x, [1], {1: second.dense})
    assert relative_error(run(y, x, table, [1]), want) < TOLERANCE[torch.float16]


@case(dtype=DTYPES)
def many_rows_use_products(dtype: torch.dtype) -> None:
    h_in, h_outs = 70, (300, 33, 40)
    table = DeltaTable(SLOTS, h_in, h_outs, max_rank=3 * MAX_RANK, device=DEVICE)
    wide = make_delta((300, h_in), [(35, 3, 5), (2, 8, 1)], scaled=True)
    flat = make_delta((33, h_in), [(9, 6, 7)], seed=1, midrise=True)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(0))
    biased = empty_delta(40, h_in).with_bias(bias)
    table.install(1, wide.packed.to(DEVICE), None, biased.to(DEVICE))
    table.install(3, None, flat.packed.to(DEVICE), None)
    y, x = make_rows(5, (sum(h_outs), h_in), dtype)
    want = y.double().cpu()
    for rows, begin, end, dense in (([0, 2], 0, 300, wide.dense), ([3, 4], 300, 333, flat.dense)):
        want[rows, begin:end] += x[rows].double().cpu() @ dense.T
    want[[0, 2], 333:] += bias.double()
    unchanged = y[1].clone()
    pair = torch.tensor([0, 2], device=DEVICE)
    add_products(y, x, table, {1: pair, 2: slice(1, 2), 3: slice(3, 5)})
    assert torch.equal(y[1], unchanged)
    for row in (0, 2, 3, 4):
        for begin, end in ((0, 300), (300, 333), (333, 373)):
            error = relative_error(y[row, begin:end], want[row, begin:end])
            assert error < TOLERANCE[dtype]


@case(GRAPH_CASES)
def a_graph_serves_later_steps() -> None:
    shape = (256, 512)
    table = make_table(shape, {1: make_delta(shape, EVEN, seed=1)})
    chunks = make_chunks(table, [1, 1, 0])
    y, x = make_rows(3, shape, torch.bfloat16)
    cache = TensorCache(0)
    out = y.clone()
    svd_delta(out, x, table, chunks, cache)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        svd_delta(out, x, table, chunks, cache)
    second = make_delta(shape, SKEWED, seed=2)
    table.install(2, second.packed.to(DEVICE))
    chunks.assign([0, 2, 0])
    out.copy_(y)
    graph.replay()
    assert torch.equal(out, run(y, x, table, [0, 2, 0]))
    want = expected(y, x, [0, 2, 0], {2: second.dense})
    assert relative_error(out[1], want[1]) < TOLERANCE[torch.bfloat16]
