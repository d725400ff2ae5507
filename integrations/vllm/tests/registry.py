"""Deltadock's api with given delta files under given names, for the tests of the plug-in.

Run with the Python of the repository's own environment: vLLM pins an older FastAPI. Prints one line
of JSON with `url` and `key`, and ends when its standard input does.

    python -m integrations.vllm.tests.registry FOLDER project/model=a.delta,b.delta ...
"""

import json
import sys
from pathlib import Path

from deltadock.cli import services
from tests.client.support import running_service


def main(folder: Path, models: list[str]) -> None:
    """Serve the models until the standard input ends; the files are versions 1, 2, ..."""
    with (
        services.valkey(folder / "valkey") as valkey,
        running_service(folder / "api", valkey.settings["broker_url"]) as service,
    ):
        for model in models:
            name, files = model.split("=")
            for seed, file in enumerate(files.split(","), 1):
                delta = service.api.delta(seed=seed, name=name)
                service.api.make_ready(delta, Path(file).read_bytes())
        sys.stdout.write(json.dumps({"url": service.url, "key": service.key}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
