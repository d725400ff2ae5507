"""The kernels' layout and tables against the artifact's packing and decoding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltadock.artifacts.encodings import decode_factors, packing
from deltadock.errors import InvalidArtifact, TooLarge
from deltadock.kernels.svd_delta import DeltaTable, Group, pack_delta, reference
from deltadock.kernels.svd_delta.layout import planes, segment_words
from tests.kernels.svd_delta.support import encode, groups, make_delta, pack, segments

SHAPE = (40, 70)
WIDTHS = [(3, 8, 3), (2, 5, 7), (4, 2, 2)]


@given(st.integers(0, 50), st.integers(1, 300), st.integers(1, 8))
def test_segments_have_the_artifacts_sizes(count: int, columns: int, bits: int) -> None:
    assert tuple(planes(bits)) == packing.PLANES[bits]
    assert segment_words(count, columns, bits) == packing.segment_words(count, columns, bits)


@given(
    st.tuples(st.integers(1, 80), st.integers(1, 80)),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 8)), max_size=4),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_unpacking_gives_the_artifacts_factors(
    shape: tuple[int, int],
    widths: list[tuple[int, int, int]],
    midrise: bool,
    row_scale: bool,
    column_scale: bool,
) -> None:
    encoded = encode(shape, widths, midrise=midrise, row_scale=row_scale, column_scale=column_scale)
    got = reference.unpack(pack(encoded))
    want = decode_factors(encoded)
    for factor, name in zip(got[:3], want.__class__.__slots__, strict=True):
        assert torch.equal(factor, torch.from_numpy(getattr(want, name)))


def test_the_words_are_the_artifacts_bytes() -> None:
    encoded = encode(SHAPE, WIDTHS)
    packed = pack_delta(SHAPE, groups(encoded), **segments(encoded))
    stored = encoded.segments["v"].tobytes() + encoded.segments["u"].tobytes()
    assert packed.words.numpy().tobytes().startswith(stored)


def test_an_empty_group_is_skipped() -> None:
    encoded = encode(SHAPE, WIDTHS)
    runs = [Group(0, 6, 6), *groups(encoded), Group(0, 2, 2)]
    packed = pack_delta(SHAPE, runs, **segments(encoded))
    assert packed.groups == tuple(groups(encoded))


@pytest.mark.parametrize("name", ["s", "v", "v_zero", "u", "u_zero"])
def test_a_segment_of_the_wrong_size_is_rejected(name: str) -> None:
    encoded = encode(SHAPE, WIDTHS)
    parts = segments(encoded)
    parts[name] = parts[name][:-1]
    with pytest.raises(InvalidArtifact):
        pack_delta(SHAPE, groups(encoded), **parts)


@pytest.mark.parametrize("name", ["row_scale", "column_scale"])
def test_a_scale_of_the_wrong_size_is_rejected(name: str) -> None:
    encoded = encode(SHAPE, WIDTHS, midrise=True, row_scale=True, column_scale=True)
    parts = segments(encoded)
    parts[name] = parts[name][:-1]
    with pytest.raises(InvalidArtifact):
        pack_delta(SHAPE, groups(encoded), **parts)


def test_a_delta_moves_with_all_regions() -> None:
    delta = pack(encode(SHAPE, WIDTHS, row_scale=True, column_scale=True), torch.ones(SHAPE[0]))
    moved = delta.to("meta")
    assert moved.nbytes == delta.nbytes == delta.words.nbytes
    assert moved.words.is_meta
    assert moved.regions == delta.regions
    scales = ("v_offset", "u_offset", "row_scale", "column_scale", "bias")
    assert all(delta.floats(name) is not None for name in scales)
    plain = pack(encode(SHAPE, WIDTHS, midrise=True))
    assert all(plain.floats(name) is None for name in scales)


@pytest.mark.parametrize("bits", [0, 9])
def test_a_width_out_of_range_is_rejected(bits: int) -> None:
    encoded = encode(SHAPE, WIDTHS)
    with pytest.raises(InvalidArtifact):
        pack_delta(SHAPE, [Group(9, bits, 2)], **segments(encoded))


def test_deltas_that_do_not_fit_a_table_are_rejected() -> None:
    delta = make_delta(SHAPE, WIDTHS).packed
    with pytest.raises(TooLarge):
        DeltaTable(2, 70, [40], max_rank=8).install(1, delta)
    with pytest.raises(ValueError, match="shape"):
        DeltaTable(2, 40, [70], max_rank=9).install(1, delta)
    table = DeltaTable(2, 70, [40], max_rank=9)
    with pytest.raises(ValueError, match="linears"):
        table.install(1, delta, delta)
    for slot in (-1, 0, 2):
        with pytest.raises(ValueError, match="Slot"):
            table.install(slot, delta)
    table.install(1, delta)


def test_a_tables_buffers_never_move() -> None:
    table = DeltaTable(3, 70, [40, 40], max_rank=9)
    tensors = (table.addresses, table.descriptors, *table.output_tiles.values())
    before = [tensor.data_ptr() for tensor in tensors]
    empty = table.descriptors.clone()
    delta = make_delta(SHAPE, WIDTHS).packed
    table.install(2, None, delta)
    assert table.addresses[2].tolist() == [0, delta.words.data_ptr()]
    table.remove(2)
    table.remove(1)
    after = (table.addresses, table.descriptors, *table.output_tiles.values())
    assert [tensor.data_ptr() for tensor in after] == before
    assert torch.equal(table.descriptors, empty)
