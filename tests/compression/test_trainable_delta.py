"""Deltas as functions of their scales, against the decoder and the dense formula."""

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np
import pytest
import torch
from torch import Tensor

from deltadock.artifacts.encodings import (
    Encoded,
    SvdMatrix,
    Vectors,
    decode_dense,
    decode_svd,
    deflate,
    encode_rows,
    encode_stack,
    encode_sum,
    encode_svd,
    encode_transposed,
)
from deltadock.compression.residence import DeviceMemory
from deltadock.compression.scratch import Scratch
from deltadock.compression.trainable_delta import TrainableDelta, flatten_factors, unit_factors

H_OUT, H_IN = 6, 10
CPU = torch.device("cpu")


def vectors(ranks: int, size: int, *, zeros: bool, seed: int) -> Vectors:
    rng = np.random.default_rng(seed)
    bits = np.sort(rng.integers(1, 9, ranks))[::-1].copy()
    codes = np.stack([rng.integers(0, 1 << width, size) for width in bits]).astype(np.uint8)
    zero = rng.uniform(0, 3, ranks).astype(np.float16) if zeros else None
    return Vectors(codes, bits, zero)


def svd(
    *, rows: bool = False, columns: bool = False, zeros: bool = False, seed: int = 0, ranks: int = 4
) -> Encoded:
    rng = np.random.default_rng(seed)
    matrix = SvdMatrix(
        vectors(ranks, H_OUT, zeros=zeros, seed=seed + 1),
        rng.standard_normal(ranks).astype(np.float32),
        vectors(ranks, H_IN, zeros=zeros, seed=seed + 2),
    )
    return encode_svd(
        matrix, "BF16", {},
        row_scale=rng.uniform(0.1, 1, H_OUT) if rows else None,
        column_scale=rng.uniform(0.1, 1, H_IN) if columns else None,
    )  # fmt: skip


def rows(*, shared: bool = False, columns: bool = False, bits: tuple[int, ...] = (4,)) -> Encoded:
    rng = np.random.default_rng(5)
    widths = np.resize(np.array(bits), H_OUT)
    codes = np.stack([rng.integers(0, 1 << width, H_IN) for width in widths]).astype(np.uint8)
    return encode_rows(
        codes, widths, rng.uniform(0.1, 1, 1 if shared else H_OUT), "BF16",
        column_scale=rng.uniform(0.1, 1, H_IN) if columns else None,
    )  # fmt: skip


CASES: dict[str, Callable[[], Encoded]] = {
    "svd": svd,
    "svd scaled": lambda: svd(rows=True, columns=True),
    "svd rows alone": lambda: svd(rows=True),
    "svd zeros": lambda: svd(zeros=True),
    "svd zeros scaled": lambda: svd(zeros=True, columns=True),
    "rows": rows,
    "rows shared": lambda: rows(shared=True, bits=(1,)),
    "rows of many widths": lambda: rows(bits=(2, 0, 8, 3, 0, 4), columns=True),
    "rows shared of many widths": lambda: rows(bits=(2, 0, 4, 1, 3, 0), shared=True, columns=True),
    "transposed": lambda: encode_transposed(svd(rows=True)),
    "sum": lambda: encode_sum([svd(columns=True), rows(), svd(seed=9)]),
    "stack": lambda: encode_stack([svd(), None, encode_sum([rows(), svd(seed=3)])]),
    "transposed stack part": lambda: encode_stack([encode_transposed(svd()), None]),
    "sum with a constant": lambda: encode_sum([svd(rows=True), deflate(rows())]),
}


@pytest.fixture
def memory() -> Iterator[DeviceMemory]:
    with Scratch() as scratch:
        yield DeviceMemory(scratch, CPU, 1 << 20)


@pytest.fixture(params=CASES)
def encoded(request: pytest.FixtureRequest) -> Encoded:
    return CASES[request.param]()


def perturbed(delta: TrainableDelta, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        key: 1 + 0.3 * torch.rand(size, generator=generator) for key, size in delta.factors.items()
    }


def test_unit_factors_give_the_decoded_delta(encoded: Encoded, memory: DeviceMemory) -> None:
    delta = TrainableDelta(encoded, memory, "w")
    actual = delta(unit_factors({"w": delta}, CPU)["w"])
    expected = torch.from_numpy(decode_dense(encoded))
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.detach(), expected, rtol=1e-5, atol=1e-5)


def test_every_scale_has_a_factor(encoded: Encoded, memory: DeviceMemory) -> None:
    delta = TrainableDelta(encoded, memory, "w")
    wanted = {
        key: data.size
        for key, data in encoded.segments.items()
        if key.split("/")[-1] in {"s", "scale", "row_scale", "column_scale"}
    }
    if "deflated" in str(encoded.record):
        wanted = {key: size for key, size in wanted.items() if not key.startswith("1/")}
    assert delta.factors == wanted
    assert sum(
        factor.numel() for factor in flatten_factors(unit_factors({"w": delta}, CPU))
    ) == sum(wanted.values())


def test_the_rescaled_record_decodes_to_the_delta_with_factors(
    encoded: Encoded, memory: DeviceMemory
) -> None:
    delta = TrainableDelta(encoded, memory, "w")
    factors = perturbed(delta)
    rescaled = delta.rescaled(factors)
    assert rescaled.nbytes == encoded.nbytes
    assert rescaled.record == encoded.record
    for key, data in encoded.segments.items():
        assert rescaled.segments[key].dtype == data.dtype
        assert rescaled.segments[key].shape == data.shape
        assert key in delta.factors or np.array_equal(rescaled.segments[key], data)
    decoded, actual = torch.from_numpy(decode_dense(rescaled)), delta(factors)
    # Scales are stored in half precision.
    torch.testing.assert_close(actual, decoded, rtol=0, atol=2e-3 * float(decoded.abs().max()))
    assert not torch.allclose(actual, torch.from_numpy(decode_dense(encoded)), rtol=1e-2)


def test_gradients_equal_finite_differences(encoded: Encoded, memory: DeviceMemory) -> None:
    delta = TrainableDelta(encoded, memory, "w")
    factors = {key: value.requires_grad_() for key, value in perturbed(delta).items()}
    weights = torch.randn(encoded.record["shape"], generator=torch.Generator().manual_seed(1))
    gradients = _gradients((delta(factors) * weights).sum(), factors)
    for key, factor in factors.items():
        for index in {0, factor.numel() - 1}:
            # The delta is linear in each factor: a finite difference of any step is exact.
            step = torch.zeros_like(factor)
            step[index] = 1.0
            with torch.no_grad():
                more = delta({**factors, key: factor + step})
                less = delta({**factors, key: factor - step})
                change = float(((more - less).double() * weights).sum()) / 2
            size = float(gradients[key].abs().max())
            assert float(gradients[key][index]) == pytest.approx(change, rel=1e-3, abs=1e-3 * size)


def test_gradients_equal_the_dense_formulas(memory: DeviceMemory) -> None:
    encoded = svd(rows=True, columns=True)
    matrix = decode_svd(encoded)
    delta = TrainableDelta(encoded, memory, "w")
    factors = {key: value.requires_grad_() for key, value in perturbed(delta).items()}
    plain = {key: value.detach().double().requires_grad_() for key, value in factors.items()}
    scale = {
        key: torch.from_numpy(encoded.segments[key].astype(np.float64)) * plain[key]
        for key in ("row_scale", "column_scale")
    }
    u, v = (torch.from_numpy(side.decode()).double() for side in (matrix.u, matrix.v))
    s = torch.from_numpy(matrix.s).double() * plain["s"]
    dense = scale["row_scale"][:, None] * (u.T @ (s[:, None] * v)) * scale["column_scale"]
    weights = torch.randn(H_OUT, H_IN, generator=torch.Generator().manual_seed(1))
    actual = _gradients((delta(factors) * weights).sum(), factors)
    expected = _gradients((dense * weights).sum(), plain)
    for key, gradient in actual.items():
        size = float(expected[key].abs().max())
        torch.testing.assert_close(gradient.double(), expected[key], rtol=1e-4, atol=1e-5 * size)


def _gradients(value: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))


def test_factors_of_different_tensors_are_independent(memory: DeviceMemory) -> None:
    names = ("w", "w.0", "w.0.1")
    made = [encode_sum([svd(seed=k), svd(seed=k + 20)]) for k in range(3)]
    deltas = {
        name: TrainableDelta(one, memory, name) for name, one in zip(names, made, strict=True)
    }
    factors = unit_factors(deltas, CPU)
    for name, one in zip(names, made, strict=True):
        torch.testing.assert_close(
            deltas[name](factors[name]).detach(), torch.from_numpy(decode_dense(one))
        )
    assert len(list(flatten_factors(factors))) == len(
        list(chain(*(d.factors for d in deltas.values())))
    )


def test_a_delta_without_ranks_is_zero(memory: DeviceMemory) -> None:
    nothing = np.zeros(0, np.int64)
    sides = [Vectors(np.zeros((0, n), np.uint8), nothing, None) for n in (H_OUT, H_IN)]
    encoded = encode_svd(SvdMatrix(sides[0], np.zeros(0, np.float32), sides[1]), "BF16", {})
    delta = TrainableDelta(encoded, memory, "w")
    factors = unit_factors({"w": delta}, CPU)["w"]
    assert torch.equal(delta(factors), torch.zeros(H_OUT, H_IN))
    assert decode_dense(delta.rescaled(factors)).shape == (H_OUT, H_IN)
