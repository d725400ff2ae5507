"""Every row lies in one chunk of its slot, on buffers that stay in place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.svd_delta import Chunks
from kernels.svd_delta.chunks import HEIGHT


@given(st.lists(st.lists(st.integers(0, 5), max_size=90), min_size=1, max_size=3))
def test_every_row_is_in_one_chunk_of_its_slot(steps: list[list[int]]) -> None:
    chunks = Chunks(90, 6, max_rank=8)
    addresses = [t.data_ptr() for t in (chunks.rows, chunks.slots, chunks.projected, chunks.sums)]
    for row_slots in steps:
        chunks.assign(row_slots)
        found = {
            row: slot
            for slot, rows in zip(
                chunks.slots.tolist(), chunks.rows.view(-1, HEIGHT).tolist(), strict=True
            )
            for row in rows
            if row >= 0
        }
        assert found == {row: slot for row, slot in enumerate(row_slots) if slot}
        assert int((chunks.rows >= 0).sum()) == len(found)
        assert not chunks.slots[chunks.count :].any()
        assert chunks.by_slot.keys() == set(found.values())
    now = [t.data_ptr() for t in (chunks.rows, chunks.slots, chunks.projected, chunks.sums)]
    assert now == addresses


def test_few_counts_serve_all_steps() -> None:
    chunks = Chunks(256, 40, max_rank=8)
    counts = set()
    for slots in range(40):
        chunks.assign(list(range(slots)))
        counts.add(chunks.count)
    assert counts == {0, 1, 2, 4, 8, 16, 32, chunks.max_chunks}


def test_what_does_not_fit_is_refused() -> None:
    chunks = Chunks(4, 3, max_rank=8)
    chunks.assign([1, 2, 1, 2])
    before = chunks.rows.clone()
    for slot in (-1, 3):
        with pytest.raises(ValueError, match="slot"):
            chunks.assign([slot])
    with pytest.raises(ValueError, match="rows"):
        chunks.assign([1] * 5)
    assert torch.equal(chunks.rows, before)
