"""Attention of decoding rows in plain PyTorch: all slots are read to the cache's length."""

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """See `deltadock.kernels.decode_attention.decode_attention`."""
    rows, heads, width = query.shape
    kv_heads, length = keys.shape[1:3]
    tokens, ends = torch.arange(length, device=query.device), lengths[:, None]
    hidden = tokens >= ends
    if window is not None:
        hidden |= tokens < ends - window
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None]
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, width)
    out = F.scaled_dot_product_attention(
        grouped, keys[slots], values[slots], attn_mask=mask, scale=scale
    )
    return torch.where(lengths[:, None, None] > 0, out.reshape(query.shape), 0)
