"""Deltas as the artifact stores them, and their expected results."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deltadock.artifacts.encodings import Encoded, SvdMatrix, Vectors, decode_factors, encode_svd
from deltadock.artifacts.tensors import packed_delta
from deltadock.kernels.svd_delta import Group, PackedDelta

Widths = Sequence[tuple[int, int, int]]
"""Runs of (ranks, v_bits, u_bits)."""


class Delta(NamedTuple):
    """A delta in the kernels' layout, and as a float64 matrix (h_out, h_in)."""

    packed: PackedDelta
    dense: Tensor


def encode(
    shape: tuple[int, int],
    widths: Widths,
    seed: int = 0,
    *,
    midrise: bool = False,
    row_scale: bool = False,
    column_scale: bool = False,
    dtype: str = "BF16",
) -> Encoded:
    """An artifact's record and segments with random codes."""
    rng = np.random.default_rng(seed)

    def side(columns: int, bits: list[int]) -> Vectors:
        codes = [rng.integers(0, 2**b, columns) for b in bits]
        zero = (2.0 ** np.array(bits) - 1) / 2 + rng.normal(0, 0.3, len(bits))
        stacked = np.array(codes).astype(np.uint8).reshape(len(bits), columns)
        stored = None if midrise else zero.astype(np.float16)
        return Vectors(stacked, np.array(bits, np.int64), stored)

    h_out, h_in = shape
    v_bits = [bits for ranks, bits, _ in widths for _ in range(ranks)]
    u_bits = [bits for ranks, _, bits in widths for _ in range(ranks)]
    # Scale the ranks so that their outer products have entries of similar magnitude.
    sizes = 2.0 ** (np.array(v_bits) + np.array(u_bits) - 2)
    s = (rng.lognormal(0, 1, len(v_bits)) / sizes / np.sqrt(h_in)).astype(np.float32)
    return encode_svd(
        SvdMatrix(side(h_out, u_bits), s, side(h_in, v_bits)),
        dtype,
        {},
        rng.lognormal(0, 0.3, h_out) if row_scale else None,
        rng.lognormal(0, 0.3, h_in) if column_scale else None,
    )


def segments(encoded: Encoded) -> dict[str, Tensor]:
    """The keyword arguments of `pack_delta`, except the gain."""
    arrays = {name.replace(".", "_"): array for name, array in encoded.segments.items()}
    return {
        name: torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array)
        for name, array in arrays.items()
    }


def groups(encoded: Encoded) -> list[Group]:
    """The record's rank groups."""
    return [Group(run["count"], run["v_bits"], run["u_bits"]) for run in encoded.record["ranks"]]


def pack(encoded: Encoded, bias: Tensor | None = None) -> PackedDelta:
    """An artifact's matrix in the kernels' layout."""
    packed = packed_delta(encoded)
    return packed if bias is None else packed.with_bias(bias)


def make_delta(
    shape: tuple[int, int],
    widths: Widths,
    seed: int = 0,
    *,
    midrise: bool = False,
    scaled: bool = False,
) -> Delta:
    encoded = encode(shape, widths, seed, midrise=midrise, row_scale=scaled, column_scale=scaled)
    packed = pack(encoded)
    factors = decode_factors(encoded)
    u, s, v = (torch.from_numpy(factor).double() for factor in (factors.u, factors.s, factors.v))
    return Delta(packed, (u * s) @ v)


def expected(y: Tensor, x: Tensor, row_slots: Sequence[int], dense: Mapping[int, Tensor]) -> Tensor:
    """The expected output rows, float64 on the CPU."""
    out = y.double().cpu()
    inputs = x.double().cpu()
    for row, slot in enumerate(row_slots):
        if slot in dense:
            out[row] += dense[slot] @ inputs[row]
    return out


def relative_error(got: Tensor, want: Tensor) -> float:
    """RMS of the error relative to the RMS of `want`."""
    error = (got.double().cpu() - want).square().sum() / want.square().sum()
    return float(error.sqrt())
