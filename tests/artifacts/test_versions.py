"""Files of later versions: unknown keys are preserved, the rest is rejected."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltadock.artifacts.manifest import WITH_DEFLATED_FILES, stored_file
from deltadock.artifacts.reader import Artifact
from deltadock.artifacts.writer import write_artifact
from deltadock.errors import InvalidArtifact
from tests.artifacts.edits import rewritten
from tests.artifacts.make_golden import MANIFEST
from tests.artifacts.use import use


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.delta"


def of_version(version: str) -> Callable[[Any, Any], object]:
    def edit(header: Any, manifest: Any) -> None:
        header["__metadata__"]["format"] = manifest["format"] = version
        manifest["colour"] = {"blue": [1, None, "é"]}
        manifest["tensors"]["norm.weight"]["colour"] = "blue"

    return edit


def test_a_newer_major_version_is_rejected(path: Path) -> None:
    path.write_bytes(rewritten(of_version("deltadock/2")))
    with pytest.raises(InvalidArtifact, match=r"'deltadock/2'.*reads 'deltadock/1'.*Upgrade"):
        Artifact(path)


def test_a_newer_minor_version_is_read_and_written_again(path: Path, tmp_path: Path) -> None:
    """Including keys that this version does not know."""
    path.write_bytes(rewritten(of_version("deltadock/1.2")))
    assert use(path) == []
    again = tmp_path / "again.delta"
    with Artifact(path) as artifact:
        assert artifact.manifest["colour"] == {"blue": [1, None, "é"]}
        tensors = {name: artifact.encoded(name) for name in artifact.records}
        write_artifact(again, tensors, artifact.manifest)
    with Artifact(path) as old, Artifact(again) as new:
        assert new.header.metadata["format"] == "deltadock/1.2"
        assert new.manifest == old.manifest
        assert new.records["norm.weight"]["colour"] == "blue"
    with pytest.raises(InvalidArtifact, match="format"):
        write_artifact(again, {}, {**MANIFEST, "format": "deltadock/2"})


def test_large_files_are_deflated_and_written_again(path: Path, tmp_path: Path) -> None:
    text, small = "".join(f'"täglich {n}",' for n in range(4000)), "{}"
    files = {"tokenizer.json": stored_file(text), "config.json": stored_file(small), "a.txt": None}
    write_artifact(path, {}, {**MANIFEST, "files": files, "format": WITH_DEFLATED_FILES})
    assert path.stat().st_size < 0.4 * len(text)
    with Artifact(path) as artifact:
        assert artifact.header.metadata["format"] == "deltadock/1.1"
        assert artifact.files == {"tokenizer.json": text, "config.json": small, "a.txt": None}
        assert artifact.manifest["files"]["config.json"] == small
        write_artifact(tmp_path / "again.delta", {}, artifact.manifest)
    assert (tmp_path / "again.delta").read_bytes() == path.read_bytes()
