"""DeltaZip and GPT-Zip against a plain float64 SparseGPT and against naive pruning."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from deltadock.artifacts.encodings import inflate
from deltadock.compression.methods.base import MatrixResult, MatrixTask
from deltadock.compression.methods.sparse import delta_zip, gpt_zip, row_scales
from deltadock.compression.numerics.metric import DAMPING
from tests.compression.matrices import check_result, make_task, output_error


def corrected(delta: Tensor, moment: Tensor, decoded: Tensor) -> Tensor:
    """Each entry when its column was quantized, recomputed in float64 from the result."""
    n = delta.shape[1]
    eye = torch.eye(n, dtype=torch.float64)
    damped = moment + DAMPING * moment.diagonal().mean() * eye
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    work = delta.double().clone()
    for j in range(n):
        error = (work[:, j] - decoded[:, j].double()) / factor[j, j]
        work[:, j + 1 :] -= torch.outer(error, factor[j, j + 1 :])
    return work


def test_two_of_four_are_kept_and_rounded_after_compensation() -> None:
    task = make_task(40, 144)
    decoded = check_result(delta_zip([task])[0], task)
    assert ((decoded.reshape(40, 36, 4) != 0).sum(dim=2) == 2).all()
    work = corrected(task.delta, task.moment, decoded)
    for columns in (slice(0, 128), slice(128, 144)):  # one scale each
        for row in range(40):
            values = decoded[row, columns].double()
            at = values != 0
            grid = values[at].abs().min() * torch.tensor([-3.0, -1.0, 1.0, 3.0])
            entries = work[row, columns][at]
            nearest = (entries[:, None] - grid).abs().min(dim=1).values
            # Near a tie, float32 may round the other way.
            assert ((entries - values[at]).abs() <= nearest + 1e-3 * grid[3]).all()


@pytest.mark.parametrize(("bits", "width"), [(1.0, 2), (2.0, 4)])
def test_delta_zip_beats_magnitude_pruning_and_rounding(bits: float, width: int) -> None:
    task = make_task(64, 128, bits=bits)
    (result,) = delta_zip([task])
    check_result(result, task)
    assert result.widths == {str(width): 64}
    quads = task.delta.reshape(64, -1, 4)
    mask = torch.zeros_like(quads).scatter_(2, quads.abs().topk(2, dim=2).indices, 1.0)
    pruned = (quads * mask).reshape(64, 128)
    centre = (2**width - 1) / 2
    scale = row_scales(pruned[pruned != 0].reshape(64, 64), width)[:, None]
    code = (pruned / scale + centre).round().clamp(0, 2 * centre)
    naive = scale * (code - centre) * (pruned != 0)
    ours = output_error(task.delta, result.approximation, task.moment)
    assert ours < 0.8 * output_error(task.delta, naive, task.moment)


@pytest.mark.parametrize("columns", [1, 2, 3, 6, 129, 131])
def test_column_counts_that_are_not_a_multiple_of_four(columns: int) -> None:
    task = make_task(9, columns)
    decoded = check_result(delta_zip([task])[0], task)
    tail = columns % 4
    if tail:
        assert ((decoded[:, -tail:] != 0).sum(dim=1) == min(2, tail)).all()


def test_one_of_twenty_is_kept() -> None:
    task = make_task(80, 256)
    (result,) = gpt_zip([task])
    decoded = check_result(result, task)
    for block in decoded.split(128, dim=1):
        assert (block != 0).sum() == int(0.05 * block.numel())
    for row in decoded:
        assert len(row[row != 0].unique()) <= 4


def test_pruning_errors_are_compensated_by_kept_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(256, 256, generator=generator) * torch.exp(-torch.arange(256) / 60)
    task = make_task(80, 256, moment=(mixing @ mixing.T).double())
    approximation = gpt_zip([task])[0].approximation
    # The same fraction by magnitude, with a grid per row.
    at = task.delta.abs().topk(round(0.05 * 256), dim=1).indices
    kept = task.delta.gather(1, at)
    scale = row_scales(kept, 2)[:, None]
    rounded = scale * ((kept / scale + 1.5).round().clamp(0, 3) - 1.5)
    naive = torch.zeros_like(task.delta).scatter_(1, at, rounded)
    ours = output_error(task.delta, approximation, task.moment)
    assert ours < 0.95 * output_error(task.delta, naive, task.moment)


@pytest.mark.parametrize("method", [delta_zip, gpt_zip])
def test_deflating_saves_bytes(
    method: Callable[[Sequence[MatrixTask]], list[MatrixResult]],
) -> None:
    encoded = method([make_task(256, 256)])[0].encoded
    assert "deflated" in encoded.record
    assert encoded.nbytes < 0.95 * inflate(encoded).nbytes


def test_scales_are_exact_in_float16() -> None:
    values = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 3e-6
    values[7] = 0
    scale = row_scales(values, 2)
    assert scale[7] == 0
    gain = 2.0**-18
    assert torch.equal((scale / gain).half().float() * gain, scale)
