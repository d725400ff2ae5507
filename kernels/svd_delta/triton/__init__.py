"""GPU path: three kernel launches per call, for any number of deltas.

`prepare` turns the inputs into fixed-point numbers, `shrink` computes `s * (x V_hat^T)`, and
`expand` adds `row_scale * (U_hat projected) + bias` to the outputs. The kernels read the packed
words as the artifact stores them, plane by plane, and multiply bytes on tensor cores, with int32
sums: packed vectors are the tall operand, the rows of a chunk the other. A shift and a mask turn a
word into a code in each of its four bytes, and nothing else is done to a code.

The rows' numbers have 16 bits, in a high and a low byte with signs, which are columns of the small
operand: of the inputs they are relative to the largest of `BLOCK_INPUTS`, of the projections to the
largest of a row and linear. Bytes are exact, and parts of a sum are added in a fixed order, without
atomics: a row's result is bitwise independent of the other rows, and of the number of warps, which
follows from that of programs.

The inner loops have neither barriers nor shared memory: terms of a product may be in any order, so
each thread loads the very words and terms that its part of the tensor-core product takes, and the
words of its next step before it uses those of this one. The four codes that share a word after the
mask depend on the width of the plane, so `prepare` stores the inputs once for each width. `expand`
has its terms in different words: it transposes the bytes of four of them. Its planes share their
accumulators, which are added up over the warps once a tile. As many programs of `expand` as run at
once share its tiles: each loads what those of a chunk and linear have in common only once.

Where launches overlap (`kernels/overlap.py`), all that does not depend on the step's inputs comes
before the wait: slot, descriptor and tile, and a request to bring all words of the program's first
tile to L2.
"""

from collections.abc import Callable
from typing import Any, Final

import triton
from torch import Tensor

from deltadock.kernels.overlap import overlaps
from deltadock.kernels.svd_delta.chunks import BLOCK_INPUTS, CHUNK_ROWS, Chunks
from deltadock.kernels.svd_delta.layout import TILE_RANKS, DeltaTable
from deltadock.kernels.svd_delta.triton.expand import expand_kernel
from deltadock.kernels.svd_delta.triton.forms import (
    ExpandForm,
    Variant,
    form_of,
    multiprocessors_of,
    parts_of_prepare,
    places_of,
    variant_of,
)
from deltadock.kernels.svd_delta.triton.prepare import prepare_kernel
from deltadock.kernels.svd_delta.triton.shrink import shrink_kernel

USUAL_SHARE: Final = 3
"""Deltas of one bit per weight have about a third of a table's most ranks, or fewer."""


def launches(
    y: Tensor,
    x: Tensor,
    table: DeltaTable,
    chunks: Chunks,
    variant: Variant,
    *,
    emulate: bool,
) -> tuple[Callable[[], object], ...]:
    """The three launches of one call, in order: prepare, shrink, expand."""
    overlap = variant.overlap and overlaps(x.device) and not emulate
    shared: dict[str, Any] = {
        "LINEARS": table.linears,
        "OVERLAP": overlap,
        "EMULATE": emulate,
        "launch_pdl": overlap,
        "enable_fp_fusion": True,  # pinned: Triton 3.10 changes the default
    }
    xs, scales = chunks.fixed, chunks.scales
    block_count = table.padded_h_in // BLOCK_INPUTS
    multiprocessors = multiprocessors_of(x.device)
    prepares = len(x) * block_count * table.linears
    prepare_form = form_of(variant.prepare, lambda _: prepares, multiprocessors)
    parts = parts_of_prepare(prepares, prepare_form, multiprocessors)
    tiles = max(1, triton.cdiv(table.max_rank, TILE_RANKS))
    shrinks = triton.cdiv(tiles, USUAL_SHARE) * chunks.count
    shrink_form = form_of(variant.shrink, lambda _: shrinks, multiprocessors)

    def expands(form: ExpandForm) -> int:
        return len(table.output_tiles[form.columns]) * chunks.count

    expand_form = form_of(variant.expand, expands, multiprocessors)
    output_tiles = table.output_tiles[expand_form.columns]
    programs = min(expands(expand_form), places_of(expand_form, multiprocessors))

    def prepare() -> object:
        return prepare_kernel[(chunks.count * CHUNK_ROWS, block_count, table.linears * parts)](
            xs, xs.stride(0), scales, scales.stride(0), x, x.stride(0),
            table.h_in, table.padded_h_in, chunks.rows, chunks.slots,
            table.addresses, table.descriptors, VECTOR=table.h_in % 128 == 0,
            num_warps=prepare_form.warps, maxnreg=prepare_form.registers, **shared,
        )  # fmt: skip

    def shrink() -> object:
        return shrink_kernel[(tiles, chunks.count)](
            chunks.projected, chunks.peaks, chunks.rests, chunks.max_tiles, xs, xs.stride(0),
            scales, scales.stride(0), block_count, table.h_in, table.padded_h_in,
            chunks.slots, table.addresses, table.descriptors,
            BLOCKS=triton.next_power_of_2(block_count), VECTOR=table.h_in % 128 == 0,
            WARPS=shrink_form.warps,
            num_warps=shrink_form.warps, maxnreg=shrink_form.registers, **shared,
        )  # fmt: skip

    def expand() -> object:
        return expand_kernel[(programs,)](
            y, y.stride(0), chunks.projected, chunks.peaks, chunks.rests, chunks.max_tiles,
            chunks.rows, chunks.slots, chunks.used, table.addresses, table.descriptors,
            output_tiles, len(output_tiles), COLUMNS=expand_form.columns, WARPS=expand_form.warps,
            VECTOR=all(h_out % 128 == 0 for h_out in table.h_outs),
            num_warps=expand_form.warps, maxnreg=expand_form.registers, **shared,
        )  # fmt: skip

    return prepare, shrink, expand


def svd_delta(
    y: Tensor,
    x: Tensor,
    table: DeltaTable,
    chunks: Chunks,
    *,
    emulate: bool | None = None,
    variant: Variant | None = None,
) -> None:
    """Add each row's delta to `y` in place; see `deltadock.kernels.svd_delta.svd_delta`.

    With `emulate` the kernels use neither inline assembly nor products of bytes, which Triton's
    interpreter lacks; on a GPU this is slow, and isolates errors in either.
    """
    if not chunks.count:
        return
    emulate = not x.is_cuda if emulate is None else emulate
    for launch in launches(y, x, table, chunks, variant or variant_of(x.device), emulate=emulate):
        launch()
