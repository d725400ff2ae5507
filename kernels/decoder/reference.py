"""The operations in plain PyTorch, rounding where transformers' models do."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deltadock.kernels.decoder.arguments import Activation, CacheRows, Rotation, RowNorm


def rms_norm(x: Tensor, norm: RowNorm, row_slots: Tensor) -> Tensor:
    """Normalize (rows, ..., width), each row by its slot's weight and epsilon."""
    shape = (len(row_slots), *[1] * (x.ndim - 2))
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    epsilons = norm.epsilons[row_slots].view(*shape, 1)
    exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + epsilons)
    weights = norm.weights[row_slots].view(*shape, -1)
    if weights.dtype != x.dtype:
        return (weights * exact).to(x.dtype)
    return weights * exact.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, norm: RowNorm, row_slots: Tensor
) -> tuple[Tensor, Tensor]:
    """`residual + x` and the same normalized."""
    total = residual + x
    return total, rms_norm(total, norm, row_slots)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first columns of heads (rows, heads, d)."""
    cos, sin = (factor[:, None] for factor in rotation)
    turned, kept = x.tensor_split([cos.shape[-1]], dim=-1)
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((turned.to(x.dtype), kept), dim=-1) if kept.shape[-1] else turned.to(x.dtype)


def store(key: Tensor, value: Tensor, cache: CacheRows) -> None:
    """Write the rows' keys and values (rows, kv_heads, d) to the cache."""
    cache.keys[cache.slots, :, cache.positions] = key
    cache.values[cache.slots, :, cache.positions] = value


def rotate_and_store(
    projected: Tensor,
    rotation: Rotation,
    cache: CacheRows,
    norms: tuple[RowNorm, RowNorm] | None,
    row_slots: Tensor,
) -> Tensor:
    """Queries, keys and values (rows, (heads + 2 kv_heads) * d) of a layer: norms of the queries'
    and the keys' heads, if any; rotation; and keys and values to the cache.

    Returns:
        (rows, heads, d), the queries.
    """
    rows, (kv_heads, _, width) = len(projected), cache.keys.shape[1:]
    heads = projected.view(rows, -1, width)
    query, key, value = heads.tensor_split([-2 * kv_heads, -kv_heads], dim=1)
    if norms is not None:
        query, key = (
            rms_norm(x, norm, row_slots) for x, norm in zip((query, key), norms, strict=True)
        )
    store(rotate(key, rotation), value, cache)
    return rotate(query, rotation)


def gated(x: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up` of (rows, 2 * width), gate first."""
    gate, up = x.chunk(2, dim=-1)
    gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return gate * up
