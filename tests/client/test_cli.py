"""The offline commands, as someone with two folders and no service uses them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from typer.testing import CliRunner

from artifacts.checkpoint import scan_folder
from client import cli
from compression.catalogue import METHODS
from deltadock import __version__

QUERY = "model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Inputs:
    """Two checkpoints and two texts on disk."""

    base: Path
    finetuned: Path
    calibration: Path
    text: Path


@dataclass(frozen=True)
class Delta:
    """A delta file made by the command, its report and what the command printed."""

    path: Path
    report: dict[str, Any]
    stdout: str


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


Command = Callable[..., Outcome]


@pytest.fixture(scope="session", autouse=True)
def _plain_terminal() -> Any:
    """Wide and without colours, so that words in messages stay whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")
        patch.setenv("NO_COLOR", "1")
        patch.delenv("FORCE_COLOR", raising=False)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a second thread only waits on matrices this small
        yield
        torch.set_num_threads(threads)


def save_tokenizer(folder: Path) -> None:
    """A tokenizer in which every byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: id_ for id_, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def save_model(folder: Path, kind: type = Qwen2Config, change: float = 0.0, **other: Any) -> Path:
    """A random model of 256 tokens; `change` is added to it as noise."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(kind(**{**sizes, **other})).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(change * torch.randn_like(parameter))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    sentence = "the quick brown fox jumps over the lazy dog while seven wizards box "
    lines = [sentence[i % 41 :] + sentence[: i % 29] for i in range(60)]
    calibration, text = folder / "calibration.txt", folder / "text.jsonl"
    calibration.write_text("\n".join(lines))
    text.write_text("".join(json.dumps({"text": line[::-1]}) + "\n" for line in lines[:20]))
    base = save_model(folder / "base")
    finetuned = save_model(folder / "finetuned", change=0.02)
    (finetuned / "chat_template.jinja").write_text("{{ messages }}")
    return Inputs(base, finetuned, calibration, text)


@pytest.fixture(scope="session")
def delta(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Delta:
    """What `deltadock compress` makes of the pair."""
    folder = tmp_path_factory.mktemp("delta")
    result = CliRunner().invoke(
        cli.app,
        [
            "compress",
            *("--base", str(inputs.base)),
            *("--finetuned", str(inputs.finetuned)),
            *("--calibration", str(inputs.calibration)),
            *("--method", "adamix", "--bits", "2.0", "--seed", "3"),
            *("--out", str(folder / "tuned.delta")),
            *("--report", str(folder / "report.json")),
        ],
    )
    assert result.exit_code == 0, result.output
    report = json.loads((folder / "report.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "tuned.delta"]
    return Delta(folder / "tuned.delta", report, result.stdout)


@pytest.fixture
def deltadock(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command in this process, through the entry point that words the errors."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["deltadock", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, captured.out, captured.err)

    return run


def compress(inputs: Inputs, out: Path, *more: object, **instead: object) -> list[object]:
    """Arguments of a compression of the pair."""
    named = {
        "base": inputs.base,
        "finetuned": inputs.finetuned,
        "calibration": inputs.calibration,
        "out": out,
        **instead,
    }
    options = [(f"--{name}", value) for name, value in named.items() if value is not None]
    return ["compress", *(part for option in options for part in option), *more]


def assert_refused(outcome: Outcome, code: str, words: str) -> None:
    """One line on stderr that has the code, exit status 1, nothing on stdout."""
    assert (outcome.code, outcome.stdout) == (1, ""), outcome
    lines = outcome.stderr.strip().splitlines()
    assert [line.startswith(f"error ({code}): ") for line in lines] == [True], outcome.stderr
    assert words in lines[0]


def test_compress_writes_delta_and_report(inputs: Inputs, delta: Delta) -> None:
    report = delta.report
    assert (report["method"], report["nominal_bits"]) == ("adamix", 2.0)
    assert report["artifact_bytes"] == delta.path.stat().st_size
    assert report["base_digest"] == scan_folder(inputs.base).weights_digest
    assert report["calibration"]["seed"] == 3
    assert report["kl"] < report["kl_base"]
    assert len(report["matrices"]) == 2 * 7
    for words in ("adamix", "2 nominal", "nats per token"):
        assert words in delta.stdout


def test_compress_is_reproducible(
    inputs: Inputs, delta: Delta, deltadock: Command, tmp_path: Path
) -> None:
    again = tmp_path / "again.delta"
    outcome = deltadock(*compress(inputs, again, "--bits", 2, "--seed", 3))
    assert outcome.code == 0
    assert again.read_bytes() == delta.path.read_bytes()


def test_inspect_as_json(inputs: Inputs, delta: Delta, deltadock: Command) -> None:
    outcome = deltadock("inspect", delta.path, "--json")
    assert (outcome.code, outcome.stderr) == (0, "")
    document = json.loads(outcome.stdout)
    for key in (
        "artifact_bytes", "checkpoint_bytes", "ratio", "nominal_bits", "true_bits", "method",
        "base_digest",
    ):  # fmt: skip
        assert document[key] == delta.report[key], key
    weights = load_file(inputs.finetuned / "model.safetensors")
    parameters = sum(tensor.numel() for tensor in weights.values())
    assert document["checkpoint_bytes"] == 2 * parameters
    assert document["ratio"] == pytest.approx(2 * parameters / delta.path.stat().st_size)
    assert document["true_bits"] == pytest.approx(8 * delta.path.stat().st_size / parameters)
    assert {tensor["name"] for tensor in document["tensors"]} == set(weights)
    rows = {tensor["name"]: tensor for tensor in document["tensors"]}
    assert rows[QUERY]["kind"] == "svd"
    assert rows[QUERY]["rank"] == sum(rows[QUERY]["widths"].values())
    assert rows[QUERY]["error"] > 0
    assert document["files"] == ["chat_template.jinja"]


def test_inspect_as_a_table(delta: Delta, deltadock: Command) -> None:
    outcome = deltadock("inspect", delta.path)
    assert outcome.code == 0
    for words in (QUERY, "64x64", "svd", "rows", "true_bits", delta.report["base_digest"]):
        assert words in outcome.stdout


def evaluate(inputs: Inputs, delta: Path, *more: object, **instead: object) -> list[object]:
    """Arguments of an evaluation of a delta."""
    named = {
        "base": inputs.base,
        "finetuned": inputs.finetuned,
        "delta": delta,
        "text": inputs.text,
        **instead,
    }
    return ["evaluate", *(part for name, value in named.items() for part in (f"--{name}", value)),
            *more]  # fmt: skip


def test_evaluate_as_json(inputs: Inputs, delta: Delta, deltadock: Command) -> None:
    outcome = deltadock(*evaluate(inputs, delta.path, "--window", 32, "--json"))
    assert (outcome.code, outcome.stderr.strip()) == (0, "")
    quality = json.loads(outcome.stdout)
    assert quality.keys() >= {"kl", "agreement", "nll", "nll_finetuned", "nll_base"}
    assert 0 < quality["kl"] < quality["kl_base"]
    assert 0 < quality["agreement"] <= 1
    distance = abs(quality["nll"] - quality["nll_finetuned"])
    assert distance < abs(quality["nll_base"] - quality["nll_finetuned"])


def test_an_exact_delta_is_the_finetune(inputs: Inputs, deltadock: Command, tmp_path: Path) -> None:
    exact, out = tmp_path / "exact.delta", tmp_path / "merged"
    outcome = deltadock(*compress(inputs, exact, method="exact", calibration=None))
    assert outcome.code == 0
    assert "–" in outcome.stdout, "what was not measured is not made up"
    quality = json.loads(deltadock(*evaluate(inputs, exact, "--json")).stdout)
    assert quality["kl"] == pytest.approx(0, abs=1e-6)
    assert (quality["agreement"], quality["nll"]) == (1, quality["nll_finetuned"])
    assert deltadock("merge", "--base", inputs.base, "--delta", exact, "--out", out).code == 0
    assert scan_folder(out).weights_digest == scan_folder(inputs.finetuned).weights_digest


def test_evaluate_as_a_table(inputs: Inputs, delta: Delta, deltadock: Command) -> None:
    outcome = deltadock(*evaluate(inputs, delta.path))
    assert outcome.code == 0
    assert "nll_finetuned" in outcome.stdout


def test_verify(delta: Delta, deltadock: Command) -> None:
    outcome = deltadock("verify", delta.path)
    assert outcome.code == 0
    assert outcome.stdout.startswith(f"{delta.path}: every hash is right")
    assert len(outcome.stdout.splitlines()) == 1


def test_verify_finds_damage(delta: Delta, deltadock: Command, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.delta"
    content = bytearray(delta.path.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert_refused(deltadock("verify", damaged), "invalid_artifact", "1 of its segments")
    damaged.write_bytes(content[:-1])
    assert_refused(deltadock("verify", damaged), "invalid_artifact", "not a whole delta file")


def test_merge_writes_what_transformers_loads(
    inputs: Inputs, delta: Delta, deltadock: Command, tmp_path: Path
) -> None:
    out = tmp_path / "merged [v2]"
    outcome = deltadock("merge", "--base", inputs.base, "--delta", delta.path, "--out", out)
    assert (outcome.code, outcome.stdout) == (0, f"Wrote {out}\n")
    model = AutoModelForCausalLM.from_pretrained(out)
    tokens = AutoTokenizer.from_pretrained(out)("the quick", return_tensors="pt")
    assert torch.isfinite(model(**tokens).logits).all()
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == load_file(inputs.finetuned / "model.safetensors").keys()
    assert not torch.equal(weights[QUERY], load_file(inputs.base / "model.safetensors")[QUERY])


def test_methods_are_listed(deltadock: Command) -> None:
    outcome = deltadock("methods")
    assert outcome.code == 0
    assert all(name in outcome.stdout for name in METHODS)


def test_version(deltadock: Command) -> None:
    assert deltadock("version").stdout == f"{__version__}\n"


@pytest.mark.parametrize(
    ("instead", "code", "words"),
    [
        ({"method": "zip"}, "unknown_method", "adamix"),
        ({"bits": 0.01}, "bits_out_of_range", "between 0.1 and 8"),
        ({"bits": 9}, "bits_out_of_range", "between 0.1 and 8"),
        ({"bits": "nan"}, "bits_out_of_range", "between 0.1 and 8"),
        ({"method": "exact", "bits": 1}, "bits_out_of_range", "leave bits out"),
        ({"calibration": None}, "invalid_calibration", "needs a calibration text"),
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


def copied(folder: Path, to: Path, **tensors: Any) -> Path:
    """A checkpoint like `folder` with some tensors replaced."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    save_file({**weights, **tensors}, to / "model.safetensors", {"format": "pt"})
    return to


def with_nan(inputs: Inputs, folder: Path) -> Path:
    weights = load_file(inputs.finetuned / "model.safetensors")[QUERY]
    weights[3, 5] = torch.nan
    return copied(inputs.finetuned, folder, **{QUERY: weights})


def with_infinity(inputs: Inputs, folder: Path) -> Path:
    weights = load_file(inputs.finetuned / "model.safetensors")[QUERY]
    weights[0, 0] = -torch.inf
    return copied(inputs.finetuned, folder, **{QUERY: weights})


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


def lying(inputs: Inputs, folder: Path) -> Path:
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
        (pickled, "unsafe_file", "safe_serialization=True"),
        (truncated, "malformed_safetensors", "ends inside tensor"),
        (lying, "malformed_safetensors", "takes"),
        (without_config, "invalid_checkpoint", "config.json is missing"),
        (empty, "invalid_checkpoint", "config.json is missing"),
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
    assert_refused(deltadock(*arguments), code, words)
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


def test_a_base_that_the_delta_does_not_belong_to(
    inputs: Inputs, delta: Delta, deltadock: Command, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    wrong = copied(inputs.base, other, **{QUERY: torch.zeros(64, 64, dtype=torch.bfloat16)})
    mine = scan_folder(wrong).weights_digest
    arguments = evaluate(inputs, delta.path, "--json", base=wrong)
    assert_refused(deltadock(*arguments), "base_mismatch", mine)
    arguments = ["merge", "--base", wrong, "--delta", delta.path, "--out", tmp_path / "out"]
    assert_refused(deltadock(*arguments), "base_mismatch", mine)
    assert list(tmp_path.iterdir()) == [other]


def test_what_exists_is_not_overwritten(
    inputs: Inputs, delta: Delta, deltadock: Command, tmp_path: Path
) -> None:
    file, folder = tmp_path / "a.delta", tmp_path / "folder"
    file.write_text("precious")
    folder.mkdir()
    (folder / "file").touch()
    for out in (file, folder):
        assert_refused(deltadock(*compress(inputs, out)), "conflict", str(out))
        arguments = ["merge", "--base", inputs.base, "--delta", delta.path, "--out", out]
        assert_refused(deltadock(*arguments), "conflict", str(out))
    assert file.read_text() == "precious"
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_to_is_refused_at_once(
    inputs: Inputs, deltadock: Command, tmp_path: Path
) -> None:
    nowhere = tmp_path / "nowhere"
    for places in ({"out": nowhere / "a.delta"}, {"report": nowhere / "a.json"}):
        arguments = compress(inputs, **{"out": tmp_path / "a.delta", **places})
        assert_refused(deltadock(*arguments), "not_found", str(nowhere))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_at_the_end_leaves_nothing(
    inputs: Inputs, deltadock: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def interrupted(*_: object, **__: object) -> None:
        written.append(out.is_file())
        raise KeyboardInterrupt

    monkeypatch.setattr("compression.pipeline.measure", interrupted)
    out = tmp_path / "a.delta"
    outcome = deltadock(*compress(inputs, out, method="exact"))
    assert outcome.code != 0
    assert written == [True], "the delta is written before it is measured"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "verify", "merge", "evaluate"])
def test_files_that_are_no_deltas(
    inputs: Inputs, deltadock: Command, tmp_path: Path, command: str
) -> None:
    weights = inputs.base / "model.safetensors"
    out = tmp_path / "out"
    arguments = {
        "merge": ["merge", "--base", inputs.base, "--delta", weights, "--out", out],
        "evaluate": evaluate(inputs, weights),
    }.get(command, [command, weights])
    assert_refused(deltadock(*arguments), "invalid_artifact", "Is it a checkpoint?")
    assert list(tmp_path.iterdir()) == []


def run_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-m", "client", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_process_ends_with_one_line_and_status_1(inputs: Inputs, tmp_path: Path) -> None:
    ended = run_process(*compress(inputs, tmp_path / "a.delta", finetuned=inputs.base.parent))
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.strip().count("\n") == 0
    assert ended.stderr.strip().startswith("error (invalid_checkpoint): ")
    assert list(tmp_path.iterdir()) == []


def test_a_process_prints_json_alone(delta: Delta) -> None:
    ended = run_process("inspect", delta.path, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["method"] == "adamix"
