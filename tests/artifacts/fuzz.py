"""A fuzzer of the reader: `python -m tests.artifacts.fuzz --cases 1000000`.

Every case is a golden file, or a part of one, mutated as its number determines: in its raw bytes,
in its header's text, in the values of its header or manifest (with hashes corrected), or in its
data. The reader may read it or raise InvalidArtifact; any other exception, more than `MEMORY`
additional memory or more than `SECONDS` is a finding, which is saved to a file. Linux only, for the
limits.
"""

import argparse
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Final

from deltadock.artifacts.container import StreamingInspector
from deltadock.errors import InvalidArtifact, MalformedSafetensors
from tests.artifacts.make_golden import GOLDEN, WIDE
from tests.artifacts.mutations import case, parts_of
from tests.artifacts.use import use

MEMORY: Final = 256 << 20
"""Additional bytes of address space that a case may take."""

SECONDS: Final = 5
"""Time limit of a case."""

PROGRESS: Final = 50_000
"""Cases per line of progress."""

SHARED: Final = Path("/dev/shm")


def attempt(file: bytes, path: Path) -> str:
    """`read`, `damaged` or `refused`; anything else is raised."""
    path.write_bytes(file)
    try:
        inspector = StreamingInspector()
        inspector.update(file)
        inspector.finish()
        streams = True
    except MalformedSafetensors:
        streams = False
    try:
        damaged = use(path)
    except InvalidArtifact:
        return "refused"
    assert streams, "the reader accepts a file that the streaming inspector rejects"
    return "damaged" if damaged else "read"


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"over {SECONDS} seconds")


def main() -> int:
    """Run the cases; return 0 if there are no findings."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the first case's number")
    parser.add_argument("--out", type=Path, default=Path("findings"), help="for findings")
    arguments = parser.parse_args()
    wholes = [parts_of(path.read_bytes()) for path in (GOLDEN, WIDE)]
    signal.signal(signal.SIGALRM, _too_slow)
    _limit_memory()
    outcomes: Counter[str] = Counter()
    began, findings = time.monotonic(), 0
    # In memory if possible: writing files dominates a case's time.
    with tempfile.TemporaryDirectory(dir=SHARED if SHARED.is_dir() else None) as folder:
        path = Path(folder) / "a.delta"
        for number in range(arguments.start, arguments.start + arguments.cases):
            mutation, file = case(arguments.seed, number, wholes)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                outcomes[f"{mutation}: {attempt(file, path)}"] += 1
            except Exception:  # noqa: BLE001 (that nothing else is raised is what is tested)
                findings += 1
                arguments.out.mkdir(exist_ok=True)
                (arguments.out / f"{arguments.seed}-{number}.delta").write_bytes(file)
                print(f"case {number} ({mutation}):\n{traceback.format_exc()}")  # noqa: T201
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            done = number + 1 - arguments.start
            if done % PROGRESS == 0:
                print(  # noqa: T201
                    f"{done:,} cases, {findings} findings, {time.monotonic() - began:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:10,} {outcome}")  # noqa: T201
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(  # noqa: T201
        f"{arguments.cases:,} cases, {findings} findings, {time.monotonic() - began:.0f} s, "
        f"peak resident memory {peak} MiB"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
