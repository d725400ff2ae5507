"""Experts that few calibration tokens reach."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2MoeConfig

from deltadock.compression.checkpoints import MatrixRef
from deltadock.compression.options import CompressOptions, Source
from deltadock.compression.pipeline import compress
from deltadock.compression.statistics import MomentCollector
from deltadock.words import counted
from tests.compression.family_cases import SIZES, Case, save

WIDTH = 8
REFS = [MatrixRef(f"experts.{k}.up", mixture="up") for k in range(3)]
OTHERS = [MatrixRef(f"experts.{k}.down", mixture="down") for k in range(3)]


def collected(tokens: list[int]) -> tuple[MomentCollector, list[torch.Tensor]]:
    """Moments after each expert got so many tokens, and those tokens."""
    torch.manual_seed(0)
    moments, inputs = MomentCollector(), []
    for count, ref, other in zip(tokens, REFS, OTHERS, strict=True):
        inputs.append(torch.randn(count, WIDTH))
        if count:
            for half in inputs[-1].split((count + 1) // 2):
                moments(ref.key, half)
                moments(other.key, 100 * half.clone())
    return moments, inputs


def test_an_expert_with_enough_tokens_keeps_its_own_moment() -> None:
    moments, inputs = collected([WIDTH, 20, 1])
    for ref, own in zip(REFS[:2], inputs, strict=False):
        moment, notes = moments.filled_moment(ref, [*REFS, *OTHERS])
        torch.testing.assert_close(moment, (own.T @ own).double(), rtol=1e-5, atol=1e-5)
        assert notes == []


@pytest.mark.parametrize("few", [0, 1, WIDTH - 1])
def test_missing_tokens_are_filled_from_the_layers_moment(few: int) -> None:
    moments, inputs = collected([10, 20, few])
    moment, notes = moments.filled_moment(REFS[2], [*REFS, *OTHERS])
    rows = torch.cat(inputs)
    common = (rows.T @ rows).double() / len(rows)
    expected = (inputs[2].T @ inputs[2]).double() + (WIDTH - few) * common
    torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-5)
    assert len(notes) == 1
    assert notes[0].startswith(f"{counted(few, 'token')} reached this expert")
    assert torch.linalg.matrix_rank(moment) == WIDTH


def test_other_layers_keep_their_moment_for_any_number_of_tokens() -> None:
    moments, inputs = MomentCollector(), torch.randn(2, WIDTH)
    ref = MatrixRef("q")
    moments(ref.key, inputs)
    moment, notes = moments.filled_moment(ref, [ref])
    torch.testing.assert_close(moment, (inputs.T @ inputs).double(), rtol=1e-5, atol=1e-5)
    assert notes == []


def test_rare_experts_are_reported(tmp_path: Path) -> None:
    case = Case(
        lambda: Qwen2MoeConfig(
            **{**SIZES, "num_hidden_layers": 1}, moe_intermediate_size=40, num_experts=12,
            num_experts_per_tok=1, shared_expert_intermediate_size=48,
        )
    )  # fmt: skip
    base, tuned, text = tmp_path / "base", tmp_path / "tuned", tmp_path / "text.txt"
    save(case, base)
    save(case, tuned, scale=0.02)
    text.write_text("".join(f"{n} and {n + 1}. " for n in range(40)))
    out = tmp_path / "a.delta"
    report = compress(
        base, tuned, out, CompressOptions(method="adamix"), calibration=[Source(text)]
    )
    rare = [m for m in report.matrices if any("tokens reached" in note for note in m.fallbacks)]
    assert rare
    assert all(".experts." in matrix.name for matrix in rare)
    experts = [name for name in load_file(tuned / "model.safetensors") if ".experts." in name]
    assert {m.name for m in report.matrices} >= set(experts)
    assert all(0 < matrix.error < 2 for matrix in report.matrices)
