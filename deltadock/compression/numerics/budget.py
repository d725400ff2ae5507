"""One bit budget for the whole model: every rank's two widths, chosen by one multiplier.

    minimise   sum over ranks of error(rank, width of U, width of V)
    subject to sum over ranks of cost(width of U, width of V) <= budget

All errors are in one unit (nats per token), so that ranks of all matrices compete. For a price per
bit every rank chooses on its own; the price is bisected until the choices fit, and what is left is
given to the ranks that gain most from it. The Lagrangian bound at that price certifies how far
from the optimum the outcome can be.
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
class Profile:
    """What each rank of a matrix is worth.

    Attributes:
        shape: (h_out, h_in).
        s: (r,) singular values under both metrics; a dropped rank costs `s ** 2 / 2`.
        u_losses, v_losses: (r, len(WIDTHS)): share of a vector's energy that a width loses.
        overhead: bits that the matrix takes whatever its widths, and where no rank is kept.
    """

    shape: tuple[int, int]
    s: Tensor
    u_losses: Tensor
    v_losses: Tensor
    overhead: int = 0

    def errors(self) -> Tensor:
        """(r, 1 + len(WIDTHS) ** 2) float64, in nats per token: dropped, then each (U, V) pair.

        A factor that loses the share l keeps `1 - l`, and so two factors keep the product.
        """
        kept = (1 - self.u_losses)[:, :, None] * (1 - self.v_losses)[:, None, :]
        lost = torch.cat([torch.ones_like(self.s)[:, None], 1 - kept.flatten(1)], dim=1)
        return lost * self.s.square()[:, None] / 2

    def costs(self) -> Tensor:
        """(1 + len(WIDTHS) ** 2,) float64: bits that a rank takes, in the order of `errors`."""
        widths = torch.tensor(WIDTHS, dtype=torch.float64)
        h_out, h_in = (-(-n // WORD) * WORD for n in self.shape)
        pairs = widths[:, None] * h_out + widths * h_in + SCALE_BITS
        return torch.cat([torch.zeros(1, dtype=torch.float64), pairs.flatten()])


@dataclass(frozen=True, slots=True)
class Widths:
    """The ranks of a matrix that are kept (k,), and the widths of their U and V vectors (k,)."""

    kept: Tensor
    u: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Shares:
    """An allocation: each matrix's widths, the error expected in nats, and the gap to the
    Lagrangian bound as a share of that error."""

    widths: list[Widths]
    error: float
    gap: float


def share(profiles: Sequence[Profile], budget: float) -> Shares:
    """Give every rank of every matrix its widths within `budget` bits.

    Raises:
        InvalidInput: the budget does not even hold the matrices' overhead.
    """
    budget -= sum(profile.overhead for profile in profiles)
    if budget < 0:
        raise InvalidInput("The budget holds no codes at all. Allow more bits.")
    errors = [profile.errors() for profile in profiles]
    costs = [profile.costs() for profile in profiles]

    def choose(price: float) -> tuple[list[Tensor], float]:
        picked = [(e + price * c).argmin(dim=1) for e, c in zip(errors, costs, strict=True)]
        return picked, sum(float(c[p].sum()) for c, p in zip(costs, picked, strict=True))

    ceiling = max((float(e.max()) for e in errors if len(e)), default=0.0) + 1e-300
    low, high = ceiling * 1e-18, ceiling
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if choose(middle)[1] > budget else (low, middle)
    picked, spent = choose(high)
    bound = (
        sum(float((e + high * c).amin(dim=1).sum()) for e, c in zip(errors, costs, strict=True))
        - high * budget
    )
    _spend(picked, choose(low)[0], errors, costs, budget - spent)
    total = sum(float(e.gather(1, p[:, None]).sum()) for e, p in zip(errors, picked, strict=True))
    gap = (total - min(max(bound, 0.0), total)) / total if total > 0 else 0.0
    return Shares([_widths(p) for p in picked], total, gap)


def _spend(
    picked: list[Tensor],
    dearer: list[Tensor],
    errors: list[Tensor],
    costs: list[Tensor],
    left: float,
) -> None:
    """Move ranks to the choice of a slightly lower price, best gain first, while it fits."""
    for p, d, e, c in zip(picked, dearer, errors, costs, strict=True):
        moved = (p != d).nonzero().squeeze(1)
        gain = (e[moved, p[moved]] - e[moved, d[moved]]) / (c[d[moved]] - c[p[moved]]).clamp_min(1)
        for row in moved[gain.argsort(descending=True, stable=True)].tolist():
            extra = float(c[d[row]] - c[p[row]])
            if extra <= left:
                p[row] = d[row]
                left -= extra


def _widths(picked: Tensor) -> Widths:
    kept = (picked > 0).nonzero().squeeze(1)
    widths = torch.tensor(WIDTHS)
    pair = picked[kept] - 1
    return Widths(kept, widths[pair // len(WIDTHS)], widths[pair % len(WIDTHS)])
