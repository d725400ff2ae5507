"""Two hundred clients of `deltadock up`, with what they may cost.

    python -m benchmarks.load [--clients 200] [--seconds 60] [--deltas 5000] [--mib 64]
                              [--pause 1] [--processes 1] [--quick]

Starts `deltadock up` in a temporary folder with a filled database, and pushes the sample fine-tune.
Of ten clients five read lists and pages, two poll a job or a delta, one or two follow a job's
events, one completes prompts and half of one uploads small texts. Each pauses between its requests
as people and scripts do: five seconds on a page, three between two looks at a job, five between
two prompts or uploads. One more client uploads a larger checkpoint every ten seconds, in turn with
a plain copy of the same bytes into the same folder. Clients and services share this machine's
processors; what each takes of them is printed. Prints each figure with its bar; the exit status is
1 if one is missed. `--pause` multiplies the pauses: with 0 every client sends its next request at
once, which measures requests a second rather than latency. `--quick` tries the script: few clients,
a few seconds.
"""

import argparse
import asyncio
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

import httpx
from sqlalchemy import update

from benchmarks import lists
from benchmarks.harness import processor
from benchmarks.upload import copy_to_folder, cpu_seconds, write_checkpoint
from deltadock.cli.demo import BASE, SAMPLES
from deltadock.cli.processes import HOST, Child, free_ports
from deltadock.client.blocking import Client
from deltadock.settings import Settings
from deltadock.storage.api_keys import local_key_path
from deltadock.storage.database import Database
from deltadock.storage.tables import JobRow, JobState

READS_P99_MS: Final = 100.0
PEAK_MIB: Final = 512
GROWTH_MIB: Final = 32
"""From the second quarter of the time to the last."""
UPLOAD_SHARE: Final = 0.7
MODEL: Final = "load/skills"
UPLOAD_EVERY: Final = 10.0
"""Seconds from one upload of the larger checkpoint to the next."""
FOLLOWED: Final = 20
"""Jobs under way that are followed."""

LISTS: Final = (
    "/v1/deltas",
    "/v1/deltas?sort=kl",
    "/v1/deltas?method=bitdelta",
    "/v1/deltas?text=legal",
    "/v1/models",
    "/v1/jobs?state=failed",
    "/v1/registry",
    "/v1/bases",
    "/v1/nodes",
    "/",
)


class Mix(NamedTuple):
    """How many clients do what."""

    lists: int
    status: int
    events: int
    completions: int
    uploads: int

    @classmethod
    def of(cls, clients: int) -> "Mix":
        """Shares of `clients`."""
        tenth = clients / 10
        events, completions, uploads = round(1.5 * tenth), round(tenth), max(1, round(tenth / 2))
        status = round(2 * tenth)
        return cls(clients - events - completions - uploads - status, status, events, completions,
                   uploads)  # fmt: skip


class Load:
    """The clients, and what they measured."""

    def __init__(self, url: str, key: str, seconds: float, pause: float) -> None:
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=60,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self._end = time.monotonic() + seconds
        self._pause = pause
        self._chance = random.Random(0)
        self.milliseconds: defaultdict[str, list[float]] = defaultdict(list)
        self.refused = 0
        self.errors: Counter[str] = Counter()

    async def run(self, mix: Mix) -> None:
        """All clients until the time is over."""
        kinds: dict[Callable[[], Awaitable[None]], tuple[int, float]] = {
            self._list: (mix.lists, 5.0),
            self._status: (mix.status, 3.0),
            self._events: (mix.events, 1.0),
            self._complete: (mix.completions, 5.0),
            self._upload: (mix.uploads, 5.0),
        }
        async with self._http, asyncio.TaskGroup() as group:
            for step, (count, pause) in kinds.items():
                for _ in range(count):
                    group.create_task(self._repeat(step, pause * self._pause))

    async def _repeat(self, step: Callable[[], Awaitable[None]], pause: float) -> None:
        """Steps with pauses of `pause` seconds on average."""
        await asyncio.sleep(self._chance.uniform(0, pause))
        while time.monotonic() < self._end:
            try:
                await step()
            except httpx.HTTPError as error:
                self.errors[f"{step.__name__[1:]}: {type(error).__name__}"] += 1
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) * pause)

    async def _send(self, kind: str, method: str, path: str, **body: object) -> httpx.Response:
        began = time.perf_counter()
        answer = await self._http.request(method, path, **body)  # type: ignore[arg-type]
        self.milliseconds[kind].append(1000 * (time.perf_counter() - began))
        if answer.status_code == 429 and "Retry-After" in answer.headers:
            self.refused += 1
        elif not answer.is_success:
            self.errors[f"{method} {path.partition('?')[0]}: {answer.status_code}"] += 1
        return answer

    async def _list(self) -> None:
        await self._send("reads", "GET", self._chance.choice(LISTS))

    async def _status(self) -> None:
        number = self._chance.randrange(FOLLOWED)
        await self._send("reads", "GET", f"/v1/{self._chance.choice(PLACES)}".format(number=number))

    async def _events(self) -> None:
        """Follow a job for some seconds; its first event is a read."""
        path = f"/v1/jobs/job_{self._chance.randrange(FOLLOWED)}/events"
        until = self._chance.uniform(5, 15)
        began = time.perf_counter()
        with suppress(TimeoutError):
            async with asyncio.timeout(until), self._http.stream("GET", path) as answer:
                answer.raise_for_status()
                first = True
                async for _ in answer.aiter_raw():
                    if first:
                        self.milliseconds["reads"].append(1000 * (time.perf_counter() - began))
                    first = False

    async def _complete(self) -> None:
        body = {"model": MODEL, "prompt": "17 + 25 =", "max_tokens": 4, "temperature": 0}
        await self._send("completions", "POST", "/v1/completions", json=body)

    async def _upload(self) -> None:
        """Upload one small calibration text."""
        text = self._chance.randbytes(1 << 19).hex().encode()
        made = await self._send("uploads", "POST", "/v1/uploads", json={"kind": "calibration"})
        if made.is_success:
            upload = f"/v1/uploads/{made.json()['id']}"
            await self._send("uploads", "PUT", f"{upload}/files/text.txt", content=text)
            await self._send("uploads", "POST", f"{upload}/complete")


PLACES: Final = ("jobs/job_{number}", "deltas/dlt_{number}")


def fill(home: Path, deltas: int) -> None:
    """A filled database, some of whose jobs are under way elsewhere."""
    settings = Settings(home=home, log_level="ERROR")
    lists.prepare(settings, deltas, queued=0)
    database = Database(settings.sqlalchemy_url)
    with database.session_scope() as session:
        session.execute(
            update(JobRow)
            .where(JobRow.id.in_([f"job_{number}" for number in range(FOLLOWED)]))
            .values(
                state=JobState.COMPRESSING, lease_owner="elsewhere",
                lease_expires_at=datetime.now(UTC) + timedelta(days=1),
            )
        )  # fmt: skip
    database.dispose()


def api_process(parent: int) -> int:
    """The process id of the api that `deltadock up` started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            if (
                int(status[1]) == parent
                and b"deltadock.api.main" in (folder / "cmdline").read_bytes()
            ):
                return int(folder.name)
    raise RuntimeError("The api does not run.")


def family(process: int) -> list[int]:
    """The process and all that descend from it."""
    parents: defaultdict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(status[1])].append(int(folder.name))
    found = [process]
    for one in found:
        found += parents[one]
    return found


def resident_mib(processes: Sequence[int]) -> float:
    """Resident memory of processes."""
    pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in processes)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def used_by(processes: Sequence[int]) -> float:
    """Processor seconds of processes so far."""
    return sum(map(cpu_seconds, processes))


async def sample_memory(processes: Sequence[int], found: list[float]) -> None:
    """Add the api's memory every half second until cancelled."""
    while True:
        found.append(resident_mib(processes))
        await asyncio.sleep(0.5)


def upload_and_copy(
    url: str, key: str, home: Path, folder: Path, mib: int, end: float, every: float
) -> list[tuple[float, float]]:
    """Seconds of an upload and of a plain copy of the same bytes, in turn until `end`."""
    copy = copy_to_folder(home / "blobs")
    pairs: list[tuple[float, float]] = []
    with Client(url, key) as client:
        while time.monotonic() < end or not pairs:
            write_checkpoint(folder, mib)
            began = time.perf_counter()
            client.upload_folder(folder, lambda *_: None)
            uploaded = time.perf_counter()
            copy(folder / "model.safetensors")
            copied = time.perf_counter()
            pairs.append((uploaded - began, copied - uploaded))
            time.sleep(max(0.0, min(began + every - copied, end - time.monotonic())))
    return pairs


class Bar(NamedTuple):
    """A figure and what it may be."""

    what: str
    figure: str
    bar: str
    is_met: bool


async def measure(
    url: str, key: str, home: Path, process: int, options: argparse.Namespace, folder: Path
) -> list[Bar]:
    """Run the clients; returns the figures."""
    load = Load(url, key, options.seconds, options.pause)
    memory: list[float] = []
    processes = family(process)
    before, own = used_by(processes), time.process_time()
    sampler = asyncio.create_task(sample_memory(processes, memory))
    # In a process of its own: in a thread it would hold up the clients whose waits are measured.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        uploads = pool.submit(
            upload_and_copy, url, key, home, folder / "large", options.mib,
            time.monotonic() + options.seconds, UPLOAD_EVERY * options.pause,
        )  # fmt: skip
        await load.run(Mix.of(options.clients))
        used, own = used_by(processes) - before, time.process_time() - own
        pairs = await asyncio.wrap_future(uploads)
    sampler.cancel()
    for kind, times in sorted(load.milliseconds.items()):
        p50, p99 = statistics.median(times), lists.p99(times)
        print(f"{kind:14}{len(times):6} requests   p50 {p50:7.1f} ms   p99 {p99:7.1f} ms")
    requests = sum(map(len, load.milliseconds.values()))
    print(
        f"{requests / options.seconds:.0f} requests a second; processor time: api {used:.1f} s, "
        f"{1000 * used / requests:.1f} ms a request, uploads included; these clients {own:.1f} s"
    )
    quarter = max(1, len(memory) // 4)
    growth = statistics.mean(memory[-quarter:]) - statistics.mean(memory[quarter : 2 * quarter])
    reads = lists.p99(load.milliseconds["reads"])
    share = statistics.median(copied / uploaded for uploaded, copied in pairs)
    failed = sum(load.errors.values())
    for what, count in load.errors.most_common(5):
        print(f"error: {what}, {count} times")
    return [
        Bar("errors", f"{failed}, and {load.refused} times 429", "0", not failed),
        Bar("reads, p99", f"{reads:.0f} ms", f"{READS_P99_MS:.0f} ms", reads <= READS_P99_MS),
        Bar("api's memory, peak", f"{max(memory):.0f} MiB", f"{PEAK_MIB} MiB",
            max(memory) <= PEAK_MIB),
        Bar("api's memory, growth", f"{growth:.0f} MiB", f"{GROWTH_MIB} MiB", growth <= GROWTH_MIB),
        Bar(f"upload of {options.mib} MiB", f"{share:.0%} of a copy", f"{UPLOAD_SHARE:.0%}",
            share >= UPLOAD_SHARE),
    ]  # fmt: skip


def run(options: argparse.Namespace) -> list[Bar]:
    """Start the system, prepare it and measure."""
    api_port, node_port = free_ports(2)
    url = f"http://{HOST}:{api_port}"
    with tempfile.TemporaryDirectory(prefix="deltadock-load-", dir=options.folder) as name:
        home, folder = Path(name, "home"), Path(name, "files")
        home.mkdir()
        fill(home, options.deltas)
        command: list[str | Path] = [
            *(sys.executable, "-P", "-m", "deltadock", "up", "--home", home),
            *("--api-port", str(api_port), "--node-port", str(node_port)),
        ]
        environment = os.environ | {"DELTADOCK_API_PROCESSES": str(options.processes)}
        log = home / "up.log"
        with Child("deltadock up", command, log=log, env=environment, grace=30.0) as system:
            system.wait_until(lambda: is_ready(url), seconds=300)
            key = local_key_path(home).read_text(encoding="utf-8").strip()
            with Client(url, key) as client:
                client.create_base(BASE, client.upload_folder(SAMPLES / "base").digest)
                client.push(SAMPLES / "finetuned", MODEL, BASE, method="bitdelta").wait()
                client.generate(MODEL, "17 + 25 =", max_tokens=1)
            process = api_process(system.pid)
            return asyncio.run(measure(url, key, home, process, options, folder))


def is_ready(url: str) -> bool:
    """Whether the api and a node answer."""
    try:
        answer = httpx.get(f"{url}/readyz", timeout=5.0).json()
    except (httpx.TransportError, ValueError):
        return False
    return bool(answer["checks"].get("node") == "ok")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--deltas", type=int, default=5000)
    parser.add_argument("--mib", type=int, default=64, help="MiB of the larger checkpoint")
    parser.add_argument("--pause", type=float, default=1.0, help="factor of the clients' pauses")
    parser.add_argument("--processes", type=int, default=1, help="of the api")
    parser.add_argument("--folder", type=Path, help="parent of the home; a temporary folder")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.clients, options.seconds, options.deltas, options.mib = 20, 3.0, 100, 2
    print(
        f"{processor()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}; "
        f"{options.clients} clients, {options.seconds:g} s, {options.deltas} deltas, "
        f"{options.processes} processes of the api, pauses times {options.pause:g}"
    )
    bars = run(options)
    for bar in bars:
        verdict = "met" if bar.is_met else "missed"
        print(f"{bar.what:24}{bar.figure:>24}   bar {bar.bar:>8}   {verdict}")
    return 0 if all(bar.is_met for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())
