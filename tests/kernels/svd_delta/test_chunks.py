"""Every row is in one chunk of its slot, on buffers that never move."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deltadock.kernels.svd_delta import Chunks, DeltaTable
from deltadock.kernels.svd_delta.chunks import CHUNK_ROWS


def scratch(chunks: Chunks) -> tuple[Tensor, ...]:
    fields = ["rows", "slots", "fixed", "scales", "projected", "peaks", "rests"]
    return tuple(getattr(chunks, field) for field in fields)


@given(st.lists(st.lists(st.integers(0, 5), max_size=90), min_size=1, max_size=3))
def test_every_row_is_in_one_chunk_of_its_slot(steps: list[list[int]]) -> None:
    chunks = Chunks(90, 6, [DeltaTable(6, 9, [4, 5], max_rank=8)])
    addresses = [t.data_ptr() for t in scratch(chunks)]
    for row_slots in steps:
        chunks.assign(row_slots)
        found = {
            row: slot
            for slot, rows in zip(
                chunks.slots.tolist(), chunks.rows.view(-1, CHUNK_ROWS).tolist(), strict=True
            )
            for row in rows
            if row >= 0
        }
        assert found == {row: slot for row, slot in enumerate(row_slots) if slot}
        assert int((chunks.rows >= 0).sum()) == len(found)
        assert not chunks.slots[chunks.count :].any()
        numbers = torch.arange(len(row_slots))
        by_slot = {slot: numbers[rows].tolist() for slot, rows in chunks.by_slot.items()}
        assert {row: slot for slot, rows in by_slot.items() for row in rows} == found
        assert chunks.row_slots[: len(row_slots)].tolist() == row_slots
        assert not chunks.row_slots[len(row_slots) :].any()
    now = [t.data_ptr() for t in scratch(chunks)]
    assert now == addresses


def test_launch_counts_are_powers_of_two() -> None:
    chunks = Chunks(256, 40, [])
    counts = set()
    for slots in range(40):
        chunks.assign(list(range(slots)))
        counts.add(chunks.count)
    assert counts == {0, 1, 2, 4, 8, 16, 32, 64}


def test_steps_that_do_not_fit_are_rejected() -> None:
    chunks = Chunks(4, 3, [])
    chunks.assign([1, 2, 1, 2])
    before = chunks.rows.clone()
    for slot in (-1, 3):
        with pytest.raises(ValueError, match="slot"):
            chunks.assign([slot])
    with pytest.raises(ValueError, match="rows"):
        chunks.assign([1] * 5)
    assert torch.equal(chunks.rows, before)


def test_a_slot_with_many_rows_uses_matrix_products() -> None:
    chunks = Chunks(40, 4, [], dense_rows=10)
    chunks.assign([1] * 10 + [2] * 9 + [0] * 12)
    assert chunks.dense == {1: slice(0, 10)}
    assert set(chunks.slots.tolist()) == {0, 2}
    chunks.assign([1])
    assert not chunks.dense


def test_buffers_are_as_large_as_the_largest_step() -> None:
    chunks = Chunks(4096, 3, [], dense_rows=10, packed_rows=30)
    assert chunks.max_chunks == 9
    chunks.assign([1] + [2] * 29)  # alone in chunks, as few rows as these are
    assert int((chunks.slots > 0).sum()) == 9
    chunks.assign([1] * 9 + [2] * 9 + [0] * 4000)
    assert int((chunks.slots > 0).sum()) == 6
    chunks.assign([1] * 10 + [2] * 4000)
    assert chunks.dense.keys() == {1, 2}
    assert chunks.count == 0
