"""Attention of decoding rows to their sequences' slots of a key/value cache."""

from torch import Tensor

from deltadock.kernels import dispatch
from deltadock.kernels.decode_attention.reference import decode_attention as reference_attention


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
    """Attend with one query per row to the tokens of the row's sequence.

    On a GPU only these tokens are read, in two launches without host synchronization, whose shapes
    depend on those of the tensors, not on their numbers: a CUDA graph can hold them. A row's result
    is bitwise independent of the other rows.

    Args:
        query: (rows, heads, d), each head contiguous.
        keys, values: (slots, kv_heads, length, d) of one layer, each head's tokens contiguous, in
            the query's dtype. Heads that share a key head are adjacent.
        slots: (rows,) int64, each row's slot.
        lengths: (rows,) int64, tokens in the slot that the row attends to; 0: the row is padding,
            and its result 0.
        scale: factor of the scores.
        window: only the last so many tokens are attended to.
        cap: scores s become `cap * tanh(s / cap)`.

    Returns:
        (rows, heads, d).
    """
    if dispatch.on_gpu(query):
        from deltadock.kernels.decode_attention import triton

        return triton.decode_attention(
            query, keys, values, slots, lengths, scale=scale, window=window, cap=cap
        )
    return reference_attention(
        query, keys, values, slots, lengths, scale=scale, window=window, cap=cap
    )
