"""Further pairs: complete, trained, and with disjoint texts."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.pairs import QUICK_MODULES, SAMPLE_BASE, code_of, make, split_modules


def test_texts_have_disjoint_modules() -> None:
    training, calibration, held_out = (set(part) for part in split_modules(code_of, QUICK_MODULES))
    assert training
    assert calibration
    assert held_out
    assert not training & calibration
    assert not (training | calibration) & held_out


def test_a_pair_is_complete_and_every_matrix_was_trained(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    make("embeddings", tmp_path, SAMPLE_BASE, quick=True)
    folder = tmp_path / "embeddings"
    base, tuned = (load_file(folder / name / "model.safetensors") for name in ("base", "finetuned"))
    assert base.keys() == tuned.keys()
    for name, weight in base.items():
        assert tuned[name].dtype == weight.dtype
        assert weight.ndim == 1 or not torch.equal(weight, tuned[name]), name
    embedding = "model.embed_tokens.weight"
    assert (base[embedding] != tuned[embedding]).any(dim=1).all()
    for name in ("calibration.txt", "heldout.txt", "finetuned/tokenizer.json"):
        assert (folder / name).stat().st_size > 0
