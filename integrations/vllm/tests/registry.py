"""Deltadock's api with given delta files under given names, for the tests of the plug-in.

Run with the Python of the repository's own environment: vLLM pins an older FastAPI. Prints one line
of JSON with `url` and `key`, and ends when its standard input does. A line `project/model 2` there
makes version 2 the one that the bare name means.

    python -m integrations.vllm.tests.registry FOLDER project/model=a.delta,b.delta ...
"""

import json
import sys
from itertools import count
from pathlib import Path
from typing import Final

from deltadock.cli import services
from tests.api.support import Api
from tests.client.support import running_service

SAMPLES: Final = Path(__file__).parents[3] / "samples"


def upload(api: Api, folder: Path) -> str:
    """The digest of a sample's checkpoint."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    digest: str = api.upload("checkpoint", files)["checkpoint"]["digest"]
    return digest


def main(folder: Path, models: list[str]) -> None:
    """Serve the models until the standard input ends; the files are versions 1, 2, ..."""
    with (
        services.valkey(folder / "valkey") as valkey,
        running_service(folder / "api", valkey.settings["broker_url"]) as service,
    ):
        api = service.api
        base = {"name": "sample", "checkpoint": upload(api, SAMPLES / "base")}
        assert api.client.post("/v1/bases", json=base).is_success
        finetuned = upload(api, SAMPLES / "finetuned")
        hundredths = count(
            100
        )  # no two requests are the same, or the second gets the first's delta
        for model in models:
            name, files = model.split("=")
            for file in files.split(","):
                bits = next(hundredths) / 100
                delta = api.delta(name=name, base="sample", checkpoint=finetuned, bits=bits)
                api.make_ready(delta, Path(file).read_bytes())
        sys.stdout.write(json.dumps({"url": service.url, "key": service.key}) + "\n")
        sys.stdout.flush()
        for line in sys.stdin:
            name, version = line.split()
            answer = api.client.put(
                f"/v1/registry/{name}/aliases/default", json={"version": int(version)}
            )
            assert answer.is_success, answer.text
            sys.stdout.write("moved\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
