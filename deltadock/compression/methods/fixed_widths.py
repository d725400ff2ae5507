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

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from deltadock.compression.methods.base import (
    MatrixResult,
    MatrixTask,
    Prepared,
    fill,
    kept_of_all,
    prepare_svd,
    stacked,
    svd_result,
)
from deltadock.compression.numerics.gptq import Codes, quantize_columns, quantize_rows
from deltadock.compression.numerics.metric import mean_of_used
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
        """Quantize V by GPTQ under the inputs' moment, then U under the moment of its own inputs.

        Each width's ranks are quantized separately and towards themselves: nothing corrects U for
        V's quantization error.
        """
        widths = fixed_widths(rank_budget(tasks[0].bits, *tasks[0].delta.shape), self.leading)
        kept = [min(len(widths), len(one.tensors["s"])) for one in prepared]
        most, b = max(kept), len(tasks)
        # Ranks of zeros fill up the matrices that have fewer.
        u = stacked([fill(one.tensors["u"][:, :most].t(), most).t() for one in prepared])
        s = stacked([fill(one.tensors["s"][:most], most) for one in prepared])
        v = stacked([fill(one.tensors["v"][:most], most) for one in prepared])
        bits = torch.tensor(widths[:most], dtype=torch.long)
        moments = stacked([task.moment for task in tasks])
        v_hat, damping = quantize_rows(v, bits.expand(b, -1), moments)
        right = (s[:, :, None] * v_hat.decode()).double()
        hessians = right @ moments @ right.mT
        diagonal = hessians.diagonal(dim1=1, dim2=2)
        diagonal += torch.where(diagonal == 0, mean_of_used(diagonal), 0.0)
        codes = torch.empty((b, most, u.shape[1]), dtype=torch.uint8, device=u.device)
        scale, zero = torch.empty((2, b, most), device=u.device)
        begin = 0
        # Widths come in runs, by falling singular value.
        for width, count in Counter(widths[:most]).items():
            of = slice(begin, begin + count)
            begin += count
            part, part_damping = quantize_columns(
                u[:, :, of], torch.full((b, count), width), hessians[:, of, of]
            )
            codes[:, of], scale[:, of], zero[:, of] = part.codes, part.scale, part.zero
            damping = [max(pair) for pair in zip(damping, part_damping, strict=True)]
        u_hat = Codes(codes, scale, zero)
        return [
            svd_result(
                task,
                u_hat[number, :count],
                s[number, :count],
                v_hat[number, :count],
                bits[:count],
                damping=damping[number],
                fallbacks=[prepared[number].fallback],
                spectrum=kept_of_all(prepared[number], bits[:count]),
            )
            for number, (task, count) in enumerate(zip(tasks, kept, strict=True))
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
