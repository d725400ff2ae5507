"""The offline commands, on checkpoint folders and without a service."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import make_url
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltadock import __version__
from deltadock.artifacts.folder import scan_folder
from deltadock.compression.encoder import Encoder
from deltadock.compression.options import METHODS
from deltadock.compression.progress import Forecast
from deltadock.settings import get_settings
from tests.cli.support import QUERY, Command, Delta, Inputs, compress, evaluate

CLI_PAGE = Path(__file__).parents[2] / "docs/cli.md"


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


def test_compress_tells_how_long_it_goes_on(
    inputs: Inputs, deltadock: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forecast, "seconds_left", lambda *_: 90.0)
    arguments = compress(inputs, tmp_path / "a.delta", method="exact")
    assert "; about 1 min 30 s left" in deltadock(*arguments).stderr


def test_calibration_sources_mix_and_default_to_sampled_text(
    inputs: Inputs, deltadock: Command, tmp_path: Path
) -> None:
    amount = ("--calibration-tokens", 1024, "--calibration-length", 32)
    mixed = ("--calibration", f"{inputs.text}:3", "--calibration", "sampled")
    tokens = {}
    for name, sources in (("mixed", mixed), ("sampled", ())):
        report = tmp_path / f"{name}.json"
        arguments = compress(inputs, tmp_path / name, *amount, *sources, calibration=None)
        assert deltadock(*arguments, "--report", report).code == 0
        tokens[name] = json.loads(report.read_text())["calibration"]["tokens"]
    assert tokens == {"mixed": 1024, "sampled": 1024}


def test_preview_as_json(inputs: Inputs, delta: Delta, deltadock: Command) -> None:
    pair = ("--base", inputs.base, "--finetuned", inputs.finetuned)
    outcome = deltadock("preview", *pair, "--method", "adamix", "--bits", 2, "--json")
    assert (outcome.code, outcome.stderr) == (0, "")
    size = json.loads(outcome.stdout)
    assert size["artifact_bytes"] == pytest.approx(delta.report["artifact_bytes"], rel=0.1)
    assert size["checkpoint_bytes"] == delta.report["checkpoint_bytes"]
    assert {part["kind"] for part in size["parts"]} == {
        "linear layers", "embeddings", "other tensors", "manifest",
    }  # fmt: skip


def test_preview_as_a_table(inputs: Inputs, deltadock: Command) -> None:
    outcome = deltadock("preview", "--finetuned", inputs.finetuned, "--ratio", 2)
    assert outcome.code == 0
    for words in ("linear layers", "embeddings", "ratio 2.0", "true bits per weight"):
        assert words in outcome.stdout


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


def documented(command: str) -> set[str]:
    """The fields that docs/cli.md says `command` prints with --json."""
    row = re.search(rf"^\| `{command}` \| (.*) \|$", CLI_PAGE.read_text(), re.MULTILINE)
    assert row is not None
    return set(re.findall(r"`(\w+)`", re.sub(r"\(.*?\)", "", row[1])))


def test_json_has_the_documented_fields(
    inputs: Inputs, delta: Delta, deltadock: Command, tmp_path: Path
) -> None:
    for arguments in (
        ("preview", "--finetuned", inputs.finetuned),
        evaluate(inputs, delta.path, "--window", 32),
        ("inspect", delta.path),
        ("verify", delta.path),
        ("merge", "--base", inputs.base, "--delta", delta.path, "--out", tmp_path / "merged"),
        ("doctor", "--url", "http://127.0.0.1:9"),
    ):
        found = json.loads(deltadock(*arguments, "--json").stdout)
        assert set(found[0] if isinstance(found, list) else found) == documented(str(arguments[0]))


def test_an_adapter_needs_no_method(inputs: Inputs, deltadock: Command, tmp_path: Path) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "adapter.delta"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    layer = f"base_model.model.{QUERY.removesuffix('.weight')}"
    factors = {
        f"{layer}.lora_A.weight": torch.ones(2, 64),
        f"{layer}.lora_B.weight": torch.ones(64, 2),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    outcome = deltadock("preview", "--finetuned", adapter)
    assert (outcome.code, "name the base's folder, --base" in outcome.stderr) == (1, True)
    both = ("--base", inputs.base, "--finetuned", adapter)
    outcome = deltadock("preview", *both)
    assert "lora: " in outcome.stdout
    outcome = deltadock("compress", *both, "--out", out, "--json")
    assert outcome.code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["method"] == "lora"
    again = ("export", "--base", inputs.base, "--delta", out, "--out", tmp_path / "again", "--json")
    printed = json.loads(deltadock(*again).stdout)
    assert set(printed) == documented("export")
    exported = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(exported.pop(name), tensor) for name, tensor in factors.items())
    assert not exported
    outcome = deltadock("compress", *both, "--out", tmp_path / "b.delta", "--method", "bitdelta")
    assert (outcome.code, "leave the method (`--method`) out" in outcome.stderr) == (1, True)


def test_all_tables_have_one_form(inputs: Inputs, delta: Delta, deltadock: Command) -> None:
    """Headings, then rows: no frames, and columns begin at the left edge."""
    preview = ("preview", "--finetuned", inputs.finetuned)
    for command, first in ((("methods",), "method"), (preview, "part"),
                           (("inspect", delta.path), "tensor")):  # fmt: skip
        shown = deltadock(*command).stdout
        assert shown.startswith(f"{first} "), shown


def test_inspect_as_a_table(delta: Delta, deltadock: Command) -> None:
    outcome = deltadock("inspect", delta.path)
    assert outcome.code == 0
    for words in (QUERY, "64x64", "svd", "rows", "bits per weight", delta.report["base_digest"]):
        assert words in outcome.stdout
    assert re.search(r"^files +chat_template\.jinja$", outcome.stdout, re.MULTILINE)


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
    assert "sampled from the fine-tune" in outcome.stdout
    quality = json.loads(deltadock(*evaluate(inputs, exact, "--json")).stdout)
    assert quality["kl"] == pytest.approx(0, abs=1e-6)
    assert (quality["agreement"], quality["nll"]) == (1, quality["nll_finetuned"])
    assert deltadock("merge", "--base", inputs.base, "--delta", exact, "--out", out).code == 0
    assert scan_folder(out).weights_digest == scan_folder(inputs.finetuned).weights_digest


def test_evaluate_as_a_table(inputs: Inputs, delta: Delta, deltadock: Command) -> None:
    outcome = deltadock(*evaluate(inputs, delta.path))
    assert outcome.code == 0
    labels = [line.split("  ")[0] for line in outcome.stdout.splitlines()]
    assert labels == [
        "KL to the fine-tune", "KL of the bare base", "top-1 agreement",
        "NLL delta / fine-tuned / base", "tokens",
    ]  # fmt: skip


def test_verify_prints_one_line(delta: Delta, deltadock: Command) -> None:
    outcome = deltadock("verify", delta.path)
    assert outcome.code == 0
    assert outcome.stdout.startswith(f"{delta.path}: all hashes match")
    assert len(outcome.stdout.splitlines()) == 1


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


@pytest.mark.parametrize("argument", ["version", "--version"])
def test_version(deltadock: Command, argument: str) -> None:
    outcome = deltadock(argument)
    assert (outcome.code, outcome.stdout) == (0, f"{__version__}\n")


def run_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-m", "deltadock", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_an_error_is_one_line_and_exit_status_1(inputs: Inputs) -> None:
    ended = run_process("verify", inputs.base / "model.safetensors")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error (invalid_artifact): model.safetensors: ")
    assert len(ended.stderr.splitlines()) == 1


def test_a_process_prints_only_json(delta: Delta) -> None:
    ended = run_process("inspect", delta.path, "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert json.loads(ended.stdout)["method"] == "adamix"


def test_migrate_prints_database_and_revision(
    deltadock: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTADOCK_HOME", str(tmp_path))
    get_settings.cache_clear()
    outcome = deltadock("migrate")
    get_settings.cache_clear()
    assert outcome.code == 0
    assert f"{tmp_path / 'deltadock.db'} is at revision " in outcome.stdout


def test_migrate_hides_the_password(
    deltadock: Command, postgres_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = make_url(postgres_database)
    monkeypatch.setenv("DELTADOCK_DATABASE_URL", postgres_database)
    get_settings.cache_clear()
    outcome = deltadock("migrate")
    get_settings.cache_clear()
    assert (url.database or "") in outcome.stdout
    assert url.password
    assert str(url.password) not in outcome.stdout + outcome.stderr


def test_an_interrupted_compression_continues_with_equal_bytes(
    inputs: Inputs,
    delta: Delta,
    deltadock: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "tuned.delta"
    arguments = compress(inputs, out, "--json", bits="2.0", seed=3)
    with monkeypatch.context() as patch:
        patch.setattr("deltadock.compression.session.write_artifact", interrupted)
        outcome = deltadock(*arguments)
    assert outcome.code == 130
    assert "Interrupted. The same command continues after the last" in outcome.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.delta.blocks"]
    monkeypatch.setattr(Encoder, "_encode_blocks", interrupted)  # nothing is left to do
    outcome = deltadock(*arguments)
    assert outcome.code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["method"] == "adamix"
    assert out.read_bytes() == delta.path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.delta"]
