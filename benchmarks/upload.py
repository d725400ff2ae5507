"""Uploading a checkpoint against a plain copy of its bytes into the same store.

    python -m benchmarks.upload [--mib 1024] [--repeats 3] [--folder FOLDER]

An api process with each store in turn: a folder, and a SeaweedFS server, which clients reach
directly (presigned) or only through the api. `deltadock.Client` uploads a new random checkpoint
of one file; the plain copy writes the same bytes into the same folder with one fsync, or to the
same bucket with boto3's `upload_file` (threads, multipart). Both alternate, and the medians count.
The upload's time ends when the checkpoint is complete: hashed by the client, sent, hashed again by
the api and linked, or on S3 copied, to its digest; `sent` ends when all bytes are in the store.
`CPU` is processor time per GiB, of the copy, the client and the api: on a busy machine it tells
more.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import httpx

from benchmarks.harness import processor
from deltadock.cli.key_store import ensure_local_key
from deltadock.cli.processes import HOST, Child, free_ports
from deltadock.cli.services import seaweedfs
from deltadock.cli.system import api_command
from deltadock.client.blocking import Client
from deltadock.settings import Settings
from deltadock.storage.api_keys import local_key_path
from deltadock.storage.blobs.s3_client import make_client
from deltadock.storage.database import migrate

CHUNK: Final = 1 << 20
COLUMNS: Final = 4096


class Speeds(NamedTuple):
    """MiB per second, and seconds of processor time per GiB."""

    copy: float
    sent: float
    complete: float
    copy_cpu: float
    client_cpu: float
    api_cpu: float


def write_checkpoint(folder: Path, mib: int) -> None:
    """A checkpoint of one safetensors file of random bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "hidden_size": COLUMNS}
    (folder / "config.json").write_text(json.dumps(config))
    size = mib * CHUNK
    tensor = {"dtype": "BF16", "shape": [size // 2 // COLUMNS, COLUMNS], "data_offsets": [0, size]}
    header = json.dumps({"w": tensor}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(mib):
            file.write(os.urandom(CHUNK))
        os.fsync(file.fileno())


@contextmanager
def running_api(home: Path, fields: dict[str, str]) -> Iterator[tuple[str, str, int]]:
    """An api process with these fields of `Settings`; yields its URL, a key and its process id."""
    port = free_ports(1)[0]
    fields = {"home": str(home), "log_level": "WARNING", **fields}
    settings = Settings.model_validate(fields)
    migrate(settings.sqlalchemy_url)
    ensure_local_key(settings)
    key = local_key_path(settings.home).read_text(encoding="utf-8").strip()
    environment = os.environ | {f"DELTADOCK_{name.upper()}": v for name, v in fields.items()}
    command = [*api_command(1), "--port", str(port)]
    with Child("api", command, log=home / "api.log", env=environment, grace=20.0) as api:
        url = f"http://{HOST}:{port}"
        api.wait_until(lambda: _answers(url))
        yield url, key, api.pid


def cpu_seconds(process: int) -> float:
    """Processor time of a process so far, its threads included."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz").is_success
    except httpx.TransportError:
        return False


def copy_to_folder(target: Path) -> Callable[[Path], None]:
    """A plain copy into the folder of the blob store."""

    def copy(source: Path) -> None:
        place = target / "copy"
        shutil.copyfile(source, place)
        with place.open("rb") as file:
            os.fsync(file.fileno())
        place.unlink()

    return copy


def copy_to_bucket(settings: Settings) -> Callable[[Path], None]:
    """A plain upload into the bucket of the blob store."""
    client = make_client(settings, settings.s3_endpoint_url)

    def copy(source: Path) -> None:
        client.upload_file(str(source), settings.s3_bucket, "copy")
        client.delete_object(Bucket=settings.s3_bucket, Key="copy")

    return copy


def measure(
    api: tuple[str, str, int], copy: Callable[[Path], None], folder: Path, mib: int, repeats: int
) -> Speeds:
    """Median speeds; every repeat has new bytes."""
    url, key, process = api
    runs = []
    for _ in range(repeats):
        write_checkpoint(folder, mib)
        began, used = time.perf_counter(), cpu_seconds(os.getpid())
        copy(folder / "model.safetensors")
        copied, copy_cpu = time.perf_counter() - began, cpu_seconds(os.getpid()) - used
        arrived = 0.0

        def progress(name: str, done: int, total: int) -> None:
            nonlocal arrived
            if name == "model.safetensors" and done == total:
                arrived = time.perf_counter()

        with Client(url, key) as client:
            began = time.perf_counter()
            client_used, api_used = cpu_seconds(os.getpid()), cpu_seconds(process)
            client.upload_folder(folder, progress)
            complete = time.perf_counter() - began
            client_cpu = cpu_seconds(os.getpid()) - client_used
            api_cpu = cpu_seconds(process) - api_used
        runs.append((copied, arrived - began, complete, copy_cpu, client_cpu, api_cpu))
    copied, sent, complete, *cpu = (statistics.median(run) for run in zip(*runs, strict=True))
    return Speeds(mib / copied, mib / sent, mib / complete, *(used / mib * 1024 for used in cpu))


def show(name: str, speeds: Speeds) -> None:
    """One line of the table."""
    print(
        f"{name:<22}{speeds.copy:8.0f}{speeds.sent:8.0f}{speeds.complete:10.0f}"
        f"{100 * speeds.sent / speeds.copy:8.0f} %{100 * speeds.complete / speeds.copy:8.0f} %"
        f"{speeds.copy_cpu:10.1f} s{speeds.client_cpu:8.1f} s{speeds.api_cpu:8.1f} s"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1024, help="MiB of the checkpoint")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="parent of the stores; a temporary folder")
    options = parser.parse_args(arguments)
    print(f"{processor()}, {os.cpu_count()} cores; {options.mib} MiB, medians of {options.repeats}")
    print(
        f"{'MiB/s':<22}{'copy':>8}{'sent':>8}{'complete':>10}{'sent':>10}{'complete':>10}"
        f"{'CPU: copy':>12}{'client':>10}{'api':>10}"
    )
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        source = root / "checkpoint"
        with running_api(root / "folder", {}) as api:
            copy = copy_to_folder(root / "folder")
            show("folder", measure(api, copy, source, options.mib, options.repeats))
        service = stack.enter_context(seaweedfs(root / "seaweedfs"))
        copy = copy_to_bucket(Settings.model_validate(service.settings))
        endpoint = {"s3_public_url": service.settings["s3_endpoint_url"]}
        for name, more in (("S3, presigned", endpoint), ("S3, through the api", {})):
            home = root / name.replace(" ", "-")
            with running_api(home, service.settings | more) as api:
                show(name, measure(api, copy, source, options.mib, options.repeats))


if __name__ == "__main__":
    main()
