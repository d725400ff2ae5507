"""The table method x budget for any pair, as text, CSV and a plot, with the spread over seeds.

    python -m benchmarks.methods --base DIR --finetuned DIR --calibration FILE --heldout FILE \
        [--exercises FILE] [--methods adamix,optimix] [--budgets 0.5,1,2] [--seeds 0,1,2] \
        [--equal-bytes] --out PREFIX

Writes PREFIX.csv, PREFIX.txt and, with matplotlib, PREFIX.svg and PREFIX.png. Rows already in
PREFIX.csv are kept (`--again` measures them again), so an interrupted run resumes. Quality is
measured on the held-out text, never on the calibration text, in windows of 256 tokens. With
`--equal-bytes` every method gets the TRUE artifact bytes that `adamix` took at the same budget and
seed. A method calibrates once per seed for all budgets; that time is part of every artifact's
seconds. Exercises are decoded greedily; the first line must equal the answer.
"""

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import describe_machine
from benchmarks.tables import (
    BenchmarkRow,
    RowKey,
    format_table,
    plot,
    read_rows,
    verdict,
    write_rows,
)
from deltadock.artifacts.export import merge
from deltadock.artifacts.folder import scan_folder
from deltadock.artifacts.tokenizers import open_tokenizer
from deltadock.compression.checkpoints import open_pair
from deltadock.compression.options import (
    METHODS,
    TOKENS,
    CalibrationOptions,
    CompressOptions,
    Goal,
    Source,
    check_method,
)
from deltadock.compression.pipeline import reach_goal
from deltadock.compression.quality import evaluate
from deltadock.compression.residence import scratch_for
from deltadock.compression.scratch import Scratch
from deltadock.compression.session import CompressionSession
from deltadock.errors import BitsOutOfRange, DeltadockError
from deltadock.kernels import choose_device

REFERENCE: Final = "adamix"
"""The method whose sizes `--equal-bytes` gives to every other."""
BUDGETS: Final = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
SPARE_TOKENS: Final = 4
"""Tokens decoded beyond the longest answer's, so that an overlong answer counts as wrong."""


def read_exercises(path: Path) -> list[tuple[str, str]]:
    """(prompt, answer) of each line of a .jsonl file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return [(str(row["prompt"]), str(row["answer"])) for row in rows]


@torch.inference_mode()
def accuracy(
    folder: Path, exercises: list[tuple[str, str]], device: str = "cpu", batch: int = 100
) -> float:
    """Fraction of the exercises whose completion's first line is the answer."""
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    tokenizer = open_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    longest = max(len(tokenizer(f" {answer}")["input_ids"]) for _, answer in exercises)
    correct = 0
    for start in range(0, len(exercises), batch):
        part = exercises[start : start + batch]
        prompts = [prompt for prompt, _ in part]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        inputs.pop("token_type_ids", None)
        output = model.generate(
            **inputs.to(device),
            max_new_tokens=longest + SPARE_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        correct += sum(
            text.strip().split("\n")[0].strip() == answer
            for text, (_, answer) in zip(texts, part, strict=True)
        )
    return correct / len(exercises)


@dataclass(frozen=True, slots=True)
class Pair:
    """A base and its fine-tune, with the texts and exercises to calibrate and measure on."""

    base: Path
    finetuned: Path
    calibration: Path
    heldout: Path
    exercises: Path | None
    tokens: int = TOKENS

    def digest(self) -> str:
        """Digest of all inputs, 16 hex digits."""
        known = hashlib.sha256()
        for folder in (self.base, self.finetuned):
            known.update(scan_folder(folder).digest.encode())
        for file in (self.calibration, self.heldout, self.exercises):
            known.update(b"" if file is None else hashlib.sha256(file.read_bytes()).digest())
        known.update(str(self.tokens).encode())
        return known.hexdigest()[:16]

    def accuracy(self, folder: Path, device: str) -> float | None:
        """Accuracy of a checkpoint on the exercises; None without exercises."""
        if self.exercises is None:
            return None
        return accuracy(folder, read_exercises(self.exercises), device)


def accepts(name: str, budget: float) -> bool:
    """Whether the method accepts this bit budget."""
    try:
        check_method(name, budget)
    except BitsOutOfRange:
        return False
    return True


def planned(methods: list[str], budgets: list[float], seeds: list[int]) -> Iterator[BenchmarkRow]:
    """The table's rows before measurement, the reference method's first.

    A method without a budget has one row per seed, one without calibration a single seed. Methods
    that import adapters are skipped: they do not compress the pair.
    """
    for name in sorted(methods, key=lambda name: name != REFERENCE):
        info = METHODS[name]
        if info.imports_adapter:
            continue
        sized = info.bits_min is not None
        for seed in seeds if info.needs_calibration else seeds[:1]:
            for budget in [b for b in budgets if accepts(name, b)] if sized else [None]:
                yield BenchmarkRow("", name, budget, seed, equal_bytes=False)


class MethodBenchmark:
    """One method with one calibration seed, calibrated once for all of its budgets."""

    def __init__(self, pair: Pair, method: str, seed: int, scratch: Scratch, device: str) -> None:
        """Calibrate; the time counts towards every artifact.

        Raises:
            DeltadockError: the pair or its calibration text is invalid.
        """
        self._pair, self._device = pair, device
        started = time.monotonic()
        options = CompressOptions(
            method=method, seed=seed, calibration=CalibrationOptions(tokens=pair.tokens)
        )
        checkpoints = open_pair(pair.base, pair.finetuned)
        sources = [Source(pair.calibration)]
        self._session = CompressionSession(checkpoints, options, sources, scratch, device=device)
        self._seconds = time.monotonic() - started

    def measure(self, row: BenchmarkRow) -> BenchmarkRow:
        """Compress and measure one row.

        Raises:
            DeltadockError: the method cannot produce an artifact of this size.
        """
        pair = self._pair
        goal = None if row.budget is None else Goal("bits", row.budget)
        if row.target_bytes is not None:
            goal = Goal("target_bytes", row.target_bytes)
        with tempfile.TemporaryDirectory() as name:
            delta, merged = Path(name) / "out.delta", Path(name) / "merged"
            started = time.monotonic()
            report = reach_goal(self._session, goal, delta)
            seconds = self._seconds + time.monotonic() - started
            quality = evaluate(pair.base, pair.finetuned, delta, pair.heldout, device=self._device)
            score = None
            if pair.exercises is not None:
                merge(pair.base, delta, merged)
                score = pair.accuracy(merged, self._device)
        return replace(
            row,
            artifact_bytes=report.artifact_bytes,
            ratio=report.ratio,
            true_bits=report.true_bits,
            kl=quality.kl,
            kl_base=quality.kl_base,
            agreement=quality.agreement,
            nll=quality.nll,
            nll_finetuned=quality.nll_finetuned,
            accuracy=score,
            seconds=seconds,
        )


def measured(rows: list[BenchmarkRow], pair: Pair, device: str) -> Iterator[BenchmarkRow]:
    """Measure rows of one method and seed; a failed row has the error as its status."""
    with scratch_for(torch.device(device)) as scratch:
        bench: MethodBenchmark | None = None
        for row in rows:
            try:
                bench = bench or MethodBenchmark(pair, row.method, row.seed, scratch, device)
                yield bench.measure(row)
            except DeltadockError as error:
                yield replace(row, status=str(error))


def with_target(row: BenchmarkRow, done: dict[RowKey, BenchmarkRow]) -> BenchmarkRow:
    """The row with the reference method's bytes at the same budget and seed as its goal.

    Methods with fixed sizes keep their budget.
    """
    if row.method == REFERENCE or row.budget is None or METHODS[row.method].budgets:
        return row
    reference = replace(row, method=REFERENCE, equal_bytes=False)
    return replace(row, equal_bytes=True, target_bytes=done[reference.key].artifact_bytes)


def run(
    pair: Pair,
    plan: list[BenchmarkRow],
    out: Path,
    *,
    equal_bytes: bool = False,
    again: bool = False,
    device: str = "cpu",
) -> list[BenchmarkRow]:
    """Measure the rows that `out`.csv lacks, and write the table of all rows.

    Args:
        pair: checkpoints and texts.
        plan: rows from `planned`; with `equal_bytes` it must include the reference method's.
        out: path of the results without suffix.
        equal_bytes: give every method the reference's bytes.
        again: measure rows in the file again.
        device: torch device.
    """
    table = out.with_name(out.name + ".csv")
    inputs, machine = pair.digest(), describe_machine(device)
    done = read_rows(table)
    references = {}
    for name, folder in (("base", pair.base), ("finetuned", pair.finetuned)):
        row = BenchmarkRow(inputs, name, None, 0, equal_bytes=False, machine=machine)
        if row.key not in done and pair.exercises is not None:
            done[row.key] = replace(row, accuracy=pair.accuracy(folder, device))
        references[name] = done.get(row.key, row).accuracy
    table_rows = []
    for _, planned_rows in groupby(plan, key=lambda row: (row.method, row.seed)):
        group = [replace(row, inputs=inputs, machine=machine) for row in planned_rows]
        if equal_bytes:
            group = [with_target(row, done) for row in group]
        kept = {row.key for row in done.values() if row.status == "ok" and not again}
        for row in measured([row for row in group if row.key not in kept], pair, device):
            done[row.key] = row
            write_rows(table, done.values())
            print(describe_row(row), flush=True)
        table_rows += [done[row.key] for row in group]
    goal = f"the bytes of {REFERENCE} at this budget" if equal_bytes else "code bits per weight"
    bases = [row.kl_base for row in table_rows if row.kl_base is not None]
    lines = [
        f"Pair {pair.finetuned.name} on {pair.base.name}, inputs {inputs}",
        f"Calibrated on {pair.calibration.name}, measured on {pair.heldout.name}; budget: {goal}",
        *(f"KL of the base {kl:.4f} nats per token" for kl in bases[:1]),
        *(f"Accuracy of {name}: {score:.1%}" for name, score in references.items() if score),
        *sorted({f"Machine: {row.machine}" for row in table_rows}),
        "",
    ]
    text = "\n".join(lines) + "\n" + format_table(table_rows) + verdict(table_rows)
    out.with_name(out.name + ".txt").write_text(text, encoding="utf-8")
    try:
        plot(table_rows, out.name, out)
    except ModuleNotFoundError:
        print("No plot: matplotlib is not installed.")
    print(text)
    return table_rows


def describe_row(row: BenchmarkRow) -> str:
    """A progress line."""
    budget = "" if row.budget is None else f" at {row.budget:g}"
    if row.kl is None:
        return f"{row.method}{budget}, seed {row.seed}: {row.status}"
    score = "" if row.accuracy is None else f", accuracy {row.accuracy:.1%}"
    return (
        f"{row.method}{budget}, seed {row.seed}: {row.artifact_bytes:,} bytes, "
        f"KL {row.kl:.6f}, agreement {row.agreement:.2%}{score}, {row.seconds:.1f} s"
    )


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("base", "finetuned", "calibration", "heldout"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--exercises", type=Path, help=".jsonl of prompt and answer")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS))
    parser.add_argument(
        "--budgets", type=lambda text: [float(b) for b in text.split(",")], default=list(BUDGETS)
    )
    parser.add_argument(
        "--seeds", type=lambda text: [int(s) for s in text.split(",")], default=[0, 1, 2]
    )
    parser.add_argument("--equal-bytes", action="store_true", help=f"{REFERENCE}'s true bytes")
    parser.add_argument("--again", action="store_true", help="measure rows in the file again")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--calibration-tokens", type=int, default=TOKENS)
    parser.add_argument("--threads", type=int, help="number of torch threads")
    parser.add_argument("--out", type=Path, required=True, metavar="PREFIX")
    arguments = parser.parse_args()
    unknown = set(arguments.methods) - METHODS.keys()
    if unknown:
        parser.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    methods = dict.fromkeys([REFERENCE] if arguments.equal_bytes else []) | dict.fromkeys(
        arguments.methods
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    pair = Pair(
        arguments.base,
        arguments.finetuned,
        arguments.calibration,
        arguments.heldout,
        arguments.exercises,
        arguments.calibration_tokens,
    )
    run(
        pair,
        list(planned(list(methods), arguments.budgets, arguments.seeds)),
        arguments.out,
        equal_bytes=arguments.equal_bytes,
        again=arguments.again,
        device=str(choose_device(arguments.device)),
    )


if __name__ == "__main__":
    main()
