"""The one command for a GPU machine, rehearsed without one."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import PARTS, Part, main
from benchmarks.kernel import SERIAL, SWEEP, name_of, variant_named
from benchmarks.linear import form_named
from benchmarks.linear import name_of as name_of_form
from deltadock.kernels.svd_delta.layout import H_IN_ALIGNMENT, WARP_INPUTS
from deltadock.kernels.svd_delta.triton.forms import DEFAULT, SUM_PARTS


def results(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_parts_take_nine_minutes_at_most() -> None:
    assert sum(part.seconds for part in PARTS.values()) <= 9 * 60
    for part in PARTS.values():
        assert (
            part.command[0] == "pytest"
            or (gpu.ROOT / part.command[0].replace(".", "/")).with_suffix(".py").exists()
        )


def test_small_forms_run_without_a_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "--parts", "sampler,optimix", "--out", str(tmp_path)]) == 0
    assert [each["status"] for each in results(tmp_path)] == [
        "done",
        "passed by: it has no small form",
    ]
    assert (tmp_path / "sampler.txt").read_text() in capfd.readouterr().out


def test_what_the_machine_cannot_run_is_passed_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--out", str(tmp_path)]) == 0
    assert {each["status"] for each in results(tmp_path)} == {"passed by: it needs a GPU"}


@pytest.mark.parametrize(
    ("code", "seconds", "status", "code_of_all"),
    [
        ("print(1); raise SystemExit(3)", 60, "failed", 1),
        ("print(1)\nwhile 1: pass", 5, "stopped", 0),
    ],
)
def test_a_part_that_fails_or_hangs_loses_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    seconds: int,
    status: str,
    code_of_all: int,
) -> None:
    (tmp_path / "bad_part.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    bad = Part("", ("bad_part",), seconds, None)
    parts = {"bad": bad, "after": Part("", ("platform",), 60, None)}
    monkeypatch.setattr(gpu, "PARTS", parts)
    monkeypatch.setattr(gpu, "obstacle", lambda part, tiny: None)
    assert main(["--parts", "bad,after", "--out", str(tmp_path)]) == code_of_all
    assert [each["status"] for each in results(tmp_path)] == [status, "done"]
    assert (tmp_path / "bad.txt").read_text() == "1\n"


def test_options_reach_the_parts_that_take_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []
    monkeypatch.setattr(gpu, "obstacle", lambda part, tiny: None)
    monkeypatch.setattr(gpu, "run", lambda command, *_: commands.append(command) or "done")
    options = ["--variant", name_of(DEFAULT), "--form", "16x4x4x32"]
    main(["--parts", "kernel,linear,node", *options, "--out", str(tmp_path)])
    kernel, linear, node = (PARTS[name].command for name in ("kernel", "linear", "node"))
    assert commands == [[*kernel, *options[:2]], [*linear], [*node, *options[2:]]]
    assert name_of_form(form_named("16x4x4x32")) == "16x4x4x32"


def test_the_sweep_has_at_least_24_variants_of_each_kernel() -> None:
    shrinks = {form for v in SWEEP for form in v.shrink}
    expands = {form for v in SWEEP for form in v.expand}
    assert min(len(shrinks), len(expands)) >= 24
    assert len(set(SWEEP)) == len(SWEEP)
    assert SWEEP[:2] == [DEFAULT, SERIAL]
    assert SUM_PARTS * WARP_INPUTS <= H_IN_ALIGNMENT
    for variant in SWEEP:
        assert max(form.warps for form in variant.shrink) <= SUM_PARTS
        assert variant_named(name_of(variant)) == variant


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--parts", "nothing"])
    assert "there are cases" in capsys.readouterr().err
