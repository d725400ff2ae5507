"""Cases of decode attention against float64; plain functions, as a GPU machine may lack pytest."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from deltadock.kernels.decode_attention.reference import decode_attention as reference
from deltadock.kernels.decode_attention.triton import Variant, decode_attention

DEVICE: Final = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SLOTS, LENGTH = 5, 90
SMALL: Final = Variant(tokens=16, splits=2)
"""Several splits, and several steps of each, within few tokens."""
TOLERANCE: Final = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def make(
    dtype: torch.dtype, heads: tuple[int, int], width: int, rows: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (rows, heads, d) and a cache of one layer, with NaN in all of it."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(heads[0], rows, width, generator=generator).transpose(0, 1)
    cache = torch.full((2, SLOTS, heads[1], LENGTH, width), torch.nan)
    keys, values = cache.to(DEVICE, dtype)
    return query.to(DEVICE, dtype), keys, values


def fill(keys: Tensor, values: Tensor, slots: Sequence[int], lengths: Sequence[int]) -> None:
    """Random keys and values for what these rows may read; what follows stays NaN."""
    generator = torch.Generator().manual_seed(1)
    for slot, length in zip(slots, lengths, strict=True):
        for tensor in (keys, values):
            shape = (keys.shape[1], length, keys.shape[3])
            tensor[slot, :, :length] = torch.randn(shape, generator=generator).to(keys)


def run(
    query: Tensor, keys: Tensor, values: Tensor, slots: Sequence[int], lengths: Sequence[int],
    window: int | None = None, cap: float | None = None,
) -> Tensor:  # fmt: skip
    places, ends = (torch.tensor(numbers, device=DEVICE) for numbers in (slots, lengths))
    return decode_attention(
        query, keys, values, places, ends, scale=0.3, window=window, cap=cap, variant=SMALL
    )


def matches_float64(
    dtype: torch.dtype,
    heads: tuple[int, int],
    width: int,
    window: int | None,
    cap: float | None = None,
) -> None:
    slots, lengths = [2, 0, 4, 1, 3], [1, 90, 0, 16, 37]
    query, keys, values = make(dtype, heads, width, len(slots))
    fill(keys, values, slots, lengths)
    got = run(query, keys, values, slots, lengths, window, cap)
    exact, cached_keys, cached_values = (
        tensor.double().cpu().nan_to_num(0) for tensor in (query, keys, values)
    )
    places, ends = torch.tensor(slots), torch.tensor(lengths)
    cached = cached_keys, cached_values
    want = reference(exact, *cached, places, ends, scale=0.3, window=window, cap=cap)
    assert not got[2].any()
    error = (got.double().cpu() - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2)).clamp_min(1e-30)
    assert (error < TOLERANCE[dtype]).all(), error


def a_row_does_not_depend_on_its_neighbours() -> None:
    query, keys, values = make(torch.float16, (2, 1), 32, 4)
    fill(keys, values, [0, 1, 2], [90, 70, 40])
    alone = run(query[:1], keys, values, [1], [70])
    together = run(query.flip(0), keys, values, [2, 0, 2, 1], [40, 90, 0, 70])
    assert torch.equal(alone[0], together[3])


def nan_in_a_row_does_not_spread() -> None:
    query, keys, values = make(torch.float16, (2, 1), 16, 2)
    fill(keys, values, [0, 1], [40, 40])
    clean = run(query, keys, values, [0, 1], [40, 40])
    values[0, :, 20] = torch.nan
    got = run(query, keys, values, [0, 1], [40, 40])
    assert got[0].isnan().all()
    assert torch.equal(got[1], clean[1])


CASES: Final[dict[str, Callable[[], None]]] = {
    f"attention, {dtype} {heads} {width} window {window} cap {cap}": partial(
        matches_float64, dtype, heads, width, window, cap
    )
    for dtype, heads, width, window, cap in (
        (torch.bfloat16, (7, 1), 128, None, None),
        (torch.bfloat16, (4, 2), 64, 33, None),
        (torch.float16, (2, 2), 80, None, None),
        (torch.float16, (17, 1), 16, 1, None),
        (torch.float32, (4, 2), 8, 40, None),
        (torch.bfloat16, (2, 1), 256, 33, 50.0),
        (torch.float32, (4, 2), 8, None, 0.7),
    )
} | {
    f"attention, {case.__name__}".replace("_", " "): case
    for case in (a_row_does_not_depend_on_its_neighbours, nan_in_a_row_does_not_spread)
}
