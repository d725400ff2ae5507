"""GPU path: each row's tokens are split over programs, whose parts a second launch adds up.

How a row's tokens are split follows from its own length and the cache's, so that its bits do not
depend on its neighbours. Programs past its last token do nothing: a short row costs what it reads,
and the grid does not depend on the lengths, which are read on the device. Where launches overlap
(`kernels/overlap.py`), slots and lengths are read before the wait.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from deltadock.kernels.interpreter import dot, round_to
from deltadock.kernels.overlap import launch_options, start_next, wait_for_previous


@dataclass(frozen=True, slots=True)
class Variant:
    """How the kernels are compiled; it may depend on the card, but not on a step's rows.

    Attributes:
        tokens: of a step of a program; a power of two from 16 on. Wide heads take fewer.
        splits: programs that share a row's tokens, at most; a power of two.
        warps: per program.
        stages: of the loads' pipeline.
    """

    tokens: int = 64
    splits: int = 32
    warps: int = 4
    stages: int = 2


DEFAULT: Final = Variant()
VARIANTS: Final[Mapping[tuple[int, int], Variant]] = MappingProxyType({})
"""The best variants by compute capability, as `python -m benchmarks.gpu` finds them; cards that are
not listed use the default."""

STEP_BYTES: Final = 16_384
"""Bytes of keys that a step of a program reads, at most."""
UNSPECIALIZED: Final = ("window", "heads")
"""Arguments whose values only would multiply compilations."""
LOG2_E: Final = math.log2(math.e)


@cache
def variant_of(device: torch.device) -> Variant:
    """The variant for a device."""
    if device.type != "cuda":
        return DEFAULT
    return VARIANTS.get(torch.cuda.get_device_capability(device), DEFAULT)


@triton.jit
def _span(length, window, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr):
    """The first token that a row of `length` attends to, and the tokens of each split."""
    begin = tl.maximum(length - window, 0)
    return begin, tl.cdiv(tl.cdiv(length - begin, BLOCK_N), SPLITS) * BLOCK_N


@triton.jit(do_not_specialize=UNSPECIALIZED)
def split_kernel(
    parts_ptr, states_ptr, query_ptr, row_stride, head_stride,
    keys_ptr, values_ptr, slot_stride, kv_stride, slots_ptr, lengths_ptr, scale, window,
    heads,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr, CAP: tl.constexpr,
    OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """A split of one row's tokens and one key head: the weighted sum of values, the largest score
    (base 2) and the sum of the weights of each of its heads.

    Scores of base 2 are the products times `scale`; with a CAP that is the exponent of the two to
    the power of which tanh is computed, and CAP the largest score.
    """
    start_next(OVERLAP)
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + row).to(tl.int32)
    begin, tokens = _span(length, window, BLOCK_N, SPLITS)
    begin += split * tokens
    end = tl.minimum(begin + tokens, length)
    if begin >= end:
        wait_for_previous(OVERLAP)
        return
    DT: tl.constexpr = keys_ptr.dtype.element_ty
    offset = tl.load(slots_ptr + row) * slot_stride + kv_head * kv_stride
    started = wait_for_previous(OVERLAP)
    keys_ptr += started + offset
    values_ptr += started + offset
    group = tl.arange(0, BLOCK_G)
    columns = tl.arange(0, BLOCK_D)
    used = (group < GROUP)[:, None] & (columns < WIDTH)[None, :]
    queries = query_ptr + started + row.to(tl.int64) * row_stride
    queries += ((kv_head * GROUP + group) * head_stride)[:, None] + columns[None, :]
    query = tl.load(queries, mask=used, other=0.0)
    largest = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_G,), tl.float32)
    total = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        index = first + tl.arange(0, BLOCK_N)
        within = (index < end)[:, None] & (columns < WIDTH)[None, :]
        offsets = (index * WIDTH)[:, None] + columns[None, :]
        keys = tl.load(keys_ptr + offsets, mask=within, other=0.0)
        scores = dot(query, tl.trans(keys), tl.zeros((BLOCK_G, BLOCK_N), tl.float32), EMULATE)
        scores *= scale
        if CAP is not None:
            scores = CAP - 2 * CAP / (1.0 + tl.exp2(scores))
        scores = tl.where((index < end)[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        fade = tl.exp2(largest - larger)
        weights = tl.exp2(scores - larger[:, None])
        weight = weight * fade + tl.sum(weights, axis=1)
        values = tl.load(values_ptr + offsets, mask=within, other=0.0)
        total = dot(round_to(weights, DT, EMULATE), values, total * fade[:, None], EMULATE)
        largest = larger
    places = ((row * heads + kv_head * GROUP + group) * SPLITS + split).to(tl.int64)
    tl.store(parts_ptr + places[:, None] * WIDTH + columns[None, :], total, mask=used)
    tl.store(states_ptr + places * 2, largest, mask=group < GROUP)
    tl.store(states_ptr + places * 2 + 1, weight, mask=group < GROUP)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def combine_kernel(
    out_ptr, parts_ptr, states_ptr, lengths_ptr, window, heads,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Add up the parts of one head of one row, in a fixed order."""
    start_next(OVERLAP)
    head, row = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths_ptr + row).to(tl.int32)
    begin, tokens = _span(length, window, BLOCK_N, SPLITS)
    place = (row * heads + head).to(tl.int64)
    split = tl.arange(0, SPLITS)
    used = split * tokens < length - begin
    columns = tl.arange(0, BLOCK_D)
    result = tl.zeros((BLOCK_D,), tl.float32)
    started = wait_for_previous(OVERLAP)
    states_ptr += started
    parts_ptr += started
    if length > 0:
        places = place * SPLITS + split
        largest = tl.load(states_ptr + places * 2, mask=used, other=float("-inf"))
        weight = tl.load(states_ptr + places * 2 + 1, mask=used, other=0.0)
        within = used[:, None] & (columns < WIDTH)[None, :]
        parts = tl.load(
            parts_ptr + places[:, None] * WIDTH + columns[None, :], mask=within, other=0.0
        )
        share = tl.exp2(largest - tl.max(largest, axis=0))
        result = tl.sum(parts * share[:, None], axis=0) / tl.sum(weight * share, axis=0)
    out = round_to(result, out_ptr.dtype.element_ty, EMULATE)
    tl.store(out_ptr + place * WIDTH + columns, out, mask=columns < WIDTH)


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    variant: Variant | None = None,
) -> Tensor:
    """See `deltadock.kernels.decode_attention.decode_attention`.

    Raises:
        ValueError: a shape, dtype or stride differs from those that it names.
    """
    _check(query, keys, values, slots, lengths)
    variant = variant or variant_of(query.device)
    rows, heads, width = query.shape
    kv_heads, longest = keys.shape[1:3]
    window = longest if window is None else window
    columns = max(16, triton.next_power_of_2(width))
    tokens = min(variant.tokens, max(16, STEP_BYTES // (columns * keys.itemsize)))
    most = triton.next_power_of_2(triton.cdiv(min(longest, window), tokens))
    splits = min(variant.splits, most)
    parts = torch.empty(rows, heads, splits, width, dtype=torch.float32, device=query.device)
    states = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=query.device)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    shared = {
        "WIDTH": width,
        "BLOCK_D": columns,
        "BLOCK_N": tokens,
        "SPLITS": splits,
        "EMULATE": not query.is_cuda,
        **launch_options(query.device),
        "enable_fp_fusion": True,  # pinned: Triton 3.10 changes the default
    }
    factor = scale * LOG2_E * (1 if cap is None else 2 / cap)
    split_kernel[(splits, kv_heads, rows)](
        parts, states, query, query.stride(0), query.stride(1),
        keys, values, keys.stride(0), keys.stride(1), slots, lengths, factor, window, heads,
        GROUP=heads // kv_heads, BLOCK_G=max(16, triton.next_power_of_2(heads // kv_heads)),
        STAGES=variant.stages, CAP=None if cap is None else cap * LOG2_E,
        num_warps=variant.warps, **shared,
    )  # fmt: skip
    combine_kernel[(heads, rows)](out, parts, states, lengths, window, heads, num_warps=4, **shared)
    return out


def _check(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, lengths: Tensor) -> None:
    """Validate what the kernels rely on: an out-of-bounds read could be another tenant's memory."""
    rows, heads, width = query.shape
    if slots.shape != (rows,) or lengths.shape != (rows,) or slots.dtype != torch.int64:
        raise ValueError("Each row needs a slot and a length.")
    if keys.shape != values.shape or keys.stride() != values.stride() or keys.shape[3] != width:
        raise ValueError("Keys and values need one layout and the query's width.")
    if heads % keys.shape[1] or not query.dtype == keys.dtype == values.dtype:
        raise ValueError("Keys and values need the query's dtype, and heads that divide its heads.")
    if query.stride(2) != 1 or keys.stride()[2:] != (width, 1):
        raise ValueError("A head's tokens need to be contiguous.")
