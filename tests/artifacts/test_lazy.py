"""Opening reads only the header, and reading needs only numpy."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deltadock.artifacts.encodings import encode_exact
from deltadock.artifacts.writer import write_artifact
from tests.artifacts.make_golden import GOLDEN, MANIFEST
from tests.artifacts.support import container, split

SIZE = 4 << 30
"""Bytes of a sparse file's data: too many to read by accident."""


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """A sparse delta file with one tensor of 4 GiB."""
    path = tmp_path / "sparse.delta"
    write_artifact(path, {"t": encode_exact(np.zeros(8, np.uint8), "U8", (8,))}, MANIFEST)
    header, _ = split(path.read_bytes())
    header["t:data"].update(shape=[SIZE], data_offsets=[0, SIZE])
    metadata = header["__metadata__"]
    manifest = json.loads(metadata["manifest"])
    manifest["tensors"]["t"]["shape"] = [SIZE]
    metadata["manifest"] = json.dumps(manifest)
    metadata["manifest_sha256"] = hashlib.sha256(metadata["manifest"].encode()).hexdigest()
    path.write_bytes(container(header))
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size + SIZE)
    return path


READ_A_LITTLE = """
import resource, sys
from pathlib import Path
from deltadock.artifacts.reader import Artifact
import deltadock.artifacts.encodings

def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

before = resident()
with Artifact(Path(sys.argv[1])) as artifact:
    data = artifact.exact("t")
    assert len(data) == int(sys.argv[2])
    assert data[-1] == data[len(data) // 2] == 0
    assert not data.flags.owndata
print(resident() - before)
"""


def test_opening_a_large_file_reads_its_header_only(sparse: Path) -> None:
    """Accessing a byte of the data reads only a few pages around it."""
    command = [sys.executable, "-c", READ_A_LITTLE, str(sparse), str(SIZE)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert int(done.stdout) < 16 << 20


USE_ALL = """
import sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "safetensors", "transformers"}:
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
from tests.artifacts.use import use
import deltadock.artifacts.writer, deltadock.artifacts.serial, deltadock.artifacts.compatibility
assert use(Path(sys.argv[1])) == []
roots = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(sorted(name for name in roots if not name.startswith("_")))
"""


def test_reading_and_writing_need_numpy_alone() -> None:
    command = [sys.executable, "-S", "-c", USE_ALL, str(GOLDEN)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env={"PYTHONPATH": str(Path(np.__file__).parents[1])},
    )  # fmt: skip
    assert done.stdout.strip() == str(["deltadock", "numpy", "tests"])
