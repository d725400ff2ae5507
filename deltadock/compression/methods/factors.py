"""What methods with quantized singular vectors share: widths set in advance, and the result."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltadock.artifacts.encodings import SvdMatrix, Vectors, decode_dense, encode_svd
from deltadock.compression.methods.base import MatrixResult, MatrixTask
from deltadock.compression.numerics.decomposition import decompose
from deltadock.compression.numerics.gptq import Codes, quantize_columns, quantize_rows
from deltadock.compression.numerics.ranks import rank_budget


def svd_result(
    task: MatrixTask,
    u: Codes,
    s: Tensor,
    v: Codes,
    bits: Tensor,
    *,
    damping: float,
    gap: float = 0.0,
    fallbacks: Sequence[str | None] = (),
) -> MatrixResult:
    """Encode quantized singular vectors, both sides with the widths `bits`.

    Args:
        task: the matrix.
        u, v: codes of U (r, h_out) and V (r, h_in).
        s: (r,) singular values; both sides' scales are folded into them.
        bits: (r,) widths.
        damping: largest that GPTQ used.
        gap: of the allocation.
        fallbacks: what did not go as planned; None is left out.
    """
    matrix = SvdMatrix(_vectors(u, bits), (s * v.scale * u.scale).cpu().numpy(), _vectors(v, bits))
    encoded = encode_svd(matrix, task.dtype)
    notes = {
        "rank": len(bits),
        "widths": {str(b): int((bits == b).sum()) for b in sorted(set(bits.tolist()))[::-1]},
        "damping": damping,
        "gap": gap,
        "fallbacks": [fallback for fallback in fallbacks if fallback is not None],
    }
    return MatrixResult(encoded, torch.from_numpy(decode_dense(encoded)), notes)


def _vectors(codes: Codes, bits: Tensor) -> Vectors:
    """The artifact's form of quantized vectors, without their scales."""
    return Vectors(codes.codes.cpu().numpy(), bits.numpy(), codes.zero.half().cpu().numpy())


def fixed_widths(budget: int, leading: Sequence[tuple[int, int]], rest: int) -> list[int]:
    """Widths of the ranks by falling singular value, until `budget` rank-bits are spent.

    Args:
        budget: most that the widths may sum to.
        leading: (width, how many ranks) from the first rank on.
        rest: width of the ranks after those.
    """
    widths: list[int] = []
    for width, most in [*leading, (rest, budget)]:
        widths += [width] * min(most, (budget - sum(widths)) // width)
    return widths


def compress_fixed(task: MatrixTask, leading: Sequence[tuple[int, int]], rest: int) -> MatrixResult:
    """Compress with widths that depend on a rank's place alone.

    V is quantized by GPTQ under the inputs' moment, then U under that of its own inputs, each
    width's ranks by themselves and towards themselves: nothing corrects U for what V lost.
    """
    h_out, h_in = task.delta.shape
    widths = fixed_widths(rank_budget(task.bits, h_out, h_in), leading, rest)
    u, s, v, fallback = decompose(task.delta, max(1, len(widths)))
    kept = min(len(widths), len(s))
    u, s, v = u[:, :kept], s[:kept], v[:kept]
    bits = torch.tensor(widths[:kept], dtype=torch.long)
    v_hat, damping = quantize_rows(v, bits, task.moment)
    right = (s[:, None] * v_hat.decode()).double()
    hessian = right @ task.moment @ right.t()
    scale, zero = torch.empty((2, kept), device=u.device)
    u_hat = Codes(torch.empty((kept, h_out), dtype=torch.uint8, device=u.device), scale, zero)
    for width in sorted(set(bits.tolist())):
        (of,) = torch.nonzero((bits == width).to(u.device), as_tuple=True)
        part, part_damping = quantize_columns(u[:, of], bits[bits == width], hessian[of][:, of])
        u_hat.codes[of], u_hat.scale[of], u_hat.zero[of] = part.codes, part.scale, part.zero
        damping = max(damping, part_damping)
    return svd_result(task, u_hat, s, v_hat, bits, damping=damping, fallbacks=[fallback])
