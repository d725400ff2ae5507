"""SmolLM2's packed form, and the whole run on a tiny model in its place."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.memory import llama
from benchmarks.smollm import dequantize, main, parts_of, unpack
from benchmarks.synthetic import random_tensor, shapes_of, write_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def scale(row: np.ndarray, start: int) -> float:
    return float(row[start : start + 2].view(np.float16)[0])


def test_dequantized_weights_follow_the_formats() -> None:
    rng = np.random.default_rng(0)
    for size in (20, 34):
        raw = rng.integers(0, 256, (3, 2 * size), dtype=np.uint8)
        for start in (0, size):  # finite scales
            raw[:, start : start + 2] = (
                rng.normal(size=3).astype(np.float16)[:, None].view(np.uint8)
            )
            raw[:, start + 2 : start + 4] = (
                rng.normal(size=3).astype(np.float16)[:, None].view(np.uint8)
            )
        expected = []
        for row in raw:
            for block in (row[:size], row[size:]):
                if size == 20:
                    codes = [*(block[4:] & 15), *(block[4:] >> 4)]
                    expected += [scale(block, 0) * code + scale(block, 2) for code in codes]
                else:
                    expected += [scale(block, 0) * code for code in block[2:].view(np.int8)]
        weights = dequantize(torch.from_numpy(raw), 64)
        torch.testing.assert_close(weights.double(), torch.tensor(expected).view(3, 64))
    with pytest.raises(ValueError, match="neither"):
        dequantize(torch.zeros(3, 36, dtype=torch.uint8), 64)


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    config, folder = llama(2, 64, 96), tmp_path / "packed"
    config.save_pretrained(folder)
    write_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tensors = {
        name: random_tensor(name, shape, "cpu") + ("norm" in name)
        for name, shape in shapes_of(config).items()
    }
    parts = list(parts_of(tensors, 100_000))
    assert len(parts) > 1
    assert all(len(part) == 1 or sum(t.nbytes for t in part.values()) <= 100_000 for part in parts)
    assert {name: tensor for part in parts for name, tensor in part.items()} == tensors
    for number, part in enumerate(parts):
        save_file(part, folder / f"part-{number}.safetensors")
    return folder


def test_a_missing_part_is_named(packed: Path, tmp_path: Path) -> None:
    part = packed / "part-1.safetensors"
    names = load_file(part)
    part.unlink()
    with pytest.raises(ValueError, match="a part was not copied") as error:
        unpack(packed, tmp_path / "base", None)
    assert any(name in str(error.value) for name in names)


def test_a_domain_is_trained_compressed_and_measured(
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    options = ["--blocks", "1", "--methods", "bitdelta", "--budgets", "1", "--quick"]
    command = ["smollm", "run", str(packed), "exercises", "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", [*command, "--calibration-tokens", "2048"])
    # As on a machine without matplotlib.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    main()
    said = capsys.readouterr().out
    assert "exercises: trained" in said
    assert "matplotlib is not installed" in said
    table = (out / "smollm_exercises.txt").read_text()
    assert "adamix" in table
    assert "bitdelta" in table
    tuned = load_file(out / "exercises" / "finetuned" / "model.safetensors")
    base = load_file(out / "base-1" / "model.safetensors")
    assert tuned.keys() == base.keys()
    assert any(not torch.equal(tuned[name], base[name]) for name in base)
    main()
    assert "trained" not in capsys.readouterr().out, "what is there already is kept"
