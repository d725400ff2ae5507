"""Embedding lookups: only the rows of U that a step asks for are unpacked."""

from collections.abc import Hashable

from torch import Tensor

from deltadock.kernels.cache import TensorCache
from deltadock.kernels.svd_delta import reference
from deltadock.kernels.svd_delta.layout import PackedDelta


def add_rows(y: Tensor, rows: Tensor, delta: PackedDelta, cache: TensorCache) -> None:
    """Add row `rows[i]` of a delta to `y[i]` in place: the delta of an embedding lookup.

    Only these rows of U are unpacked. V is cached under `("v", delta)`.

    Args:
        y: (n, h_in), any float dtype.
        rows: (n,) int64, from 0 to h_out - 1.
        delta: on the device of `y`.
        cache: cache for V.
    """
    v = cache.get(("v", delta), lambda: reference.unpack_v(delta))
    y += (reference.rows_of_u(delta, rows) * delta.s) @ v


def discard_rows(delta: Hashable, cache: TensorCache) -> None:
    """Discard what is cached of an embedding's delta, in whatever form."""
    cache.discard(("v", delta))
    cache.discard(delta)
