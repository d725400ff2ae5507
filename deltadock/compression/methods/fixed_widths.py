"""Delta-CoMe and Top-k: SVD factors whose widths depend on a rank's place alone.

Delta-CoMe: 8 bits for the 2 leading ranks, 3 for the next 32, 2 for the others in the budget.
Source: Ping et al., "Delta-CoMe: Training-Free Delta-Compression with Mixed-Precision for Large
Language Models" (arXiv 2406.08903). As there, GPTQ quantizes V and then U, one width's ranks at a
time, towards the factors themselves. Unlike there, a vector has one grid whose range is searched,
instead of a min-max grid for every 128 entries (better at 2 bits, and with fewer scales to
store), and columns are not reordered.

Top-k: 8 bits for the k leading ranks, 2 for the others, the heuristic baselines of the AdaMix
paper (arXiv 2506.11087, section 4.3) with k = 2 and 32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from deltadock.compression.methods.base import (
    MatrixResult,
    MatrixTask,
    Prepared,
    prepare_svd,
    svd_result,
)
from deltadock.compression.numerics.gptq import Codes, quantize_columns, quantize_rows
from deltadock.compression.options import rank_budget

DELTA_COME: Final = ((8, 2), (3, 32))
TOP_2: Final = ((8, 2),)
TOP_32: Final = ((8, 32),)
"""(width, number of ranks) from the first rank on."""
REST: Final = 2
"""Width of the ranks after those."""


@dataclass(frozen=True, slots=True)
class FixedWidths:
    """The method with these (width, number of ranks) from the first rank on."""

    leading: Sequence[tuple[int, int]]

    def ranks(self, bits: float, h_out: int, h_in: int) -> int:
        return max(1, len(fixed_widths(rank_budget(bits, h_out, h_in), self.leading)))

    def prepare(self, tasks: Sequence[MatrixTask], ranks: int) -> list[Prepared]:
        return prepare_svd(tasks, ranks)

    def compress(
        self, tasks: Sequence[MatrixTask], prepared: Sequence[Prepared]
    ) -> list[MatrixResult]:
        return [
            _compress(task, one, self.leading) for task, one in zip(tasks, prepared, strict=True)
        ]


def fixed_widths(budget: int, leading: Sequence[tuple[int, int]], rest: int = REST) -> list[int]:
    """Widths of the ranks by falling singular value, until `budget` rank-bits are spent.

    Args:
        budget: upper bound of the widths' sum.
        leading: (width, number of ranks) from the first rank on.
        rest: width of the ranks after those.
    """
    widths: list[int] = []
    for width, most in [*leading, (rest, budget)]:
        widths += [width] * min(most, (budget - sum(widths)) // width)
    return widths


def _compress(
    task: MatrixTask, prepared: Prepared, leading: Sequence[tuple[int, int]]
) -> MatrixResult:
    """Quantize V by GPTQ under the inputs' moment, then U under the moment of its own inputs.

    Each width's ranks are quantized separately and towards themselves: nothing corrects U for
    V's quantization error.
    """
    h_out, h_in = task.delta.shape
    widths = fixed_widths(rank_budget(task.bits, h_out, h_in), leading)
    u, s, v = (prepared.tensors[name] for name in ("u", "s", "v"))
    kept = min(len(widths), len(s))
    u, s, v = u[:, :kept], s[:kept], v[:kept]
    bits = torch.tensor(widths[:kept], dtype=torch.long)
    v_hat, damping = quantize_rows(v[None], bits[None], task.moment[None])
    right = (s[:, None] * v_hat.decode()[0]).double()
    hessian = right @ task.moment @ right.t()
    scale, zero = torch.empty((2, kept), device=u.device)
    u_hat = Codes(torch.empty((kept, h_out), dtype=torch.uint8, device=u.device), scale, zero)
    for width in sorted(set(bits.tolist())):
        (of,) = torch.nonzero((bits == width).to(u.device), as_tuple=True)
        part, part_damping = quantize_columns(
            u[None, :, of], bits[None, bits == width], hessian[of][None, :, of]
        )
        u_hat.codes[of], u_hat.scale[of], u_hat.zero[of] = (
            part.codes[0], part.scale[0], part.zero[0]
        )  # fmt: skip
        damping += part_damping
    return svd_result(
        task, u_hat, s, v_hat[0,], bits, damping=max(damping), fallbacks=[prepared.fallback]
    )
