"""Attention of decoding rows in plain PyTorch: all slots are read to the cache's length."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    cap: float | None = None,
) -> Tensor:
    """Attention of (..., n, d) to (..., tokens, d), with capped scores if there is a `cap`.

    `mask` (..., n, tokens) is added to the scores, or true for the tokens that are attended to.
    """
    if cap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scale)
    # PyTorch's kernel caps no scores.
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ keys.mT).to(exact).mul_(scale / cap).tanh_().mul_(cap)
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, float("-inf"))
    elif mask is not None:
        scores += mask
    return scores.softmax(-1).to(query.dtype) @ values


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
    out = attention(grouped, keys[slots], values[slots], mask, scale=scale, cap=cap)
    return torch.where(lengths[:, None, None] > 0, out.reshape(query.shape), 0)
