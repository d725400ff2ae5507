"""`deltadock demo`: compress and serve the sample fine-tune over HTTP.

Starts an embedded Deltadock in a temporary folder, stores the sample fine-tune as a one-bit delta
and as an exact one, and lets base, fine-tune and delta answer the same held-out exercises.
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Final

import httpx
from rich.table import Table
from rich.text import Text

from deltadock import words
from deltadock.cli.output import output
from deltadock.cli.processes import HOST, Child, check_ports, free_ports
from deltadock.cli.readiness import api_url, is_ready
from deltadock.client.blocking import Client
from deltadock.client.progress import job_bar
from deltadock.client.requests import JsonObject
from deltadock.client.resources import Delta, Job, Report
from deltadock.errors import NotFound
from deltadock.storage.api_keys import local_key_path
from deltadock.trust import is_loopback

SAMPLES: Final = Path(str(files("deltadock") / "samples")).resolve()
BASE: Final = "sample-base"
SHOWN: Final = 5
"""Exercises whose answers are printed."""
MEASURED: Final = 60
"""Exercises for the accuracy."""
PARALLEL: Final = 8


def demo(host: str = HOST, api_port: int | None = None, node_port: int | None = None) -> None:
    """Run the demonstration and print it.

    Args:
        host: address of the api.
        api_port, node_port: by default free ones.

    Raises:
        NotFound: the samples are not installed.
        DeltadockError: a request failed or a process did not start.
    """
    began = time.monotonic()
    if not (SAMPLES / "base").is_dir():
        raise NotFound(
            f"{SAMPLES} has no samples. Install Deltadock again, or run the demo from a checkout."
        )
    lines = (SAMPLES / "exercises.jsonl").read_text(encoding="utf-8").splitlines()
    exercises = [json.loads(line) for line in lines[:MEASURED]]
    _step("1. Start", ": api, worker and node with a broker, SQLite and a folder")
    with (
        _running_system(host, api_port, node_port) as (url, key),
        Client(url, key) as client,
    ):
        output.print(f"   running at {url}")
        delta, exact = _store(client)
        _show_report(delta, client.report(delta.id))
        models = {"base": BASE, "fine-tuned": exact.id, "delta": delta.id}
        answers = {title: _answers(client, model, exercises) for title, model in models.items()}
        _show_answers(exercises[:SHOWN], answers)
        _show_accuracy(exercises, answers)
        _step("5. Stop", "")
    output.print(f"Stopped after {words.duration(time.monotonic() - began)} in all.")
    _show_next()


def _step(title: str, text: str) -> None:
    output.print(Text.assemble((title, "bold"), text))


@contextmanager
def _running_system(
    host: str, api_port: int | None, node_port: int | None
) -> Iterator[tuple[str, str]]:
    """Run `deltadock up` in a temporary folder; yields its URL and API key."""
    free = free_ports(2)
    api_port, node_port = api_port or free[0], node_port or free[1]
    check_ports(api_port, node_port)  # else another Deltadock would answer
    url = api_url(host, api_port)
    with tempfile.TemporaryDirectory(prefix="deltadock-demo-") as name:
        home = Path(name)
        command: list[str | Path] = [
            *(sys.executable, "-P", "-m", "deltadock", "up", "--home", home),
            *("--host", host, "--api-port", str(api_port), "--node-port", str(node_port)),
        ]
        if not is_loopback(host):
            output.print(f"   key for other machines: {_make_key(home)}")
        with Child("deltadock up", command, log=home / "up.log", grace=30.0) as system:
            # The worker and the node may still be starting: jobs wait for the worker, and the node
            # is up long before the first compression ends.
            try:
                with httpx.Client(base_url=url, timeout=5.0) as http:
                    system.wait_until(lambda: is_ready(http), seconds=120)
                yield url, local_key_path(home).read_text(encoding="utf-8").strip()
            except KeyboardInterrupt:
                output.print("\nStopping ...")  # takes seconds
                raise


def _make_key(home: Path) -> str:
    """Make the key without which `up` lets no other machine reach it."""
    from deltadock.cli.key_store import issue
    from deltadock.settings import Settings

    settings = Settings(home=home, database_url="")
    return issue(settings, "demo", None, ["read"], None).key or ""


def _store(client: Client) -> tuple[Delta, Delta]:
    """Upload the samples and compress the fine-tune twice: at one bit per weight, and exactly."""
    _step("2. Upload", " the base and its fine-tune, hashed while they stream")
    base = client.upload_folder(SAMPLES / "base")
    client.create_base(BASE, base.digest)
    finetuned = client.upload_folder(SAMPLES / "finetuned")
    for title, checkpoint in (("base", base), ("fine-tune", finetuned)):
        size = words.size(checkpoint.total_bytes)
        output.print(f"   {title:<10}{size:>8}  sha256 {checkpoint.digest[:16]}")
    _step("3. Compress", " with a budget of 1.0 bit per compressed weight")
    text = SAMPLES / "calibration.txt"
    pushed = SAMPLES / "finetuned", "demo/skills", BASE
    small = client.push(*pushed, bits=1.0, calibration=text)
    # Measured on the same text; without one, text would be sampled for it.
    exact = client.push(pushed[0], "demo/skills-exact", BASE, method="exact", calibration=text)
    with job_bar(output) as show:
        return small.wait(show), exact.wait(_quietly)


def _quietly(_job: Job) -> None:
    """The exact copy takes a moment: its progress is not shown."""


def _show_report(delta: Delta, report: Report) -> None:
    table = Table(title=f"{delta.reference} on {delta.base.name}")
    table.add_column("what")
    table.add_column("value", justify="right")
    rows = {
        "checkpoint in bf16": words.size(report.checkpoint_bytes),
        "delta": words.size(report.artifact_bytes),
        "ratio": words.ratio(report.ratio),
        "bits per compressed weight, budget": words.budget(report.nominal_bits),
        "bits per weight, the whole file": words.significant(report.true_bits),
        "KL to the fine-tune": words.nats(report.kl),
        "top-1 agreement": words.percentage(report.agreement),
        "loss of the base": words.nats(report.nll_base),
        "loss of the fine-tune": words.nats(report.nll_finetuned),
        "loss of base with delta": words.nats(report.nll),
        "matrices compressed": words.grouped(len(report.matrices)),
        "time": words.duration(report.seconds),
    }
    for row in rows.items():
        table.add_row(*row)
    output.print(table)


def _answers(client: Client, model: str, exercises: Sequence[JsonObject]) -> list[str]:
    """The first line of the model's greedy answer to every prompt."""

    def answer(exercise: JsonObject) -> str:
        answered = client.generate(
            model, exercise["prompt"], max_tokens=16, temperature=0.0, stop="\n"
        )
        return answered.text.strip()

    with ThreadPoolExecutor(PARALLEL) as pool:  # the node batches them
        return list(pool.map(answer, exercises))


def _show_answers(exercises: Sequence[JsonObject], answers: dict[str, list[str]]) -> None:
    _step("4. Generate", " over HTTP: the same base serves all three")
    table = Table("exercise", "expected", *answers)
    for number, exercise in enumerate(exercises):
        given = [_marked(found[number], exercise["answer"]) for found in answers.values()]
        table.add_row(" ".join(exercise["prompt"].split()), exercise["answer"], *given)
    output.print(table)


def _marked(answer: str, expected: str) -> Text:
    return Text(answer or "(nothing)", style="green" if answer == expected else "red")


def _show_accuracy(exercises: Sequence[JsonObject], answers: dict[str, list[str]]) -> None:
    for title, found in answers.items():
        right = sum(
            answer == exercise["answer"] for answer, exercise in zip(found, exercises, strict=False)
        )
        output.print(f"   {title:<11}{right:3d} of {len(exercises)} held-out exercises right")


def _show_next() -> None:
    command = _command()
    output.print(
        f"Next: `{command} up` starts it to stay. Then, in another terminal:\n"
        f"   {command} bases add {_shown(SAMPLES / 'base')} --name sample\n"
        f"   {command} push {_shown(SAMPLES / 'finetuned')} --base sample --name demo/exercises "
        f"--calibration {_shown(SAMPLES / 'calibration.txt')}\n"
        f"   {command} run demo/exercises 'sort h b d a'",
        soft_wrap=True,
    )


def _command() -> str:
    """This installation's command, as it is typed here."""
    script = Path(sys.executable).with_name("deltadock")
    found = shutil.which("deltadock")
    return "deltadock" if found == str(script) else str(_shown(script))


def _shown(path: Path) -> Path:
    """A path as short as it can be written in this folder."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
