"""The CPU path against float64."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from deltadock.kernels.cache import RowPool
from deltadock.kernels.svd_delta import (
    Chunks,
    DeltaTable,
    PackedDelta,
    TensorCache,
    cpu,
    svd_delta,
)
from deltadock.kernels.svd_delta.cpu import (
    MATMUL_ROWS,
    EmbeddingBagPlan,
    EmbeddingBagSlot,
    unpack_slot,
)
from tests.kernels.svd_delta.support import Delta, expected, make_delta, relative_error

SHAPE = (50, 90)
WIDTHS = [(2, 8, 8), (7, 3, 4), (3, 2, 2)]
WIDE = [(1, 8, 7), (60, 1, 2), (9, 5, 3)]
ROOM = [0, 10**6]
"""Cache limits: nothing fits, or everything."""


def make_table(deltas: dict[int, Delta]) -> DeltaTable:
    table = DeltaTable(4, SHAPE[1], [SHAPE[0]], max_rank=12)
    for slot, delta in deltas.items():
        table.install(slot, delta.packed)
    return table


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 5e-6), (torch.float16, 1e-3), (torch.bfloat16, 5e-3)],
)
@pytest.mark.parametrize("limit", ROOM)
@pytest.mark.parametrize("more", [0, MATMUL_ROWS])
def test_rows_of_several_slots(limit: int, more: int, dtype: torch.dtype, tolerance: float) -> None:
    deltas = {
        1: make_delta(SHAPE, WIDTHS, seed=1),
        2: make_delta(SHAPE, WIDTHS, seed=2, midrise=True, scaled=True),
    }
    table = make_table(deltas)
    row_slots = [2, 0, 1, 3, 1, *[1] * more]
    chunks = Chunks(32, 4, [table])
    chunks.assign(row_slots)
    count = len(row_slots)
    y, x = torch.randn(count, SHAPE[0]).to(dtype), torch.randn(count, SHAPE[1]).to(dtype)
    want = expected(y, x, row_slots, {slot: delta.dense for slot, delta in deltas.items()})
    got = y.clone()
    svd_delta(got, x, table, chunks, TensorCache(limit))
    for row in range(count):
        assert relative_error(got[row], want[row]) < tolerance
    assert torch.equal(got[[1, 3]], y[[1, 3]])


class SharedInput:
    """Three linears that share an input; slots have deltas for some or all of them."""

    h_in, h_outs = 130, (70, 64, 33)

    def __init__(self) -> None:
        self.table = DeltaTable(6, self.h_in, self.h_outs, max_rank=210)
        self.dense: dict[int, Tensor] = {}
        self.bias: dict[int, Tensor] = {}

    def install(self, slot: int, widths: Sequence[list[tuple[int, int, int]] | None]) -> None:
        packed: list[PackedDelta | None] = []
        dense, biases = [], []
        for linear, (h_out, runs) in enumerate(zip(self.h_outs, widths, strict=True)):
            bias = torch.randn(h_out) if linear == 1 and runs is not None else None
            delta = make_delta((h_out, self.h_in), runs or [], slot + linear, scaled=linear > 0)
            with_bias = delta.packed if bias is None else delta.packed.with_bias(bias)
            packed.append(None if runs is None else with_bias)
            dense.append(delta.dense if runs else torch.zeros(h_out, self.h_in).double())
            biases.append(torch.zeros(h_out) if bias is None else bias)
        self.table.install(slot, *packed)
        self.dense[slot], self.bias[slot] = torch.cat(dense), torch.cat(biases).double()

    def check(self, row_slots: list[int], cache: TensorCache, width: int = 200) -> None:
        chunks = Chunks(64, 6, [self.table])
        chunks.assign(row_slots)
        # Strided rows: views of wider matrices.
        y, x = (
            torch.randn(len(row_slots), width)[:, : sum(self.h_outs)],
            torch.randn(len(row_slots), 140)[:, : self.h_in],
        )
        want = expected(y, x, row_slots, self.dense)
        for row, slot in enumerate(row_slots):
            want[row] += self.bias.get(slot, torch.zeros(()))
        svd_delta(y, x, self.table, chunks, cache)
        for row in range(len(row_slots)):
            assert relative_error(y[row], want[row]) < 5e-6


@pytest.mark.parametrize("limit", ROOM)
def test_linears_that_share_their_input(limit: int) -> None:
    shared, cache = SharedInput(), TensorCache(limit)
    shared.install(1, [WIDTHS, WIDE, WIDTHS])
    shared.install(2, [None, WIDE, None])
    shared.install(3, [WIDE, [], WIDTHS])
    shared.install(4, [[], [], []])
    for row_slots in (
        [1, 2, 0, 3],
        [1, 2, 0, 3],
        [3, 3, 1],
        [2, *[3] * MATMUL_ROWS, 1, *[1] * MATMUL_ROWS],
        [2, 5],
        [0, 4],
        [4] * MATMUL_ROWS,
    ):
        shared.check(row_slots, cache)
    assert cache.nbytes <= limit
    # Replace a slot's delta, for the same rows.
    shared.check([1, 2], cache)
    shared.install(1, [WIDE, None, WIDTHS])
    shared.check([1, 2], cache)


def test_steps_with_an_unchanged_batch_reuse_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[EmbeddingBagPlan] = []

    class Counted(EmbeddingBagPlan):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            plans.append(self)

    monkeypatch.setattr(cpu, "EmbeddingBagPlan", Counted)
    shared, cache = SharedInput(), TensorCache(10**6)
    shared.install(1, [WIDTHS, WIDE, WIDTHS])
    shared.install(2, [None, WIDE, None])
    for row_slots, width, count in (
        ([1, 2], 200, 1),
        ([1, 2], 200, 1),
        ([1, 2], 201, 2),
        ([2, 1], 201, 3),
        ([0, 2, 1], 201, 4),
    ):
        shared.check(row_slots, cache, width)
        assert len(plans) == count
    shared.table.remove(1)
    assert shared.table.cpu_plan is None, "it references rows of the pool"


def test_a_slot_moves_to_the_pool_once_it_has_room() -> None:
    shared = SharedInput()
    shared.install(1, [WIDTHS, WIDE, WIDTHS])
    shared.install(2, [WIDTHS, WIDE, WIDTHS])
    size = unpack_slot(shared.table.deltas[1], shared.h_outs, RowPool(10**6)).nbytes
    cache = TensorCache(int(1.6 * size))
    shared.check([1], cache)
    for _ in range(4):  # evicts slot 1, whose rows the plan still references
        cache.begin_step()
        shared.check([2], cache)
    unpacked: EmbeddingBagSlot = cache.get(shared.table.deltas[2], pytest.fail)
    assert unpacked.pooled is not None
    assert unpacked.nbytes == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("more", [0, MATMUL_ROWS])
def test_inputs_with_a_large_mean_keep_their_precision(more: int) -> None:
    shape = (64, 4096)
    delta = make_delta(shape, [(3, 8, 8), (70, 4, 4)], scaled=True)
    table = DeltaTable(2, shape[1], [shape[0]], max_rank=80)
    table.install(1, delta.packed)
    rows = [1] * (1 + more)
    chunks = Chunks(32, 2, [table])
    chunks.assign(rows)
    y, x = torch.zeros(len(rows), shape[0]), torch.randn(len(rows), shape[1]) + 1
    want = expected(y, x, rows, {1: delta.dense})
    svd_delta(y, x, table, chunks, TensorCache(10**7))
    assert relative_error(y, want) < 1e-5


@pytest.mark.parametrize("neighbours", [[], [1] * 3, [2, 0, 2]])
def test_a_row_does_not_depend_on_its_neighbours(neighbours: list[int]) -> None:
    table = make_table({1: make_delta(SHAPE, WIDTHS, seed=1), 2: make_delta(SHAPE, WIDTHS, seed=2)})
    y, x = torch.randn(4, SHAPE[0]), torch.randn(4, SHAPE[1])
    x[1:] *= 1e6
    rows = []
    for row_slots in ([1], [1, *neighbours]):
        chunks = Chunks(4, 4, [table])
        chunks.assign(row_slots)
        got = y[: len(row_slots)].clone()
        svd_delta(got, x[: len(row_slots)], table, chunks, TensorCache(10**6))
        rows.append(got[0])
    assert torch.equal(*rows)


def test_nan_in_a_row_does_not_spread() -> None:
    table = make_table({1: make_delta(SHAPE, WIDTHS)})
    chunks = Chunks(4, 4, [table])
    chunks.assign([1, 1, 1])
    y, x = torch.randn(3, SHAPE[0]), torch.randn(3, SHAPE[1])
    x[1] = torch.nan
    svd_delta(y, x, table, chunks, TensorCache(10**6))
    assert y[1].isnan().all()
    assert not y[[0, 2]].isnan().any()


def test_invalid_arguments_are_rejected() -> None:
    table = DeltaTable(2, SHAPE[1], [SHAPE[0]], max_rank=12)
    chunks = Chunks(4, 2, [table])
    chunks.assign([1, 0])
    cache = TensorCache(0)
    y, x = torch.zeros(2, SHAPE[0]), torch.zeros(2, SHAPE[1])
    svd_delta(y, x, table, chunks, cache)
    wrong = [
        (y[:1], x),
        (y, x[:, 1:]),
        (y.half(), x),
        (y.T.contiguous().T, x),
    ]
    for bad_y, bad_x in wrong:
        with pytest.raises(ValueError, match="x and y need"):
            svd_delta(bad_y, bad_x, table, chunks, cache)
    small = Chunks(4, 2, [])
    small.assign([1, 0])
    with pytest.raises(ValueError, match="chunks"):
        svd_delta(y, x, table, small, cache)
