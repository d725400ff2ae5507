"""A tensor's encoding as a differentiable function of its scales, the codes being frozen.

Every segment of scales is multiplied by a vector of factors that start at one. As a factor is
relative, one learning rate suits the scales of all matrices.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor

from deltadock.artifacts.encodings import Encoded, decode_dense, decode_svd, parts
from deltadock.compression.scratch import Scratch

SCALES: Final = ("s", "scale", "row_scale", "column_scale")

Factors = Mapping[str, Tensor]
"""Factors by the full key of the segment they multiply."""
Delta = Callable[[Factors], Tensor]


class TrainableDelta:
    """The delta (float32, in the base's shape) of one encoding for any factors of its scales.

    Attributes:
        factors: segment key to how many factors it takes.
    """

    def __init__(self, encoded: Encoded, scratch: Scratch, name: str, device: torch.device) -> None:
        """Decode `encoded` once; what its codes stand for is set aside in `scratch`."""
        self.encoded = encoded
        self.factors: dict[str, int] = {}
        self._scratch, self._device = scratch, device
        self._delta = self._build(encoded, name, "")

    def __call__(self, factors: Factors) -> Tensor:
        """The delta under `factors`."""
        return self._delta(factors)

    def rescaled(self, factors: Factors) -> Encoded:
        """The encoding with the factors multiplied into its scales, in their stored dtypes."""
        segments = dict(self.encoded.segments)
        for key in self.factors:
            factor = factors[key].detach().cpu().numpy().astype(np.float64)
            segments[key] = (segments[key] * factor).astype(segments[key].dtype)
        return Encoded(self.encoded.record, segments)

    def _build(self, encoded: Encoded, name: str, prefix: str) -> Delta:
        record = encoded.record
        kind = "constant" if "deflated" in record else record["kind"]
        match kind:
            case "svd":
                return self._svd(encoded, name, prefix)
            case "rows":
                return self._rows(encoded, name, prefix)
            case "sum" | "stack" | "transposed":
                found = [
                    None if part is None else self._build(part, f"{name} {k}", f"{prefix}{k}/")
                    for k, part in enumerate(parts(encoded))
                ]
                return self._combine(kind, record["shape"], found)
            case "new-rows":
                (old,) = parts(encoded)
                assert old is not None, "there is nothing to train where only rows were added"
                return self._build(old, f"{name} 0", f"{prefix}0/")
        key = f"constant {name}"
        self._scratch.put(key, torch.from_numpy(decode_dense(encoded)))
        return lambda _: self._scratch.get(key, self._device)

    def _combine(self, kind: str, shape: list[int], found: list[Delta | None]) -> Delta:
        def combine(factors: Factors) -> Tensor:
            none = torch.zeros(shape[1:], device=self._device)
            deltas = [none if part is None else part(factors) for part in found]
            if kind == "transposed":
                return deltas[0].t()
            return torch.stack(deltas) if kind == "stack" else torch.stack(deltas).sum(0)

        return combine

    def _scale(self, encoded: Encoded, key: str, prefix: str) -> None:
        if key in encoded.segments:
            self.factors[prefix + key] = encoded.segments[key].size

    def _svd(self, encoded: Encoded, name: str, prefix: str) -> Delta:
        matrix = decode_svd(encoded)
        sides = {"u": (matrix.u, "row_scale"), "v": (matrix.v, "column_scale")}
        for side, (vectors, key) in sides.items():
            # Multiples of one half up to 127.5 are exact in bfloat16; zero points may not be.
            units = torch.from_numpy(vectors.decode())
            exact = vectors.zero is None
            self._scratch.put(f"{side} {name}", units.bfloat16() if exact else units)
            self._scale(encoded, key, prefix)
        self._scale(encoded, "s", prefix)
        s = torch.from_numpy(matrix.s).to(self._device)

        def delta(factors: Factors) -> Tensor:
            u = self._side(f"u {name}", encoded, "row_scale", prefix, factors)
            v = self._side(f"v {name}", encoded, "column_scale", prefix, factors)
            return (u.t() * (s * factors[prefix + "s"])) @ v

        return delta

    def _side(
        self, stored: str, encoded: Encoded, key: str, prefix: str, factors: Factors
    ) -> Tensor:
        units = self._scratch.get(stored, self._device).float()
        if key not in encoded.segments:
            return units
        scale = torch.from_numpy(encoded.segments[key].astype(np.float32)).to(self._device)
        return units * (scale * factors[prefix + key])

    def _rows(self, encoded: Encoded, name: str, prefix: str) -> Delta:
        key = f"constant {name}"
        self._scratch.put(key, torch.from_numpy(decode_dense(encoded)))
        self._scale(encoded, "scale", prefix)
        self._scale(encoded, "column_scale", prefix)
        shared = encoded.record["scale"] == "shared"
        index = encoded.segments.get("index")
        rows = None if index is None else torch.from_numpy(index.astype(np.int64)).to(self._device)

        def delta(factors: Factors) -> Tensor:
            dense = self._scratch.get(key, self._device)
            factor = factors[prefix + "scale"]
            if not shared and rows is not None:
                factor = torch.ones(len(dense), device=self._device).index_copy(0, rows, factor)
            dense = dense * (factor if shared else factor[:, None])
            by_column = factors.get(prefix + "column_scale")
            return dense if by_column is None else dense * by_column

        return delta


def ones(
    deltas: Mapping[str, TrainableDelta], device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """Factors of one for every delta, requiring gradients."""
    return {
        name: {
            key: torch.ones(size, device=device, requires_grad=True)
            for key, size in delta.factors.items()
        }
        for name, delta in deltas.items()
    }


def flat(factors: Mapping[str, Factors]) -> Iterator[Tensor]:
    """All factors, one tensor after another."""
    for by_key in factors.values():
        yield from by_key.values()
