"""Second moments of linear layers' inputs, and their damping."""

from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

DAMPING: Final = 0.01


@dataclass(slots=True)
class MomentCollector:
    """Second moments `X X^T` of linear layers' inputs, shared by layers with the same input.

    `moment(name)` is (h_in, h_in) float64. Feed it as a `BlockwiseModel.run_block` observer.
    """

    _sums: dict[str, Tensor] = field(default_factory=dict)
    _owner: dict[str, str] = field(default_factory=dict)
    _last: tuple[Tensor, str] | None = None

    def __call__(self, name: str, inputs: Tensor) -> None:
        """Add one batch of inputs (..., h_in) of layer `name`."""
        if self._last is not None and self._last[0] is inputs:
            self._owner[name] = self._last[1]
            return
        self._owner[name] = name
        self._last = (inputs, name)
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        product = (rows.t() @ rows).double()
        self._sums[name] = self._sums[name] + product if name in self._sums else product

    def moment(self, name: str) -> Tensor:
        """`X X^T` of the layer's inputs so far, (h_in, h_in) float64."""
        return self._sums[self._owner[name]]


def damped(moment: Tensor) -> Tensor:
    """`moment` plus 1 % of its mean diagonal on the diagonal; of zeros, the identity.

    What the calibration text never excites would otherwise cost nothing, and be given up.
    """
    mean = moment.diagonal().mean()
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return moment + DAMPING * mean * eye if mean != 0 else eye
