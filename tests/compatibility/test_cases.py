"""Each line of docs/compatibility.md, tried on a tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from deltadock.artifacts.checkpoint import ADAPTER_CONFIG, MODEL_FILES
from deltadock.artifacts.compatibility import TIED_BY_DEFAULT
from deltadock.artifacts.export import merge
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.reader import Artifact
from deltadock.client.loading import load_delta
from deltadock.compression.families import CALIBRATED
from deltadock.compression.model.families import auto_class
from deltadock.compression.options import CalibrationOptions, CompressOptions
from deltadock.compression.pipeline import compress
from deltadock.inference.deltas.reading import merge_delta, place_delta, read_delta
from deltadock.inference.model.attention import Span, make_attention_metadata
from deltadock.inference.model.loading import load_base
from deltadock.inference.model.routing import DeltaLimits
from deltadock.inference.prompts.tokenizer import read_tokenizer_files
from tests.compatibility.cases import CASES, Case, Made
from tests.compatibility.table import page

TOKENS = [5, 17, 200, 99, 3, 250, 31, 8]
TOKENIZED = 256
"""Logits of the rows past the tokenizer's size are not compared."""
AMOUNT = CalibrationOptions(tokens=256, length=32)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def logits_of(model: Any) -> Tensor:
    """Logits (tokens, vocabulary) of `TOKENS`."""
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.tensor([TOKENS])).logits[0]
    return found.float()


def served_logits(base: Path, delta: Path, *, merged: bool = False) -> Tensor:
    """The logits of a node, on merged weights if `merged`."""
    manifest = scan_folder(base)
    model = load_base(base, manifest, torch.device("cpu"), DeltaLimits(slots=2, rows=64))
    with Artifact(delta) as artifact:
        loaded = read_delta(artifact, model, manifest.weights_digest, read_tokenizer_files(base))
    place_delta(model, 1, loaded)
    if merged:
        merge_delta(model, 1)
    slots = [1] * len(TOKENS)
    with torch.inference_mode():
        step = make_attention_metadata(model.make_cache(1, 32), [Span(0, 0, len(TOKENS), 0)])
        hidden = model.forward(torch.tensor(TOKENS), step, slots)
        return torch.stack(model.logits(hidden, slots).rows())


def run(made: Made, out: Path, text: Path | None = None) -> list[str]:
    """Compress, measured on a text or on sampled text; the report's notes."""
    options = CompressOptions(made.method, calibration=AMOUNT)
    report = compress(made.base, made.tuned, out, options, calibration=text)
    return report.notes


def names(case: Case) -> str:
    return f"{case.trainer}: {case.given}"


@pytest.mark.parametrize("case", [c for c in CASES if c.error is None], ids=names)
def test_what_is_taken_has_the_logits_of_transformers(case: Case, tmp_path: Path) -> None:
    made = case.make(tmp_path)
    expected = logits_of(made.model)[:, :TOKENIZED]
    out = tmp_path / "a.delta"
    notes = run(made, out)
    assert any("NaN" in note for note in notes) == ("NaN" in case.given)
    assert any("Ignored" in note for note in notes) == ("ignored" in case.note)
    with Artifact(out) as artifact:
        assert artifact.manifest["files"].keys() <= MODEL_FILES - {ADAPTER_CONFIG}
    merge(made.base, out, tmp_path / "merged")
    auto = auto_class(scan_folder(made.base).config["model_type"])
    close: Callable[..., None] = torch.testing.assert_close
    merged = logits_of(auto.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval())
    close(merged[:, :TOKENIZED], expected, rtol=1e-3, atol=2e-4)
    if case.served:
        close(served_logits(made.base, out)[:, :TOKENIZED], expected, rtol=1e-3, atol=2e-4)
    model = auto.from_pretrained(made.base, dtype=torch.float32).eval()
    with load_delta(model, out, base=made.base):
        close(logits_of(model)[:, :TOKENIZED], expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("case", [c for c in CASES if c.error is not None], ids=names)
def test_what_is_refused_is_named(case: Case, tmp_path: Path) -> None:
    made = case.make(tmp_path)
    assert case.error is not None
    with pytest.raises(case.error, match=case.words):
        run(made, tmp_path / "a.delta")


def test_the_page_is_the_table() -> None:
    assert (Path(__file__).parents[2] / "docs/compatibility.md").read_text() == page()


@pytest.mark.parametrize("kind", sorted({*CALIBRATED, *TIED_BY_DEFAULT}))
def test_families_whose_head_is_tied_by_default(kind: str) -> None:
    config = CONFIG_MAPPING[kind]()
    assert bool(config.tie_word_embeddings) == (kind in TIED_BY_DEFAULT)
