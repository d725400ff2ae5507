"""An upgrade under load: the api of the release before and this one on one Postgres.

    python -m tests.system.upgrade CHECKOUT_OF_THE_RELEASE_BEFORE

Uploads, bases, deltas, cancellations, deletions and lists go on while the database is migrated,
this version's api starts beside the other one, and the other one stops. Every step of a round goes
to any api that runs. Prints the requests of each phase; exits with 1 if one failed.
"""

import os
import random
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from subprocess import check_output
from typing import Any, Final

import httpx
import typer

from deltadock.cli import services
from deltadock.cli.processes import Child, free_ports
from deltadock.storage.database import head_revision
from tests.api.support import CONFIG, TEXT, weights
from tests.waiting import wait_until

HERE: Final = Path(__file__).parents[2]
ROUNDS: Final = 10
"""Of each phase, at least."""


class Load:
    """A thread of requests to the running apis."""

    def __init__(self, key: str) -> None:
        self.apis: list[str] = []
        self.phase = ""
        self.rounds = 0
        self.requests: Counter[str] = Counter()
        self.failures: list[str] = []
        self._http = httpx.Client(timeout=60, headers={"Authorization": f"Bearer {key}"})
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def start(self, phase: str) -> None:
        """Begin, or go on to, the next phase."""
        self.phase = phase
        if not self._thread.is_alive():
            self._thread.start()

    def finish_phase(self) -> None:
        """Wait for some more rounds."""
        last = self.rounds + ROUNDS
        wait_until(lambda: self.rounds >= last or bool(self.failures), 120)

    def stop(self) -> None:
        self._done.set()
        self._thread.join()
        self._http.close()

    def _ask(self, method: str, path: str, **content: Any) -> Any:
        phase = self.phase
        answer = self._http.request(method, f"{random.choice(self.apis)}{path}", **content)
        self.requests[phase] += 1
        if not answer.is_success:
            raise RuntimeError(f"{phase}: {method} {path}: {answer.status_code} {answer.text}")
        return answer.json() if answer.content else None

    def _run(self) -> None:
        try:
            while not self._done.is_set():
                self._round(self.rounds)
                self.rounds += 1
        except (RuntimeError, httpx.HTTPError) as error:
            self.failures.append(str(error))

    def _upload(self, kind: str, files: dict[str, bytes]) -> Any:
        upload = self._ask("POST", "/v1/uploads", json={"kind": kind})["id"]
        for path, data in files.items():
            self._ask("PUT", f"/v1/uploads/{upload}/files/{path}", content=data)
        return self._ask("POST", f"/v1/uploads/{upload}/complete")

    def _checkpoint(self, seed: int) -> str:
        files = {"config.json": CONFIG, "model.safetensors": weights(seed)}
        digest: str = self._upload("checkpoint", files)["checkpoint"]["digest"]
        return digest

    def _round(self, number: int) -> None:
        base, name = self._checkpoint(0), f"project-{number % 3}/model"
        self._ask("POST", "/v1/bases", json={"name": "base", "checkpoint": base})
        text = self._upload("calibration", {"text.txt": TEXT})["calibration"]["digest"]
        body = {
            "name": name, "base": "base", "checkpoint": self._checkpoint(number + 1), "bits": 1.0,
            "method": "adamix", "calibration": {"source": "text", "digest": text},
        }  # fmt: skip
        delta = self._ask("POST", "/v1/deltas", json=body)["delta"]
        self._ask("POST", f"/v1/jobs/{delta['job']}/cancel")
        self._ask("PATCH", f"/v1/registry/{name}", json={"tags": ["tried"]})
        self._ask("PUT", f"/v1/projects/project-{number % 3}/retention", json={"rule": "ready"})
        for path in ("deltas?limit=5", "jobs?limit=5", "registry", f"deltas/{delta['id']}"):
            self._ask("GET", f"/v1/{path}")
        self._ask("DELETE", f"/v1/deltas/{delta['id']}")
        self._ask("POST", f"/v1/deltas/{delta['id']}/restore")


@contextmanager
def running_api(checkout: Path, folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The api of a checkout; yields its URL once it is ready."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "uvicorn", "deltadock.api.main:app", "--port", str(port)]
    log = folder / f"api-{port}.log"
    with Child(
        "api", ["env", "-C", str(checkout), *command], log=log, env=environment, grace=30
    ) as child:
        child.wait_until(lambda: is_ready(url))
        yield url
        child.stop()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").is_success
    except httpx.HTTPError:
        return False


def main() -> None:
    """Run the phases."""
    before = Path(sys.argv[1]).resolve()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o711)
        postgres = stack.enter_context(services.postgres(folder / "postgres"))
        valkey = stack.enter_context(services.valkey(folder / "valkey"))
        settings = {"home": str(folder / "home"), "key_secret": "s" * 40}
        settings |= postgres.settings | valkey.settings
        environment = dict(os.environ)
        environment |= {f"DELTADOCK_{name.upper()}": value for name, value in settings.items()}

        def command(checkout: Path, *arguments: str) -> str:
            line = [sys.executable, "-m", "deltadock", *arguments]
            return check_output(line, cwd=checkout, env=environment, text=True).strip()

        typer.echo(command(before, "migrate"))
        load = Load(command(before, "keys", "create", "--name", "load"))
        other = ExitStack()
        stack.callback(other.close)
        load.apis = [other.enter_context(running_api(before, folder, environment))]
        load.start("before")
        load.finish_phase()
        load.start("while the database is migrated")
        typer.echo(command(HERE, "migrate"))
        load.finish_phase()
        new = stack.enter_context(running_api(HERE, folder, environment))
        load.apis = [*load.apis, new]
        load.start("both")
        load.finish_phase()
        load.apis = [new]
        load.start("after")
        other.close()
        load.finish_phase()
        load.stop()
    for phase, count in load.requests.items():
        typer.echo(f"{phase}: {count} requests")
    typer.echo("\n".join(load.failures or [f"None failed; revision {head_revision()}."]))
    sys.exit(bool(load.failures))


if __name__ == "__main__":
    main()
