"""One bit budget for the whole model: both widths of every rank, by Lagrangian relaxation.

    minimise   sum over ranks of error(rank, width of U, width of V)
    subject to sum over ranks of cost(width of U, width of V) <= budget

All errors are in nats per token, so that the ranks of all matrices compete. At a given price per
bit (the multiplier) the ranks' choices are independent; the price is bisected until the choices
fit, and the remaining bits go to the ranks that gain most. The Lagrangian bound at that price
bounds the distance to the optimum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from deltadock.compression.numerics.two_sided import WIDTHS
from deltadock.errors import InvalidInput

BISECTIONS: Final = 70
SCALE_BITS: Final = 16
WORD: Final = 32


@dataclass(frozen=True, slots=True)
class RankProfile:
    """The error of each rank of a matrix at each pair of widths, and its cost.

    Attributes:
        shape: (h_out, h_in).
        s: (r,) singular values under both metrics; dropping a rank costs `s ** 2 / 2`.
        u_losses, v_losses: (r, len(WIDTHS)), fraction of a vector's energy lost at each width.
        overhead: bits that the matrix takes whatever its widths, even without any rank.
    """

    shape: tuple[int, int]
    s: Tensor
    u_losses: Tensor
    v_losses: Tensor
    overhead: int = 0

    def errors(self) -> Tensor:
        """(r, 1 + len(WIDTHS) ** 2) float64, in nats per token: dropped, then each (U, V) pair.

        A factor of loss l keeps `1 - l`; two factors keep the product.
        """
        kept = (1 - self.u_losses)[:, :, None] * (1 - self.v_losses)[:, None, :]
        lost = torch.cat([torch.ones_like(self.s)[:, None], 1 - kept.flatten(1)], dim=1)
        return lost * self.s.square()[:, None] / 2

    def costs(self) -> Tensor:
        """(1 + len(WIDTHS) ** 2,) float64: bits of a rank, in the order of `errors`."""
        widths = torch.tensor(WIDTHS, dtype=torch.float64)
        h_out, h_in = (-(-n // WORD) * WORD for n in self.shape)
        pairs = widths[:, None] * h_out + widths * h_in + SCALE_BITS
        return torch.cat([torch.zeros(1, dtype=torch.float64), pairs.flatten()])


@dataclass(frozen=True, slots=True)
class RankWidths:
    """Indices (k,) of the ranks of a matrix that are kept, and the widths (k,) of U and V."""

    kept: Tensor
    u: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class GlobalAllocation:
    """Each matrix's widths, the expected error in nats per token, and the optimality gap: the
    distance to the Lagrangian bound as a fraction of that error."""

    widths: list[RankWidths]
    error: float
    gap: float


def allocate(profiles: Sequence[RankProfile], budget: float) -> GlobalAllocation:
    """Choose the widths of every rank of every matrix within `budget` bits.

    Raises:
        InvalidInput: the budget is below the matrices' overhead.
    """
    budget -= sum(profile.overhead for profile in profiles)
    if budget < 0:
        raise InvalidInput("The budget holds no codes at all. Allow more bits.")
    if not profiles:
        return GlobalAllocation([], 0.0, 0.0)
    ranks = [len(profile.s) for profile in profiles]
    errors = torch.cat([profile.errors() for profile in profiles])
    costs = torch.cat(
        [
            profile.costs().to(errors.device).expand(n, -1)
            for n, profile in zip(ranks, profiles, strict=True)
        ]
    )

    def choose(price: float) -> tuple[Tensor, float]:
        picked = torch.add(errors, costs, alpha=price).argmin(dim=1, keepdim=True)
        return picked, float(costs.gather(1, picked).sum())

    ceiling = (float(errors.max()) if len(errors) else 0.0) + 1e-300
    low, high = ceiling * 1e-18, ceiling
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if choose(middle)[1] > budget else (low, middle)
    picked, spent = choose(high)
    bound = float(torch.add(errors, costs, alpha=high).amin(dim=1).sum()) - high * budget
    _spend_rest(picked, choose(low)[0], errors, costs, budget - spent)
    total = float(errors.gather(1, picked).sum())
    gap = (total - min(max(bound, 0.0), total)) / total if total > 0 else 0.0
    widths = [_widths(part) for part in picked.squeeze(1).cpu().split(ranks)]
    return GlobalAllocation(widths, total, gap)


def _spend_rest(picked: Tensor, larger: Tensor, errors: Tensor, costs: Tensor, left: float) -> None:
    """Upgrade ranks to their choice at a slightly lower price, best gain per bit first."""
    moved = (picked != larger).squeeze(1).nonzero().squeeze(1)
    before, after = picked[moved], larger[moved]
    extra = (costs[moved].gather(1, after) - costs[moved].gather(1, before)).squeeze(1)
    gain = (errors[moved].gather(1, before) - errors[moved].gather(1, after)).squeeze(1)
    order = (gain / extra.clamp_min(1)).argsort(descending=True, stable=True)
    upgraded = []
    for row, bits in zip(moved[order].tolist(), extra[order].tolist(), strict=True):
        if bits <= left:
            upgraded.append(row)
            left -= bits
    picked[upgraded] = larger[upgraded]


def _widths(picked: Tensor) -> RankWidths:
    kept = (picked > 0).nonzero().squeeze(1)
    widths = torch.tensor(WIDTHS)
    pair = picked[kept] - 1
    return RankWidths(kept, widths[pair // len(WIDTHS)], widths[pair % len(WIDTHS)])
