"""Outputs: `row_scale * (U_hat projected) + bias`, added in place."""

import triton
import triton.language as tl

from deltadock.kernels.interpreter import round_to
from deltadock.kernels.overlap import prefetch, start_next, wait_for_previous
from deltadock.kernels.svd_delta.chunks import CHUNK_ROWS
from deltadock.kernels.svd_delta.layout import (
    BLOCK_FIELDS,
    DESCRIPTOR_FIELDS,
    OUTPUT_TILE_FIELDS,
    TILE_RANKS,
)
from deltadock.kernels.svd_delta.triton.fixed_point import (
    HIGH,
    LARGEST,
    LOW,
    bytes_of,
    codes_of,
    dot_bytes,
    fixed_point,
    inverse_of,
    pick_bytes,
    spread,
    sum_over_warps,
)
from deltadock.kernels.svd_delta.triton.forms import UNSPECIALIZED
from deltadock.kernels.svd_delta.triton.words import ceil_div, load_run, row_addresses

_DESCRIPTOR = tl.constexpr(DESCRIPTOR_FIELDS)
_BLOCK = tl.constexpr(BLOCK_FIELDS)
_RANKS = tl.constexpr(TILE_RANKS)
_OUTPUT_TILE = tl.constexpr(OUTPUT_TILE_FIELDS)
_ROWS = tl.constexpr(CHUNK_ROWS)


@triton.jit
def _block(blocks_address, block, end, EMULATE: tl.constexpr):
    """A block of ranks of each warp: its tile, its ranks, its first word, and its weight."""
    address = blocks_address + tl.maximum(tl.minimum(block, end - 1), 0) * (4 * _BLOCK)
    tile, count, word, weight = load_run(address, 4, True, EMULATE)
    return tile, count, word, tl.where(block < end, weight.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _block_words(
    words_address, word, count, tile, h_out,
    P: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The words of a run of columns a thread, of ranks 0, 4, ... of a block; of 1, 5, ...; etc."""
    BITS: tl.constexpr = COLUMNS // 8 * P
    COUNT: tl.constexpr = BITS // 32 if BITS > 32 else 1
    # Past the last column or word, those of the next vector or region: of columns that do not
    # exist.
    column = tl.arange(0, 8) * BITS // 32 + tile * (COLUMNS * P // 32)
    first = words_address + (word[:, None, None] + column[None, None, :]).to(tl.int64) * 4
    stride = 4 * ceil_div(h_out * P, 32)
    # Past the last rank, words of the last.
    last = count[:, None, None] - 1
    index = tl.arange(0, _RANKS // 4)[None, :, None] * 4
    row_0 = row_addresses(first, index, last, stride, EMULATE)
    row_1 = row_addresses(first, index + 1, last, stride, EMULATE)
    row_2 = row_addresses(first, index + 2, last, stride, EMULATE)
    row_3 = row_addresses(first, index + 3, last, stride, EMULATE)
    return (
        load_run(row_0, COUNT, VECTOR, EMULATE), load_run(row_1, COUNT, VECTOR, EMULATE),
        load_run(row_2, COUNT, VECTOR, EMULATE), load_run(row_3, COUNT, VECTOR, EMULATE),
    )  # fmt: skip


@triton.jit
def _prefetch_blocks(
    address, blocks_address, bounds, tile, h_out, COLUMNS: tl.constexpr, WARPS: tl.constexpr
):
    """Ask for the words of all blocks of a tile of outputs, one rank of a block a thread."""
    AT_ONCE: tl.constexpr = WARPS * 4
    words_ptr = address.to(tl.pointer_type(tl.int32))
    blocks_ptr = blocks_address.to(tl.pointer_type(tl.int32))
    _, second, third, fourth, end = bounds
    index = tl.arange(0, _RANKS)[None, :]
    for first in range(0, end, AT_ONCE):
        block = first + tl.arange(0, AT_ONCE)
        digit = (block >= second).to(tl.int32) + (block >= third).to(tl.int32)
        plane = 8 >> (digit + (block >= fourth).to(tl.int32))
        block_ptr = blocks_ptr + block * _BLOCK
        count = tl.load(block_ptr + 1, mask=block < end, other=0)
        word = tl.load(block_ptr + 2, mask=block < end, other=0) + tile * (COLUMNS // 32) * plane
        word = word[:, None] + index * ceil_div(h_out * plane, 32)[:, None]
        prefetch(words_ptr + word, index < count[:, None])


@triton.jit
def _terms(projected_addresses, tile, scale, EMULATE: tl.constexpr):
    """A block's projections as fixed-point numbers, a byte of four ranks a word."""
    index = tl.arange(0, _RANKS // 4)[None, :, None] * 16
    addresses = projected_addresses[None, None, :] + (tile * (4 * _RANKS))[:, None, None] + index
    t0, t1, t2, t3 = load_run(addresses, 4, True, EMULATE)
    t0 = fixed_point(t0.to(tl.float32, bitcast=True), scale)
    t1 = fixed_point(t1.to(tl.float32, bitcast=True), scale)
    t2 = fixed_point(t2.to(tl.float32, bitcast=True), scale)
    t3 = fixed_point(t3.to(tl.float32, bitcast=True), scale)
    selector = tl.where(tl.arange(0, 2 * _ROWS) % 2 == 0, HIGH, LOW)[None, None, :]
    return bytes_of(t0, t1, t2, t3, selector, EMULATE)


@triton.jit
def _two_of_four(w0, w1, w2, w3, selector, EMULATE: tl.constexpr):
    """Words of a byte of each of four, and of another; `selector` picks them from two of four."""
    a, b = pick_bytes(w0, w1, selector, EMULATE), pick_bytes(w2, w3, selector, EMULATE)
    return pick_bytes(a, b, 0x5410, EMULATE), pick_bytes(a, b, 0x7632, EMULATE)


@triton.jit
def _transpose_bytes(words, WORD: tl.constexpr, BITS: tl.constexpr, EMULATE: tl.constexpr):
    """Words of the first, second, ... bytes of four ranks' runs of BITS bits, from word WORD on."""
    w0, w1, w2, w3 = words[0][WORD], words[1][WORD], words[2][WORD], words[3][WORD]
    if BITS >= 32:
        transposed = _two_of_four(w0, w1, w2, w3, 0x5140, EMULATE)
        transposed += _two_of_four(w0, w1, w2, w3, 0x7362, EMULATE)
        if BITS > 32:
            transposed += _transpose_bytes(words, WORD + 1, BITS - 32, EMULATE)
    elif BITS == 16:  # Two threads share a word.
        half = (0x5140 + 0x2222 * (tl.arange(0, 8) % 2))[None, None, :]
        transposed = _two_of_four(w0, w1, w2, w3, half, EMULATE)
    else:  # Four do.
        byte = (0x5140 + 0x1111 * (tl.arange(0, 8) % 4))[None, None, :] & 0x77
        transposed = _two_of_four(w0, w1, w2, w3, byte, EMULATE)[:1]
    return transposed


@triton.jit
def _codes_of_run(transposed, P: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """Codes FIRST, FIRST + STEP, ... of runs whose bytes are transposed, on trailing axes of 2.

    They are shifted to the upper bits of their byte: those of 7 bits or less fill the lower seven.
    """
    FIELDS: tl.constexpr = 8 // P
    if len(transposed) * FIELDS == STEP:
        codes = codes_of(transposed[FIRST // FIELDS], P, FIRST % FIELDS, 7 - P if P < 8 else 0)
    else:
        even = _codes_of_run(transposed, P, FIRST, 2 * STEP)
        odd = _codes_of_run(transposed, P, FIRST + STEP, 2 * STEP)
        codes = tl.join(even, odd)
    return codes


@triton.jit
def _expand_plane(
    acc, projected_addresses, inverse, words_address, blocks_address, first_block, begin, end,
    steps, tile, h_out,
    P: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, VECTOR: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """Add the products of all planes of P bits to `acc` (warps, columns, rows' bytes).

    Blocks of ranks are strided over the warps. A thread takes a run of an eighth of the tile's
    columns: column `8 * i + run` of `acc` is the run's column i, for every plane.
    """
    RUN: tl.constexpr = COLUMNS // 8
    block = begin + tl.arange(0, WARPS)
    rank_tile, count, word, weight = first_block
    words = _block_words(words_address, word, count, tile, h_out, P, COLUMNS, VECTOR, EMULATE)
    for _ in range(steps):
        # The next block is asked for before this one is used.
        block += WARPS
        next_tile, count, word, next_weight = _block(blocks_address, block, end, EMULATE)
        if P * COLUMNS * WARPS < 8192:
            next_words = _block_words(
                words_address, word, count, tile, h_out, P, COLUMNS, VECTOR, EMULATE
            )
        scale = inverse[None, None, :] * weight[:, None, None]
        terms = spread(_terms(projected_addresses, rank_tile, scale, EMULATE), EMULATE)
        terms = tl.reshape(terms, (WARPS, _RANKS // 4, 2 * _ROWS, 4))
        terms = tl.reshape(tl.permute(terms, (0, 1, 3, 2)), (WARPS, _RANKS, 2 * _ROWS))
        codes = _codes_of_run(_transpose_bytes(words, 0, RUN * P, EMULATE), P, 0, 1)
        codes = tl.reshape(spread(codes, EMULATE), (WARPS, _RANKS // 4, 8, RUN, 4))
        codes = tl.reshape(tl.permute(codes, (0, 3, 2, 1, 4)), (WARPS, COLUMNS, _RANKS))
        acc = dot_bytes(codes, terms, acc, EMULATE)
        if P * COLUMNS * WARPS >= 8192:  # More registers would be spilled.
            next_words = _block_words(
                words_address, word, count, tile, h_out, P, COLUMNS, VECTOR, EMULATE
            )
        rank_tile, weight, words = next_tile, next_weight, next_words
    return acc


@triton.jit
def _peak_and_rest(peaks_ptr, rests_ptr, tiles, EMULATE: tl.constexpr):
    """The rows' largest projections and what the zero points take, (rows), from those of tiles.

    A warp takes eight tiles at a time, in an order that does not depend on the number of warps.
    """
    peak = tl.zeros((8, _ROWS), tl.int32)
    rest = tl.zeros((8, _ROWS), tl.float32)
    place = tl.arange(0, 8)[:, None] * _ROWS + tl.arange(0, _ROWS)[None, :]
    for first in range(0, tiles, 32):
        for some in tl.static_range(4):
            offsets = (first + 8 * some) * _ROWS + place
            mask = offsets < tiles * _ROWS
            peak = tl.maximum(peak, tl.load(peaks_ptr + offsets, mask=mask, other=0))
            rest += tl.load(rests_ptr + offsets, mask=mask, other=0.0)
    return tl.max(peak, axis=0).to(tl.float32, bitcast=True), tl.sum(rest, axis=0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def expand_kernel(
    y_ptr, y_stride, projected_ptr, peaks_ptr, rests_ptr, max_tiles, rows_ptr, slots_ptr, used_ptr,
    addresses_ptr, descriptors_ptr, output_tiles_ptr, output_tiles,
    LINEARS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, VECTOR: tl.constexpr,
    OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add the deltas to chunks of rows and tiles of the linears' outputs.

    All programs take as many tiles, one after another. What the tiles of a chunk and linear have in
    common is loaded once.
    """
    start_next(OVERLAP)
    everything = tl.load(used_ptr) * output_tiles
    share = tl.cdiv(everything, tl.num_programs(0))
    item = tl.program_id(0) * share
    end = tl.minimum(item + share, everything)
    while item < end:
        chunk = item // output_tiles
        output_tile_ptr = output_tiles_ptr + item % output_tiles * _OUTPUT_TILE
        slot = tl.load(slots_ptr + chunk)
        linear = tl.load(output_tile_ptr)
        first_tile = tl.load(output_tile_ptr + 1)
        begin = tl.load(output_tile_ptr + 2)
        h_out = tl.load(output_tile_ptr + 3)
        if VECTOR:
            begin, h_out = tl.multiple_of(begin, 4), tl.multiple_of(h_out, 4)
        last_tile = tl.minimum(ceil_div(h_out, COLUMNS), first_tile + end - item)
        item += last_tile - first_tile
        # All that depends on the slot is asked for at once.
        descriptor = descriptors_ptr + (slot * LINEARS + linear) * _DESCRIPTOR
        address = tl.load(addresses_ptr + slot * LINEARS + linear)
        tiles, first_rank_tile, scale_word, bias_word, blocks_word = (
            tl.load(descriptor), tl.load(descriptor + 1), tl.load(descriptor + 6),
            tl.load(descriptor + 8), tl.load(descriptor + 9),
        )  # fmt: skip
        bound_0, bound_1, bound_2, bound_3, bound_4 = (
            tl.load(descriptor + 10), tl.load(descriptor + 11), tl.load(descriptor + 12),
            tl.load(descriptor + 13), tl.load(descriptor + 14),
        )  # fmt: skip
        bounds = (bound_0, bound_1, bound_2, bound_3, bound_4)
        rows = tl.load(rows_ptr + chunk * _ROWS + tl.arange(0, _ROWS))
        if (tiles > 0) | (bias_word >= 0):
            floats_ptr = address.to(tl.pointer_type(tl.float32))
            blocks_address = address + 4 * tl.maximum(blocks_word, 0)
            warp = tl.arange(0, WARPS)
            blocks = (
                _block(blocks_address, bound_0 + warp, bound_1, EMULATE),
                _block(blocks_address, bound_1 + warp, bound_2, EMULATE),
                _block(blocks_address, bound_2 + warp, bound_3, EMULATE),
                _block(blocks_address, bound_3 + warp, bound_4, EMULATE),
            )
            if OVERLAP & (tiles > 0):
                _prefetch_blocks(address, blocks_address, bounds, first_tile, h_out, COLUMNS, WARPS)
            started = wait_for_previous(OVERLAP)
            places = (chunk * max_tiles + first_rank_tile) * _ROWS + started
            peak, rest = _peak_and_rest(peaks_ptr + places, rests_ptr + places, tiles, EMULATE)
            positions = chunk * _ROWS + tl.arange(0, 2 * _ROWS) // 2
            offsets = (positions * max_tiles + first_rank_tile).to(tl.int64) * (4 * _RANKS)
            projected_addresses = (projected_ptr + started).to(tl.int64) + offsets
            inverse = inverse_of(tl.reshape(tl.join(peak, peak), (2 * _ROWS,)))
            for tile in range(first_tile, last_tile):
                acc = tl.zeros((WARPS, COLUMNS, 2 * _ROWS), tl.int32)
                for DIGIT in tl.static_range(4):
                    if DIGIT == 3:
                        columns = tile * COLUMNS + tl.arange(0, COLUMNS)
                        out = y_ptr + started + rows.to(tl.int64)[:, None] * y_stride
                        out += (begin + columns)[None, :]
                        mask = (rows >= 0)[:, None] & (columns < h_out)[None, :]
                        y = tl.load(out, mask=mask, other=0.0).to(tl.float32)
                        row_scale = tl.load(
                            floats_ptr + scale_word + columns,
                            mask=columns < tl.where(scale_word >= 0, h_out, 0), other=1.0,
                        )  # fmt: skip
                        bias = tl.load(
                            floats_ptr + bias_word + columns,
                            mask=columns < tl.where(bias_word >= 0, h_out, 0), other=0.0,
                        )  # fmt: skip
                    steps = ceil_div(bounds[DIGIT + 1] - bounds[DIGIT], WARPS)
                    # Into a condition Triton would move the exchange of sums between warps.
                    for _ in range(tl.minimum(steps, 1)):
                        acc = _expand_plane(
                            acc, projected_addresses, inverse, address, blocks_address,
                            blocks[DIGIT], bounds[DIGIT], bounds[DIGIT + 1], steps, tile, h_out,
                            8 >> DIGIT, COLUMNS, WARPS, VECTOR, EMULATE,
                        )  # fmt: skip
                acc = tl.reshape(acc, (WARPS, COLUMNS // 8, 8, _ROWS, 2))
                acc = tl.reshape(tl.permute(acc, (0, 3, 2, 1, 4)), (WARPS, _ROWS, 2 * COLUMNS))
                # Sums of integers are the same for any number of warps.
                high, low = tl.split(tl.reshape(sum_over_warps(acc), (_ROWS, COLUMNS, 2)))
                total = high.to(tl.float32) * 256.0 + low.to(tl.float32)
                total = total * (peak * (1.0 / LARGEST))[:, None] - rest[:, None]
                total = total * row_scale[None, :] + bias[None, :] + y
                tl.store(out, round_to(total, y_ptr.dtype.element_ty, EMULATE), mask=mask)
    wait_for_previous(OVERLAP)
