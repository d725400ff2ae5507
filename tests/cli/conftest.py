"""A tiny pair of checkpoints, its delta, and the command run in this process."""

import json
import sys
from collections.abc import Iterator

import pytest
import torch
from typer.testing import CliRunner

from deltadock.cli import main as cli
from deltadock.cli.app import app
from tests.cli.support import Command, Delta, Inputs, Outcome, save_model


@pytest.fixture(scope="session")
def plain_terminal() -> Iterator[None]:
    """A wide terminal without colours, so that messages are not wrapped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")
        patch.setenv("NO_COLOR", "1")
        patch.delenv("FORCE_COLOR", raising=False)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # matrices this small do not gain from a second
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    sentence = "the quick brown fox jumps over the lazy dog while seven wizards box "
    lines = [sentence[i % 41 :] + sentence[: i % 29] for i in range(60)]
    calibration, text = folder / "calibration.txt", folder / "text.jsonl"
    calibration.write_text("\n".join(lines))
    text.write_text("".join(json.dumps({"text": line[::-1]}) + "\n" for line in lines[:20]))
    base = save_model(folder / "base")
    finetuned = save_model(folder / "finetuned", noise=0.02)
    (finetuned / "chat_template.jinja").write_text("{{ messages }}")
    return Inputs(base, finetuned, calibration, text)


@pytest.fixture(scope="session")
def delta(inputs: Inputs, plain_terminal: None, tmp_path_factory: pytest.TempPathFactory) -> Delta:
    """The output of `deltadock compress` for the pair."""
    folder = tmp_path_factory.mktemp("delta")
    result = CliRunner().invoke(
        app,
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
def deltadock(
    plain_terminal: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """Run the command in this process, through its entry point."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["deltadock", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, captured.out, captured.err)

    return run
