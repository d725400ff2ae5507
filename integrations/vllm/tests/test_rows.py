"""What a step adds to its rows, without an engine: parts of deltas, blocks, and captured graphs."""

import random

import pytest
import torch
from deltadock_vllm.many.memory import in_copy, moved
from deltadock_vllm.many.sharding import DensePart, part
from deltadock_vllm.many.sites import (
    EmbeddingSite,
    LinearDelta,
    LinearSite,
    NormSite,
    Rows,
    StepChunks,
    is_called,
    linear,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from deltadock.inference.model.weight_deltas import LowRank, buffered
from deltadock.kernels.cache import TensorCache
from deltadock.kernels.svd_delta import Group, PackedDelta, pack_delta, reference
from deltadock.kernels.svd_delta.chunks import CHUNK_ROWS, most_chunks
from deltadock.kernels.svd_delta.layout import segment_words

H_OUT, H_IN = 96, 160


def packed(*, zeros: bool = False, scales: bool = False) -> PackedDelta:
    """A delta of two groups, with random codes and an optional bias."""
    groups = [Group(5, 3, 2), Group(2, 8, 5)]
    generator = torch.Generator().manual_seed(7)

    def words(side: int, length: int) -> Tensor:
        count = sum(segment_words(group.ranks, length, group[side]) for group in groups)
        return torch.randint(-(2**31), 2**31, (count,), generator=generator).int()

    def numbers(count: int) -> Tensor:
        return torch.rand(count, generator=generator) + 0.5

    return pack_delta(
        (H_OUT, H_IN), groups, s=numbers(7), v=words(1, H_IN), u=words(2, H_OUT),
        v_zero=numbers(7) if zeros else None, u_zero=numbers(7) if zeros else None,
        row_scale=numbers(H_OUT) if scales else None,
        column_scale=numbers(H_IN) if scales else None,
    )  # fmt: skip


@pytest.mark.parametrize("zeros", [False, True])
def test_a_ranks_part_of_a_packed_delta_is_that_part_of_the_matrix(zeros: bool) -> None:
    whole = packed(zeros=zeros, scales=True).with_bias(torch.arange(H_OUT).float())
    dense = reference.dense(whole)
    for rows in (slice(0, 32), slice(32, 96), slice(0, 96)):
        for columns in (slice(0, 64), slice(64, 160), slice(0, 160)):
            cut = part(whole, rows, columns)
            assert isinstance(cut, PackedDelta)
            assert torch.equal(reference.dense(cut), dense[rows, columns])
            bias = cut.floats("bias")
            assert bias is not None
            assert bias.tolist() == list(range(rows.start, rows.stop))
    odd = part(whole, slice(8, 24), slice(0, H_IN))
    assert isinstance(odd, DensePart)
    assert torch.equal(odd.dense(), dense[8:24])


def test_a_delta_is_placed_by_one_copy_of_its_block() -> None:
    low = LowRank(torch.randn(H_OUT, 3), torch.randn(3, H_IN))
    packed_delta = packed(zeros=True)
    block, views = buffered([packed_delta, low, packed_delta], moved, pin_memory=False)
    assert block.nbytes < packed_delta.nbytes + low.u.nbytes + low.v.nbytes + 4 * 128
    slot = torch.zeros(block.nbytes + 1000, dtype=torch.uint8)
    slot[: block.nbytes] = block
    block.zero_()
    first, second, third = (in_copy(view, slot) for view in views)
    assert isinstance(first, PackedDelta)
    assert isinstance(third, PackedDelta)
    assert isinstance(second, LowRank)
    assert first.words.data_ptr() == third.words.data_ptr() == slot.data_ptr()
    assert torch.equal(reference.dense(first), reference.dense(packed_delta))
    assert torch.equal(second.u, low.u)


def test_no_step_has_more_chunks_than_a_graph_of_as_many_rows_launches() -> None:
    random.seed(0)
    for slots in (2, 5, 9):
        chunks = StepChunks(64, slots, [], captured=48)
        for rows in (1, 7, 8, 9, 40, 48):
            worst = 0
            for _ in range(50):
                members = [random.randrange(slots) for _ in range(rows)]
                chunks.assign(members)
                needed = int((chunks.slots > 0).sum())
                worst = max(worst, needed)
                assert needed <= most_chunks(rows, slots)
                if any(members):
                    assert chunks.count == most_chunks(rows, slots) <= chunks.max_chunks
            # one row of each slot but the last, which has the rest, is the worst case
            used = min(rows, slots - 1)
            chunks.assign([*range(1, used), *[used] * (rows - used + 1)])
            assert int((chunks.slots > 0).sum()) <= most_chunks(rows, slots)
        bounds = [most_chunks(rows, slots) for rows in range(1, 49)]
        assert bounds == sorted(bounds)  # so a graph of more rows serves a step of fewer
    assert most_chunks(CHUNK_ROWS * 6, 2) == 1 + (CHUNK_ROWS * 6 - 1) // CHUNK_ROWS


def rows_of(*members: int, slots: int = 3) -> Rows:
    rows = Rows(TensorCache(1 << 20))
    rows.tokens = StepChunks(16, slots, [], captured=0)
    rows.tokens.assign(members)
    rows.samples = rows.tokens
    return rows


def test_rows_have_their_own_weights_biases_embeddings_and_norms() -> None:
    rows = rows_of(0, 1, 2, 1)
    bias = torch.randn(H_OUT)
    site = LinearSite(rows, 3, H_IN, [H_OUT], bias=bias)
    rows.tokens = rows.samples = StepChunks(16, 3, [site.table], captured=0)
    rows.tokens.assign([0, 1, 2, 1])
    one = packed()
    replaced = torch.randn(H_OUT, H_IN)
    low = LowRank(torch.randn(H_OUT, 3), torch.randn(3, H_IN))
    site.install(1, [LinearDelta(one.with_bias(torch.ones(H_OUT)), None)])
    site.install(2, [LinearDelta(replaced, torch.full((H_OUT,), 2.0))])
    x = torch.randn(5, H_IN)  # the last row is padding
    base = torch.randn(5, H_OUT)
    y = base.clone()
    site.add(y, x)
    assert torch.equal(y[[0, 4]], base[[0, 4]])
    expected = base[[1, 3]] + x[[1, 3]] @ reference.dense(one).T + 1
    assert torch.allclose(y[[1, 3]], expected, atol=1e-2, rtol=1e-3)
    assert torch.allclose(y[2], replaced @ x[2] + bias + 2, atol=1e-4)
    site.remove(1)
    site.install(1, [LinearDelta(low, None)])
    y = base.clone()
    site.add(y, x)
    assert torch.allclose(y[[1, 3]], base[[1, 3]] + x[[1, 3]] @ (low.u @ low.v).T, atol=1e-4)
    site.remove(1)
    site.remove(2)
    y = base.clone()
    site.add(y, x)
    assert torch.equal(y, base)

    table = torch.randn(10, 4)
    embedding = EmbeddingSite(rows)
    embedding.install(2, table)
    y = torch.zeros(4, 4)
    embedding.add(y, torch.tensor([1, 2, 3, 4]))
    assert torch.equal(y[2], table[3])
    assert not y[[0, 1, 3]].any()

    norm = NormSite(rows, 3, torch.full((4,), 3.0))
    assert not norm.active
    norm.install(2, torch.full((4,), 5.0))
    assert norm.active
    y = torch.ones(4, 2, 4)
    norm.scale(y)
    assert y[:, 0, 0].tolist() == [3, 3, 5, 3]


def test_a_step_of_the_bases_rows_alone_calls_no_operator_unless_it_is_compiled() -> None:
    rows = rows_of(0, 0)
    rows.samples = StepChunks(16, 3, [], captured=0)
    rows.samples.assign([0, 1])
    norm = NormSite(rows, 3, torch.ones(4))
    sites = (LinearSite(rows, 3, H_IN, [H_OUT]), EmbeddingSite(rows), norm)
    assert not any(is_called(site.number) for site in sites)
    assert is_called(LinearSite(rows, 3, H_IN, [H_OUT], head=True).number)
    rows.tokens.assign([0, 1])
    assert [is_called(site.number) for site in sites] == [True, True, False]
    called = torch.compile(lambda x: x + is_called(norm.number), backend="eager", fullgraph=True)
    assert called(torch.zeros(())) == 1


def test_a_layer_that_is_called_with_fewer_rows_than_the_step_has_is_an_error() -> None:
    rows = rows_of(1, 1)
    site = LinearSite(rows, 3, H_IN, [H_OUT])
    with pytest.raises(RuntimeError, match="leaves out rows"):
        site.add(torch.zeros(1, H_OUT), torch.zeros(1, H_IN))


def test_the_operators_trace_with_fake_tensors() -> None:
    site = LinearSite(rows_of(), 3, H_IN, [H_OUT])
    with FakeTensorMode():
        y, x = torch.empty(7, H_OUT), torch.empty(7, H_IN)
        linear(y, x, site.number)
        assert y.shape == (7, H_OUT)

    def forward(x: Tensor) -> Tensor:
        y = x @ torch.ones(H_IN, H_OUT)
        linear(y, x, site.number)
        return y * 2

    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    x = torch.randn(3, H_IN)
    assert torch.equal(compiled(x), forward(x))
