"""A delta's decoded codes as a function of its scales, for training them.

Codes stay frozen, and so does every byte count: each segment of scales is multiplied by a vector
of factors that start at one.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from deltadock.artifacts.encodings import Encoded, decode_dense, decode_svd, parts
from deltadock.compression.residence import DeviceMemory

ScaleFactors = Mapping[str, Tensor]
"""Factors by the full key of the segment they multiply."""
DeltaFunction = Callable[[ScaleFactors], Tensor]


class TrainableDelta:
    """The delta of one encoding, float32 in the base's shape, as a function of scale factors.

    Attributes:
        factors: number of factors by segment key.
    """

    def __init__(self, encoded: Encoded, memory: DeviceMemory, name: str) -> None:
        """Decode the codes of `encoded` once, and store them in `memory` under `name`."""
        self.encoded = encoded
        self.factors: dict[str, int] = {}
        self._memory, self._device = memory, memory.device
        self._delta = self._build(encoded, name, "")

    def __call__(self, factors: ScaleFactors) -> Tensor:
        """The delta with its scales multiplied by `factors`."""
        return self._delta(factors)

    def rescaled(self, factors: ScaleFactors) -> Encoded:
        """The encoding with the factors multiplied into its scales, in their stored dtypes."""
        segments = dict(self.encoded.segments)
        for key in self.factors:
            factor = factors[key].detach().cpu().numpy().astype(np.float64)
            segments[key] = (segments[key] * factor).astype(segments[key].dtype)
        return Encoded(self.encoded.record, segments)

    def _build(self, encoded: Encoded, name: str, prefix: str) -> DeltaFunction:
        record = encoded.record
        kind = "constant" if "deflated" in record else record["kind"]
        match kind:
            case "svd":
                return self._svd(encoded, name, prefix)
            case "rows":
                return self._rows(encoded, name, prefix)
            case "sum" | "stack" | "transposed":
                deltas = [
                    None if part is None else self._build(part, f"{name} {k}", f"{prefix}{k}/")
                    for k, part in enumerate(parts(encoded))
                ]
                return self._combine(kind, record["shape"], deltas)
            case "new-rows":
                (old,) = parts(encoded)
                assert old is not None, "added rows alone have no scales to train"
                return self._build(old, f"{name} 0", f"{prefix}0/")
        key = f"constant {name}"
        self._memory.put(key, torch.from_numpy(decode_dense(encoded)))
        return lambda _: self._memory.get(key)

    def _combine(
        self, kind: str, shape: list[int], parts: list[DeltaFunction | None]
    ) -> DeltaFunction:
        def combine(factors: ScaleFactors) -> Tensor:
            zeros = torch.zeros(shape[1:], device=self._device)
            deltas = [zeros if part is None else part(factors) for part in parts]
            if kind == "transposed":
                return deltas[0].t()
            return torch.stack(deltas) if kind == "stack" else torch.stack(deltas).sum(0)

        return combine

    def _register(self, encoded: Encoded, key: str, prefix: str) -> None:
        if key in encoded.segments:
            self.factors[prefix + key] = encoded.segments[key].size

    def _svd(self, encoded: Encoded, name: str, prefix: str) -> DeltaFunction:
        matrix = decode_svd(encoded)
        sides = {"u": (matrix.u, "row_scale"), "v": (matrix.v, "column_scale")}
        for side, (vectors, key) in sides.items():
            # Multiples of one half up to 127.5 are exact in bfloat16; zero points may not be.
            units = torch.from_numpy(vectors.decode())
            exact = vectors.zero is None
            self._memory.put(f"{side} {name}", units.bfloat16() if exact else units)
            self._register(encoded, key, prefix)
        self._register(encoded, "s", prefix)
        s = torch.from_numpy(matrix.s).to(self._device)

        u_side = self._side(f"u {name}", encoded, "row_scale", prefix)
        v_side = self._side(f"v {name}", encoded, "column_scale", prefix)

        def delta(factors: ScaleFactors) -> Tensor:
            return (u_side(factors).t() * (s * factors[prefix + "s"])) @ v_side(factors)

        return delta

    def _side(self, stored: str, encoded: Encoded, key: str, prefix: str) -> DeltaFunction:
        if key not in encoded.segments:
            return lambda _: self._memory.get(stored).float()
        scale = torch.from_numpy(encoded.segments[key].astype(np.float32)).to(self._device)
        return lambda factors: self._memory.get(stored).float() * (scale * factors[prefix + key])

    def _rows(self, encoded: Encoded, name: str, prefix: str) -> DeltaFunction:
        key = f"constant {name}"
        self._memory.put(key, torch.from_numpy(decode_dense(encoded)))
        self._register(encoded, "scale", prefix)
        self._register(encoded, "column_scale", prefix)
        shared = encoded.record["scale"] == "shared"
        index = encoded.segments.get("index")
        rows = None if index is None else torch.from_numpy(index.astype(np.int64)).to(self._device)

        def delta(factors: ScaleFactors) -> Tensor:
            dense = self._memory.get(key)
            factor = factors[prefix + "scale"]
            if not shared and rows is not None:
                factor = torch.ones(len(dense), device=self._device).index_copy(0, rows, factor)
            dense = dense * (factor if shared else factor[:, None])
            by_column = factors.get(prefix + "column_scale")
            return dense if by_column is None else dense * by_column

        return delta


def unit_factors(
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


def flatten_factors(factors: Mapping[str, ScaleFactors]) -> Iterator[Tensor]:
    """All factors, one tensor after another."""
    for by_key in factors.values():
        yield from by_key.values()
