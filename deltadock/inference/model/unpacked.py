"""Rows changed by deltas slot by slot, without a kernel; what is decoded is cached.

Other engines than the node's use these functions too.
"""

from collections.abc import Hashable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deltadock.inference.model.weight_deltas import LowRank, RowsDelta, WeightDelta
from deltadock.kernels.cache import TensorCache
from deltadock.kernels.svd_delta import PackedDelta, add_rows


class Decodable(Hashable, Protocol):
    """A matrix difference that is decoded at use."""

    def dense(self) -> Tensor:
        """The difference, in the matrix's shape."""


def change_products(
    y: Tensor,
    x: Tensor,
    weight: WeightDelta | Decodable | None,
    bias: Tensor | None,
    cache: TensorCache,
) -> Tensor:
    """The outputs of a linear with this delta, from the base's `y` (rows, h_out) for `x`.

    `weight` is not packed: a kernel applies that. `bias` is the bias itself if the weight is
    replaced, otherwise its difference from the base's.
    """
    assert not isinstance(weight, PackedDelta)
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    if isinstance(weight, LowRank):
        y = torch.addmm(y, F.linear(x, weight.v), weight.u.T)
    elif weight is not None:
        y = torch.addmm(y, x, _decoded(weight, x.dtype, cache).T)
    return y if bias is None else y + bias


def change_embeddings(
    y: Tensor,
    tokens: Tensor,
    delta: WeightDelta | Decodable,
    cache: TensorCache,
) -> Tensor:
    """The embeddings of `tokens` (rows,) int64 with this delta, from the base's `y`.

    A packed delta changes `y` in place.
    """
    if isinstance(delta, PackedDelta):
        add_rows(y, tokens, delta, cache)
        return y
    if isinstance(delta, LowRank):
        return torch.addmm(y, F.embedding(tokens, delta.u), delta.v)
    if isinstance(delta, Tensor):
        return F.embedding(tokens, delta)
    if isinstance(delta, RowsDelta):
        return y + delta.rows(tokens).to(y.dtype)
    return y + F.embedding(tokens, _decoded(delta, y.dtype, cache))


def _decoded(delta: Decodable, dtype: torch.dtype, cache: TensorCache) -> Tensor:
    return cache.get(delta, lambda: delta.dense().to(dtype))
