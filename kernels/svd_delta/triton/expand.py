"""From projections to outputs: `y += row_scale * (U_hat (s * projection)) + bias`."""

import triton
import triton.language as tl

from deltadock.kernels.svd_delta.layout import BLOCK_FIELDS, BLOCK_RANKS
from deltadock.kernels.svd_delta.table import ENTRY_FIELDS, OUTPUT_FIELDS, TILE_COLUMNS
from deltadock.kernels.svd_delta.triton.unpack import (
    UNSPECIALIZED,
    dot,
    load_words,
    round_to,
    row_words,
    unpack,
)

_ENTRY = tl.constexpr(ENTRY_FIELDS)
_BLOCK = tl.constexpr(BLOCK_FIELDS)
_RANKS = tl.constexpr(BLOCK_RANKS)
_OUTPUT = tl.constexpr(OUTPUT_FIELDS)
_COLUMNS = tl.constexpr(TILE_COLUMNS)


@triton.jit
def _expand_plane(
    total, projected_ptr, max_rank, places, words_ptr, entry, tile, h_out,
    P: tl.constexpr, DIGIT: tl.constexpr, TERMS: tl.constexpr,
    WARPS: tl.constexpr, ALIGNED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add to `total` (columns, rows) what all planes of P bits give; a warp takes every so manieth
    block of ranks."""
    HALF: tl.constexpr = _RANKS // 2
    PER: tl.constexpr = 32 // P
    WORDS: tl.constexpr = _COLUMNS // PER
    BLOCK_M: tl.constexpr = places.shape[0]
    begin, end = tl.load(entry + 11 + DIGIT), tl.load(entry + 12 + DIGIT)
    if begin < end:
        blocks_ptr = words_ptr + tl.load(entry + 10)
        words = row_words(h_out, P, ALIGNED)
        warp = tl.arange(0, WARPS)
        columns = (tile * WORDS + tl.arange(0, WORDS))[None, None, :]
        acc = tl.zeros((WARPS, _COLUMNS, BLOCK_M), tl.float32)
        for step in range(tl.cdiv(end - begin, WARPS)):
            block = begin + step * WARPS + warp
            block_ptr = blocks_ptr + tl.minimum(block, end - 1) * _BLOCK
            count = tl.where(block < end, tl.load(block_ptr + 1), 0)
            word = tl.load(block_ptr + 2)[:, None, None]
            last = tl.maximum(count - 1, 0)[:, None]
            upper = tl.minimum(tl.arange(0, HALF)[None, :], last)
            lower = tl.minimum(tl.arange(0, HALF)[None, :] + HALF, last)
            first = load_words(
                words_ptr, word + (upper * words)[:, :, None], columns, words, ALIGNED
            )
            second = load_words(
                words_ptr, word + (lower * words)[:, :, None], columns, words, ALIGNED
            )
            ranks = tl.load(block_ptr)[:, None] + tl.arange(0, _RANKS)[None, :]
            inside = tl.arange(0, _RANKS)[None, :] < count[:, None]
            at = (places * max_rank)[None, :, None] + ranks[:, None, :]
            t = tl.load(projected_ptr + at, mask=inside[:, None, :], other=0.0)
            t *= (1 << tl.load(block_ptr + 3)).to(tl.float32)[:, None, None]
            t = tl.reshape(t, (WARPS, BLOCK_M, 2, HALF))
            t = tl.reshape(tl.permute(t, (0, 3, 2, 1)), (WARPS, _RANKS, BLOCK_M))
            for DOWN in tl.static_range(0, 8 if P == 8 else 4, 4):
                codes = unpack(first, second, P, DOWN, tl.bfloat16, EMULATE)
                codes = tl.permute(codes, (0, 3, 2, 1, 4))
                codes = tl.reshape(codes, (WARPS, _COLUMNS, _RANKS))
                term = round_to(t, tl.bfloat16, EMULATE)
                acc = dot(codes, term, acc, EMULATE)
                if TERMS == 2:  # What bfloat16 dropped, for outputs that are finer than it.
                    term = round_to(t - term.to(tl.float32), tl.bfloat16, EMULATE)
                    acc = dot(codes, term, acc, EMULATE)
        found = tl.sum(acc, axis=0) * (1024.0 if P == 8 else 64.0)
        found = tl.permute(tl.reshape(found, (PER, WORDS, BLOCK_M)), (1, 0, 2))
        total += tl.reshape(found, (_COLUMNS, BLOCK_M))
    return total


@triton.jit
def _rest(projected_ptr, max_rank, places, offset_ptr, rank, BLOCK: tl.constexpr):
    """What U's offsets take from every output of a row: (rows)."""
    rest = tl.zeros((places.shape[0], BLOCK), tl.float32)
    for first in range(0, rank, BLOCK):
        ranks = first + tl.arange(0, BLOCK)
        inside = (ranks < rank)[None, :]
        at = (places * max_rank)[:, None] + ranks[None, :]
        t = tl.load(projected_ptr + at, mask=inside, other=0.0)
        rest += t * tl.load(offset_ptr + ranks[None, :], mask=inside, other=0.0)
    return tl.sum(rest, axis=1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def expand_kernel(
    y_ptr, y_stride, projected_ptr, max_rank, rows_ptr, slots_ptr,
    addresses_ptr, entries_ptr, outputs_ptr,
    LINEARS: tl.constexpr, BLOCK_M: tl.constexpr, TERMS: tl.constexpr,
    WARPS: tl.constexpr, ALIGNED: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add the deltas to one chunk of rows and one tile of one linear's outputs."""
    output_ptr, chunk = outputs_ptr + tl.program_id(0) * _OUTPUT, tl.program_id(1)
    slot = tl.load(slots_ptr + chunk)
    if slot == 0:
        return
    linear = tl.load(output_ptr)
    tile = tl.load(output_ptr + 1)
    begin = tl.load(output_ptr + 2)
    h_out = tl.load(output_ptr + 3)
    entry = entries_ptr + (slot * LINEARS + linear) * _ENTRY
    rank, bias_word = tl.load(entry), tl.load(entry + 9)
    if (rank == 0) & (bias_word < 0):
        return
    words_ptr = tl.load(addresses_ptr + slot * LINEARS + linear).to(tl.pointer_type(tl.int32))
    floats_ptr = words_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    places = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tl.load(rows_ptr + places)
    columns = tile * _COLUMNS + tl.arange(0, _COLUMNS)
    total = tl.zeros((_COLUMNS, BLOCK_M), tl.float32)
    if rank > 0:
        own_ptr = projected_ptr + tl.load(entry + 1)
        for DIGIT in tl.static_range(4):
            total = _expand_plane(
                total, own_ptr, max_rank, places, words_ptr, entry, tile, h_out,
                8 >> DIGIT, DIGIT, TERMS, WARPS, ALIGNED, EMULATE,
            )  # fmt: skip
        offset_word = tl.load(entry + 6)
        if offset_word >= 0:
            total -= _rest(own_ptr, max_rank, places, floats_ptr + offset_word, rank, 128)[None, :]
    scale_word = tl.load(entry + 7)
    if scale_word >= 0:
        scale = tl.load(floats_ptr + scale_word + columns, mask=columns < h_out, other=0.0)
        total *= scale[:, None]
    if bias_word >= 0:
        bias = tl.load(floats_ptr + bias_word + columns, mask=columns < h_out, other=0.0)
        total += bias[:, None]
    out = y_ptr + rows.to(tl.int64)[None, :] * y_stride + (begin + columns)[:, None]
    inside = (rows >= 0)[None, :] & (columns < h_out)[:, None]
    y = tl.load(out, mask=inside, other=0.0).to(tl.float32) + total
    tl.store(out, round_to(y, y_ptr.dtype.element_ty, EMULATE), mask=inside)
