"""Float factors, stored bit for bit."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltadock.artifacts.encodings import (
    decode_factors,
    decode_floats,
    encode_floats,
    encode_low_rank,
)
from tests.artifacts.samples import assert_as_expected, assert_decodes, low_rank_sample

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@given(st.tuples(st.integers(0, 40), st.integers(0, 40)), st.integers(0, 2**32 - 1))
def test_round_trip(shape: tuple[int, int], seed: int) -> None:
    assert_decodes(low_rank_sample(shape, np.random.default_rng(seed)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_are_kept_bit_for_bit(dtype: str) -> None:
    torch.manual_seed(0)
    u, v = (torch.randn(shape).to(DTYPES[dtype]) for shape in ((6, 2), (2, 9)))
    raw: list[Any] = [
        (factor.view(torch.uint16) if dtype == "BF16" else factor).numpy() for factor in (u, v)
    ]
    encoded = encode_low_rank(*raw, 0.1, "F32", factor_dtype=dtype)
    assert_as_expected(encoded)
    assert [encoded.segments[side].tobytes() for side in "uv"] == [x.tobytes() for x in raw]
    factors = decode_factors(encoded)
    np.testing.assert_array_equal(factors.u, u.float().numpy())
    np.testing.assert_array_equal(factors.v, v.float().numpy())
    np.testing.assert_array_equal(factors.s, np.full(2, 0.1, np.float32))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_bfloat16_is_rounded_as_torch_does(values: list[float]) -> None:
    numbers = np.array(values, np.float32)
    want = torch.from_numpy(numbers).to(torch.bfloat16)
    raw = encode_floats(numbers, "BF16")
    np.testing.assert_array_equal(raw, want.view(torch.uint16).numpy())
    np.testing.assert_array_equal(decode_floats(raw, "BF16"), want.float().numpy())


def test_invalid_input_is_rejected() -> None:
    u, v = np.ones((3, 2), np.float32), np.ones((2, 4), np.float32)
    with pytest.raises(ValueError, match="no product"):
        encode_low_rank(u, v[:1], 1.0, "F32")
    with pytest.raises(ValueError, match="no product"):
        encode_low_rank(u[0], v, 1.0, "F32")
    with pytest.raises(ValueError, match="stored in"):
        encode_low_rank(u, v, 1.0, "F32", factor_dtype="F64")
    with pytest.raises(ValueError, match="are not F16"):
        encode_low_rank(encode_floats(u, "BF16"), v, 1.0, "F32", factor_dtype="F16")
