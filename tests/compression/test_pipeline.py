"""Compressing whole checkpoints: encodings, resuming, cancellation, invalid input."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltadock.artifacts.compatibility import inherits_tokenizer
from deltadock.artifacts.export import merge
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.reader import Artifact
from deltadock.compression.calibration import sampling, windows
from deltadock.compression.checkpoints import open_pair
from deltadock.compression.options import (
    METHODS,
    CalibrationOptions,
    CompressOptions,
    Goal,
    Source,
)
from deltadock.compression.pipeline import compress
from deltadock.compression.progress import Progress
from deltadock.compression.quality import evaluate
from deltadock.compression.scratch import Scratch
from deltadock.compression.session import NO_WEIGHTS, CompressionSession
from deltadock.errors import (
    ArchitectureMismatch,
    Cancelled,
    DeltadockError,
    InvalidCalibration,
    InvalidCheckpoint,
    NonFiniteWeights,
    UnchangedCheckpoint,
    UnknownMethod,
    UnsupportedModel,
)
from tests.compression.conftest import MemoryStore

Pair = tuple[Path, Path]
LITTLE = CalibrationOptions(1024, 32)
BITDELTA = CompressOptions(method="bitdelta", calibration=LITTLE)
EXACT = CompressOptions(method="exact", calibration=LITTLE)
ADAMIX = CompressOptions(method="adamix")


def test_exactly_the_changed_tensors_are_stored(pair: Pair, text: Path, tmp_path: Path) -> None:
    base, finetuned = pair
    weights = load_file(finetuned / "model.safetensors")
    unchanged = "model.layers.0.mlp.up_proj.weight"
    weights[unchanged] = load_file(base / "model.safetensors")[unchanged]
    save_file(weights, finetuned / "model.safetensors", metadata={"format": "pt"})
    report = compress(
        base,
        finetuned,
        tmp_path / "a.delta",
        CompressOptions(method="adamix"),
        calibration=[Source(text)],
    )
    with Artifact(tmp_path / "a.delta") as artifact:
        kinds = {name: record["kind"] for name, record in artifact.records.items()}
        assert artifact.nbytes == report.artifact_bytes
        assert artifact.base_digest == report.base_digest
        assert list(artifact.damaged()) == []
    assert kinds.keys() == weights.keys() - {unchanged}
    for name, kind in kinds.items():
        expected = "rows" if "embed" in name else "svd" if weights[name].ndim == 2 else "exact"
        assert kind == expected, name
    assert report.quality is not None
    assert 0 < report.quality.kl < 0.5 * report.quality.kl_base
    assert report.ratio == report.checkpoint_bytes / report.artifact_bytes
    assert report.checkpoint_bytes == 2 * sum(tensor.numel() for tensor in weights.values())
    assert {matrix.name for matrix in report.matrices} == {
        name for name, kind in kinds.items() if kind == "svd"
    }
    assert all(0 < matrix.error < 1 for matrix in report.matrices)
    json.dumps(report.to_dict(), allow_nan=False)


def test_an_untied_head_is_compressed_as_a_linear_layer(
    make_pair: Callable[..., Pair], text: Path, tmp_path: Path
) -> None:
    base, finetuned = make_pair(tied=False)
    options = CompressOptions(method="adamix")
    compress(base, finetuned, tmp_path / "a.delta", options, calibration=[Source(text)])
    with Artifact(tmp_path / "a.delta") as artifact:
        assert artifact.records["lm_head.weight"]["kind"] == "svd"
        assert artifact.records["model.embed_tokens.weight"]["kind"] == "rows"


def test_exact_is_lossless(pair: Pair, text: Path, tmp_path: Path) -> None:
    base, finetuned = pair
    report = compress(base, finetuned, tmp_path / "a.delta", EXACT, calibration=[Source(text)])
    assert report.quality.kl == pytest.approx(0, abs=1e-9)
    assert report.quality.agreement == 1
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    assert [(one["kind"], one["sha256"]) for one in report.measured_on] == [("text", digest)]
    merge(base, tmp_path / "a.delta", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in load_file(finetuned / "model.safetensors").items():
        assert torch.equal(merged[name], tensor), name


def test_two_compressions_to_one_file_do_not_share_an_unfinished_one(
    pair: Pair, text: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    out = folder / "a.delta"
    others = []

    def compress_too(_: Progress) -> None:
        if not others and [*folder.iterdir()]:
            others.append(compress(*pair, out, EXACT, calibration=[Source(text)]))

    compress(*pair, out, EXACT, calibration=[Source(text)], progress=compress_too)
    assert len(others) == 1
    assert [path.name for path in folder.iterdir()] == ["a.delta"]
    with Artifact(out) as artifact:
        assert list(artifact.damaged()) == []


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_errors_name_files_relative_to_their_checkpoint(
    pair: Pair, text: Path, tmp_path: Path, name: str
) -> None:
    base, finetuned = pair
    (finetuned / name).write_text("{")
    with pytest.raises(DeltadockError) as caught:
        compress(base, finetuned, tmp_path / "a.delta", ADAMIX, calibration=[Source(text)])
    assert str(tmp_path) not in caught.value.message
    assert caught.value.message.startswith("The fine-tune"), caught.value.message
    assert str(caught.value) == caught.value.message


def test_a_folder_that_there_is_not_is_named_as_it_was_given(
    pair: Pair, text: Path, tmp_path: Path
) -> None:
    base, absent = pair[0], tmp_path / "absent"
    with pytest.raises(InvalidCheckpoint, match=re.escape(str(absent))):
        compress(base, absent, tmp_path / "a.delta", ADAMIX, calibration=[Source(text)])


def test_evaluation_equals_plain_transformers(pair: Pair, text: Path, tmp_path: Path) -> None:
    base, finetuned = pair
    compress(base, finetuned, tmp_path / "a.delta", CompressOptions(), calibration=[Source(text)])
    quality = evaluate(base, finetuned, tmp_path / "a.delta", text, window=64)
    merge(base, tmp_path / "a.delta", tmp_path / "merged")
    tokens = torch.tensor(list(text.read_bytes()))
    # The byte-level alphabet is not in byte order: ids come from the tokenizer.
    from deltadock.compression.calibration.windows import read_windows

    windows = read_windows(text, finetuned, 64)
    assert windows.numel() <= len(tokens)
    scores = []
    for folder in (finetuned, tmp_path / "merged", base):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            scores.append(torch.log_softmax(model(windows).logits.double(), dim=-1))
    target, delta, bare = scores
    kl = (target.exp() * (target - delta)).sum(-1).mean()
    assert quality.kl == pytest.approx(float(kl), rel=1e-3)
    agreement = (target.argmax(-1) == delta.argmax(-1)).double().mean()
    assert quality.agreement == pytest.approx(float(agreement), abs=2e-3)
    for value, log_p in (
        (quality.nll_finetuned, target), (quality.nll, delta), (quality.nll_base, bare),
    ):  # fmt: skip
        nll = -log_p[:, :-1].gather(2, windows[:, 1:, None]).mean()
        assert value == pytest.approx(float(nll), rel=1e-4)


def test_interruptions_do_not_change_the_bytes(pair: Pair, text: Path, tmp_path: Path) -> None:
    base, finetuned = pair
    compress(
        base,
        finetuned,
        tmp_path / "whole.delta",
        ADAMIX,
        calibration=[Source(text)],
    )
    store = MemoryStore()

    def interrupt(progress: Progress) -> None:
        if progress.stage == "compressing" and progress.block == 1:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        compress(
            base, finetuned, tmp_path / "b.delta", ADAMIX,
            calibration=[Source(text)], progress=interrupt, store=store,
        )  # fmt: skip
    assert not (tmp_path / "b.delta").exists()
    assert len(store.kept) == 1
    compress(
        base,
        finetuned,
        tmp_path / "b.delta",
        ADAMIX,
        calibration=[Source(text)],
        store=store,
    )
    assert store.hits == 1
    assert (tmp_path / "b.delta").read_bytes() == (tmp_path / "whole.delta").read_bytes()


def test_stored_blocks_of_other_inputs_are_not_reused(
    pair: Pair, text: Path, tmp_path: Path
) -> None:
    base, finetuned = pair
    store = MemoryStore()
    for seed in (0, 1):
        compress(
            base, finetuned, tmp_path / f"{seed}.delta", replace(ADAMIX, seed=seed),
            calibration=[Source(text)], store=store,
        )  # fmt: skip
    assert store.hits == 0


@pytest.mark.parametrize(
    ("options", "with_text"),
    [
        (CompressOptions(), True),
        (BITDELTA, False),
        (CompressOptions(method="low-rank", goal=Goal("ratio", 3.0)), True),
        (CompressOptions(method="adamix", goal=Goal("max_kl", 0.1)), True),
        (EXACT, False),
    ],
    ids=lambda value: str(value.method) if isinstance(value, CompressOptions) else None,
)
def test_progress_never_decreases(
    pair: Pair, text: Path, tmp_path: Path, options: CompressOptions, with_text: bool
) -> None:
    seen: list[Progress] = []
    sources = [Source(text)] if with_text else []
    compress(
        *pair, tmp_path / "a.delta", options, calibration=sources, progress=seen.append
    )  # fmt: skip
    fractions = [progress.fraction for progress in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0
    assert fractions[-1] == 1
    worked = [progress.worked for progress in seen]
    assert worked == sorted(worked)
    assert all(progress.worked <= progress.fraction for progress in seen)
    stages = list(dict.fromkeys(progress.stage for progress in seen))
    order = ["validating", "calibrating", "compressing", "assembling", "verifying"]
    assert stages == [stage for stage in order if stage in stages]
    assert {"validating", "assembling", "verifying"} <= set(stages)
    assert all(0 <= progress.block <= progress.blocks for progress in seen)


def test_blocks_are_counted_in_one_way(pair: Pair, text: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    compress(
        *pair, tmp_path / "a.delta", CompressOptions(), calibration=[Source(text)],
        progress=seen.append,
    )  # fmt: skip
    parts: dict[str, list[str]] = {}
    for progress in seen:
        part = progress.message.partition(", ")[0]
        if part not in parts.setdefault(progress.phase, []):
            parts[progress.phase].append(part)
    blocks = ["block 1 of 2", "block 2 of 2"]
    assert parts["inputs"] == [*blocks, "output head"]
    assert parts["gradients"] == ["output head", *reversed(blocks)]
    assert parts["encoding"][:2] == blocks
    assert set(parts["encoding"][2:]) <= {"output head", "embedding"}


def test_sampled_text_is_kept_for_a_later_run(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(ADAMIX, calibration=LITTLE)
    whole = compress(*pair, tmp_path / "whole.delta", options, calibration=None)
    store = MemoryStore()

    def stop(progress: Progress) -> None:
        if progress.phase == "inputs":
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        compress(*pair, tmp_path / "a.delta", options, calibration=None, progress=stop, store=store)

    def sample(*_: object, **__: object) -> None:
        raise AssertionError("the text is sampled again")

    monkeypatch.setattr(windows, "TextSampler", sample)
    again = compress(*pair, tmp_path / "a.delta", options, calibration=None, store=store)
    assert again.calibration == whole.calibration
    assert (tmp_path / "a.delta").read_bytes() == (tmp_path / "whole.delta").read_bytes()


def test_what_an_earlier_run_saved_is_not_worked_again(
    pair: Pair, text: Path, tmp_path: Path
) -> None:
    store, seen = MemoryStore(), list[list[Progress]]()
    for _ in range(2):
        seen.append([])
        compress(
            *pair, tmp_path / "a.delta", ADAMIX, calibration=[Source(text)],
            progress=seen[-1].append, store=store,
        )  # fmt: skip
    first, second = (run[-1] for run in seen)
    assert first.fraction == second.fraction == 1
    encoding = [run for run in seen[0] if run.phase == "encoding"]
    share = encoding[-1].fraction - encoding[0].fraction
    assert share > 0
    assert second.worked == pytest.approx(first.worked - share)


def test_files_that_differ_are_stored_in_the_artifact(pair: Pair, tmp_path: Path) -> None:
    base, finetuned = pair
    (finetuned / "generation_config.json").write_text('{"temperature": 0.5}')
    (base / "added_tokens.json").write_text("{}")
    compress(base, finetuned, tmp_path / "a.delta", BITDELTA, calibration=None)
    merge(base, tmp_path / "a.delta", tmp_path / "merged")
    assert (tmp_path / "merged" / "generation_config.json").read_text() == '{"temperature": 0.5}'
    assert not (tmp_path / "merged" / "added_tokens.json").exists()


def test_binary_files_are_stored_unchanged(pair: Pair, tmp_path: Path) -> None:
    base, finetuned = pair
    binary, lines = bytes(range(256)), b"{% if a %}\r\n\xc3\xa9\n"
    (finetuned / "tokenizer.model").write_bytes(binary)
    (finetuned / "chat_template.jinja").write_bytes(lines)
    compress(base, finetuned, tmp_path / "a.delta", BITDELTA, calibration=None)
    merge(base, tmp_path / "a.delta", tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == binary
    assert (tmp_path / "merged" / "chat_template.jinja").read_bytes() == lines


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}"])
def test_a_fine_tune_without_a_tokenizer_has_its_bases(
    pair: Pair, text: Path, tmp_path: Path, template: str | None
) -> None:
    """All that it was saved with, such as a chat template of its own, is kept."""
    base, finetuned = pair
    with_its_own = compress(*pair, tmp_path / "a.delta", BITDELTA, calibration=[Source(text)])
    (base / "chat_template.jinja").write_text("of the base")
    remove_tokenizer(finetuned)
    if template is not None:
        (finetuned / "chat_template.jinja").write_text(template)
    report = compress(*pair, tmp_path / "b.delta", BITDELTA, calibration=[Source(text)])
    assert report.quality.kl == with_its_own.quality.kl
    assert report.notes == ["The fine-tune has no tokenizer: the base's is used."]
    sampled = compress(*pair, tmp_path / "c.delta", EXACT, calibration=None)
    assert sampled.quality is not None
    assert evaluate(*pair, tmp_path / "b.delta", text).kl > 0
    merge(base, tmp_path / "b.delta", tmp_path / "merged")
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged("a word").input_ids == AutoTokenizer.from_pretrained(base)("a word").input_ids
    assert merged.chat_template == (template or "of the base")


def test_equal_weights_without_a_tokenizer_are_no_fine_tune(pair: Pair, tmp_path: Path) -> None:
    base, _ = pair
    copy = shutil.copytree(base, tmp_path / "copy")
    remove_tokenizer(copy)
    with pytest.raises(UnchangedCheckpoint):
        compress(base, copy, tmp_path / "a.delta", BITDELTA, calibration=None)


def test_a_base_without_a_tokenizer_has_none_to_give(
    pair: Pair, text: Path, tmp_path: Path
) -> None:
    for folder in pair:
        remove_tokenizer(folder)
    with pytest.raises(InvalidCheckpoint, match="tokenizer"):
        compress(*pair, tmp_path / "a.delta", CompressOptions(), calibration=[Source(text)])


def test_a_tokenizer_of_fewer_tokens_is_not_inherited(pair: Pair) -> None:
    base, finetuned = pair
    remove_tokenizer(finetuned)
    config = json.loads((finetuned / "config.json").read_text())
    (finetuned / "config.json").write_text(json.dumps(config | {"vocab_size": 257}))
    assert not inherits_tokenizer(scan_folder(base), scan_folder(finetuned))


def change(finetuned: Path, name: str, value: torch.Tensor | None) -> None:
    weights = load_file(finetuned / "model.safetensors")
    del weights[name]
    if value is not None:
        weights[name] = value
    save_file(weights, finetuned / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_rejected(
    pair: Pair, text: Path, tmp_path: Path, bad: float
) -> None:
    tensor = load_file(pair[1] / "model.safetensors")["model.norm.weight"]
    tensor[5] = bad
    change(pair[1], "model.norm.weight", tensor)
    with pytest.raises(NonFiniteWeights, match=r"model\.norm\.weight"):
        compress(*pair, tmp_path / "a.delta", CompressOptions(), calibration=[Source(text)])
    assert not list(tmp_path.glob("a.delta*"))


@pytest.mark.parametrize("value", [None, torch.zeros(3, 3)])
def test_another_architecture_is_rejected(
    pair: Pair, text: Path, tmp_path: Path, value: torch.Tensor | None
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    change(pair[1], name, value)
    with pytest.raises(ArchitectureMismatch, match="q_proj"):
        compress(*pair, tmp_path / "a.delta", CompressOptions(), calibration=[Source(text)])


def test_an_unknown_model_type_is_rejected(pair: Pair, text: Path, tmp_path: Path) -> None:
    for folder in pair:
        (folder / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(UnsupportedModel, match="abacus"):
        compress(*pair, tmp_path / "a.delta", CompressOptions(), calibration=[Source(text)])


@pytest.mark.parametrize("method", [name for name in METHODS if name != "lora"])
def test_a_drafts_size_equals_the_files(
    pair: Pair, text: Path, tmp_path: Path, method: str
) -> None:
    (pair[1] / "generation_config.json").write_text('{"temperature": 0.5}')
    calibration = CalibrationOptions(tokens=512, length=32)
    options = CompressOptions(method=method, calibration=calibration)
    bits = None if METHODS[method].bits_min is None else 1.0
    out = tmp_path / "a.delta"
    with Scratch() as scratch:
        session = CompressionSession(open_pair(*pair), options, [Source(text)], scratch)
        size = session.draft_bytes(bits)
        assert not out.exists()
        report = session.compress(bits, out)
    assert size == report.artifact_bytes == out.stat().st_size


def test_every_budget_has_the_same_windows(pair: Pair, text: Path, tmp_path: Path) -> None:
    used = []
    for bits in (1.0, 3.0):
        options = CompressOptions(
            method="adamix",
            goal=Goal("bits", bits),
            calibration=CalibrationOptions(tokens=512, length=32),
        )
        report = compress(
            *pair, tmp_path / f"{bits}.delta", options, calibration=[Source(text), Source(None)]
        )
        used.append(report.calibration)
    assert used[0] == used[1]
    assert used[0] is not None
    assert [source["choose"] for source in used[0]["sources"]] == [32, 32]
    assert [source["report"] for source in used[0]["sources"]] == [32, 32]


def test_without_a_source_text_is_sampled_from_the_fine_tune(pair: Pair, tmp_path: Path) -> None:
    options = CompressOptions(
        method="adamix", calibration=CalibrationOptions(tokens=512, length=32)
    )
    report = compress(*pair, tmp_path / "a.delta", options, calibration=[])
    again = compress(*pair, tmp_path / "b.delta", options, calibration=[])
    assert report.calibration is not None
    assert report.calibration == again.calibration
    assert report.calibration["tokens"] == 512
    assert report.quality is not None
    assert (tmp_path / "a.delta").read_bytes() == (tmp_path / "b.delta").read_bytes()


@pytest.mark.parametrize("method", ["bitdelta", "low-rank", "exact"])
def test_without_a_text_every_method_is_measured_on_sampled_text(
    pair: Pair, tmp_path: Path, method: str
) -> None:
    options = CompressOptions(method=method, calibration=LITTLE)
    report = compress(*pair, tmp_path / "a.delta", options, calibration=None)
    assert report.measured_on == [{"kind": "sampled", "sha256": None, "tokens": 128}]
    assert report.calibration is None, "the artifact does not depend on it"
    assert report.quality is not None
    assert 0 <= report.quality.kl < report.quality.kl_base


def test_what_cannot_be_measured_is_noted(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "free_memory", lambda: 1000)
    report = compress(*pair, tmp_path / "a.delta", BITDELTA, calibration=None)
    assert (report.quality, report.measured_on) == (None, [])
    (note,) = report.notes
    assert "not measured" in note
    assert "1.00 kB are free" in note


def test_an_unknown_method_is_rejected(pair: Pair, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownMethod):
        compress(*pair, tmp_path / "a", CompressOptions(method="zip"), calibration=[Source(text)])


@pytest.mark.parametrize(
    "content", [b"", b"too short", b"\xff\xfe" * 4000], ids=["empty", "short", "not utf-8"]
)
def test_invalid_calibration_text_is_rejected(pair: Pair, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(InvalidCalibration):
        compress(*pair, tmp_path / "a.delta", CompressOptions(), calibration=[Source(path)])


def test_a_fine_tune_equal_to_its_base_is_rejected_unless_a_file_differs(
    pair: Pair, text: Path, tmp_path: Path
) -> None:
    base, finetuned = pair
    shutil.copy(base / "model.safetensors", finetuned / "model.safetensors")
    with pytest.raises(UnchangedCheckpoint, match="equals its base"):
        compress(base, finetuned, tmp_path / "a.delta", BITDELTA, calibration=None)
    (finetuned / "chat_template.jinja").write_text("{{ messages[0].content }}")
    report = compress(
        base, finetuned, tmp_path / "a.delta", CompressOptions(), calibration=[Source(text)]
    )
    assert report.quality.kl == pytest.approx(0, abs=1e-9)
    assert report.notes == [NO_WEIGHTS]
    with Artifact(tmp_path / "a.delta") as artifact:
        assert artifact.records == {}
    merge(base, tmp_path / "a.delta", tmp_path / "merged")


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("hidden_size", 512, InvalidCheckpoint),
        ("num_key_value_heads", 1, InvalidCheckpoint),
        ("vocab_size", 10, InvalidCheckpoint),
        ("num_hidden_layers", 9, DeltadockError),
        ("num_hidden_layers", 10**9, UnsupportedModel),
        ("num_attention_heads", 0, UnsupportedModel),
        ("hidden_size", "abc", UnsupportedModel),
    ],
)
def test_a_config_that_does_not_match_the_weights_is_rejected(
    pair: Pair, text: Path, tmp_path: Path, key: str, value: object, error: type[Exception]
) -> None:
    for folder in pair:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(error):
        compress(*pair, tmp_path / "a.delta", CompressOptions(), calibration=[Source(text)])
    assert not list(tmp_path.glob("a.delta*"))


def test_a_config_with_other_computations_is_rejected(
    pair: Pair, text: Path, tmp_path: Path
) -> None:
    config = json.loads((pair[1] / "config.json").read_text())
    (pair[1] / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(ArchitectureMismatch, match="hidden_act"):
        compress(*pair, tmp_path / "a.delta", CompressOptions(), calibration=[Source(text)])
