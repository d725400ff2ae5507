"""All that a GPU has to say, in one command and nine minutes.

    python -m benchmarks.gpu [--parts cases,kernel,...] [--variant 8x40,8x80,4x168x256]
        [--form 16x4x4x32] [--out DIR]

Runs from a bare checkout with torch, triton, transformers, safetensors and numpy. The parts run in
the order of their worth, each in a process of its own under its own time limit; what a part prints
is shown and written to DIR/PART.txt at once, and a line of JSON about it to DIR/results.jsonl, so
that a machine that is taken away loses nothing. A part that this machine cannot run is named and
passed by. `--tiny` runs small forms of the parts without a GPU: a rehearsal, whose figures mean
nothing, and without time limits.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import torch

from benchmarks.harness import describe_machine

SEVEN_B: Final = ("--model", "qwen2.5-7b", "--tokens", "262144", "--device", "cuda")
ROOT: Final = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Part:
    """One measurement.

    Attributes:
        about: what it finds out.
        command: arguments of `python -m`, on a GPU.
        seconds: time limit.
        tiny: arguments of a small form that needs no GPU; None if there is none.
        option: of this command, which it takes too.
        needs: a package beyond those of a bare machine.
    """

    about: str
    command: tuple[str, ...]
    seconds: int
    tiny: tuple[str, ...] | None
    option: str | None = None
    needs: str | None = None


PARTS: Final = {
    "cases": Part(
        "every case of the kernels is right",
        ("benchmarks.kernel", "--only-cases"),
        60,
        ("benchmarks.kernel", "--only-cases", "--device", "cpu", "--cases", "1"),
    ),
    "kernel": Part(
        "a layer's deltas against copy bandwidth, low-rank and dense deltas; prefill",
        ("benchmarks.kernel", "--cases", "0"),
        70,
        ("benchmarks.kernel", "--device", "cpu", "--cases", "0"),
        option="variant",
    ),
    "sweep": Part(
        "the variants of the kernels",
        ("benchmarks.kernel", "--sweep", "50"),
        60,
        ("benchmarks.kernel", "--sweep", "80", "--device", "cpu"),
    ),
    "decoder": Part(
        "a decode step between its products: attention by exact lengths, its variants; fused norms",
        ("benchmarks.decoder",),
        30,
        ("benchmarks.decoder", "--device", "cpu"),
    ),
    "linear": Part(
        "the base's products of few rows: cuBLAS, and the kernel that overlaps, in its forms",
        ("benchmarks.linear",),
        30,
        ("benchmarks.linear", "--device", "cpu"),
    ),
    "sampler": Part(
        "sampling in batch against row by row",
        ("benchmarks.sampler", "--device", "cuda"),
        15,
        ("benchmarks.sampler", "--device", "cpu", "--rows", "2", "--vocabularies", "100"),
    ),
    "node": Part(
        "decode steps of a 7B model with 0 to 64 deltas, cold swaps, Zipf traffic",
        ("benchmarks.node", "7b"),
        100,
        ("benchmarks.node", "7b", "--device", "cpu", "--tiny"),
        option="form",
    ),
    "adamix": Part(
        "compression of two of 28 blocks of a 7B model, projected",
        ("benchmarks.compress_speed", *SEVEN_B, "--blocks", "2", "--method", "adamix"),
        60,
        ("benchmarks.compress_speed", "48x64", "--tokens", "512"),
    ),
    "optimix": Part(
        "the same with distillation",
        ("benchmarks.compress_speed", *SEVEN_B, "--blocks", "2", "--method", "optimix"),
        85,
        None,
    ),
    "tests": Part(
        "the tests that need a GPU",
        ("pytest", "-q", "tests/kernels"),
        30,
        None,
        needs="pytest",
    ),
}
"""In the order of their worth; the limits add up to nine minutes."""


def obstacle(part: Part, *, tiny: bool) -> str | None:
    """Why this machine cannot run the part, or None."""
    if tiny:
        return None if part.tiny else "it has no small form"
    if not torch.cuda.is_available():
        return "it needs a GPU"
    if part.needs and find_spec(part.needs) is None:
        return f"it needs {part.needs}"
    return None


def run(command: Sequence[str], seconds: float, log: Path, variables: dict[str, str]) -> str:
    """Run a command; its output goes to the screen and to `log` line by line.

    Returns:
        `done`, `failed`, or `stopped` at the time limit. The command's children end with it.
    """
    deadline = time.monotonic() + seconds
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            [sys.executable, "-u", "-m", *command],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        status = ""
        while not status:
            ended = process.poll() is not None
            if text := (process.stdout.read() or b"").decode(errors="replace"):
                sys.stdout.write(text)
                sys.stdout.flush()
                file.write(text)
                file.flush()
            if ended:
                status = "failed" if process.returncode else "done"
            elif time.monotonic() > deadline:
                status = "stopped"
            else:
                time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=list(PARTS), help=", ".join(PARTS)
    )
    parser.add_argument("--variant", help="of the deltas' kernels, as the part sweep prints it")
    parser.add_argument("--form", help="of the base's products, as the part linear prints it")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    parser.add_argument("--tiny", action="store_true", help="a rehearsal without a GPU")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine("cuda" if torch.cuda.is_available() else "cpu")
    print(machine, flush=True)
    failed = False
    for name in options.parts:
        part = PARTS[name]
        print(f"\n== {name}: {part.about}", flush=True)
        record: dict[str, object] = {"part": name, "machine": machine}
        if reason := obstacle(part, tiny=options.tiny):
            record["status"] = f"passed by: {reason}"
        else:
            command = list((part.tiny if options.tiny else None) or part.command)
            if part.option and (value := getattr(options, part.option)):
                command += [f"--{part.option}", value]
            began = time.monotonic()
            variables = {"TRITON_INTERPRET": "1"} if options.tiny else {}
            record["command"] = " ".join(command)
            seconds = math.inf if options.tiny else part.seconds
            record["status"] = run(command, seconds, options.out / f"{name}.txt", variables)
            record["seconds"] = round(time.monotonic() - began, 1)
            failed |= record["status"] == "failed"
        print(f"== {name}: {record['status']}", flush=True)
        with (options.out / "results.jsonl").open("a", encoding="utf-8") as results:
            results.write(json.dumps(record) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
