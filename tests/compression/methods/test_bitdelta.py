"""BitDelta is the sign times the mean magnitude."""

import numpy as np
import torch

from deltadock.compression.methods.bitdelta import compress
from tests.compression.matrices import check_result, make_task


def test_the_approximation_is_the_sign_times_the_mean() -> None:
    delta = make_task(33, 70).delta
    delta[3, 5] = delta[7, 0] = 0
    task = make_task(33, 70, delta=delta)
    decoded = check_result(compress([task])[0], task)
    mean = np.float32(delta.double().abs().mean())
    expected = torch.where(delta >= 0, float(mean), -float(mean))
    assert torch.equal(decoded, expected)


def test_the_scale_is_optimal() -> None:
    task = make_task()
    approximation = compress([task])[0].approximation.double()
    delta = task.delta.double()
    best = (delta - approximation).square().sum()
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert (delta - factor * approximation).square().sum() > best


def test_one_bit_per_weight_and_one_scale() -> None:
    task = make_task(128, 256)
    (result,) = compress([task])
    assert result.encoded.nbytes == 128 * 256 // 8 + 4
    assert result.encoded.segments["scale"].shape == (1,)
